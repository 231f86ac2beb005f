"""`qbits.dependent_launch`: the same bits, refused writes, and nothing where there is no GPU."""

from __future__ import annotations

import pytest
import qbits
import torch
from qbits import errors, functional, ops
from qbits.codebooks import create_dynamic_map
from torch import nn


def model_of(device: str, num_layers: int = 4, size: int = 512) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(size, size, bias=index % 2 == 0) for index in range(num_layers)]
    model = nn.Sequential(*layers).to(torch.bfloat16)
    return qbits.quantize_(model, "nf4" if num_layers % 2 else "nf4-dq").to(device)


def test_on_a_cpu_nothing_changes():
    model = model_of("cpu", 2)
    x = torch.randn(3, 512, dtype=torch.bfloat16)
    want = model(x)
    with qbits.dependent_launch(model) as context, qbits.dependent_launch(model):
        assert isinstance(context, qbits.dependent_launch)
        assert torch.equal(model(x), want)
        model[0].weight.zero_()  # no GPU, no overlap, no rule


def test_anything_but_a_module_is_refused():
    with pytest.raises(errors.ArgumentTypeError, match=r"^qbits::dependent_launch: model must be a torch.nn"):
        qbits.dependent_launch([nn.Linear(2, 2)])


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 40, 128, 300])
@pytest.mark.parametrize("num_layers", [4, 5])
def test_results_have_the_same_bits(M, num_layers):
    model = model_of("cuda", num_layers)
    x = torch.randn(M, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        want = model(x)
        with qbits.dependent_launch(model):
            for _ in range(20):
                assert torch.equal(model(x), want)
        assert torch.equal(model(x), want)


@pytest.mark.gpu
def test_a_graph_that_was_captured_inside_gives_the_same_bits():
    model = model_of("cuda", 5)
    x = torch.randn(2, 512, device="cuda", dtype=torch.bfloat16)
    graph, inner = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        want = model(x)
        with qbits.dependent_launch(model), torch.cuda.graph(graph):
            first = model(x)
        with torch.cuda.graph(inner), qbits.dependent_launch(model):
            second = model(x)
        for captured, result in ((graph, first), (inner, second)):
            for _ in range(20):
                result.zero_()
                captured.replay()
                assert torch.equal(result, want)


@pytest.mark.gpu
def test_writes_before_and_after_are_ordered():
    model, other = model_of("cuda", 5), model_of("cuda", 5)
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in other:
            layer.weight.random_(0, 256)
        wanted = [model_of("cuda", 5)(x), other(x)]
        sources = [[layer.weight.clone() for layer in source] for source in (model, other)]
        for turn in range(20):
            for layer, weight in zip(model, sources[turn % 2], strict=True):
                layer.weight.copy_(weight)
            with qbits.dependent_launch(model):
                result = model(x)
            for layer in model:
                layer.weight.zero_()
            assert torch.equal(result, wanted[turn % 2])


@pytest.mark.gpu
def test_a_write_inside_is_refused_at_the_next_use_and_at_the_exit():
    model = model_of("cuda", 5)
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        refused = pytest.raises(errors.ArgumentValueError, match="must stay as it is inside dependent_launch")
        with refused, qbits.dependent_launch(model):
            model[1].weight.zero_()
            model(x)
        with pytest.raises(errors.ArgumentValueError) as refusal, qbits.dependent_launch(model):
            model[2].weight_absmax.mul_(2)
        assert str(refusal.value) == (
            "qbits::dependent_launch: weights must stay as they are inside, got writes to 2"
        )
        model(x)  # outside it is a weight like any other
        with pytest.raises(KeyError), qbits.dependent_launch(model):
            model[0].weight.zero_()
            raise KeyError("its own error comes out")


@pytest.mark.gpu
def test_other_weights_are_not_concerned():
    model, other = model_of("cuda", 5), model_of("cuda", 5)
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), qbits.dependent_launch(model):
        before = other(x)
        other[0].weight.zero_()
        assert not torch.equal(other(x), before)
        q = functional.quantize_4bit(torch.randn(64, 512, device="cuda"))
        assert functional.linear_4bit(x, q).shape == (1, 64)


@pytest.mark.gpu
def test_compiled_models_run_inside():
    model = model_of("cuda", 3)
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), qbits.dependent_launch(model):
        assert torch.equal(compiled(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 40, 300])
def test_what_comes_behind_a_kernel_that_lets_it_start_waits_for_the_end(M):
    size = 4096
    weight = functional.quantize_4bit(torch.randn(size, size, device="cuda"))
    weight = (weight.packed, weight.absmax, size, size, "nf4", 64)
    x = torch.randn(M, size, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(x)
    data = product.view(-1).view(torch.uint8)
    n, ones, table = data.numel(), torch.ones(M * size, device="cuda"), create_dynamic_map().cuda()
    behind = {
        "quantize_4bit": lambda: ops.quantize_4bit(product, "nf4", 64),
        "dequantize_4bit": lambda: ops.dequantize_4bit(data, ones[: n // 32], 2 * n, "nf4", 64, x.dtype),
        "quantize_blockwise": lambda: ops.quantize_blockwise(product, table, 64),
        "dequantize_blockwise": lambda: ops.dequantize_blockwise(data, ones[: n // 64], table, 64, x.dtype),
        "dequantize": lambda: ops.dequantize(data, ones[0], table, x.dtype),
        "pack_4bit": lambda: ops.pack_4bit(data, "nf4"),
        "unpack_4bit": lambda: ops.unpack_4bit(data, 2 * n),
        "gemm_4bit": lambda: ops.gemm_4bit(product, *weight),
    }
    for name, op in behind.items():
        for _ in range(10):
            product.zero_()
            ops.gemm_4bit(x, *weight, out=product)
            early = op()
            torch.cuda.synchronize()
            late = op()
            for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (early, late)), strict=True):
                assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)), name
    want = product.clone()
    for _ in range(10):
        y = x.clone()
        ops.gemm_4bit(y, *weight, out=product)
        over = y.view(-1).view(torch.uint8)[: n // 4], ones[: n // 128]
        ops.quantize_4bit(want, "nf4", 64, out=over)
        assert torch.equal(product, want)
