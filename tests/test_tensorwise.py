"""Whole-tensor ops, with one absmax and with none: bit for bit the reference, inside their outputs."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from compare import Guarded, around, assert_same_bits, dtype_of, skip_without_memory, tensor_of, widened
from qbits import ops
from reference import DTYPES, MAPS, Floats

RANDOM = np.random.default_rng(22)
TABLES: dict[str, Floats] = {name: make() for name, make in MAPS.items()}
TABLES["random"] = np.sort(RANDOM.uniform(-1, 1, 256).astype(np.float32))
# the last size is larger than any tile, so that the maximum is gathered over many thread blocks
SIZES = (0, 1, 2, 3, 31, 255, 256, 257, 1000, 4097, 2**20 + 37)


def quantize_and_compare(x: torch.Tensor, table: Floats, offset: int = 0) -> None:
    """Into guarded outputs; codes and absmax must equal the reference."""
    device = str(x.device)
    codes, absmax = (
        Guarded((x.numel(),), torch.uint8, device, offset),
        Guarded((), torch.float32, device, offset),
    )
    ops.quantize(x, tensor_of(table, "float32", device), out=(codes.tensor, absmax.tensor))
    want_codes, want_absmax = reference.quantize(widened(x), table)
    what = f"{x.dtype} n {x.numel()} offset {offset}"
    assert_same_bits(absmax.tensor, np.array([want_absmax]), f"absmax of {what}")
    assert_same_bits(codes.tensor, want_codes, f"codes of {what}")
    codes.assert_intact()
    absmax.assert_intact()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_equals_the_reference(device, dtype, n):
    x = RANDOM.standard_normal(n, np.float32) * 3
    quantize_and_compare(tensor_of(x, dtype, device), TABLES["dynamic"])


@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_equals_the_reference_for_every_map(device, dtype, name):
    x = RANDOM.standard_normal(20_001, np.float32) * 3
    quantize_and_compare(tensor_of(x, dtype, device), TABLES[name])


@pytest.mark.parametrize("place", [0, 500, 999])
@pytest.mark.parametrize(
    "value", [np.nan, -np.nan, np.inf, -np.inf, 3.4e38, 2.0**-126, -(2.0**-127), 1e-45, -0.0]
)
@pytest.mark.parametrize("rest", [0.0, 1e-41, 0.5])
def test_quantize_handles_nan_inf_zero_subnormal_and_huge(device, value, place, rest):
    x = np.full(1000, rest, np.float32)
    x[place] = value
    for dtype in DTYPES:
        quantize_and_compare(tensor_of(x, dtype, device), TABLES["dynamic"])


def test_quantize_divides_instead_of_multiplying_by_the_reciprocal(device):
    """x / absmax and x * (1 / absmax) round differently; a map with entries beside them tells which."""
    x = RANDOM.standard_normal(100_000, np.float32)
    absmax = np.abs(x).max()
    divided, multiplied = x / absmax, x * (np.float32(1) / absmax)
    different = np.flatnonzero(divided != multiplied)[:127]
    assert different.size == 127
    # a threshold on each divided value: an entry pair whose midpoint is that value
    targets = np.unique(np.concatenate([divided[different], np.nextafter(divided[different], np.float32(2))]))
    table = np.sort(np.concatenate([targets, np.linspace(1, 2, 256 - targets.size, dtype=np.float32)]))
    assert (reference.encode_8bit(divided, table) != reference.encode_8bit(multiplied, table)).any()
    quantize_and_compare(tensor_of(x, "float32", device), table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(TABLES))
def test_quantize_no_absmax_is_exact_at_every_boundary_and_beyond_the_map(device, dtype, name):
    table = TABLES[name]
    odd = np.array(
        [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45, 2, -2], np.float32
    )
    values = np.concatenate([odd, around(np.concatenate([reference.midpoints(table), table]))])
    for offset in (0, 1):
        x = tensor_of(values, dtype, device, offset)
        codes = Guarded((values.size,), torch.uint8, device, offset)
        ops.quantize_no_absmax(x, tensor_of(table, "float32", device), out=codes.tensor)
        assert_same_bits(codes.tensor, reference.quantize_no_absmax(widened(x), table), f"{name} {dtype}")
        codes.assert_intact()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_with_and_without_absmax_equals_the_reference(device, dtype, n):
    table = TABLES["dynamic"]
    codes = RANDOM.integers(0, 256, n, np.uint8)
    scales = [1.7, 0.0, 1e-40, 1e5, np.inf, np.nan, -2.5] if n < 5000 else [1.7]
    for offset in (0, 1):
        codes_tensor, codebook = (
            tensor_of(codes, "uint8", device, offset),
            tensor_of(table, "float32", device),
        )
        for scale in np.array(scales, np.float32):
            output = Guarded((n,), dtype_of(dtype), device, offset)
            absmax = torch.tensor(float(scale), device=device)
            ops.dequantize(codes_tensor, absmax, codebook, dtype_of(dtype), out=output.tensor)
            assert_same_bits(output.tensor, reference.round_to(reference.decode(codes, scale, table), dtype))
            output.assert_intact()
        output = Guarded((n,), dtype_of(dtype), device, offset)
        ops.dequantize_no_absmax(codes_tensor, codebook, dtype_of(dtype), out=output.tensor)
        assert_same_bits(output.tensor, reference.round_to(reference.decode_no_absmax(codes, table), dtype))
        output.assert_intact()


def test_results_are_allocated_beside_the_input(device):
    x = torch.randn(3, 43, dtype=torch.float16, device=device)
    table = tensor_of(TABLES["dynamic"], "float32", device)
    codes, absmax = ops.quantize(x, table)
    assert (codes.shape, codes.dtype, codes.device) == ((129,), torch.uint8, x.device)
    assert (absmax.shape, absmax.dtype, absmax.device) == ((), torch.float32, x.device)
    output = ops.dequantize(codes, absmax, table, torch.bfloat16)
    assert (output.shape, output.dtype, output.device) == ((129,), torch.bfloat16, x.device)
    assert ops.quantize_no_absmax(x, table).shape == (129,)


def test_quantize_error_is_within_half_the_widest_step(device):
    x = torch.randn(10_001, device=device)
    table = tensor_of(TABLES["linear"], "float32", device)
    codes, absmax = ops.quantize(x, table)
    output = ops.dequantize(codes, absmax, table, torch.float32)
    # 255 levels make 254 steps over 2 * absmax; the rest is a few ulp of absmax
    assert (x - output).abs().max() <= absmax * (1 / 254 + 4 * 2.0**-24)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dynamic", "dynamic_unsigned", "linear", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu_on_millions_of_elements(dtype, name):
    x = torch.randn(2**22 + 37).to(dtype_of(dtype))
    table = torch.from_numpy(TABLES[name])
    codes, absmax = ops.quantize(x, table)
    for _ in range(5):  # and every run gives the same bits
        got_codes, got_absmax = ops.quantize(x.cuda(), table.cuda())
        assert_same_bits(got_absmax, absmax)
        assert_same_bits(got_codes, codes)
    assert_same_bits(ops.quantize_no_absmax(x.cuda(), table.cuda()), ops.quantize_no_absmax(x, table))
    got = ops.dequantize(codes.cuda(), absmax.cuda(), table.cuda(), x.dtype)
    assert_same_bits(got, ops.dequantize(codes, absmax, table, x.dtype))
    got = ops.dequantize_no_absmax(codes.cuda(), table.cuda(), x.dtype)
    assert_same_bits(got, ops.dequantize_no_absmax(codes, table, x.dtype))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device):
    """The largest value stands behind 2^31, and the values there come back."""
    skip_without_memory(device, 13 * 2**30)
    n = 2**31 + 65
    table = tensor_of(TABLES["linear"], "float32", device)
    x = torch.zeros(n, dtype=torch.bfloat16, device=device)
    x[-64:] = torch.arange(-64, 0, dtype=torch.bfloat16, device=device)
    codes, absmax = ops.quantize(x, table)
    assert absmax.item() == 64
    want = reference.encode_8bit(np.arange(-64, 0).astype(np.float32) / np.float32(64), TABLES["linear"])
    assert_same_bits(codes[-64:], want)
    assert codes[: -64 : 2**16 + 1].eq(127).all()
    ops.dequantize(codes, absmax, table, torch.bfloat16, out=x)
    decoded = reference.decode(want, np.float32(64), TABLES["linear"])
    assert_same_bits(x[-64:], reference.round_to(decoded, "bfloat16"))
    ops.quantize_no_absmax(x, table, out=codes)
    assert codes[-64:].eq(0).all()
    ops.dequantize_no_absmax(codes, table, torch.bfloat16, out=x)
    assert x[-64:].eq(-1).all()
