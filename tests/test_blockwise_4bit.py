"""4-bit blockwise ops: codes, scales and decoded values equal the reference bit for bit."""

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
    bits_of,
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
from reference import BLOCK_SIZES_4BIT, CODEBOOKS, DTYPES, VALUES_4BIT, Bytes, Floats, ceil_div

RANDOM = np.random.default_rng(20)


def quantize_and_compare(x: torch.Tensor, codebook: str, block_size: int, offset: int = 0) -> None:
    """Into guarded outputs; packed and absmax must equal the reference."""
    n = x.numel()
    packed = Guarded((ceil_div(n, 2),), torch.uint8, str(x.device), offset)
    absmax = Guarded((ceil_div(n, block_size),), torch.float32, str(x.device), offset)
    ops.quantize_4bit(x, codebook, block_size, out=(packed.tensor, absmax.tensor))
    want_packed, want_absmax = reference.quantize_4bit(widened(x), codebook, block_size)
    what = f"{codebook} {x.dtype} block {block_size} n {n} offset {offset}"
    assert_same_bits(absmax.tensor, want_absmax, f"absmax of {what}")
    assert_same_bits(packed.tensor, want_packed, f"packed of {what}")
    packed.assert_intact()
    absmax.assert_intact()


def dequantize_and_compare(
    packed: Bytes,
    absmax: Floats,
    n: int,
    codebook: str,
    block_size: int,
    dtype: str,
    device: str,
    offset: int = 0,
) -> None:
    """Into a guarded output; the values must equal the reference."""
    output = Guarded((n,), dtype_of(dtype), device, offset)
    ops.dequantize_4bit(
        tensor_of(packed, "uint8", device, offset),
        tensor_of(absmax, "float32", device, offset),
        n,
        codebook,
        block_size,
        dtype_of(dtype),
        out=output.tensor,
    )
    want = reference.round_to(reference.decode_4bit(packed, absmax, n, codebook, block_size), dtype)
    assert_same_bits(output.tensor, want, f"{codebook} {dtype} block {block_size} n {n} offset {offset}")
    output.assert_intact()


@pytest.mark.parametrize("block_size", BLOCK_SIZES_4BIT)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_4bit_equals_the_reference(device, dtype, codebook, block_size):
    for n in sizes_around(block_size):
        x = RANDOM.standard_normal(n, np.float32)
        quantize_and_compare(tensor_of(x, dtype, device), codebook, block_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES_4BIT)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_4bit_equals_the_reference(device, dtype, codebook, block_size):
    for n in sizes_around(block_size):
        packed = RANDOM.integers(0, 256, ceil_div(n, 2), np.uint8)
        absmax = RANDOM.uniform(0, 3, ceil_div(n, block_size)).astype(np.float32)
        dequantize_and_compare(packed, absmax, n, codebook, block_size, dtype, device)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 7, 8])
def test_views_at_any_offset_are_read_and_written_in_place(device, dtype, codebook, offset):
    for n in (1, 64, 1000, 20_001):
        x = RANDOM.standard_normal(n, np.float32)
        quantize_and_compare(tensor_of(x, dtype, device, offset), codebook, 64, offset)
        packed, absmax = reference.quantize_4bit(x, codebook, 64)
        dequantize_and_compare(packed, absmax, n, codebook, 64, dtype, device, offset)


@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_4bit_is_exact_at_every_boundary_and_scale(device, dtype, codebook, block_size):
    x = boundary_blocks(reference.THRESHOLDS_4BIT[codebook], block_size, SCALES)
    quantize_and_compare(tensor_of(x, dtype, device), codebook, block_size)


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_4bit_handles_nan_inf_zero_subnormal_and_huge_blocks(device, dtype, codebook, block_size):
    quantize_and_compare(tensor_of(corner_blocks(block_size), dtype, device), codebook, block_size)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_4bit_of_every_byte_and_odd_scales(device, dtype, codebook):
    every_byte = np.arange(256, dtype=np.uint8)
    for scale in ODD_SCALES:
        dequantize_and_compare(every_byte, np.full(8, scale), 512, codebook, 64, dtype, device)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_quantize_4bit_reproduces_golden_vectors(device, codebook):
    x = tensor_of(golden.bfloat16_of(golden.INPUT_4BIT), "bfloat16", device)
    packed, absmax = ops.quantize_4bit(x.view(2, 64), codebook, 64)
    assert packed.cpu().numpy().tobytes().hex() == golden.PACKED_4BIT[codebook]
    assert absmax.cpu().numpy().tobytes().hex() == golden.ABSMAX_4BIT
    for dtype in DTYPES:
        output = ops.dequantize_4bit(packed, absmax, 128, codebook, 64, dtype_of(dtype))
        assert golden.sha256(bits_of(output)) == golden.DECODED_4BIT_SHA256[codebook, dtype], dtype


