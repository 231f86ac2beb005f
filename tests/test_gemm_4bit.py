"""gemm_4bit against float64: at most twice as far from it as dequantize and torch's linear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from compare import Guarded, assert_same_bits, dtype_of, skip_without_memory, tensor_of, widened
from qbits import ops
from reference import BLOCK_SIZES_4BIT, CODEBOOKS, DTYPES, Bytes, Floats, ceil_div

RANDOM = np.random.default_rng(24)
FIRST_STATE = RANDOM.bit_generator.state
Doubles = npt.NDArray[np.float64]
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """Errors are compared, so a test must see the same data alone and in the suite."""
    RANDOM.bit_generator.state = FIRST_STATE


@dataclass
class Weight:
    """A quantized [N, K] weight with its parts as NumPy arrays and as tensors."""

    shape: tuple[int, int]
    codebook: str
    block_size: int
    packed: Bytes
    absmax: Floats  # float32, also when the op is given nested parts
    nested: tuple[Bytes, Floats, np.float32] | None

    def arguments(self, device: str, offset: int = 0) -> tuple[list[object], dict[str, torch.Tensor]]:
        """What follows `input` in the call, and the nested keywords."""
        N, K = self.shape
        absmax = tensor_of(self.absmax, "float32", device, offset)
        keywords = {}
        if self.nested:
            absmax = tensor_of(self.nested[0], "uint8", device, offset)
            keywords["absmax_scale"] = tensor_of(self.nested[1], "float32", device, offset)
            keywords["absmax_offset"] = torch.tensor(float(self.nested[2]), device=device)
        packed = tensor_of(self.packed, "uint8", device, offset)
        return [packed, absmax, N, K, self.codebook, self.block_size], keywords


def random_weight(
    N: int, K: int, codebook: str = "nf4", block_size: int = 64, nested: bool = False
) -> Weight:
    """A normal weight of variance 1 / K, quantized by the reference."""
    x = (RANDOM.standard_normal(N * K) / max(K, 1) ** 0.5).astype(np.float32)
    packed, absmax = reference.quantize_4bit(x, codebook, block_size)
    parts = None
    if nested:
        parts = reference.quantize_absmax(absmax)
        absmax = reference.decode_absmax(*parts)
    return Weight((N, K), codebook, block_size, packed, absmax, parts)


def decoded_matrix(weight: Weight, dtype: str, device: str) -> torch.Tensor:
    """The weight [N, K], each element rounded once."""
    N, K = weight.shape
    values = reference.decode_4bit(weight.packed, weight.absmax, N * K, weight.codebook, weight.block_size)
    return tensor_of(values, dtype, device).view(N, K)


def torch_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """Dequantize to the input's dtype, then torch's linear."""
    matrix = decoded_matrix(weight, str(x.dtype).removeprefix("torch."), str(x.device))
    return torch.nn.functional.linear(x, matrix, None if bias is None else bias.to(x.dtype))


def multiply_and_compare(
    M: int, weight: Weight, dtype: str, device: str, bias_dtype: str | None = None, offset: int = 0
) -> None:
    """Into a guarded output; the error against float64 must be at most twice torch's."""
    N, K = weight.shape
    x = tensor_of(RANDOM.standard_normal(M * K, np.float32), dtype, device, offset).view(M, K)
    bias = None
    if bias_dtype:
        bias = tensor_of(RANDOM.standard_normal(N, np.float32), bias_dtype, device, offset)
    arguments, keywords = weight.arguments(device, offset)
    output = Guarded((M, N), dtype_of(dtype), device, offset)
    ops.gemm_4bit(x, *arguments, bias=bias, out=output.tensor, **keywords)
    output.assert_intact()
    want = reference.gemm_4bit(
        widened(x).reshape(M, K),
        weight.packed,
        weight.absmax,
        weight.shape,
        weight.codebook,
        weight.block_size,
        None if bias is None else widened(bias),
    )
    got = widened(output.tensor).reshape(M, N)
    what = (
        f"M {M} N {N} K {K} {weight.codebook} {weight.block_size} {dtype} bias {bias_dtype} offset {offset}"
    )
    assert_close(got, want, widened(torch_linear(x, weight, bias)).reshape(M, N), dtype, what)
    if dtype == "float32" and want.size:
        # whatever the order of K additions, their roundings stay within K + 2 halves of a unit of the sum of
        # magnitudes; the average of many outputs says more, but this holds for each
        values = reference.decode_4bit(
            weight.packed, weight.absmax, N * K, weight.codebook, weight.block_size
        )
        magnitudes = np.abs(widened(x).reshape(M, K)) @ np.abs(values.reshape(N, K)).T
        if bias is not None:
            magnitudes = magnitudes + np.abs(widened(bias))
        assert (np.abs(got - want) <= (K + 2) * 2.0**-24 * magnitudes + 1e-30).all(), what


