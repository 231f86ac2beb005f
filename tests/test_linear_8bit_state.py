"""State_dicts of `nn.Linear8bit`: its own layout, bitsandbytes', tiled ones, floats; whole and broken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import SHAPES, bytes_of_state, quantized
from qbits import errors
from qbits.compat.bitsandbytes.autograd._functions import get_tile_inds, undo_layout
from qbits.nn import Linear8bit, state_8bit
from torch import nn

# Where element (r, c) of a matrix stands, with R rows when padded: the closed formulas of the three layouts.
PLACES: dict[str, Callable[[int, int, int], int]] = {
    "col32": lambda r, c, R: (c // 32) * 32 * R + r * 32 + c % 32,
    "col_turing": lambda r, c, R: (
        (c // 32) * 32 * R + (r // 8) * 256 + (r % 2) * 128 + (c % 32 // 4) * 16 + (r % 8 // 2) * 4 + c % 4
    ),
    "col_ampere": lambda r, c, R: (
        (c // 32) * 32 * R + (r // 32) * 1024 + ((r % 8 // 2) * 8 + (r % 32 // 8) * 2 + r % 2) * 32 + c % 32
    ),
}
NUMBERS = {"col32": 1, "col_turing": 2, "col_ampere": 3}
ROWS = {"col32": 1, "col_turing": 8, "col_ampere": 32}


def tiled(matrix: torch.Tensor, format: str) -> torch.Tensor:
    """The matrix in a tiled layout, element by element, padding -1."""
    N, K = matrix.shape
    R, C = -(-N // ROWS[format]) * ROWS[format], -(-K // 32) * 32
    flat = torch.full((R * C,), -1, dtype=torch.int8)
    for r in range(N):
        for c in range(K):
            flat[PLACES[format](r, c, R)] = matrix[r, c]
    return flat.view(R, C)


def bnb_state(layer: Linear8bit) -> dict[str, torch.Tensor]:
    """The layer's state under bitsandbytes' keys."""
    return {"bias": layer.bias.detach(), **state_8bit.to_bnb(layer.record())}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["native", "bnb", "bnb without a format"])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_both_layouts_load_exactly(shape, layout, is_quantized):
    source = quantized("int8", shape)
    state = source.state_dict() if layout == "native" else bnb_state(source)
    if layout == "bnb without a format":
        del state["weight_format"]
    target = Linear8bit(shape[1], shape[0], threshold=6.0)
    target = target.quantize_() if is_quantized else target
    assert not target.load_state_dict(state).missing_keys
    assert bytes_of_state(target) == bytes_of_state(source)
    assert target.threshold == 6.0 and list(source.state_dict()) == ["weight", "bias", "weight_scale"]


@pytest.mark.parametrize("format", PLACES)
def test_tile_maps_are_the_closed_formulas(format):
    """[D34]"""
    rows, columns = get_tile_inds(format, "cpu").shape
    assert (rows, columns) == (ROWS[format], 32)
    matrix = torch.randint(-127, 128, (3 * rows, 64), dtype=torch.int8)
    assert torch.equal(undo_layout(tiled(matrix, format), get_tile_inds(format, "cpu")), matrix)
    flat = get_tile_inds(format, "cpu").reshape(-1)
    assert all(
        int(flat[PLACES[format](r, c, rows)]) == r * 32 + c for r in range(rows) for c in range(columns)
    )


@pytest.mark.parametrize("format", PLACES)
@pytest.mark.parametrize("shape", [(1, 1), (8, 64), (33, 70), (40, 32)])
@pytest.mark.parametrize("spelling", ["number", "text", "tensor"])
def test_old_tiled_layouts_become_rows(format, shape, spelling, device):
    """[D34] On any device, padding left out."""
    source = Linear8bit.from_linear(nn.Linear(shape[1], shape[0], device=device))
    number = NUMBERS[format]
    forms = {"number": number, "text": format, "tensor": torch.tensor(number, dtype=torch.uint8)}
    state = bnb_state(source)
    state["weight"] = tiled(state["weight"].cpu(), format).to(device)
    state["weight_format"] = forms[spelling]
    target = Linear8bit(shape[1], shape[0], device=device)
    target.load_state_dict(state)
    assert bytes_of_state(target) == bytes_of_state(source)


@pytest.mark.parametrize("assign", [False, True])
def test_meta_layer_takes_a_checkpoint(assign):
    want = quantized("int8")
    layer = Linear8bit(64, 8, device="meta").quantize_()
    assert all(p.is_meta for p in layer.parameters())
    if not assign:
        layer.to_empty(device="cpu")
    layer.load_state_dict(want.state_dict(), assign=assign)
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), want(x)) and not layer.weight.requires_grad


@pytest.mark.parametrize("assign", [False, True])
def test_float_checkpoint_quantizes_a_quantized_layer(assign):
    linear = nn.Linear(64, 8, dtype=torch.bfloat16)
    layer = Linear8bit(64, 8, device="meta" if assign else None).quantize_()
    layer.load_state_dict(linear.state_dict(), assign=assign)
    want = Linear8bit.from_linear(linear)
    assert torch.equal(layer.weight, want.weight) and torch.equal(layer.weight_scale, want.weight_scale)
    for plain in (Linear8bit(64, 8), Linear8bit(64, 8, trainable=True)):
        plain.load_state_dict(linear.state_dict())
        assert not plain.is_quantized and torch.equal(plain.weight, linear.weight.float())


def test_loading_in_place_keeps_parameters_and_versions_advance():
    layer, other = quantized("int8"), quantized("int8")
    ids, version = [id(p) for p in layer.parameters()], layer.weight._version
    layer.load_state_dict(other.state_dict())
    assert [id(p) for p in layer.parameters()] == ids and layer.weight._version > version
    assert bytes_of_state(layer) == bytes_of_state(other)


def test_missing_unexpected_and_misshapen_keys_are_torch_s_own_errors():
    layer = quantized("int8")
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
        layer.load_state_dict({k: v for k, v in state.items() if k != "bias"})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "other"'):
        layer.load_state_dict({**state, "other": torch.zeros(1)})
    before = bytes_of_state(layer)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for weight: copying a param with shape \(16, 64\)"
    ):
        layer.load_state_dict({**quantized("int8", (16, 64)).state_dict(), "bias": state["bias"]})
    assert bytes_of_state(layer) == before
    missing = layer.load_state_dict({"bias": state["bias"]}, strict=False).missing_keys
    assert missing == ["weight", "weight_scale"]


def changed(**changes: object) -> dict[str, torch.Tensor]:
    """bitsandbytes' keys of a layer with some replaced, or taken out by None."""
    merged = {**bnb_state(quantized("int8")), **changes}
    return {key: value for key, value in merged.items() if value is not None}