@pytest.mark.parametrize("name", sorted(golden.EDGES_4BIT))
def test_quantize_4bit_reproduces_golden_edges(device, name):
    edge = golden.EDGES_4BIT[name]
    x = tensor_of(golden.float32_of(edge.input), "float32", device)
    for codebook, want in (("nf4", edge.nf4), ("fp4", edge.fp4)):
        packed, absmax = ops.quantize_4bit(x, codebook, 64)
        assert packed.cpu().numpy().tobytes().hex() == want, codebook
        assert absmax.cpu().numpy().tobytes().hex() == edge.absmax, codebook


def test_a_corrupt_block_decodes_to_nan_and_its_neighbours_do_not(device):
    x = torch.ones(192, device=device)
    x[70], x[130] = float("nan"), float("-inf")
    packed, absmax = ops.quantize_4bit(x, "nf4", 64)
    output = ops.dequantize_4bit(packed, absmax, 192, "nf4", 64, torch.float32)
    assert (output[:64] == 1).all()
    assert torch.isnan(output[64:]).all()


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 64, 1001, 70_001])
@pytest.mark.parametrize("offset", [0, 1])
def test_pack_and_unpack_4bit_equal_the_reference(device, codebook, n, offset):
    codes = RANDOM.integers(0, 256, n, np.uint8)  # the high four bits must be ignored
    packed = Guarded((ceil_div(n, 2),), torch.uint8, device, offset)
    ops.pack_4bit(tensor_of(codes, "uint8", device, offset), codebook, out=packed.tensor)
    assert_same_bits(packed.tensor, reference.pack_4bit(codes, codebook))
    packed.assert_intact()
    unpacked = Guarded((n,), torch.uint8, device, offset)
    ops.unpack_4bit(packed.tensor, n, out=unpacked.tensor)
    assert_same_bits(unpacked.tensor, codes & 15)
    unpacked.assert_intact()


def test_even_elements_go_to_the_high_nibble(device):
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8, device=device)
    assert ops.pack_4bit(codes, "nf4").tolist() == [0x12, 0x37]
    assert ops.pack_4bit(codes, "fp4").tolist() == [0x12, 0x30]
    assert ops.pack_4bit(codes, "af4").tolist() == [0x12, 0x38]


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_requantizing_decoded_values_changes_nothing(device, codebook):
    x = torch.randn(64 * 513 + 7, device=device)
    packed, absmax = ops.quantize_4bit(x, codebook, 64)
    decoded = ops.dequantize_4bit(packed, absmax, x.numel(), codebook, 64, torch.float32)
    again, again_absmax = ops.quantize_4bit(decoded, codebook, 64)
    # the largest element decodes to exactly +-absmax, so the scale stays and every value is a code's own;
    # FP4 has two codes of value zero, so values are compared, not bytes
    assert torch.equal(again_absmax, absmax)
    assert torch.equal(ops.dequantize_4bit(again, absmax, x.numel(), codebook, 64, torch.float32), decoded)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_value_takes_the_nearest_entry(device, codebook):
    """Against float64 distances to all 16 entries, up to a few ulp."""
    x = torch.randn(64 * 200, device=device)
    packed, absmax = ops.quantize_4bit(x, codebook, 64)
    y = widened(x).astype(np.float64) / np.repeat(absmax.cpu().numpy().astype(np.float64), 64)
    chosen = VALUES_4BIT[codebook][reference.unpack_4bit(packed.cpu().numpy(), x.numel())].astype(np.float64)
    distances = np.abs(y[:, None] - VALUES_4BIT[codebook].astype(np.float64))
    # the reciprocal, the product and a threshold are each off by at most a few float32 ulp of 1
    assert (np.abs(y - chosen) <= distances.min(axis=1) + 8 * 2.0**-24).all()


NF4_LIMITS = {
    32: (0.068229, 0.191854),
    64: (0.073316, 0.205719),
    128: (0.077468, 0.217974),
    256: (0.081051, 0.228891),
}
NF4_LIMITS |= {512: (0.084548, 0.239887), 1024: (0.087919, 0.249570), 2048: (0.091349, 0.259392)}
NF4_LIMITS |= {4096: (0.095067, 0.269466)}
FP4_LIMITS = {
    32: (0.089562, 0.244753),
    64: (0.097320, 0.262778),
    128: (0.103907, 0.278848),
    256: (0.109958, 0.293310),
}
FP4_LIMITS |= {512: (0.115753, 0.306962), 1024: (0.121573, 0.320299), 2048: (0.127741, 0.333292)}
FP4_LIMITS |= {4096: (0.133820, 0.345842)}