def assert_close(got: Floats, want: Doubles, dense: Floats, dtype: str, what: str) -> None:
    """At most twice the error of torch's own product; of fewer than 256 outputs that error is luck."""
    error, torch_error = np.abs(got - want), np.abs(dense - want)
    assert np.isfinite(error).all(), what
    # the one rounding to the output dtype, half a unit in the last place, which torch may escape by luck
    rounding = EPSILON[dtype] / 2 * np.abs(want)
    if error.size >= 256 or (error.size and dtype != "float32"):
        assert error.max() <= 2 * torch_error.max() + rounding.max(), what
        assert error.mean() <= 2 * torch_error.mean() + rounding.mean(), what


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 3, 7, 8, 9, 16, 17, 33, 65, 129])
def test_gemm_4bit_is_as_close_to_float64_as_torch_for_every_m(device, dtype, M):
    multiply_and_compare(M, random_weight(96, 256), dtype, device)
    multiply_and_compare(M, random_weight(45, 192, "fp4"), dtype, device, bias_dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257])
def test_gemm_4bit_handles_every_tail_of_n(device, dtype, N):
    weight = random_weight(N, 128)
    for M in (1, 5, 19):
        multiply_and_compare(M, weight, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "K", [1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 96, 127, 129, 251, 513, 1000, 1024]
)
def test_gemm_4bit_handles_every_tail_of_k_and_blocks_that_straddle_rows(device, dtype, K):
    weight = random_weight(37, K)
    for M in (1, 4, 18):
        multiply_and_compare(M, weight, dtype, device)


@pytest.mark.parametrize("block_size", BLOCK_SIZES_4BIT)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_4bit_for_every_codebook_and_block_size(device, dtype, codebook, block_size):
    for nested in (False, True):
        for N, K in ((48, 256), (31, 77)):
            weight = random_weight(N, K, codebook, block_size, nested)
            for M in (1, 6):
                multiply_and_compare(M, weight, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_gemm_4bit_adds_a_bias_of_any_dtype(device, dtype, bias_dtype, nested):
    weight = random_weight(70, 320, nested=nested)
    for M in (1, 8, 20):
        multiply_and_compare(M, weight, dtype, device, bias_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3, 8])
