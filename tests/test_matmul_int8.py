"""`functional.matmul_int8`: values and gradients against their formulas in float64 on the same codes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from qbits import functional, ops
from qbits.functional import matmul_int8

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1), (7, 5, 30), (3, 33, 64), (17, 40, 83), (64, 24, 129)]  # M, N, K
THRESHOLDS = [0.0, 6.0]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """The values in float64 that the row codes of a matrix stand for."""
    codes, scales = ops.quantize_rowwise(x.contiguous())
    return codes.double() * scales.double()[:, None] / 127


def columns_of(x: torch.Tensor) -> torch.Tensor:
    """The values in float64 that the column codes of a matrix stand for."""
    codes, scales = ops.quantize_columnwise_and_transpose(x.contiguous())
    return (codes.double() * scales.double()[:, None] / 127).t()


def split(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantized part of an input in float64, outlier columns at zero, and the mask of these columns."""
    if threshold == 0:
        return rows_of(x), torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    is_outlier = x.float().abs() >= threshold
    kept = rows_of(torch.where(is_outlier, torch.zeros((), dtype=x.dtype, device=x.device), x))
    mask = is_outlier.any(0)
    return torch.where(mask, 0.0, kept), mask


def with_outliers(M: int, K: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal values, with some of 20 to 60 in up to three columns, and some columns just below and at 6."""
    x = torch.randn(M, K, device=device).clamp(-5, 5)
    for column in range(0, K, max(K // 3, 1)):
        x[:: max(M // 3, 1), column] = 20 + 40 * torch.rand(1, device=device)
    x[0, K // 2] = -6.0  # the threshold itself is an outlier
    x[-1, K // 3] = 5.96875  # below it, in every dtype
    return x.to(dtype)


def assert_close(got: torch.Tensor, parts: list[torch.Tensor], magnitude: torch.Tensor, terms: int) -> None:
    """Within float32 sums of ``terms`` terms of ``magnitude`` in all, and one rounding, of the parts' sum."""
    want = sum(parts)
    # each of the terms, and about eight factors and conversions, rounds once in float32
    bound = (terms + 8) * 2.0**-24 * magnitude + torch.finfo(got.dtype).eps * want.abs()
    excess = (got.double() - want).abs() - bound
    assert not bool((excess > torch.finfo(got.dtype).smallest_normal).any()), float(excess.max())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("M, N, K", SHAPES)
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_frozen_product_is_that_of_the_codes(dtype, M, N, K, threshold, has_bias, device):
    x, weight = with_outliers(M, K, dtype, device), torch.randn(N, K, device=device)
    bias = torch.randn(N, device=device, dtype=torch.bfloat16) if has_bias else None
    codes, scales = ops.quantize_rowwise(weight)
    got = matmul_int8(x, codes, scales, bias, threshold=threshold)
    assert got.dtype == dtype
    kept, mask = split(x, threshold)
    decoded = ops.dequantize_rowwise(codes, scales, dtype).double()
    outliers = torch.where(mask, x.double(), 0.0)
    addend = torch.zeros(N, device=device).double() if bias is None else bias.double()
    magnitude = kept.abs() @ rows_of(weight).abs().t() + outliers.abs() @ decoded.abs().t() + addend.abs()
    parts = [kept @ rows_of(weight).t(), outliers @ decoded.t(), addend]
    assert_close(got, parts, magnitude, int(mask.sum()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_training_product_takes_outlier_columns_of_the_float_weight(dtype, weight_dtype, threshold, device):
    M, N, K = 17, 40, 83
    x = with_outliers(M, K, dtype, device)
    weight = torch.randn(N, K, device=device).to(weight_dtype)
    bias = torch.randn(N, device=device)
    kept, mask = split(x, threshold)
    outliers, dense = torch.where(mask, x.double(), 0.0), weight.to(dtype).double()
    magnitude = kept.abs() @ rows_of(weight).abs().t() + outliers.abs() @ dense.abs().t() + bias.abs()
    parts = [kept @ rows_of(weight).t(), outliers @ dense.t(), bias.double()]
    for recorded in (False, True):
        got = matmul_int8(x, weight.requires_grad_(recorded), None, bias, threshold=threshold)
        assert got.requires_grad == recorded
        # a product of K terms, of which those outside of the mask are zero
        assert_close(got.detach(), parts, magnitude.double(), K)


@pytest.mark.parametrize("count", [0, 1, 16, 40, 64])
def test_any_number_of_outlier_columns_is_right(count, device):
    x, weight = torch.randn(5, 64, device=device).clamp(-5, 5), torch.randn(8, 64, device=device)
    x[2, torch.randperm(64, device=device)[:count]] = 30.0
    codes, scales = ops.quantize_rowwise(weight)
    kept, mask = split(x, 6.0)
    assert int(mask.sum()) == count
    decoded = ops.dequantize_rowwise(codes, scales, torch.float32).double()
    outliers = torch.where(mask, x.double(), 0.0)
    magnitude = kept.abs() @ rows_of(weight).abs().t() + outliers.abs() @ decoded.abs().t()
    got = matmul_int8(x, codes, scales, threshold=6.0)
    assert_close(got, [kept @ rows_of(weight).t(), outliers @ decoded.t()], magnitude, count)


def test_outlier_columns_make_the_product_better_where_there_are_some(device):
    """The reason for them: two columns of 60 leave rows of +-1 with a step of about a half."""
    x, weight = torch.randn(64, 256, device=device), torch.randn(32, 256, device=device)
    x[:, [3, 70]] *= 60
    exact = x.double() @ weight.double().t()
    codes, scales = ops.quantize_rowwise(weight)
    error = {
        t: (matmul_int8(x, codes, scales, threshold=t) - exact).square().mean().sqrt() for t in THRESHOLDS
    }
    # what is left is the weight's own rounding, times 60
    assert error[6.0] < 0.3 * error[0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_stay_visible(value, device):
    """[D8] A row with NaN becomes NaN; Inf is an outlier, and makes its row Inf or NaN, never a number."""
    x, weight = torch.randn(3, 64, device=device), torch.randn(8, 64, device=device)
    x[1, 5] = value
    codes, scales = ops.quantize_rowwise(weight)
    for threshold in THRESHOLDS:
        for got in (
            matmul_int8(x, codes, scales, threshold=threshold),
            matmul_int8(x, weight, threshold=threshold),
        ):
            assert not got[1].isfinite().any()
            assert bool(got[[0, 2]].isfinite().all())


def gradients(y: torch.Tensor, grad: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(83,), (5, 83), (2, 3, 83), (2, 1, 2, 83)])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_frozen_gradients_are_those_of_the_decoded_weight(dtype, shape, threshold, device):
    """[D4, D35] grad_input = grad @ T(dq(weight)) unquantized, grad_bias = sum grad, for any rank."""
    codes, scales = ops.quantize_rowwise(torch.randn(40, 83, device=device))
    x = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(40, device=device, dtype=dtype, requires_grad=True)
    y = matmul_int8(x, codes, scales, bias, threshold=threshold)
    grad = torch.randn_like(y)
    got = gradients(y, grad, x, bias)
    decoded, rows = ops.dequantize_rowwise(codes, scales, dtype), grad.reshape(-1, 40)
    assert_close(
        got[0].reshape(-1, 83),
        [rows.double() @ decoded.double()],
        rows.abs().double() @ decoded.abs().double(),
        40,
    )
    assert_close(got[1], [rows.double().sum(0)], rows.double().abs().sum(0), len(rows))
    assert all(g.dtype == dtype for g in got) and got[0].shape == x.shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(83,), (64, 83), (2, 33, 83)])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("grad_weight", ["int8", "16bit"])
def test_training_gradients_are_those_of_the_codes(
    dtype, weight_dtype, shape, threshold, grad_weight, device
):
    """[D36] grad_input by rows of grad and columns of weight; grad_weight by columns of both, over tokens."""
    x = with_outliers(math.prod(shape[:-1]), 83, dtype, device).view(shape).requires_grad_()
    weight = torch.randn(40, 83, device=device).to(weight_dtype).requires_grad_()
    bias = torch.randn(40, device=device, requires_grad=True)
    y = matmul_int8(x, weight, None, bias, threshold=threshold, grad_weight=grad_weight)
    grad = torch.randn_like(y)
    got = gradients(y, grad, x, weight, bias)
    rows, input_rows = grad.reshape(-1, 40), x.detach().reshape(-1, 83)
    left, right = rows_of(rows), columns_of(weight.detach())
    assert_close(got[0].reshape(-1, 83), [left @ right], left.abs() @ right.abs(), 0)
    left, right = columns_of(rows), columns_of(input_rows)
    want, magnitude = left.t() @ right, left.abs().t() @ right.abs()
    dense = rows.double().t() @ input_rows.double()
    mask = split(input_rows, threshold)[1] | (grad_weight == "16bit")
    want = torch.where(mask, dense, want)
    magnitude = torch.where(mask, rows.double().abs().t() @ input_rows.double().abs(), magnitude)
    assert_close(got[1], [want], magnitude, len(rows))
    assert_close(got[2], [rows.double().sum(0)], rows.double().abs().sum(0), len(rows))
    assert [g.dtype for g in got] == [dtype, weight_dtype, torch.float32]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_gradients_are_close_to_the_exact_ones(threshold, device):
    """[D36] Relative errors of about 0.01; with statistics of the wrong side it was above 0.2."""
    x = torch.randn(256, 128, device=device, requires_grad=True)
    weight = torch.nn.init.xavier_uniform_(torch.empty(96, 128, device=device)).requires_grad_()
    y = matmul_int8(x, weight, threshold=threshold)
    # rows and columns of very different sizes, which only their own scales can hold
    grad = torch.randn_like(y) * torch.logspace(-2, 0, 96, device=device)
    got = gradients(y, grad, x, weight)
    want = (grad.double() @ weight.double(), grad.double().t() @ x.double())
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() / w.norm() < 0.02
    # the bar of bitsandbytes' own tests, with weights as they make them
    outside = (y.double() - x.double() @ weight.double().t()).abs() > 0.01 + 0.1 * y.double().abs()
    assert outside.double().mean() < 0.021


@pytest.mark.parametrize("M, N, K", [(0, 5, 64), (4, 0, 64), (4, 5, 0), (0, 5, 0)])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_empty_sizes_give_the_bias_and_zero_gradients(M, N, K, threshold, frozen, device):
    """[D2] K = 0: the bias broadcast, never memory that nobody wrote; gradients stay attached."""
    x = torch.randn(2, M, K, device=device, requires_grad=True)
    weight = torch.randn(N, K, device=device)
    bias = torch.arange(float(N), device=device, requires_grad=True)
    operands = ops.quantize_rowwise(weight) if frozen else (weight.requires_grad_(), None)
    y = matmul_int8(x, *operands, bias, threshold=threshold)
    assert y.shape == (2, M, N)
    if K == 0:
        assert torch.equal(y, bias.expand(2, M, N))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) or N > 0
    assert x.grad.shape == x.shape
    assert torch.equal(bias.grad, torch.full((N,), 2.0 * M, device=device))
    if not frozen:
        assert weight.grad.shape == (N, K)
        assert M > 0 or not weight.grad.any()


