"""Every argument of every op, broken in every way: one whole sentence, and nothing is written.

The cases and their messages are derived from the declarations; a new op is covered without a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from breaches import all_breaches
from calls import SCHEMA_ROLES, SPECS, Call, shape_of, valid_call
from compare import bits_of
from qbits import _core, errors, ops

BREACHES = list(all_breaches())
LARGE_M = {"M": 200}  # decoded first, then multiplied by torch, where the dispatch rule says so


def assert_refused(
    call: Call, argument: str, kind: type[Exception], sentence: str, run: Callable[[], Any]
) -> None:
    """The whole message, the class, and the outputs as they were before."""
    if not sentence.startswith("must"):  # the sentence names another argument than the one that was broken
        argument, sentence = sentence.split(": ", 1)
    tensors = [value for value in call.outputs.values() if isinstance(value, torch.Tensor)]
    before = [bits_of(tensor).copy() for tensor in tensors]
    with pytest.raises(errors.QbitsError) as refusal:
        run()
    assert str(refusal.value) == f"qbits::{call.name}: {argument} {sentence}"
    assert type(refusal.value) is kind
    for tensor, bits in zip(tensors, before, strict=True):
        assert (bits_of(tensor) == bits).all(), "an output was written"
    for guard in call.guards:
        guard.assert_intact()


@pytest.mark.parametrize("breach", BREACHES, ids=repr)
def test_a_broken_argument_is_refused_with_one_sentence(device, breach):
    call = valid_call(breach.op, device, with_optional=breach.with_optional, wanted=breach.wanted)
    sentence = breach.apply(call)
    assert_refused(call, breach.argument, breach.kind, sentence, call.run)


@pytest.mark.parametrize("breach", [b for b in BREACHES if b.op == "gemm_4bit"], ids=repr)
def test_a_product_that_is_decoded_first_refuses_in_its_own_name(device, breach):
    call = valid_call(breach.op, device, with_optional=breach.with_optional, **LARGE_M)
    sentence = breach.apply(call)
    assert_refused(call, breach.argument, breach.kind, sentence, call.run)


@pytest.mark.parametrize("op", sorted(SPECS))
def test_a_wrong_number_of_arguments_is_refused(op):
    call = valid_call(op)
    num = len(call.args) + len(call.outputs)
    function = getattr(_core, op)
    for count in (0, num - 1, num + 1):
        arguments = [*call.args.values(), *call.outputs.values(), None][:count]
        with pytest.raises(errors.ArgumentTypeError) as refusal:
            function(*arguments)
        assert (
            str(refusal.value) == f"qbits::{op}: the call must have {num} positional arguments, got {count}"
        )
    with pytest.raises(TypeError):
        getattr(ops, op)(*call.args.values(), None, None)


@pytest.mark.parametrize("op", sorted(SPECS))
def test_tensors_without_memory_are_refused_on_the_direct_path(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, tensor in valid_call(op).tensors().items():
        meta = valid_call(op)
        meta.args[name] = tensor.to("meta")
        with pytest.raises(
            errors.TracedTensorError, match=f"^qbits::{op}: {name} must be a dense tensor with memory, "
        ):
            meta.run_core()
        fake = valid_call(op)
        with FakeTensorMode() as mode:
            fake.args[name] = mode.from_tensor(tensor)
        with pytest.raises(errors.TracedTensorError) as refusal:
            fake.run_core()
        assert str(refusal.value) == f"qbits::{op}: {name} must be a plain tensor, got FakeTensor"


@pytest.mark.parametrize("op", sorted(SPECS))
def test_sparse_and_negated_tensors_are_refused(op):
    for name, tensor in valid_call(op).tensors().items():
        if not tensor.is_floating_point():
            continue
        sparse = valid_call(op)
        sparse.args[name] = tensor.to_sparse()
        with pytest.raises(
            errors.QbitsError, match=f"^qbits::{op}: {name} must be a dense tensor with memory, "
        ):
            sparse.run_core()
        negated = valid_call(op)
        negated.args[name] = torch.complex(tensor, tensor).conj().imag
        assert negated.args[name].is_neg()
        kind = errors.ArgumentValueError if tensor.numel() > 1 else errors.DtypeError
        with pytest.raises(kind, match=f"^qbits::{op}: {name} must .*, got "):
            negated.run_core()
        negated.args[name] = negated.args[name].reshape(-1)[:1]
        assert negated.args[name].is_neg()
        with pytest.raises(errors.DtypeError, match=f"^qbits::{op}: {name} must .*, got a negated view"):
            negated.run_core()


@pytest.mark.parametrize("op", sorted(SPECS))
def test_read_only_outputs_are_refused(op):
    for name in valid_call(op).outputs:
        call = valid_call(op)
        array = np.zeros(call.outputs[name].shape, str(call.outputs[name].dtype).removeprefix("torch."))
        array.flags.writeable = False
        call.outputs[name] = array
        assert_refused(
            call, name, errors.ArgumentValueError, "must be writable, got read-only memory", call.run_core
        )
        assert (array == 0).all()


def test_misaligned_memory_is_refused():
    memory = np.zeros(4 * 64 + 1, np.uint8)
    with pytest.raises(errors.ArgumentValueError) as refusal:
        ops.quantize_4bit(memory[1:].view(np.float32), "nf4", 64)
    message = "qbits::quantize_4bit: input must start on a multiple of 4 bytes, got an address 1 past one"
    assert str(refusal.value) == message


def test_sizes_beyond_63_bits_are_refused():
    codes, absmax = torch.zeros(8, dtype=torch.uint8), torch.ones(1)
    with pytest.raises(errors.ShapeError, match=r"^qbits::unpack_4bit: packed must "):
        ops.unpack_4bit(codes, 2**63 - 1)
    with pytest.raises(
        errors.ShapeError, match=r"^qbits::gemm_4bit: packed must have fewer than 2\^63 bytes, got "
    ):
        ops.gemm_4bit(torch.zeros(0, 2**40), codes, absmax, 2**40, 2**40, "nf4", 64)


@pytest.mark.gpu
@pytest.mark.parametrize("op", sorted(SPECS))
def test_tensors_on_another_device_are_refused(op):
    order = [arg["name"] for arg in SPECS[op]["args"] if arg["role"] in (*SCHEMA_ROLES, "output")]
    call = valid_call(op)
    movable = [name for name in order if name in call.tensors() or name in call.outputs]
    for name in movable[1:]:
        call = valid_call(op)
        place = call.args if name in call.args else call.outputs
        place[name] = place[name].cuda()
        sentence = f"must be on cpu like {movable[0]}, got cuda:0"
        assert_refused(call, name, errors.DeviceError, sentence, call.run_core)


@pytest.mark.parametrize("op", sorted(SPECS))
def test_a_call_after_a_refusal_works(device, op):
    """A refusal leaves nothing behind: the same arguments, repaired, give what a fresh call gives."""
    call = valid_call(op, device)
    name = next(iter(call.tensors()))
    good = call.args[name]
    call.args[name] = [1]
    with pytest.raises(errors.ArgumentTypeError):
        call.run()
    call.args[name] = good
    call.run()
    for given, fresh in zip(call.outputs.values(), call.run_allocating(), strict=True):
        assert torch.equal(given.reshape(-1), fresh.reshape(-1))


def test_the_shapes_of_this_file_are_those_of_the_ops(device):
    """Guards the cases above: what `calls.shape_of` expects is what ops allocate."""
    for op, spec in SPECS.items():
        call = valid_call(op, device)
        wanted = [shape_of(arg, call.sizes) for arg in spec["args"] if arg["role"] == "output"]
        assert [tuple(t.shape) for t in call.run_allocating()] == wanted, op
