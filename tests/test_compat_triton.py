"""bitsandbytes' seven kernels under SwitchBack by its names; its defects must not return."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from compare import assert_same_bits, dtype_of, tensor_of, widened
from qbits import errors
from qbits.compat.bitsandbytes.triton import triton_utils
from qbits.compat.bitsandbytes.triton.dequantize_rowwise import dequantize_rowwise
from qbits.compat.bitsandbytes.triton.int8_matmul_mixed_dequantize import int8_matmul_mixed_dequantize
from qbits.compat.bitsandbytes.triton.int8_matmul_rowwise_dequantize import int8_matmul_rowwise_dequantize
from qbits.compat.bitsandbytes.triton.quantize_columnwise_and_transpose import (
    quantize_columnwise_and_transpose,
)
from qbits.compat.bitsandbytes.triton.quantize_global import quantize_global, quantize_global_transpose
from qbits.compat.bitsandbytes.triton.quantize_rowwise import quantize_rowwise
from reference import DTYPES, Floats

RANDOM = np.random.default_rng(61)
QUANTIZERS = [quantize_rowwise, quantize_columnwise_and_transpose, quantize_global, quantize_global_transpose]


def expected(quantizer: object, x: Floats) -> tuple[reference.Codes, Floats]:
    """What the reference says of a quantizer."""
    if quantizer is quantize_rowwise:
        return reference.quantize_rowwise(x)[:2]
    by_column = quantizer is quantize_columnwise_and_transpose
    codes, scales = reference.quantize_columnwise(x) if by_column else reference.quantize_global(x)
    return codes if quantizer is quantize_global else np.ascontiguousarray(codes.T), scales


def check(quantizer: object, x: torch.Tensor) -> None:
    """Codes and scales are the reference's, on the device of the input."""
    values, scales = quantizer(x)  # type: ignore[operator]
    wanted, wanted_scales = expected(quantizer, widened(x).reshape(x.shape))
    assert (values.dtype, scales.dtype, values.device) == (torch.int8, torch.float32, x.device)
    assert values.shape == wanted.shape
    assert_same_bits(values, wanted)
    assert_same_bits(scales, wanted_scales)


def codes_of(rows: int, columns: int, device: str) -> torch.Tensor:
    """Codes that quantizers make."""
    return torch.from_numpy(RANDOM.integers(-127, 128, (rows, columns)).astype(np.int8)).to(device)