def test_strided_operands_are_read_by_logical_index(device):
    """[D15] Slices, transposes, stride 0 and unaligned views give what their contiguous copies give."""
    base, weight = torch.randn(10, 200, device=device), torch.randn(64, 24, device=device).t()
    inputs = {
        "slice": base[:, 3:67],
        "transposed": torch.randn(64, 10, device=device).t(),
        "stride-0 rows": base[:1, :64].expand(6, 64),
        "stride-0 columns": base[:, :1].expand(10, 64),
        "unaligned": base.view(-1)[1 : 1 + 640].view(10, 64),
        "inner slice": torch.randn(2, 5, 192, device=device)[..., 64:128],
    }
    bias = torch.randn(48, device=device)[::2]
    codes, scales = ops.quantize_rowwise(weight.contiguous())
    strided = codes.t().contiguous().t()
    for threshold in (0.0, 2.0):
        for name, x in inputs.items():
            want = matmul_int8(x.contiguous(), codes, scales, bias.contiguous(), threshold=threshold)
            assert torch.equal(matmul_int8(x, strided, scales, bias, threshold=threshold), want), name
            want = matmul_int8(x.contiguous(), weight.contiguous(), None, bias, threshold=threshold)
            assert torch.equal(matmul_int8(x, weight, None, bias, threshold=threshold), want), name


