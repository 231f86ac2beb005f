"""Weights exchanged with bitsandbytes 0.50 itself: the same codes, values and state_dicts, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import native_of
from qbits import quant_state
from qbits.compat.bitsandbytes import functional as F
from qbits.compat.bitsandbytes.nn import Linear4bit


@pytest.fixture(scope="module")
def original() -> Any:
    """bitsandbytes 0.50; its CPU backend is the oracle."""
    return pytest.importorskip("bitsandbytes", "0.50")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compress", [False, True])
def test_nf4_codes_and_values_equal_bitsandbytes(original, dtype, compress):
    x = torch.randn(40, 128, dtype=dtype)
    packed, state = original.functional.quantize_nf4(x, compress_statistics=compress)
    ours, our_state = F.quantize_nf4(x, compress_statistics=compress)
    assert torch.equal(ours, packed)
    if not compress:  # nested codes come from its 65,536-bin lookup, and its mean is the device's
        assert torch.equal(our_state.absmax, state.absmax)
    theirs = original.functional.dequantize_4bit(packed, state)
    read = F.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    assert torch.equal(F.dequantize_4bit(packed, read), theirs)
    back = original.functional.QuantState.from_dict(our_state.as_dict(packed=True), torch.device("cpu"))
    assert torch.equal(original.functional.dequantize_4bit(ours, back), F.dequantize_4bit(ours, our_state))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress", [False, True])
def test_layers_exchange_state_dicts_with_bitsandbytes(original, quant_type, compress):
    options = {"quant_type": quant_type, "compress_statistics": compress}
    theirs = original.nn.Linear4bit(128, 24, **options).to("cpu").train()  # eval mode would repack in place
    state = theirs.state_dict()
    ours = Linear4bit(128, 24, **options)
    ours.load_state_dict(state)
    again = ours.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())
    want = original.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(ours.dequantize(), want)
    returned = original.nn.Linear4bit(128, 24, **options).to("cpu").train()
    statistics = {k.removeprefix("weight."): v for k, v in again.items() if k.startswith("weight.")}
    returned.weight = original.nn.Params4bit.from_prequantized(
        data=again["weight"], quantized_stats=statistics, device="cpu"
    )
    got = original.functional.dequantize_4bit(returned.weight.data, returned.weight.quant_state)
    assert torch.equal(got, want)
    x = torch.randn(3, 128, requires_grad=True)
    reference = theirs(x)
    torch.testing.assert_close(ours(x), reference, rtol=1e-4, atol=1e-4)


def test_native_layer_reads_what_bitsandbytes_wrote(original):
    theirs = original.nn.LinearNF4(128, 24).to("cpu")
    native = native_of(Linear4bit(128, 24, quant_type="nf4").to("cpu"))
    native.load_state_dict(theirs.state_dict())
    want = original.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(native.dequantize(), want)
    written = quant_state.pack_quant_state(native.record(), "weight")
    assert all(
        torch.equal(written[key], value) for key, value in theirs.state_dict().items() if key != "bias"
    )