FORMATS = "['row', 'col32', 'col_turing', 'col_ampere']"
CODES = torch.zeros(8, 64, dtype=torch.int8)
BROKEN_STATES = {
    "codes alone": (
        {"SCB": None, "weight_format": None},
        "weight must stand beside weight_scale or SCB, got torch.int8 alone",
    ),
    "short scales": (
        {"SCB": torch.ones(7)},
        "SCB must be contiguous float32 with 8 elements, got float32 [7]",
    ),
    "float16 scales": (
        {"SCB": torch.ones(8, dtype=torch.float16)},
        "SCB must be contiguous float32 with 8 elements, got float16 [8]",
    ),
    "nan scale": ({"SCB": torch.full((8,), torch.nan)}, "SCB must be finite and >= 0, got nan at 0"),
    "negative scale": ({"SCB": -torch.ones(8)}, "SCB must be finite and >= 0, got -1.0 at 0"),
    "float weight": (
        {"weight": CODES.float()},
        "weight must be a contiguous int8 matrix beside SCB, got float32 [8, 64]",
    ),
    "flat weight": (
        {"weight": CODES.view(-1)},
        "weight must be a contiguous int8 matrix beside SCB, got int8 [512]",
    ),
    "no weight": ({"weight": None}, "weight must be a contiguous int8 matrix beside SCB, got none"),
    "unknown format": (
        {"weight_format": torch.tensor(4, dtype=torch.uint8)},
        f"weight_format must be one of {FORMATS} or its number, got 4",
    ),
    "unknown name": (
        {"weight_format": "col_hopper"},
        f"weight_format must be one of {FORMATS} or its number, got 'col_hopper'",
    ),
    "not tiled": (
        {"weight_format": 3},
        "weight must have shape [32, 64] in the layout col_ampere, got [8, 64]",
    ),
}


@pytest.mark.parametrize("case", BROKEN_STATES)
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_broken_checkpoint_is_refused_and_changes_nothing(case, is_quantized):
    """[D34, D35] Tiled bytes are never read as rows."""
    changes, words = BROKEN_STATES[case]
    layer = Linear8bit(64, 8)
    layer = layer.quantize_() if is_quantized else layer
    before = bytes_of_state(layer)
    with pytest.raises(errors.CheckpointFormatError) as caught:
        layer.load_state_dict(changed(**changes))
    assert str(caught.value) == f"qbits::load: {words}"
    assert bytes_of_state(layer) == before and layer.is_quantized == is_quantized