@pytest.mark.parametrize("frozen", [False, True])
def test_a_stride_0_gradient_is_read_within_its_bounds(frozen, device):
    """[D15] The gradient of a sum."""
    x = torch.randn(6, 64, device=device, requires_grad=True)
    weight = torch.randn(8, 64, device=device)
    operands: Any = ops.quantize_rowwise(weight) if frozen else (weight.requires_grad_(), None)
    leaves = (x,) if frozen else (x, weight)
    expanded = gradients(matmul_int8(x, *operands), torch.ones((), device=device).expand(6, 8), *leaves)
    plain = gradients(matmul_int8(x, *operands), torch.ones(6, 8, device=device), *leaves)
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))


def test_weight_codes_of_a_foreign_file_may_hold_minus_128(device):
    codes = torch.full((2, 64), -128, dtype=torch.int8, device=device)
    scales = torch.full((2,), 127.0, device=device)
    x = torch.ones(1, 64, device=device)
    assert matmul_int8(x, codes, scales).tolist() == [[-8192.0, -8192.0]]


def test_result_is_fresh_and_takes_in_place_ops(device):
    """[D35] No view: in-place operations on it are recorded."""
    codes, scales = ops.quantize_rowwise(torch.randn(8, 64, device=device))
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    for operands in ((codes, scales), (torch.randn(8, 64, device=device), None)):
        for threshold in THRESHOLDS:
            y = matmul_int8(x, *operands, threshold=threshold)
            assert y.is_contiguous() and not y._is_view()
            y.relu_().sum().backward()
            with torch.no_grad():
                assert not matmul_int8(x, *operands, threshold=threshold)._is_view()
    assert x.grad is not None


def test_functional_names_are_exported():
    assert "matmul_int8" in functional.__all__ and functional.matmul_int8 is matmul_int8
