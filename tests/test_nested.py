"""Nested statistics: the second level of absmax, and its decoding fused into dequantize_4bit."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import reference
import torch
from compare import Guarded, assert_same_bits, dtype_of, skip_without_memory, tensor_of
from qbits import ops
from reference import BLOCK_SIZES_4BIT, CODEBOOKS, DTYPES, Bytes, Floats, ceil_div

RANDOM = np.random.default_rng(23)
SIZES = (1, 2, 3, 255, 256, 257, 511, 512, 513, 1000, 4097, 70_001)


def quantize_and_compare(absmax: Floats, device: str, offset: int = 0) -> None:
    """Into guarded outputs; codes, scale and offset must equal the reference."""
    n = absmax.size
    codes = Guarded((n,), torch.uint8, device, offset)
    scale = Guarded((ceil_div(n, 256),), torch.float32, device, offset)
    mean = Guarded((), torch.float32, device, offset)
    outputs = (codes.tensor, scale.tensor, mean.tensor)
    ops.quantize_absmax(tensor_of(absmax, "float32", device, offset), out=outputs)
    want_codes, want_scale, want_mean = reference.quantize_absmax(absmax)
    assert_same_bits(mean.tensor, np.array([want_mean]), f"offset, n {n}")
    assert_same_bits(scale.tensor, want_scale, f"scale, n {n}")
    assert_same_bits(codes.tensor, want_codes, f"codes, n {n}")
    for guarded in (codes, scale, mean):
        guarded.assert_intact()


@pytest.mark.parametrize("n", SIZES)
def test_quantize_absmax_equals_the_reference(device, n):
    for spread in (0.1, 10.0):
        absmax = np.abs(RANDOM.standard_normal(n)).astype(np.float32) * np.float32(spread) + np.float32(0.01)
        for offset in (0, 1):
            quantize_and_compare(absmax, device, offset)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1e-40, 2.0**-126, 3.4e38, 1e-30])
@pytest.mark.parametrize("rest", [0.0, 1.0, 1e-40])
def test_quantize_absmax_handles_every_kind_of_number(device, value, rest):
    for n, place in ((1, 0), (300, 0), (300, 299)):
        absmax = np.full(n, rest, np.float32)
        absmax[place] = value
        quantize_and_compare(absmax, device)


def test_the_mean_follows_the_prescribed_order_of_sums(device):
    """Runs of 256 in float64, then their totals: values of mixed size make any other order visible."""
    for seed in range(40):
        random = np.random.default_rng(seed)
        absmax = np.exp(random.uniform(-60, 60, int(random.integers(2, 3000)))).astype(np.float32)
        _, _, mean = ops.quantize_absmax(tensor_of(absmax, "float32", device))
        assert_same_bits(mean, np.array([reference.mean_of_absmax(absmax)]), f"seed {seed}")


def test_quantize_absmax_of_equal_values_is_exact(device):
    codes, scale, mean = ops.quantize_absmax(torch.full((1000,), 0.37, device=device))
    assert codes.eq(127).all()
    assert scale.eq(0).all()
    assert mean.item() == np.float32(0.37)


def nested_parts(num_blocks: int) -> tuple[Bytes, Floats, np.float32]:
    """Codes, second-level scales and offset that decode to positive values."""
    codes = RANDOM.integers(0, 256, num_blocks, np.uint8)
    scale = RANDOM.uniform(0, 0.5, ceil_div(num_blocks, 256)).astype(np.float32)
    return codes, scale, np.float32(1.234567)


@pytest.mark.parametrize("block_size", BLOCK_SIZES_4BIT)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_4bit_nested_equals_the_reference(device, dtype, codebook, block_size):
    for n in (1, block_size - 1, block_size + 1, 256 * block_size + 1, 300 * 64 + 37):
        packed = RANDOM.integers(0, 256, ceil_div(n, 2), np.uint8)
        codes, scale, mean = nested_parts(ceil_div(n, block_size))
        absmax = reference.decode_absmax(codes, scale, mean)
        want = reference.round_to(reference.decode_4bit(packed, absmax, n, codebook, block_size), dtype)
        for offset in (0, 1):
            output = Guarded((n,), dtype_of(dtype), device, offset)
            ops.dequantize_4bit(
                tensor_of(packed, "uint8", device, offset),
                tensor_of(codes, "uint8", device, offset),
                n,
                codebook,
                block_size,
                dtype_of(dtype),
                tensor_of(scale, "float32", device, offset),
                tensor_of(np.array([mean]), "float32", device, offset),
                out=output.tensor,
            )
            assert_same_bits(
                output.tensor, want, f"{codebook} {dtype} block {block_size} n {n} offset {offset}"
            )
            output.assert_intact()


def test_the_product_and_the_sum_are_rounded_separately(device):
    """A fused multiply-add would change some of these scales; the reference says which."""
    num_blocks = 4096
    codes, scale, mean = nested_parts(num_blocks)
    table = reference.dynamic_map().astype(np.float64)
    fused = (table[codes] * np.repeat(scale, 256).astype(np.float64) + np.float64(mean)).astype(np.float32)
    absmax = reference.decode_absmax(codes, scale, mean)
    assert (fused != absmax).any(), "the data must tell the two apart"
    packed = np.full(num_blocks * 32, 0xFF, np.uint8)  # NF4 code 15 is 1.0: the output is absmax itself
    output = ops.dequantize_4bit(
        tensor_of(packed, "uint8", device),
        tensor_of(codes, "uint8", device),
        num_blocks * 64,
        "nf4",
        64,
        torch.float32,
        tensor_of(scale, "float32", device),
        tensor_of(np.array([mean]), "float32", device),
    )
    assert_same_bits(output, np.repeat(absmax, 64))


def test_a_map_from_a_file_is_used_instead_of_the_built_in_one(device):
    n, block_size = 20_000, 64
    packed = RANDOM.integers(0, 256, n // 2, np.uint8)
    codes, scale, mean = nested_parts(ceil_div(n, block_size))
    for table in (np.sort(RANDOM.uniform(-1, 1, 256).astype(np.float32)), reference.dynamic_map()):
        absmax = reference.decode_absmax(codes, scale, mean, table)
        output = ops.dequantize_4bit(
            tensor_of(packed, "uint8", device),
            tensor_of(codes, "uint8", device),
            n,
            "fp4",
            block_size,
            torch.bfloat16,
            absmax_scale=tensor_of(scale, "float32", device),
            absmax_offset=torch.tensor(float(mean), device=device),
            absmax_codebook=tensor_of(table, "float32", device, 1),
        )
        want = reference.decode_4bit(packed, absmax, n, "fp4", block_size)
        assert_same_bits(output, reference.round_to(want, "bfloat16"))


def test_ops_reproduce_the_golden_nested_tensor(device):
    x = tensor_of(golden.nested_input(), "float32", device)
    packed, absmax = ops.quantize_4bit(x.view(golden.NESTED_SHAPE), "nf4", 64)
    assert golden.sha256(packed.cpu().numpy()) == golden.NESTED_PACKED_SHA256
    assert golden.sha256(absmax.cpu().numpy()) == golden.NESTED_ABSMAX_SHA256
    codes, scale, mean = ops.quantize_absmax(absmax)
    assert golden.sha256(codes.cpu().numpy()) == golden.NESTED_CODES_SHA256
    assert scale.cpu().numpy().tobytes().hex() == golden.NESTED_SCALE
    assert mean.cpu().numpy().tobytes().hex() == golden.NESTED_OFFSET
    output = ops.dequantize_4bit(packed, codes, x.numel(), "nf4", 64, torch.float32, scale, mean)
    assert golden.sha256(output.cpu().numpy()) == golden.NESTED_DECODED_SHA256


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_error_on_normal_data_is_within_the_published_limits(device, codebook, block_size):
    x = torch.randn(1024, 1024, device=device)
    packed, absmax = ops.quantize_4bit(x, codebook, block_size)
    codes, scale, mean = ops.quantize_absmax(absmax)
    output = ops.dequantize_4bit(packed, codes, x.numel(), codebook, block_size, torch.float32, scale, mean)
    error = (output.view_as(x) - x).abs()
    assert error.mean().item() < 0.11
    assert (error / (x.abs() + 1e-8)).mean().item() < 0.28


@pytest.mark.gpu
def test_cuda_equals_cpu_on_many_scales():
    absmax = torch.rand(2**20 + 37) + 0.01
    want = ops.quantize_absmax(absmax)
    for _ in range(5):  # and every run gives the same bits
        for got, expected in zip(ops.quantize_absmax(absmax.cuda()), want, strict=True):
            assert_same_bits(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES_4BIT)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_dequantize_on_cuda_equals_cpu_on_millions_of_elements(dtype, codebook, block_size):
    x = torch.randn(2**22 + 37)
    packed, absmax = ops.quantize_4bit(x, codebook, block_size)
    parts = ops.quantize_absmax(absmax)
    cuda_parts = [p.cuda() for p in parts]
    want = ops.dequantize_4bit(packed, parts[0], x.numel(), codebook, block_size, dtype_of(dtype), *parts[1:])
    got = ops.dequantize_4bit(
        packed.cuda(), cuda_parts[0], x.numel(), codebook, block_size, dtype_of(dtype), *cuda_parts[1:]
    )
    assert_same_bits(got, want)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(device):
    """The tail behind 2^31 elements decodes as the same tail alone."""
    skip_without_memory(device, 9 * 2**30)
    n, block_size, tail_blocks = 2**31 + 64 * 256 * 3, 64, 256 * 3
    packed = torch.full((n // 2,), 0x77, dtype=torch.uint8, device=device)
    packed[2**30 :] = torch.randint(0, 256, (tail_blocks * 32,), dtype=torch.uint8, device=device)
    codes = torch.randint(0, 256, (n // block_size,), dtype=torch.uint8, device=device)
    scale = torch.rand(n // block_size // 256, device=device)
    mean = torch.tensor(1.5, device=device)
    output = ops.dequantize_4bit(packed, codes, n, "nf4", block_size, torch.bfloat16, scale, mean)
    want = ops.dequantize_4bit(
        packed[2**30 :],
        codes[-tail_blocks:],
        tail_blocks * 64,
        "nf4",
        block_size,
        torch.bfloat16,
        scale[-3:],
        mean,
    )
    assert torch.equal(output[2**31 :], want)
    assert torch.count_nonzero(output[: 2**31 : 2**16 + 1]).item() == 0
