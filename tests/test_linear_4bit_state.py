"""State_dicts of `nn.Linear4bit`: its own layout, bitsandbytes' keys and float weights, whole and broken."""

from __future__ import annotations

import pytest
import torch
from layers import SHAPES, bytes_of_state, quantized
from qbits import errors, quant_state
from qbits.nn import Linear4bit
from torch import nn

SCHEMES = ["nf4", "nf4-dq", "fp4", "af4"]


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_meta_layer_takes_a_checkpoint(scheme, shape):
    """Assigned, or after to_empty; construction on meta allocates nothing."""
    want = quantized(scheme, shape)
    x = torch.randn(2, shape[1])
    for route in ("assign", "to_empty", "from_linear"):
        if route == "from_linear":
            layer = Linear4bit.from_linear(nn.Linear(shape[1], shape[0], device="meta"), scheme)
        else:
            chosen = {"double_quant": scheme.endswith("dq")}
            layer = Linear4bit(shape[1], shape[0], device="meta", **chosen).quantize_()
        assert all(p.is_meta for p in layer.parameters())
        if route == "to_empty":
            layer.to_empty(device="cpu")
        layer.load_state_dict(want.state_dict(), assign=route != "to_empty")
        assert torch.equal(layer(x), want(x)), route
        assert not layer.weight.requires_grad


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_state_dict_round_trip_is_exact(scheme, shape):
    layer = quantized(scheme, shape, dtype=torch.bfloat16)
    state = layer.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    codebook = scheme[:3]
    for target in (
        Linear4bit(shape[1], shape[0], codebook=codebook),  # float until now
        Linear4bit(shape[1], shape[0], codebook=codebook, block_size=128).quantize_(),
    ):
        assert not target.load_state_dict(state).missing_keys
        target.bias.data = target.bias.data.bfloat16()  # torch keeps the dtype of the bias that is there
        assert bytes_of_state(target) == bytes_of_state(layer)
        assert target.scheme == layer.scheme and target.weight_dtype == torch.bfloat16


def test_loading_in_place_keeps_parameters_and_versions_advance():
    layer, other = quantized(), quantized()
    ids, version = [id(p) for p in layer.parameters()], layer.weight._version
    layer.load_state_dict(other.state_dict())
    assert [id(p) for p in layer.parameters()] == ids and layer.weight._version > version
    assert bytes_of_state(layer) == bytes_of_state(other)


@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq", "fp4"])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_bitsandbytes_keys_load(scheme, is_quantized):
    source = quantized(scheme, (8, 128))
    state = quant_state.pack_quant_state(source.record(), "inner.weight")
    state["inner.bias"] = source.bias.detach()
    target = nn.ModuleDict({"inner": Linear4bit(128, 8, codebook=scheme[:3])})
    if is_quantized:
        target["inner"].quantize_()
    target.load_state_dict(state)
    assert bytes_of_state(target["inner"]) == bytes_of_state(source)


@pytest.mark.parametrize("assign", [False, True])
def test_float_checkpoint_quantizes_a_quantized_layer(assign):
    linear = nn.Linear(64, 8, dtype=torch.bfloat16)
    layer = Linear4bit(64, 8, device="meta" if assign else None).quantize_()
    layer.load_state_dict(linear.state_dict(), assign=assign)
    want = Linear4bit.from_linear(linear)
    assert torch.equal(layer.weight, want.weight) and torch.equal(layer.weight_absmax, want.weight_absmax)
    assert layer.weight_dtype == (torch.bfloat16 if assign else torch.float32)
    plain = Linear4bit(64, 8)
    plain.load_state_dict(linear.state_dict())
    assert not plain.is_quantized and torch.equal(plain.weight, linear.weight.float())


def test_missing_unexpected_and_misshapen_keys_are_torch_s_own_errors():
    layer = quantized()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
        layer.load_state_dict({k: v for k, v in state.items() if k != "bias"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "scb"'):
        layer.load_state_dict({**state, "scb": torch.zeros(1)})
    assert layer.load_state_dict({**state, "scb": torch.zeros(1)}, strict=False).unexpected_keys == ["scb"]
    before = bytes_of_state(layer)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for weight: copying a param with shape \(16, 64\)"
    ):
        layer.load_state_dict({**quantized(shape=(16, 64)).state_dict(), "bias": state["bias"]})
    assert bytes_of_state(layer) == before
    assert layer.load_state_dict({"bias": state["bias"]}, strict=False).missing_keys == [
        "weight",
        "weight_absmax",
    ]


def broken(state: dict[str, torch.Tensor], **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    merged = {**state, **changes}
    return {key: value for key, value in merged.items() if value is not None}


BROKEN_STATES = {
    "another codebook": (
        lambda: quantized("fp4").state_dict(),
        "weight must be nf4 as the layer is, got fp4",
    ),
    "short absmax": (
        lambda: broken(quantized().state_dict(), weight_absmax=torch.ones(7)),
        "weight_absmax must be contiguous float32 with 8 elements, got float32 [7]",
    ),
    "no absmax": (
        lambda: broken(quantized().state_dict(), weight_absmax=None),
        "weight_absmax must be contiguous float32 with 8 elements, got NoneType",
    ),
    "short weight": (
        lambda: broken(quantized().state_dict(), weight=torch.zeros(8, 31, dtype=torch.uint8)),
        "weight must be contiguous uint8 with 256 elements, got uint8 [8, 31]",
    ),
    "nan scale": (
        lambda: broken(quantized().state_dict(), weight_absmax=torch.full((8, 1), torch.nan)),
        "weight_absmax must be finite and >= 0, got nan at 0",
    ),
    "nested without offset": (
        lambda: broken(quantized("nf4-dq").state_dict(), weight_absmax_offset=None),
        "weight_absmax_offset must be contiguous float32 with 1 elements, got NoneType",
    ),
    "offset alone": (
        lambda: broken(quantized().state_dict(), weight_absmax_offset=torch.zeros(1)),
        "weight_absmax_offset must stand beside weight_absmax_scale, got it alone",
    ),
    "nested nan": (
        lambda: broken(quantized("nf4-dq").state_dict(), weight_absmax_offset=torch.full((1,), torch.nan)),
        "weight_absmax_scale must be finite and >= 0, got nan at 0",
    ),
    "bytes without a header": (
        lambda: broken(quantized().state_dict(), weight_quant_state=None, weight_absmax=None),
        "weight must stand beside weight_quant_state or weight.quant_state.*, got torch.uint8 alone",
    ),
    "no json": (
        lambda: broken(quantized().state_dict(), weight_quant_state=torch.zeros(9)),
        "weight_quant_state must be a 1-D uint8 tensor holding JSON, got float32 [9]",
    ),
}


@pytest.mark.parametrize("case", BROKEN_STATES)
def test_a_broken_native_checkpoint_is_refused_and_changes_nothing(case):
    make, words = BROKEN_STATES[case]
    layer = Linear4bit(64, 8)
    before = bytes_of_state(layer)
    with pytest.raises(errors.CheckpointFormatError) as caught:
        layer.load_state_dict(make())
    assert str(caught.value) == f"qbits::load: {words}"
    assert bytes_of_state(layer) == before and not layer.is_quantized