def test_gemm_4bit_reads_and_writes_views_at_any_offset(device, dtype, offset):
    for N, K, nested in ((48, 256, False), (33, 65, True)):
        weight = random_weight(N, K, nested=nested)
        for M in (1, 9):
            multiply_and_compare(M, weight, dtype, device, dtype, offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_k_of_zero_gives_the_bias_or_zeros(device, dtype, bias_dtype):
    M, N = 3, 37
    bias = (
        None if bias_dtype is None else tensor_of(RANDOM.standard_normal(N, np.float32), bias_dtype, device)
    )
    output = Guarded((M, N), dtype_of(dtype), device)
    arguments, _ = random_weight(N, 0).arguments(device)
    ops.gemm_4bit(
        torch.empty(M, 0, dtype=dtype_of(dtype), device=device), *arguments, bias=bias, out=output.tensor
    )
    output.assert_intact()
    want = torch.zeros(M, N) if bias is None else bias.float().cpu().expand(M, N)
    assert torch.equal(output.tensor.cpu(), want.to(dtype_of(dtype)))


@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_columns_give_an_empty_result(device, M, N):
    arguments, _ = random_weight(N, 64).arguments(device)
    assert ops.gemm_4bit(torch.ones(M, 64, device=device), *arguments).shape == (M, N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_rows_return_the_columns_of_the_dequantized_weight(device, dtype):
    """With one exact term per sum, the only error left is how the kernel rounds a weight."""
    weight = random_weight(65, 128)
    arguments, _ = weight.arguments(device)
    identity = torch.eye(128, dtype=dtype_of(dtype), device=device)
    values = reference.decode_4bit(weight.packed, weight.absmax, 65 * 128, "nf4", 64).reshape(65, 128)
    for first in range(0, 128, 8):
        output = ops.gemm_4bit(identity[first : first + 8].contiguous(), *arguments)
        error = np.abs(widened(output).reshape(8, 65) - values[:, first : first + 8].T)
        # a weight may be rounded to the input's dtype before the product, the sum is rounded once
        assert (error <= EPSILON[dtype] * np.abs(values[:, first : first + 8].T)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_badly_scaled_blocks_and_rows_do_not_spread_their_error(device, dtype):
    """Rows whose scales differ by 2^20 and inputs with large outliers, row by row against float64."""
    N, K, M = 24, 512, 64  # 64 rows of input: the largest of fewer errors says little about a row
    scales = 2.0 ** RANDOM.integers(-10, 4, (N, K // 64))
    x = (RANDOM.standard_normal((N, K // 64, 64)) * scales[:, :, None]).reshape(-1).astype(np.float32)
    packed, absmax = reference.quantize_4bit(x, "nf4", 64)
    weight = Weight((N, K), "nf4", 64, packed, absmax, None)
    inputs = RANDOM.standard_normal((M, K)).astype(np.float32)
    inputs[:, ::67] *= 50
    a = tensor_of(inputs, dtype, device).view(M, K)
    arguments, _ = weight.arguments(device)
    fused = torch.cat([ops.gemm_4bit(rows, *arguments) for rows in a.split(8)])
    got = widened(fused).reshape(M, N)
    want = reference.gemm_4bit(widened(a).reshape(M, K), packed, absmax, (N, K), "nf4", 64, None)
    torch_error = np.abs(widened(torch_linear(a, weight, None)).reshape(M, N) - want)
    rounding = EPSILON[dtype] / 2 * np.abs(want)
    for row in range(N):
        assert np.abs(got - want)[:, row].max() <= 2 * torch_error[:, row].max() + rounding[:, row].max(), row


def test_nan_and_inf_scales_reach_exactly_their_rows(device):
    weight = random_weight(8, 64)
    weight.absmax[2], weight.absmax[5] = np.nan, np.inf
    arguments, _ = weight.arguments(device)
    output = ops.gemm_4bit(torch.randn(3, 64, device=device), *arguments)
    finite = torch.isfinite(output).all(dim=0).cpu()
    assert finite.tolist() == [True, True, False, True, True, False, True, True]


@pytest.mark.parametrize("M", [1, 8, 40])
def test_gemm_4bit_gives_the_same_bits_every_time(device, M):
    arguments, _ = random_weight(256, 1024).arguments(device)
    x = torch.randn(M, 1024, device=device).to(torch.bfloat16)
    first = ops.gemm_4bit(x, *arguments)
    for _ in range(20):
        assert_same_bits(ops.gemm_4bit(x, *arguments), first)


def test_out_and_allocated_results_are_the_same(device):
    arguments, _ = random_weight(40, 96).arguments(device)
    x = torch.randn(5, 96, device=device)
    out = torch.full((5, 40), float("nan"), device=device)
    fresh = ops.gemm_4bit(x, *arguments)
    assert ops.gemm_4bit(x, *arguments, out=out) is out
    assert torch.equal(out, fresh)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(4096, 4096), (1023, 4096), (512, 14336), (256, 8256), (8192, 1024)])
def test_gemm_4bit_on_model_shapes(dtype, N, K, codebook, nested):
    """Float64 on the GPU, from scales and values that other tests compare with the reference."""
    weight = torch.randn(N, K, device="cuda") / K**0.5
    packed, absmax = ops.quantize_4bit(weight, codebook, 64)
    keywords = {}
    if nested:
        absmax, keywords["absmax_scale"], keywords["absmax_offset"] = ops.quantize_absmax(absmax)
    values = ops.dequantize_4bit(packed, absmax, N * K, codebook, 64, torch.float32, **keywords).view(N, K)
    for M in (1, 2, 4, 5, 8, 9, 16, 64):
        x = torch.randn(M, K, device="cuda").to(dtype_of(dtype))
        bias = torch.randn(N, device="cuda").to(dtype_of(dtype))
        got = ops.gemm_4bit(x, packed, absmax, N, K, codebook, 64, bias=bias, **keywords)
        want = x.double() @ values.double().T + bias.double()
        error = (got.double() - want).abs()
        torch_error = (torch.nn.functional.linear(x, values.to(x.dtype), bias).double() - want).abs()
        rounding = want.abs() * (EPSILON[dtype] / 2)
        assert error.max() <= 2 * torch_error.max() + rounding.max(), M
        assert error.mean() <= 2 * torch_error.mean(), M


def check_ends(device: str, M: int, N: int, K: int) -> None:
    """The first and last rows of a random weight give the products with those rows alone, up to rounding."""
    rows = 256  # a multiple of 64 elements, so that each end has blocks of its own
    decoded_bytes = 2 * N * K if M > 512 else 0
    skip_without_memory(device, N * K * 5 // 8 + decoded_bytes + 2 * M * N + 2**30)
    num_blocks = ceil_div(N * K, 64)
    packed = torch.randint(0, 256, (ceil_div(N * K, 2),), dtype=torch.uint8, device=device)
    absmax = torch.rand(num_blocks, device=device)
    x = torch.randn(M, K, device=device).to(torch.bfloat16)
    output = torch.full((M, N), torch.nan, dtype=torch.bfloat16, device=device)
    ops.gemm_4bit(x, packed, absmax, N, K, "nf4", 64, out=output)
    half, blocks = rows * K // 2, rows * K // 64
    for codes, scales, got in (
        (packed[:half], absmax[:blocks], output[:, :rows]),
        (packed[-half:], absmax[-blocks:], output[:, -rows:]),
    ):
        decoded = ops.dequantize_4bit(codes, scales, rows * K, "nf4", 64, torch.float32).view(rows, K)
        want = x.double() @ decoded.double().T
        # a bfloat16 result of K terms; a wrong row would be off by the whole value, of size sqrt(K)
        assert (got.double() - want).abs().max() <= 0.05 * want.abs().max()


@pytest.mark.slow
def test_a_weight_of_more_than_2_to_the_31_elements(device):
    check_ends(device, 2, 2**18 + 128, 8192)


# By the families skinny_sm90, skinny, mid, large, simt, decoding and torch where the GPU is an H200.
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("M", "K"),
    [(1, 8192), (8, 4096), (2, 4160), (40, 8192), (128, 4160), (300, 4096), (3, 4104), (600, 4096)],
)
def test_kernels_read_weights_of_more_than_2_to_the_31_elements(M, K):
    check_ends("cuda", M, ceil_div(2**31, K * 64) * 64 + 128, K)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("M", "K"), [(8, 256), (7, 64), (16, 64), (128, 128), (512, 64), (8, 24), (1000, 64)]
)
def test_kernels_write_more_than_2_to_the_31_elements(M, K):
    check_ends("cuda", M, ceil_div(2**31, M * 64) * 64 + 2**15, K)
