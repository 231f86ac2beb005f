"""gemm_int8 bit for bit against exact sums and three roundings; with outliers against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from compare import Guarded, assert_same_bits, dtype_of, tensor_of, widened
from qbits import errors, functional, ops
from reference import DTYPES, Floats

RANDOM = np.random.default_rng(5)
Codes = npt.NDArray[np.int8]
# Relative error of one rounding to the dtype.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SHAPES = [
    (1, 1, 1), (2, 3, 5), (1, 64, 64), (63, 65, 16), (64, 64, 64), (65, 63, 127), (17, 129, 128),
    (128, 128, 192), (130, 257, 33), (5, 7, 1000), (16, 16, 4096), (33, 8, 272),
    (300, 264, 1040), (100, 300, 2064),
]  # fmt: skip


def codes_of(rows: int, columns: int) -> Codes:
    """Every code, -128 too."""
    return RANDOM.integers(-128, 128, (rows, columns)).astype(np.int8)


def scales_of(n: int) -> Floats:
    """Positive scales over several magnitudes."""
    return np.exp(RANDOM.uniform(-6, 6, n)).astype(np.float32)


def multiply_and_compare(
    codes: Codes,
    weight: Codes,
    dtype: str,
    device: str,
    *,
    input_scales: Floats | None = None,
    weight_scales: Floats | None = None,
    bias: str | None = None,
    offset: int = 0,
) -> None:
    """Into a guarded output, which must have the reference's bits."""
    M, N = len(codes), len(weight)
    bias_tensor = None
    if bias is not None:
        bias_tensor = tensor_of(RANDOM.standard_normal(N) * 10, bias, device, offset)
    output = Guarded((M, N), dtype_of(dtype), device, offset)
    rows, columns = (
        None if scales is None else tensor_of(scales, "float32", device, offset)
        for scales in (input_scales, weight_scales)
    )
    is_one = columns is not None and columns.numel() != N
    ops.gemm_int8(
        tensor_of(codes, "int8", device, offset).view(codes.shape),
        tensor_of(weight, "int8", device, offset).view(weight.shape),
        dtype_of(dtype), rows, None if is_one else columns, columns if is_one else None, bias_tensor,
        out=output.tensor,
    )  # fmt: skip
    output.assert_intact()
    addend = None if bias_tensor is None else widened(bias_tensor)
    want = reference.gemm_int8(codes, weight, input_scales, weight_scales, addend)
    what = f"{codes.shape} x {weight.shape} {dtype} bias {bias} offset {offset}"
    assert_same_bits(output.tensor, reference.round_to(want, dtype), what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gemm_int8_equals_the_reference_for_every_shape(device, shape, dtype):
    M, N, K = shape
    codes, weight = codes_of(M, K), codes_of(N, K)
    scales: dict[str, Any] = {"input_scales": scales_of(M), "weight_scales": scales_of(N)}
    multiply_and_compare(codes, weight, dtype, device, **scales)
    multiply_and_compare(codes, weight, dtype, device, **scales, bias=dtype)
    scales["weight_scales"] = scales_of(1)
    multiply_and_compare(codes, weight, dtype, device, **scales, bias="float32")
    multiply_and_compare(codes, weight, dtype, device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int32_is_the_sum(device, shape):
    M, N, K = shape
    codes, weight = codes_of(M, K), codes_of(N, K)
    output = Guarded((M, N), torch.int32, device)
    operands = tensor_of(codes, "int8", device).view(M, K), tensor_of(weight, "int8", device).view(N, K)
    ops.gemm_int8(*operands, torch.int32, out=output.tensor)
    output.assert_intact()
    want = codes.astype(np.int64) @ weight.astype(np.int64).T
    assert np.array_equal(output.tensor.cpu().numpy(), want)


@pytest.mark.parametrize("K", [65536, 131_056, 131_071, 131_072, 200_003, 300_000])
def test_sums_are_exact_whatever_k(device, K):
    """All codes -128 or 127 give the largest sums; what float32 makes of them shows an overflow."""
    for fill in ((-128, -128), (127, -128), (127, 127)):
        codes, weight = (np.full((rows, K), code, np.int8) for rows, code in zip((2, 3), fill, strict=True))
        codes[1], weight[1] = codes_of(1, K), codes_of(1, K)
        scales = {"input_scales": scales_of(2), "weight_scales": scales_of(3)}
        multiply_and_compare(codes, weight, "float32", device, **scales)
        if K <= 131_071:
            arguments = (torch.from_numpy(x).to(device) for x in (codes, weight))
            raw = functional.gemm_int8(*arguments, out_dtype=torch.int32).cpu().numpy()
            assert np.array_equal(raw, codes.astype(np.int64) @ weight.astype(np.int64).T)


def test_int32_refuses_sums_that_may_not_fit(device):
    codes = torch.zeros(1, 131_072, dtype=torch.int8, device=device)
    with pytest.raises(errors.ShapeError) as refusal:
        ops.gemm_int8(codes, codes, torch.int32)
    message = "qbits::gemm_int8: K must be at most 131071 for dtype int32, got 131072"
    assert str(refusal.value) == message


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_int8_takes_any_alignment(device, dtype):
    for offset in (1, 2, 3, 8):
        for K in (64, 65):
            scales = {"input_scales": scales_of(9), "weight_scales": scales_of(7)}
            multiply_and_compare(
                codes_of(9, K), codes_of(7, K), dtype, device, **scales, bias=dtype, offset=offset
            )


@pytest.mark.parametrize("bias", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_k_of_zero_gives_the_bias_or_zeros(device, dtype, bias):
    scales = {"input_scales": scales_of(3), "weight_scales": scales_of(37)}
    multiply_and_compare(codes_of(3, 0), codes_of(37, 0), dtype, device, **scales, bias=bias)


@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_columns_give_an_empty_result(device, M, N):
    codes, weight = (torch.ones(rows, 64, dtype=torch.int8, device=device) for rows in (M, N))
    for dtype in (torch.float16, torch.int32):
        got = functional.gemm_int8(codes, weight, out_dtype=dtype)
        assert (got.shape, got.dtype) == ((M, N), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_zero_nan_and_inf_reach_exactly_their_rows_and_columns(device, dtype):
    odd = np.array([0.0, np.nan, np.inf, 1e-45, 3e38, 1.0, -1.5], np.float32)
    codes, weight = codes_of(7, 48), codes_of(7, 48)
    multiply_and_compare(
        codes, weight, dtype, device, input_scales=odd, weight_scales=scales_of(7), bias=dtype
    )
    multiply_and_compare(
        codes, weight, dtype, device, input_scales=scales_of(7), weight_scales=odd, bias=dtype
    )


def test_functional_takes_strides_and_one_scale_of_any_shape(device):
    codes, weight = (torch.from_numpy(codes_of(20, 12)).to(device) for _ in range(2))
    rows = torch.from_numpy(scales_of(12)).to(device)
    for scale in (torch.tensor(0.5, device=device), torch.tensor([0.5], device=device)):
        got = functional.gemm_int8(codes.t(), weight.t(), rows, scale, out_dtype=torch.float32)
        want = functional.gemm_int8(
            codes.t().contiguous(), weight.t().contiguous(), rows, scale.expand(12), out_dtype=torch.float32
        )
        assert_same_bits(got, want)
    lone = functional.gemm_int8(codes[:3], weight[:1], rows[:3], rows[:1], out_dtype=torch.float32)
    assert_same_bits(lone, ops.gemm_int8(codes[:3], weight[:1], torch.float32, rows[:3], rows[:1]))


def test_functional_answers_in_the_framework_of_the_input():
    codes = codes_of(4, 8)
    got = functional.gemm_int8(codes, codes, out_dtype=torch.int32)
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, codes.astype(np.int32) @ codes.astype(np.int32).T)


def outlier_call(
    M: int, N: int, K: int, mask: npt.NDArray[np.bool_], dtype: str, device: str, bias: str | None = None
) -> None:
    """Codes that are zero in the masked columns; the result against float64."""
    codes, weight = codes_of(M, K), codes_of(N, K)
    codes[:, mask] = 0
    rows, columns = scales_of(M), scales_of(N)
    x = tensor_of(RANDOM.standard_normal((M, K)) * 20, dtype, device).view(M, K)
    addend = None if bias is None else tensor_of(RANDOM.standard_normal(N), bias, device)
    output = Guarded((M, N), dtype_of(dtype), device)
    ops.gemm_int8_outliers(
        tensor_of(codes, "int8", device).view(M, K), tensor_of(rows, "float32", device), x,
        torch.from_numpy(mask).to(device), tensor_of(weight, "int8", device).view(N, K),
        tensor_of(columns, "float32", device), addend, out=output.tensor,
    )  # fmt: skip
    output.assert_intact()
    wide = widened(x).reshape(M, K)
    wide_bias = None if addend is None else widened(addend)
    want = reference.gemm_int8_outliers(codes, rows, wide, mask, weight, columns, wide_bias, dtype)
    got = widened(output.tensor).reshape(M, N)
    if not mask.any():
        exact = reference.round_to(reference.gemm_int8(codes, weight, rows, columns, wide_bias), dtype)
        assert_same_bits(output.tensor, exact)
    # the sum of |O| products and the int8 part in float32, whatever the order, then one rounding, which of a
    # float16 below 2^-14 is one of 2^-25
    terms = np.abs(wide[:, mask]) @ np.abs(weight[:, mask].astype(np.float64) * columns[:, None] / 127).T
    part = np.abs(reference.gemm_int8(codes, weight, rows, columns, wide_bias))
    limit = (mask.sum() + 2) * 2.0**-24 * (1.01 * terms + part) + ROUNDING[dtype] * np.abs(want) + 2.0**-25
    is_small = np.abs(want) < 65000 if dtype == "float16" else np.ones(want.shape, bool)
    error = np.abs(got - want)
    assert (error <= limit)[is_small].all(), (M, N, K, int(mask.sum()), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [0, 1, 2, 16, 17, 64, None])
def test_outliers_of_any_number_are_multiplied_unquantized(device, num, dtype):
    for M, N, K in ((3, 70, 130), (65, 130, 96), (1, 1, 64), (130, 70, 257)):
        mask = np.ones(K, bool) if num is None else np.zeros(K, bool)
        mask[RANDOM.permutation(K)[: num or 0]] = True
        outlier_call(M, N, K, mask, dtype, device)
        outlier_call(M, N, K, mask, dtype, device, bias=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_of_many_columns_are_listed_whole(device, dtype):
    """More columns than one pass of the kernel that lists them takes."""
    K = 20_000
    mask = RANDOM.random(K) < 0.01
    mask[[0, 8191, 8192, K - 1]] = True
    outlier_call(2, 5, K, mask, dtype, device)
    outlier_call(2, 5, K, np.zeros(K, bool), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_of_empty_shapes(device, dtype):
    for M, N, K in ((0, 5, 8), (5, 0, 8), (3, 4, 0)):
        outlier_call(M, N, K, np.ones(K, bool), dtype, device)


def test_an_infinite_outlier_reaches_its_row_alone(device):
    M, N, K = 4, 6, 32
    x = torch.ones(M, K, device=device)
    x[2, 5] = torch.inf
    mask = torch.zeros(K, dtype=torch.bool, device=device)
    mask[5] = True
    codes = torch.ones(M, K, dtype=torch.int8, device=device)
    weight = torch.ones(N, K, dtype=torch.int8, device=device)
    ones = torch.ones(max(M, N), device=device)
    got = ops.gemm_int8_outliers(codes, ones[:M], x, mask, weight, ones[:N], None)
    assert torch.isfinite(got).all(dim=1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("M", [1, 40])
def test_products_give_the_same_bits_every_time(device, M):
    codes, weight = (torch.from_numpy(codes_of(rows, 1024)).to(device) for rows in (M, 96))
    rows, columns = (torch.from_numpy(scales_of(n)).to(device) for n in (M, 96))
    x, mask = torch.randn(M, 1024, device=device).bfloat16(), torch.arange(1024, device=device) % 100 == 0
    first = ops.gemm_int8(codes, weight, torch.bfloat16, rows, columns)
    with_outliers = ops.gemm_int8_outliers(codes, rows, x, mask, weight, columns, None)
    for _ in range(20):
        assert_same_bits(ops.gemm_int8(codes, weight, torch.bfloat16, rows, columns), first)
        again = ops.gemm_int8_outliers(codes, rows, x, mask, weight, columns, None)
        assert_same_bits(again, with_outliers)