def test_triton_is_never_missing():
    assert triton_utils.is_triton_available() is True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_strides_are_honoured(device, quantizer, dtype):
    """The reference reads row m at m * K, whatever the strides [D15]."""
    whole = tensor_of(RANDOM.standard_normal(24 * 40), dtype, device).view(24, 40)
    for view in (whole, whole.t(), whole[:, 5:22], whole[3::2], whole[:1].expand(7, 40)):
        check(quantizer, view)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_scales_are_float32(device, quantizer):
    """float16 loses magnitudes below 6e-8 and overflows above 65504 [D16]."""
    for magnitude in (1e-30, 1e-8, 1e5, 1e38):
        x = torch.tensor([[magnitude, -magnitude / 3]], device=device)
        check(quantizer, x)
        values, scales = quantizer(x)
        assert scales[0].item() == x[0, 0].item()
        assert values.flatten()[0].item() == 127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_zeros_have_code_zero(device, quantizer, dtype):
    """The reference divides by zero and casts the NaN to a code [D17]."""
    check(quantizer, torch.zeros(3, 5, dtype=dtype_of(dtype), device=device))
    x = torch.ones(3, 5, dtype=dtype_of(dtype), device=device)
    x[1], x[:, 2] = 0, 0
    check(quantizer, x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_nan_and_inf_stay_in_their_group(device, quantizer, value):
    x = torch.randn(4, 6, device=device)
    x[2, 3] = value
    check(quantizer, x)


@pytest.mark.parametrize("rows", [83, 16_385])
def test_columns_of_any_length_are_quantized(device, rows):
    """One program of the reference holds a whole column, and gives up above 16k rows [D21]."""
    check(quantize_columnwise_and_transpose, torch.randn(rows, 3, device=device))


def test_one_scale_is_rounded_as_float32_whatever_the_input(device):
    """The reference computes 1 / absmax and the product in the input's dtype: 1/4 of a step in bfloat16."""
    x = tensor_of(RANDOM.standard_normal(4096) * 3, "bfloat16", device).view(64, 64)
    values, scales = quantize_global(x)
    assert (values.float() * (scales / 127) - x.float()).abs().max() <= scales / 254 * (1 + 2.0**-20)
    assert_same_bits(quantize_global_transpose(x)[0], values.t().contiguous())


@pytest.mark.multigpu
def test_results_are_on_the_device_of_the_input():
    """The reference's are on the default GPU [D20]."""
    x = torch.randn(5, 7, device="cuda:1")
    for quantizer in QUANTIZERS:
        check(quantizer, x)


def test_decoding_does_not_overflow_within_float16(device):
    """127 * 600 overflows float16 before it is divided by 127 [D21]."""
    codes = torch.tensor([[127, -127, 1]], dtype=torch.int8, device=device)
    for scale in (515.9, 600.0, 60_000.0):
        scales = torch.tensor([scale], device=device)
        got = dequantize_rowwise(codes, scales)
        assert got.dtype == torch.float16
        values = reference.decode_int8(codes.cpu().numpy(), scales.cpu().numpy())
        assert_same_bits(got, reference.round_to(values, "float16"))
        assert torch.isfinite(got).all()


def test_scales_of_float16_are_taken(device):
    codes, scales = codes_of(3, 4, device), torch.rand(3, device=device).half()
    assert_same_bits(dequantize_rowwise(codes, scales), dequantize_rowwise(codes, scales.float()))
    one = torch.tensor(0.5, dtype=torch.float16, device=device)
    got = int8_matmul_mixed_dequantize(codes, codes.t(), scales, one, None)
    assert_same_bits(got, int8_matmul_mixed_dequantize(codes, codes.t(), scales.float(), one.float(), None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(83, 33, 332), (1, 1, 1), (5, 8, 64), (3, 4, 0)])
def test_products_round_once(device, M, N, K, dtype):
    """Whatever the dtypes; the weight comes as [K, N], of any strides."""
    a, weight = codes_of(M, K, device), codes_of(N, K, device)
    rows, columns = (torch.rand(n, device=device) * 9 for n in (M, N))
    bias = torch.randn(N, device=device).to(dtype_of(dtype))
    for b in (weight.t(), weight.t().contiguous()):
        for addend in (None, bias):
            wide = None if addend is None else widened(addend)
            operands = [x.cpu().numpy() for x in (a, weight, rows)]
            by_row = int8_matmul_rowwise_dequantize(a, b, rows, columns, addend, out_dtype=dtype_of(dtype))
            want = reference.gemm_int8(*operands, columns.cpu().numpy(), wide)
            assert_same_bits(by_row, reference.round_to(want, dtype))
            mixed = int8_matmul_mixed_dequantize(a, b, rows, columns[:1], addend, out_dtype=dtype_of(dtype))
            want = reference.gemm_int8(*operands, columns[:1].cpu().numpy(), wide)
            assert_same_bits(mixed, reference.round_to(want, dtype))


def product_of(sum_is: int, bias: float, device: str, num_k: int = 1, **options: torch.dtype) -> torch.Tensor:
    """A product whose codes sum to that number, with a bias."""
    a = torch.zeros(1, num_k * 127, dtype=torch.int8, device=device)
    a[0, : sum_is // 127] = 127
    a[0, sum_is // 127] = sum_is % 127
    ones = torch.ones(a.shape[1], 1, dtype=torch.int8, device=device)
    # r = RN(scale / 127**2) is 1 for this scale, which the reference would store as float16
    scale = torch.tensor([1 / float(reference.INVERSE_127_SQUARED)], device=device)
    addend = torch.tensor([bias], device=device)
    return int8_matmul_mixed_dequantize(a, ones, scale, torch.ones(1, device=device), addend, **options)


def test_the_bias_is_added_before_the_rounding(device):
    """2049 is 2048 in float16, and 2048 + 1 is 2048 again [D18]; a sum beyond 65504 is Inf there."""
    assert product_of(2049, 1.0, device).item() == 2050
    assert product_of(70_000, -10_000.0, device, 8).item() == 60_000


def test_the_bias_is_not_cast_to_float16(device):
    """1e5 is Inf in float16, and 0.1 another number [D18]."""
    assert product_of(90_000, -100_000.0, device, 8).item() == -10_000
    assert product_of(0, 0.1, device, out_dtype=torch.float32).item() == np.float32(0.1)


@pytest.mark.parametrize("K", [64, 8192, 140_000])
def test_the_bias_is_added_once_however_long_the_rows(device, K):
    """The reference splits K and adds the bias with each part, by atomics in any order [D19]."""
    zeros, ones = torch.zeros(2, K, dtype=torch.int8, device=device), torch.ones(3, device=device)
    bias = torch.tensor([1.0, -2.5, 1000.0], device=device)
    got = int8_matmul_rowwise_dequantize(zeros, zeros[:1].expand(3, K).t(), ones[:2], ones, bias)
    assert got.dtype == torch.float16
    assert_same_bits(got, bias.half().expand(2, 3).contiguous())


def test_what_does_not_fit_is_refused(device):
    codes, ones = codes_of(3, 4, device), torch.ones(3, device=device)
    vector = torch.ones(4, device=device)
    for call, kind, message in (
        (lambda: quantize_global(vector), errors.ShapeError, "x must have 2 dimensions, got shape [4]"),
        (lambda: quantize_rowwise(codes), errors.DtypeError, "got int8"),
        (
            lambda: int8_matmul_rowwise_dequantize(codes, codes.t(), ones, ones[:1], None),
            errors.ShapeError,
            "qbits::int8_matmul_rowwise_dequantize: state_w must have 3 elements, got 1",
        ),
        (
            lambda: int8_matmul_mixed_dequantize(codes, codes.t(), ones, ones, None),
            errors.ShapeError,
            "qbits::int8_matmul_mixed_dequantize: state_w must have 1 elements, got 3",
        ),
        (
            lambda: int8_matmul_mixed_dequantize(codes, codes, ones, ones[:1], None),
            errors.ShapeError,
            "qbits::gemm_int8: ",
        ),
        (lambda: dequantize_rowwise(codes, vector), errors.ShapeError, "scales"),
    ):
        with pytest.raises(kind) as refusal:
            call()
        assert message in str(refusal.value)
