"""bitsandbytes' int8 quantizers under their own names: tuples, columns, and the same bits as bitsandbytes."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import reference
import torch
from compare import assert_same_bits
from matrices import with_outliers
from qbits import errors
from qbits.compat import bitsandbytes as bnb

F = bnb.functional
SIGNATURES = {
    F.int8_vectorwise_quant: "A threshold=0.0",
    F.int8_vectorwise_dequant: "A stats",
    F.int8_double_quant: "A col_stats=None row_stats=None out_col=None out_row=None threshold=0.0",
}


def half(rows: int, columns: int, num_outliers: int = 0, seed: int = 4) -> torch.Tensor:
    """A float16 matrix with columns of outliers, and a row of zeros."""
    x = with_outliers(np.random.default_rng(seed), rows, columns, num_outliers)
    x[rows // 2] = 0
    return torch.from_numpy(x.astype(np.float16))


@pytest.mark.parametrize("call", SIGNATURES, ids=lambda call: call.__name__)
def test_signature_is_the_reference_s(call):
    text = " ".join(
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(call).parameters.values()
    )
    assert text == SIGNATURES[call]
    assert F.double_quant is F.int8_double_quant


@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0, 1000.0])
@pytest.mark.parametrize("shape", [(40, 130), (1, 64), (3, 1)])
def test_rows_equal_bitsandbytes_to_the_bit(shape, threshold):
    """Codes, scales and columns of float16 input (NUMERICS 4.1 names differences for other dtypes only)."""
    theirs = pytest.importorskip("bitsandbytes").functional
    x = half(*shape, num_outliers=min(5, shape[1]))
    codes, scales, columns = F.int8_vectorwise_quant(x, threshold)
    want_codes, want_scales, want_columns = theirs.int8_vectorwise_quant(x.clone(), threshold)
    assert torch.equal(codes, want_codes)
    assert_same_bits(scales, want_scales)
    if threshold == 0:
        assert columns is None and want_columns is None
    else:
        assert columns.dtype == torch.int64 and torch.equal(columns, want_columns)
    decoded = F.int8_vectorwise_dequant(codes, scales)
    assert decoded.dtype == torch.float32
    assert_same_bits(decoded, theirs.int8_vectorwise_dequant(want_codes, want_scales))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_double_quant_equals_the_reference(device, dtype, threshold):
    x = half(33, 70, num_outliers=6).to(device=device, dtype=dtype)
    values = x.float().cpu().numpy()
    limit = threshold or None
    by_row, by_column, row_scales, column_scales, columns = F.double_quant(x, threshold=threshold)
    want_row, want_row_scales, mask = reference.quantize_rowwise(values, limit)
    kept = values if limit is None else np.where(np.abs(values) >= limit, np.float32(0), values)
    want_column, want_column_scales = reference.quantize_columnwise(kept)
    assert_same_bits(by_row, want_row)
    assert_same_bits(by_column, want_column)
    assert_same_bits(row_scales, want_row_scales)
    assert_same_bits(column_scales, want_column_scales)
    assert (columns is None) if limit is None else (columns.tolist() == np.flatnonzero(mask).tolist())
    assert by_column.is_contiguous()


def test_leading_dimensions_count_as_rows(device):
    x = half(12, 20, num_outliers=2).to(device)
    flat, cube = F.int8_vectorwise_quant(x, 6.0), F.int8_vectorwise_quant(x.view(3, 4, 20), 6.0)
    assert cube[0].shape == (3, 4, 20) and torch.equal(cube[0].view(12, 20), flat[0])
    assert all(torch.equal(a, b) for a, b in zip(cube[1:], flat[1:], strict=True))
    assert F.int8_vectorwise_dequant(cube[0], cube[1]).shape == (3, 4, 20)
    assert F.int8_double_quant(x.view(3, 4, 20))[1].shape == (3, 4, 20)
    line = F.int8_vectorwise_quant(x[0])
    assert line[0].shape == (20,) and line[1].shape == (1,)
    empty = F.int8_vectorwise_quant(torch.zeros(0, 20, device=device), 6.0)
    assert [tuple(t.shape) for t in empty] == [(0, 20), (0,), (0,)]


def test_an_input_with_outliers_is_not_changed_meanwhile(device):
    """bitsandbytes zeroes the outliers and puts them back, which another stream or thread could see."""
    x = half(12, 20, num_outliers=3).to(device)
    version, before = x._version, x.clone()
    F.int8_vectorwise_quant(x, 6.0)
    F.int8_double_quant(x, threshold=6.0)
    assert x._version == version and torch.equal(x, before)


def test_buffers_and_wrong_arguments_are_refused(device):
    x = torch.zeros(2, 2, device=device)
    for name in ("col_stats", "row_stats", "out_col", "out_row"):
        with pytest.raises(errors.ArgumentValueError) as refusal:
            F.int8_double_quant(x, **{name: x})
        assert str(refusal.value) == f"qbits::int8_double_quant: {name} must be None, got a buffer"
    with pytest.raises(errors.ArgumentValueError) as refusal:
        F.int8_vectorwise_quant(x, -1.0)
    assert str(refusal.value) == "qbits::quantize_rowwise: threshold must be at least 0, got -1.0"
    with pytest.raises(errors.ShapeError) as refusal:
        F.int8_vectorwise_quant(x[0, 0])
    message = "qbits::int8_vectorwise_quant: A must have at least 1 dimension [*, K], got shape []"
    assert str(refusal.value) == message
