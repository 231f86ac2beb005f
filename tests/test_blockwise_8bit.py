"""8-bit blockwise ops with any ascending 256-entry map: bit for bit the reference, inside their outputs."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import reference
import torch
from compare import (
    ODD_SCALES,
    SCALES,
    Guarded,
    assert_same_bits,
    boundary_blocks,
    corner_blocks,
    dtype_of,
    guarded_like,
    sizes_around,
    skip_without_memory,
    tensor_of,
    widened,
)
from qbits import ops
from reference import BLOCK_SIZES_8BIT, DTYPES, MAPS, Bytes, Floats, ceil_div

RANDOM = np.random.default_rng(21)


def repeated_map() -> Floats:
    """An ascending map with runs of equal entries, which also has no zero."""
    values = np.sort(RANDOM.standard_normal(64).astype(np.float32))
    return np.repeat(values, 4)


TABLES: dict[str, Floats] = {name: make() for name, make in MAPS.items()}
TABLES["random"] = np.sort(RANDOM.uniform(-1, 1, 256).astype(np.float32))
TABLES["repeated"] = repeated_map()
TABLES["constant"] = np.full(256, 0.25, np.float32)


def quantize_and_compare(x: torch.Tensor, table: Floats, block_size: int, offset: int = 0) -> None:
    """Into guarded outputs; codes and absmax must equal the reference."""
    n, device = x.numel(), str(x.device)
    codes = Guarded((n,), torch.uint8, device, offset)
    absmax = Guarded((ceil_div(n, block_size),), torch.float32, device, offset)
    codebook = tensor_of(table, "float32", device)
    ops.quantize_blockwise(x, codebook, block_size, out=(codes.tensor, absmax.tensor))
    want_codes, want_absmax = reference.quantize_blockwise(widened(x), table, block_size)
    what = f"{x.dtype} block {block_size} n {n} offset {offset}"
    assert_same_bits(absmax.tensor, want_absmax, f"absmax of {what}")
    assert_same_bits(codes.tensor, want_codes, f"codes of {what}")
    codes.assert_intact()
    absmax.assert_intact()


def dequantize_and_compare(
    codes: Bytes, absmax: Floats, table: Floats, block_size: int, dtype: str, device: str, offset: int = 0
) -> None:
    """Into a guarded output; the values must equal the reference."""
    output = Guarded((codes.size,), dtype_of(dtype), device, offset)
    ops.dequantize_blockwise(
        tensor_of(codes, "uint8", device, offset),
        tensor_of(absmax, "float32", device, offset),
        tensor_of(table, "float32", device),
        block_size,
        dtype_of(dtype),
        out=output.tensor,
    )
    want = reference.round_to(reference.decode_blockwise(codes, absmax, table, block_size), dtype)
    assert_same_bits(output.tensor, want, f"{dtype} block {block_size} n {codes.size} offset {offset}")
    output.assert_intact()


@pytest.mark.parametrize("block_size", BLOCK_SIZES_8BIT)
@pytest.mark.parametrize("name", ["dynamic", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_blockwise_equals_the_reference(device, dtype, name, block_size):
    for n in sizes_around(block_size):
        x = RANDOM.standard_normal(n, np.float32)
        quantize_and_compare(tensor_of(x, dtype, device), TABLES[name], block_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES_8BIT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_blockwise_equals_the_reference(device, dtype, block_size):
    for n in sizes_around(block_size):
        codes = RANDOM.integers(0, 256, n, np.uint8)
        absmax = RANDOM.uniform(0, 3, ceil_div(n, block_size)).astype(np.float32)
        dequantize_and_compare(codes, absmax, TABLES["dynamic"], block_size, dtype, device)


@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_map_quantizes_and_dequantizes_exactly(device, dtype, name):
    x = RANDOM.standard_normal(40_000 + 13, np.float32)
    quantize_and_compare(tensor_of(x, dtype, device), TABLES[name], 256)
    codes, absmax = reference.quantize_blockwise(x, TABLES[name], 256)
    dequantize_and_compare(codes, absmax, TABLES[name], 256, dtype, device)


@pytest.mark.parametrize("block_size", [64, 256, 4096])
@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_blockwise_is_exact_at_every_midpoint_entry_and_scale(device, dtype, name, block_size):
    table = TABLES[name]
    boundaries = np.concatenate([reference.midpoints(table), table])
    scales = SCALES if name == "dynamic" else SCALES[:4]
    quantize_and_compare(
        tensor_of(boundary_blocks(boundaries, block_size, scales), dtype, device), table, block_size
    )


@pytest.mark.parametrize("block_size", [64, 256, 4096])
@pytest.mark.parametrize("name", ["dynamic", "dynamic_unsigned", "e4m3", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_blockwise_handles_nan_inf_zero_subnormal_and_huge_blocks(device, dtype, name, block_size):
    quantize_and_compare(tensor_of(corner_blocks(block_size), dtype, device), TABLES[name], block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 7, 8])
def test_views_at_any_offset_are_read_and_written_in_place(device, dtype, offset):
    for n in (1, 64, 1000, 20_001):
        x = RANDOM.standard_normal(n, np.float32)
        for name in ("dynamic", "linear"):
            quantize_and_compare(tensor_of(x, dtype, device, offset), TABLES[name], 64, offset)
        codes, absmax = reference.quantize_blockwise(x, TABLES["linear"], 64)
        dequantize_and_compare(codes, absmax, TABLES["linear"], 64, dtype, device, offset)


def test_quantize_blockwise_reads_a_map_at_any_offset(device):
    x = tensor_of(RANDOM.standard_normal(5000, np.float32), "float32", device)
    table = TABLES["dynamic"]
    want, _ = reference.quantize_blockwise(widened(x), table, 64)
    for offset in (0, 1, 2, 3):
        codes, absmax = ops.quantize_blockwise(x, tensor_of(table, "float32", device, offset), 64)
        assert_same_bits(codes, want, f"map at offset {offset}")
        output = ops.dequantize_blockwise(
            codes, absmax, tensor_of(table, "float32", device, offset), 64, torch.float32
        )
        assert_same_bits(output, reference.decode_blockwise(want, absmax.cpu().numpy(), table, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_blockwise_of_every_code_and_odd_scales(device, dtype):
    every_code = np.arange(256, dtype=np.uint8)
    for scale in ODD_SCALES:
        for name in ("dynamic", "e4m3"):
            dequantize_and_compare(every_code, np.full(4, scale), TABLES[name], 64, dtype, device)


def test_ops_reproduce_golden_vectors(device):
    x = tensor_of(golden.bfloat16_of(golden.INPUT_8BIT), "bfloat16", device)
    table = tensor_of(TABLES["dynamic"], "float32", device)
    codes, absmax = ops.quantize_blockwise(x, table, 256)
    assert codes.cpu().numpy().tobytes().hex() == golden.CODES_8BIT
    assert absmax.cpu().numpy().tobytes().hex() == golden.ABSMAX_8BIT
    output = ops.dequantize_blockwise(codes, absmax, table, 256, torch.float32)
    assert golden.sha256(output.cpu().numpy()) == golden.DECODED_8BIT_SHA256
    for name, (first, whole) in golden.CODES_8BIT_OF_MAP.items():
        source = x.abs() if name == "dynamic_unsigned" else x
        codes, _ = ops.quantize_blockwise(source, tensor_of(TABLES[name], "float32", device), 256)
        assert codes[:8].cpu().numpy().tobytes().hex() == first, name
        assert golden.sha256(codes.cpu().numpy()) == whole, name


def test_ties_go_to_the_even_index_and_zeros_to_the_zero_code(device):
    signed, unsigned = (tensor_of(TABLES[n], "float32", device) for n in ("dynamic", "dynamic_unsigned"))
    ties = tensor_of(golden.float32_of(golden.TIES_8BIT), "float32", device)
    codes, _ = ops.quantize_blockwise(ties, signed, 256)
    assert codes.cpu().numpy().tobytes().hex() == golden.TIES_8BIT_CODES
    zeros = torch.zeros(256, device=device)
    for table, code in ((signed, 127), (unsigned, 0)):
        codes, absmax = ops.quantize_blockwise(zeros, table, 256)
        assert codes.eq(code).all()
        assert absmax.tolist() == [0.0]


@pytest.mark.parametrize(
    ("name", "source", "abs_limit", "rel_limit"),
    [
        ("dynamic", "normal", 0.011, 0.018),
        ("dynamic", "uniform", 0.0036, 0.015),
        ("dynamic_unsigned", "uniform", 0.0023, 0.012),
    ],
)
@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_error_is_within_the_published_limits(device, name, source, abs_limit, rel_limit, block_size):
    x = (
        torch.randn(1024, 1024, device=device)
        if source == "normal"
        else torch.rand(1024, 1024, device=device)
    )
    table = tensor_of(TABLES[name], "float32", device)
    codes, absmax = ops.quantize_blockwise(x, table, block_size)
    error = (ops.dequantize_blockwise(codes, absmax, table, block_size, torch.float32).view_as(x) - x).abs()
    assert error.mean().item() < abs_limit
    assert (error / (x.abs() + 1e-8)).mean().item() < rel_limit


def test_roundtrip_with_a_linear_map_is_within_half_a_step(device):
    x = torch.randn(10_007, device=device)
    table = tensor_of(TABLES["linear"], "float32", device)
    codes, absmax = ops.quantize_blockwise(x, table, 64)
    output = ops.dequantize_blockwise(codes, absmax, table, 64, torch.float32)
    # 255 levels make 254 steps over 2 * absmax, so half a step is absmax / 254; the rest is a few ulp
    limit = absmax.repeat_interleave(64)[:10_007] * (1 / 254 + 4 * 2.0**-24)
    assert ((x - output).abs() <= limit).all()


def test_results_are_allocated_beside_the_input_and_out_comes_back(device):
    x = torch.randn(3, 43, dtype=torch.bfloat16, device=device)
    table = tensor_of(TABLES["dynamic"], "float32", device)
    fresh = ops.quantize_blockwise(x, table, 64)
    assert [(t.shape, t.dtype, t.device) for t in fresh] == [
        ((129,), torch.uint8, x.device),
        ((3,), torch.float32, x.device),
    ]
    out = tuple(g.tensor for g in guarded_like(fresh))
    returned = ops.quantize_blockwise(x, table, 64, out=out)
    assert all(r is o for r, o in zip(returned, out, strict=True))
    assert all(torch.equal(f, o) for f, o in zip(fresh, out, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES_8BIT)
@pytest.mark.parametrize("name", ["dynamic", "dynamic_unsigned", "linear", "e4m3", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu_on_millions_of_elements(dtype, name, block_size):
    x = torch.randn(2**22 + 37).to(dtype_of(dtype))
    table = torch.from_numpy(TABLES[name])
    codes, absmax = ops.quantize_blockwise(x, table, block_size)
    for _ in range(3):  # and every run gives the same bits
        got_codes, got_absmax = ops.quantize_blockwise(x.cuda(), table.cuda(), block_size)
        assert_same_bits(got_absmax, absmax)
        assert_same_bits(got_codes, codes)
    output = ops.dequantize_blockwise(codes, absmax, table, block_size, x.dtype)
    got = ops.dequantize_blockwise(codes.cuda(), absmax.cuda(), table.cuda(), block_size, x.dtype)
    assert_same_bits(got, output)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic", "linear"])
def test_more_than_2_to_the_31_elements(device, name):
    """The tail behind 2^31 equals the same tail quantized alone."""
    skip_without_memory(device, 13 * 2**30)
    n = 2**31 + 64 * 1000 + 33
    first_of_tail = 2**31 - 64 * 8
    table = tensor_of(TABLES[name], "float32", device)
    x = torch.zeros(n, dtype=torch.bfloat16, device=device)
    tail = torch.randn(n - first_of_tail, dtype=torch.bfloat16, device=device)
    x[first_of_tail:] = tail
    codes, absmax = ops.quantize_blockwise(x, table, 64)
    want_codes, want_absmax = ops.quantize_blockwise(tail, table, 64)
    assert torch.equal(codes[first_of_tail:], want_codes)
    assert torch.equal(absmax[first_of_tail // 64 :], want_absmax)
    assert codes[: first_of_tail : 2**16 + 1].eq(127).all()
    ops.dequantize_blockwise(codes, absmax, table, 64, torch.bfloat16, out=x)
    want = ops.dequantize_blockwise(want_codes, want_absmax, table, 64, torch.bfloat16)
    assert torch.equal(x[first_of_tail:], want)
    assert torch.count_nonzero(x[: first_of_tail : 2**16 + 1]).item() == 0