@pytest.mark.parametrize("block_size", BLOCK_SIZES_4BIT)
@pytest.mark.parametrize(("codebook", "limits"), [("nf4", NF4_LIMITS), ("fp4", FP4_LIMITS)])
def test_error_on_normal_data_is_within_the_published_limits(device, codebook, limits, block_size):
    """Mean absolute and relative error on a 1024 x 1024 standard normal; limit = mean + 7 sigma."""
    x = torch.randn(1024, 1024, device=device)
    packed, absmax = ops.quantize_4bit(x, codebook, block_size)
    output = ops.dequantize_4bit(packed, absmax, x.numel(), codebook, block_size, torch.float32).view_as(x)
    error = (output - x).abs()
    assert error.mean().item() < limits[block_size][0]
    assert (error / (x.abs() + 1e-8)).mean().item() < limits[block_size][1]


def test_results_are_allocated_beside_the_input(device):
    x = torch.randn(3, 43, dtype=torch.float16, device=device)
    packed, absmax = ops.quantize_4bit(x, "nf4", 32)
    assert (packed.shape, packed.dtype, packed.device) == ((65,), torch.uint8, x.device)
    assert (absmax.shape, absmax.dtype, absmax.device) == ((5,), torch.float32, x.device)
    output = ops.dequantize_4bit(packed, absmax, 129, "nf4", 32, torch.bfloat16)
    assert (output.shape, output.dtype, output.device) == ((129,), torch.bfloat16, x.device)


def test_out_is_what_comes_back(device):
    x = torch.randn(100, device=device)
    fresh = ops.quantize_4bit(x, "nf4", 64)
    out = tuple(g.tensor for g in guarded_like(fresh))
    returned = ops.quantize_4bit(x, "nf4", 64, out=out)
    assert all(r is o for r, o in zip(returned, out, strict=True))
    assert all(torch.equal(f, o) for f, o in zip(fresh, out, strict=True))


def test_inputs_are_left_alone(device):
    x = torch.randn(1000, device=device)
    before = x.clone()
    packed, absmax = ops.quantize_4bit(x, "fp4", 64)
    kept = packed.clone(), absmax.clone()
    ops.dequantize_4bit(packed, absmax, 1000, "fp4", 64, torch.float32)
    assert torch.equal(x, before)
    assert torch.equal(packed, kept[0])
    assert torch.equal(absmax, kept[1])


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES_4BIT)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_equals_cpu_on_millions_of_elements(dtype, codebook, block_size):
    x = torch.randn(2**22 + 37).to(dtype_of(dtype))
    packed, absmax = ops.quantize_4bit(x, codebook, block_size)
    for _ in range(3):  # and every run gives the same bits
        got_packed, got_absmax = ops.quantize_4bit(x.cuda(), codebook, block_size)
        assert_same_bits(got_absmax, absmax)
        assert_same_bits(got_packed, packed)
    output = ops.dequantize_4bit(packed, absmax, x.numel(), codebook, block_size, x.dtype)
    got = ops.dequantize_4bit(packed.cuda(), absmax.cuda(), x.numel(), codebook, block_size, x.dtype)
    assert_same_bits(got, output)


@pytest.mark.slow
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_more_than_2_to_the_31_elements(device, codebook):
    """The tail behind 2^31 equals the same tail quantized alone; bfloat16 keeps it at 8.7 GB."""
    n = 2**31 + 64 * 1000 + 33
    skip_without_memory(device, 9 * 2**30)
    x = torch.zeros(n, dtype=torch.bfloat16, device=device)
    first_of_tail = 2**31 - 64 * 8
    tail = torch.randn(n - first_of_tail, dtype=torch.bfloat16, device=device)
    x[first_of_tail:] = tail
    x[:1000] = torch.randn(1000, dtype=torch.bfloat16, device=device)
    packed, absmax = ops.quantize_4bit(x, codebook, 64)
    want_packed, want_absmax = ops.quantize_4bit(tail, codebook, 64)
    assert torch.equal(packed[first_of_tail // 2 :], want_packed)
    assert torch.equal(absmax[first_of_tail // 64 :], want_absmax)
    head_packed, head_absmax = ops.quantize_4bit(x[:1000], codebook, 64)
    assert torch.equal(packed[:500], head_packed)
    assert torch.equal(absmax[:15], head_absmax[:15])
    ops.dequantize_4bit(packed, absmax, n, codebook, 64, torch.bfloat16, out=x)
    want = ops.dequantize_4bit(want_packed, want_absmax, tail.numel(), codebook, 64, torch.bfloat16)
    assert torch.equal(x[first_of_tail:], want)
    assert torch.count_nonzero(x[1024 : first_of_tail : 2**16 + 1]).item() == 0
