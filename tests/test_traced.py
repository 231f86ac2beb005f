"""The traced path of every op: schema, fake kernel, compile, export, meta tensors; from the declarations."""

from __future__ import annotations

import itertools

import pytest
import torch
from calls import SPECS, Call, valid_call, valid_calls
from compare import assert_same_bits
from qbits import ops

OPS = sorted(SPECS)


def flat(result: object) -> tuple[torch.Tensor, ...]:
    """One output or several, as a tuple."""
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]


def function_of_tensors(call: Call) -> tuple[object, list[torch.Tensor]]:
    """The op as a function of its tensors alone, and those tensors."""
    tensors = call.tensors()

    def function(*values: torch.Tensor) -> object:
        return getattr(ops, call.name)(**{**call.args, **dict(zip(tensors, values, strict=True))})

    return function, list(tensors.values())


@pytest.mark.parametrize("op", OPS)
def test_opcheck_accepts_the_registration(device, op):
    for call in valid_calls(op, device):
        torch.library.opcheck(getattr(torch.ops.qbits, op).default, tuple(call.args.values()))


@pytest.mark.parametrize("op", OPS)
def test_the_dispatcher_gives_the_same_bits_as_the_direct_path(device, op):
    for call in valid_calls(op, device):
        for direct, traced in zip(call.run_allocating(), flat(call.run_traced()), strict=True):
            assert (direct.shape, direct.dtype) == (traced.shape, traced.dtype)
            assert_same_bits(traced, direct)


@pytest.mark.parametrize("op", OPS)
def test_compile_makes_one_graph_for_every_size(device, op):
    torch._dynamo.reset()
    num_graphs = itertools.count()
    seen = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        seen.append(next(num_graphs))
        return graph.forward

    def run(call: Call) -> None:
        function, tensors = function_of_tensors(call)
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
        for got, want in zip(flat(compiled(*tensors)), call.run_allocating(), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert_same_bits(got, want)

    run(valid_call(op, device))
    assert seen == [0]


@pytest.mark.parametrize("op", OPS)
def test_a_compiled_function_serves_other_sizes_without_recompiling(device, op):
    torch._dynamo.reset()
    num_graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        num_graphs.append(1)
        return graph.forward

    tensors_only = getattr(ops, op)

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def compiled(arguments: list[object]) -> object:
        return tensors_only(*arguments)

    for sizes in (
        {"n": 1000, "M": 3},
        {"n": 1500, "M": 5, "N": 14, "K": 96},
        {"n": 777, "M": 12, "N": 33, "K": 31},
    ):
        call = valid_call(op, device, **sizes)
        for got, want in zip(flat(compiled([*call.args.values()])), call.run_allocating(), strict=True):
            assert_same_bits(got, want)
    assert len(num_graphs) <= 2, "sizes must be symbols, not constants"


@pytest.mark.parametrize("op", OPS)
def test_fake_kernels_give_shapes_and_dtypes_on_meta(op):
    for float_dtype in ("float32", "float16", "bfloat16"):
        for with_optional in (False, True):
            call = valid_call(op, float_dtype=float_dtype, with_optional=with_optional)
            wanted = [(t.shape, t.dtype, t.stride()) for t in call.run_allocating()]
            for name, tensor in call.tensors().items():
                call.args[name] = tensor.to("meta")
            for result, want in zip(flat(getattr(ops, op)(*call.args.values())), wanted, strict=True):
                assert result.device.type == "meta"
                assert (result.shape, result.dtype, result.stride()) == want


@pytest.mark.parametrize("op", OPS)
def test_export_keeps_the_op(device, op):
    call = valid_call(op, device)
    function, tensors = function_of_tensors(call)

    class Module(torch.nn.Module):
        def forward(self, *values: torch.Tensor) -> object:
            return function(*values)  # type: ignore[operator]

    program = torch.export.export(Module(), tuple(tensors), strict=False)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert f"qbits.{op}.default" in targets
    for got, want in zip(flat(program.module()(*tensors)), call.run_allocating(), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("op", OPS)
def test_given_outputs_are_written_under_compile(device, op):
    torch._dynamo.reset()
    call = valid_call(op, device)
    names, tensors = list(call.outputs), list(call.outputs.values())

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(*outputs: torch.Tensor) -> None:
        getattr(ops, op)(*call.args.values(), out=outputs if len(outputs) > 1 else outputs[0])

    compiled(*tensors)
    for name, tensor, want in zip(names, tensors, call.run_allocating(), strict=True):
        assert_same_bits(tensor, want.reshape(-1), name)


@pytest.mark.parametrize("op", OPS)
def test_given_outputs_advance_their_version(device, op):
    call = valid_call(op, device)
    before = {name: tensor._version for name, tensor in call.outputs.items()}
    call.run()
    for name, tensor in call.outputs.items():
        assert tensor._version > before[name], name


@pytest.mark.parametrize("op", OPS)
def test_inference_tensors_and_parameters_are_taken(device, op):
    call = valid_call(op, device)
    want = call.run_allocating()
    with torch.inference_mode():
        inference = valid_call(op, device)
        inference.args = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.args.items()}
        inference.run()
        for got, expected in zip(inference.outputs.values(), want, strict=True):
            assert_same_bits(got, expected)
    for name, tensor in call.tensors().items():
        if tensor.is_floating_point():
            call.args[name] = torch.nn.Parameter(tensor)
    for got, expected in zip(call.run_allocating(), want, strict=True):
        assert_same_bits(got, expected)
        assert not got.requires_grad
