"""gemm_4bit_transposed against float64: at most twice as far from it as dequantize and torch's matmul."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from compare import Guarded, assert_same_bits, dtype_of, skip_without_memory, tensor_of, widened
from qbits import ops
from qbits.errors import QbitsError
from reference import BLOCK_SIZES_4BIT, CODEBOOKS, DTYPES
from test_gemm_4bit import RANDOM, Weight, _same_numbers_in_any_order, decoded_matrix, random_weight

__all__ = ["_same_numbers_in_any_order"]

SHAPES = [
    (1, 1), (7, 30), (16, 32), (33, 100), (5, 129), (130, 256), (200, 288), (48, 520), (513, 64),
    (8, 256), (136, 768), (1024, 1024),
]  # fmt: skip


def multiply_and_compare(M: int, weight: Weight, dtype: str, device: str, offset: int = 0) -> None:
    """Into a guarded output; the error against float64 must be at most twice torch's."""
    N, K = weight.shape
    x = tensor_of(RANDOM.standard_normal(M * N, np.float32), dtype, device, offset).view(M, N)
    positional, keywords = weight.arguments(device, offset)
    output = Guarded((M, K), dtype_of(dtype), device)
    ops.gemm_4bit_transposed(x, *positional, out=output.tensor, **keywords)
    output.assert_intact()
    parts = (weight.packed, weight.absmax, (N, K), weight.codebook, weight.block_size)
    exact = torch.from_numpy(reference.gemm_4bit_transposed(widened(x).reshape(M, N), *parts)).to(device)
    torch_error = ((x @ decoded_matrix(weight, dtype, device)).double() - exact).abs().max()
    one_rounding = exact.abs().max() * torch.finfo(x.dtype).eps
    assert (output.tensor.double() - exact).abs().max() <= 2 * torch_error + one_rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("M", [1, 5, 8, 13, 33])
def test_gemm_4bit_transposed_is_as_exact_as_torch(device, dtype, shape, M):
    multiply_and_compare(M, random_weight(*shape), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES_4BIT)
@pytest.mark.parametrize("nested", [False, True])
def test_every_weight_format_is_read(device, dtype, codebook, block_size, nested):
    for shape in ((300, 96), (136, 4096)):
        multiply_and_compare(4, random_weight(*shape, codebook, block_size, nested), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment_is_taken(device, dtype):
    for offset in (1, 2, 4):
        multiply_and_compare(3, random_weight(40, 64), dtype, device, offset)


@pytest.mark.parametrize("M, N, K", [(0, 5, 64), (3, 0, 64), (3, 5, 0)])
def test_empty_sums_are_zero(device, M, N, K):
    weight = random_weight(N, K)
    positional, keywords = weight.arguments(device)
    output = ops.gemm_4bit_transposed(torch.ones(M, N, device=device), *positional, **keywords)
    assert torch.equal(output, torch.zeros(M, K, device=device))


@pytest.mark.parametrize("M", [2, 16, 32])
def test_large_weights_are_as_exact_as_torch(device, M):
    for shape in ((1000, 2080), (4100, 512), (1000, 2048), (4096, 512)):
        multiply_and_compare(M, random_weight(*shape), "bfloat16", device)


def test_the_same_call_gives_the_same_bits(device):
    weight = random_weight(515, 1056)
    positional, keywords = weight.arguments(device)
    for M in (3, 20):
        x = torch.randn(M, 515, device=device).half()
        first = ops.gemm_4bit_transposed(x, *positional, **keywords)
        for _ in range(5):
            assert_same_bits(ops.gemm_4bit_transposed(x, *positional, **keywords), first)


@pytest.mark.parametrize("position", [0, 1, 255, 256, 600])
def test_one_input_picks_one_row_of_the_weight(device, position):
    """An index-coded input: each output is a decoded weight, exactly."""
    weight = random_weight(601, 352)
    positional, keywords = weight.arguments(device)
    x = torch.zeros(1, 601, device=device, dtype=torch.bfloat16)
    x[0, position] = 1
    got = ops.gemm_4bit_transposed(x, *positional, **keywords)
    assert torch.equal(got[0], decoded_matrix(weight, "bfloat16", device)[position])


@pytest.mark.parametrize("M", [3, 500])
@pytest.mark.parametrize(("op", "K"), [(ops.gemm_4bit, 64), (ops.gemm_4bit_transposed, 96)])
def test_outputs_are_checked_also_where_torch_multiplies(device, op, K, M):
    """With 500 rows the weight is decoded for torch's product."""
    positional, keywords = random_weight(96, 64).arguments(device)
    x = torch.ones(M, K, device=device)
    num = M * (160 - K)
    for out, message in (
        (torch.empty(num, dtype=torch.float16, device=device), "have dtype float32, got float16"),
        (torch.empty(7, device=device), f" = {num} elements, got 7"),
        (torch.empty(num, 2, device=device)[:, 0], "be contiguous, got a strided view"),
        (torch.empty(num + x.numel(), device=device), "not share memory with input"),
    ):
        if out.numel() > num:
            x, out = out[: x.numel()].view(M, K), out[x.numel() // 2 :][:num]
        with pytest.raises(QbitsError, match=f"^qbits::{op.__name__}: output must .*{message}"):
            op(x, *positional, out=out, **keywords)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("K", [8192, 8200])
def test_kernels_read_weights_of_more_than_2_to_the_31_elements(K):
    N = 2**18 + 128
    skip_without_memory("cuda", 6 * 2**30)
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(N * K // 64, device="cuda")
    x = torch.randn(2, N, device="cuda").to(torch.bfloat16)
    got = ops.gemm_4bit_transposed(x, packed, absmax, N, K, "nf4", 64)
    want = torch.zeros(2, K, device="cuda", dtype=torch.float64)
    for first in range(0, N, 2**13):
        rows = min(2**13, N - first)
        codes = packed[first * K // 2 : (first + rows) * K // 2]
        scales = absmax[first * K // 64 : (first + rows) * K // 64]
        part = ops.dequantize_4bit(codes, scales, rows * K, "nf4", 64, torch.float32).view(rows, K)
        want += x[:, first : first + rows].double() @ part.double()
    # a bfloat16 result of N terms; rows left out, or read elsewhere, would change it by a hundredth and more
    assert (got.double() - want).abs().max() <= 0.01 * want.abs().max()
