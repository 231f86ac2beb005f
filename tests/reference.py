"""Slow NumPy implementations of every op, written from NUMERICS and sharing nothing with the Rust code.

Inputs are float32 arrays (16-bit inputs widen exactly). Rounding happens only where NUMERICS asks for it; a
matrix product is accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SMALLEST_NORMAL = np.float32(2.0**-126)
QUIET_NAN = np.array(0x7FC00000, np.uint32).view(np.float32)[()]
NESTED_BLOCK_SIZE = 256
DTYPES = ("float32", "float16", "bfloat16")
CODEBOOKS = ("nf4", "fp4", "af4")
BLOCK_SIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BLOCK_SIZES_8BIT = BLOCK_SIZES_4BIT[1:]


def ceil_div(a: int, b: int) -> int:
    """Quotient rounded up."""
    return -(-a // b)


def float32_of_bits(words: str) -> Floats:
    """Float32 values from their bit patterns, most significant digit first."""
    return np.array([int(word, 16) for word in words.split()], np.uint32).view(np.float32)


# ------------------------------------------------------------------------------------------ 4-bit codebooks

NF4_VALUES = float32_of_bits(
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
NF4_THRESHOLDS = float32_of_bits(
    "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
    "3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da"
)
FP4_MAGNITUDES = float32_of_bits("00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000")
FP4_VALUES = np.concatenate([FP4_MAGNITUDES, -FP4_MAGNITUDES])  # code 8 decodes to -0.0
FP4_THRESHOLDS = float32_of_bits("3b2aaab9 3db00000 3e555555 3e955555 3ed55556 3f155550 3f555555")
FP4_CODE_OF_RANK = np.array([0, 1, 6, 7, 4, 5, 2, 3], np.uint8)
AF4_VALUES = float32_of_bits(
    "3f800000 3f39685c 3f0e1203 3ed9ed55 3ea22dee 3e60e22a 3e0472f9 3d2f075f "
    "00000000 bd4a2141 be196bab be831c55 bebf54f7 bf032f19 bf31c4dc bf800000"
)
AF4_THRESHOLDS = (AF4_VALUES[:-1] + AF4_VALUES[1:]) * np.float32(0.5)

VALUES_4BIT = {"nf4": NF4_VALUES, "fp4": FP4_VALUES, "af4": AF4_VALUES}
THRESHOLDS_4BIT = {"nf4": NF4_THRESHOLDS, "fp4": FP4_THRESHOLDS, "af4": AF4_THRESHOLDS}
ZERO_CODE_4BIT = {"nf4": 7, "fp4": 0, "af4": 8}


def count_true(conditions: list[npt.NDArray[np.bool_]]) -> Bytes:
    """How many of the conditions hold, element by element."""
    count: Bytes = np.sum(conditions, axis=0).astype(np.uint8)
    return count


def encode_4bit(y: Floats, codebook: str) -> Bytes:
    """Codes of scaled values: NF4 counts `y > T`, AF4 (descending) `y < T`, FP4 ranks the magnitude."""
    if codebook == "nf4":
        return count_true([y > t for t in NF4_THRESHOLDS])
    if codebook == "af4":
        return count_true([y < t for t in AF4_THRESHOLDS])
    rank = count_true([np.abs(y) > t for t in FP4_THRESHOLDS])
    return np.where(y < 0, 8, 0).astype(np.uint8) + FP4_CODE_OF_RANK[rank]


# ------------------------------------------------------------------------------------------- 256-entry maps


def round_to_float32(x: Fraction) -> np.float32:
    """One rounding of an exact number to float32, ties to even."""
    if x == 0:
        return np.float32(0)
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    return np.float32(float(round(x / quantum) * quantum))


def linspace(a: float, b: float, num: int) -> Floats:
    """`step = RN(RN(b - a) / (num - 1))`; the first half counts from a, the rest from b, by fma."""
    first, last = np.float32(a), np.float32(b)
    step = (last - first) / np.float32(num - 1)
    exact_step, exact_first, exact_last = (Fraction(float(v)) for v in (step, first, last))
    points = [
        exact_first + exact_step * i if i < num // 2 else exact_last - exact_step * (num - 1 - i)
        for i in range(num)
    ]
    return np.array([round_to_float32(p) for p in points], np.float32)


def dynamic_map(signed: bool = True) -> Floats:
    """Seven decades of equal bins (Dettmers et al., arXiv:1511.04561, arXiv:2110.02861)."""
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for i in range(7):
        edge = linspace(0.1, 1.0, (2**i if signed else 2 ** (i + 1)) + 1)
        decade = np.float32(10.0 ** (i - 6))
        centres = decade * ((edge[:-1] + edge[1:]) * np.float32(0.5))
        values += [centres, -centres] if signed else [centres]
    return np.sort(np.concatenate(values))


def linear_map(signed: bool = True, add_zero: bool = True) -> Floats:
    """Equal steps from -1 (or 0) to 1; a signed map has a zero inserted at index 127."""
    if not signed:
        return linspace(0.0, 1.0, 256)
    if not add_zero:
        return linspace(-1.0, 1.0, 256)
    return np.insert(linspace(-1.0, 1.0, 255), 127, np.float32(0))


def normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Floats:
    """Quantiles of the normal distribution, 241 or 242 zeros between them (QLoRA, arXiv:2305.14314)."""

    def quantiles(num: int) -> list[float]:
        return [NormalDist().inv_cdf(float(p)) for p in linspace(offset, 0.5, num)[:-1]]

    positive, negative = quantiles(9 if use_extra_value else 8), quantiles(8)
    zeros = [0.0] * (256 - len(positive) - len(negative))
    values = np.sort(np.array([-v for v in negative] + zeros + positive, np.float32))
    scaled: Floats = values / values.max()
    return scaled


def fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2) -> Floats:
    """All field pairs of a small float whose exponent field runs downwards, divided by the largest."""
    bias = 2 ** (exponent_bits - 1)
    values: list[float] = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**precision_bits):
            fraction = mantissa / 2**precision_bits
            value = fraction * 2.0**-bias if exponent == 0 else (1 + fraction) * 2.0 ** (bias + 1 - exponent)
            values += [value, -value] if signed else [value]
    table = np.array(sorted(values), np.float32)  # sorted() is stable: +0 was created before -0
    scaled: Floats = table / table.max()
    return scaled


MAPS: dict[str, Callable[[], Floats]] = {
    "dynamic": dynamic_map,
    "dynamic_unsigned": lambda: dynamic_map(signed=False),
    "linear": linear_map,
    "linear_unsigned": lambda: linear_map(signed=False),
    "normal": normal_map,
    "e5m2": lambda: fp8_map(True, 5, 2),
    "e4m3": lambda: fp8_map(True, 4, 3),
}


def midpoints(codebook: Floats) -> Floats:
    """`mid[i] = RN(RN(c[i] + c[i + 1]) * 0.5)`."""
    return (codebook[:-1] + codebook[1:]) * np.float32(0.5)


def encode_8bit(y: Floats, codebook: Floats) -> Bytes:
    """Index of the nearest entry; a tie goes to the even index, unless both entries are equal."""
    mid = midpoints(codebook)
    k = np.searchsorted(mid, y, side="left")  # number of midpoints below y
    below = np.minimum(k, 254)
    tie_to_upper = (k < 255) & (y == mid[below]) & (k % 2 == 1) & (codebook[below] != codebook[below + 1])
    codes: Bytes = (k + tie_to_upper).astype(np.uint8)
    return codes


# ------------------------------------------------------------------------------------------------ blockwise


def scale_blocks(x: Floats, block_size: int) -> tuple[Floats, Floats]:
    """absmax [B] as stored, and y [n] = x times the rounded reciprocal (+0 in zero and non-finite blocks)."""
    num_blocks = ceil_div(x.size, block_size)
    padded = np.zeros(num_blocks * block_size, np.float32)
    padded[: x.size] = x
    rows = padded.reshape(num_blocks, block_size)
    absmax = np.abs(rows).max(axis=1)
    absmax[np.isnan(absmax)] = QUIET_NAN
    absmax[absmax < SMALLEST_NORMAL] = 0
    scaled = np.zeros_like(rows)
    usable = np.isfinite(absmax) & (absmax > 0)
    inverse = np.float32(1) / absmax[usable]
    scaled[usable] = rows[usable] * inverse[:, None]
    return absmax, scaled.reshape(-1)[: x.size]


def block_values(absmax: Floats, block_size: int, n: int) -> Floats:
    """absmax of every element: `absmax[i div block_size]`."""
    return np.repeat(absmax, block_size)[:n]


def pack_4bit(codes: Bytes, codebook: str) -> Bytes:
    """Two codes to a byte, the even element high; an odd count is filled up with the zero code."""
    low_bits = codes & 15
    if codes.size % 2:
        low_bits = np.append(low_bits, np.uint8(ZERO_CODE_4BIT[codebook]))
    return (low_bits[0::2] << 4 | low_bits[1::2]).astype(np.uint8)


def unpack_4bit(packed: Bytes, n: int) -> Bytes:
    """The codes of `n` elements."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]


def quantize_4bit(x: Floats, codebook: str, block_size: int) -> tuple[Bytes, Floats]:
    """packed [ceil(n / 2)], absmax [ceil(n / block_size)]."""
    absmax, y = scale_blocks(x, block_size)
    return pack_4bit(encode_4bit(y, codebook), codebook), absmax


def decode_absmax(
    codes: Bytes, scale: Floats, offset: Floats | np.float32, codebook: Floats | None = None
) -> Floats:
    """Nested statistics back to float32, in two roundings."""
    table = dynamic_map() if codebook is None else codebook
    product = table[codes] * block_values(scale, NESTED_BLOCK_SIZE, codes.size)
    return product + np.float32(np.asarray(offset).reshape(()))


def decode_4bit(packed: Bytes, absmax: Floats, n: int, codebook: str, block_size: int) -> Floats:
    """`RN(value[code] * absmax)`, before the rounding to the output dtype."""
    with np.errstate(invalid="ignore", over="ignore"):
        return VALUES_4BIT[codebook][unpack_4bit(packed, n)] * block_values(absmax, block_size, n)


def quantize_blockwise(x: Floats, codebook: Floats, block_size: int) -> tuple[Bytes, Floats]:
    """codes [n], absmax [ceil(n / block_size)]."""
    absmax, y = scale_blocks(x, block_size)
    return encode_8bit(y, codebook), absmax


def decode_blockwise(codes: Bytes, absmax: Floats, codebook: Floats, block_size: int) -> Floats:
    """`RN(codebook[code] * absmax)`, before the rounding to the output dtype."""
    with np.errstate(invalid="ignore", over="ignore"):
        return codebook[codes] * block_values(absmax, block_size, codes.size)


def mean_of_absmax(absmax: Floats) -> np.float32:
    """Float64 sums of runs of 256 in index order, then of their totals; one rounding; 0 of nothing."""
    total = 0.0
    for start in range(0, absmax.size, NESTED_BLOCK_SIZE):
        run = 0.0
        for value in absmax[start : start + NESTED_BLOCK_SIZE].astype(np.float64):
            run += value
        total += run
    return np.float32(total / absmax.size) if absmax.size else np.float32(0)


def quantize_absmax(absmax: Floats) -> tuple[Bytes, Floats, np.float32]:
    """Second level of nested statistics: codes [n], scale [ceil(n / 256)], offset."""
    with np.errstate(invalid="ignore", over="ignore"):
        offset = mean_of_absmax(absmax)
        codes, scale = quantize_blockwise(absmax - offset, dynamic_map(), NESTED_BLOCK_SIZE)
    return codes, scale, offset


# --------------------------------------------------------------------------------------------- whole tensor


def quantize(x: Floats, codebook: Floats) -> tuple[Bytes, np.float32]:
    """One absmax for the tensor; `y = x / absmax` by division; zero, NaN and Inf as in a block."""
    absmax = np.abs(x).max() if x.size else np.float32(0)
    if np.isnan(absmax):
        absmax = QUIET_NAN
    if absmax < SMALLEST_NORMAL:
        absmax = np.float32(0)
    usable = np.isfinite(absmax) and absmax > 0
    y = x / absmax if usable else np.zeros_like(x)
    return encode_8bit(y, codebook), np.float32(absmax)


def decode(codes: Bytes, absmax: np.float32, codebook: Floats) -> Floats:
    """`RN(codebook[code] * absmax)`, before the rounding to the output dtype."""
    with np.errstate(invalid="ignore", over="ignore"):
        return codebook[codes] * np.float32(absmax)


def quantize_no_absmax(x: Floats, codebook: Floats) -> Bytes:
    """Codes of values that are scaled already; NaN takes the code of 0.0."""
    return encode_8bit(np.where(np.isnan(x), np.float32(0), x), codebook)


def decode_no_absmax(codes: Bytes, codebook: Floats) -> Floats:
    """`codebook[code]`, before the rounding to the output dtype."""
    return codebook[codes]


# ---------------------------------------------------------------------------------------------------- int8

Codes = npt.NDArray[np.int8]
SMALLEST_OF_INT8 = np.float32(2.0**-119)
RECIPROCAL_OF_127 = np.array(0x3C010204, np.uint32).view(np.float32)[()]


def int8_scales(x: Floats, axis: int | None) -> Floats:
    """Largest magnitudes along an axis, or of everything; NaN where there is one, 0 below 2^-119."""
    largest = np.max(np.abs(x), axis=axis, keepdims=True, initial=0)
    scales: Floats = np.where(np.isnan(largest), QUIET_NAN, np.where(largest < SMALLEST_OF_INT8, 0, largest))
    return scales.astype(np.float32)


def int8_codes(x: Floats, scales: Floats) -> Codes:
    """`rint(RN(x * RN(127 / s)))`, 0 where s is 0, NaN or Inf."""
    usable = np.isfinite(scales) & (scales > 0)
    with np.errstate(invalid="ignore", over="ignore"):
        codes = np.rint(x * (np.float32(127) / np.where(usable, scales, np.float32(1))))
    return np.where(usable, codes, 0).astype(np.int8)


def quantize_rowwise(
    x: Floats, threshold: float | None = None
) -> tuple[Codes, Floats, npt.NDArray[np.bool_]]:
    """One scale per row; columns with an outlier (`|x| >= threshold`) apart: codes, scales, which columns."""
    is_outlier = np.zeros(x.shape, bool) if threshold is None else np.abs(x) >= np.float32(threshold)
    kept = np.where(is_outlier, np.float32(0), x)
    scales, mask = int8_scales(kept, 1), is_outlier.any(axis=0)
    return np.where(mask, np.int8(0), int8_codes(kept, scales)), scales[:, 0], mask


def quantize_columnwise(x: Floats) -> tuple[Codes, Floats]:
    """One scale per column."""
    scales = int8_scales(x, 0)
    return int8_codes(x, scales), scales[0]


def quantize_global(x: Floats) -> tuple[Codes, Floats]:
    """One scale."""
    scales = int8_scales(x, None).reshape(1)
    return int8_codes(x, scales), scales


def decode_int8(codes: Codes, scales: Floats) -> Floats:
    """`RN(RN(q * s) * RN(1 / 127))` for scales that broadcast, before the rounding to the output dtype."""
    with np.errstate(invalid="ignore", over="ignore"):
        return codes.astype(np.float32) * scales * RECIPROCAL_OF_127


# ------------------------------------------------------------------------------------------- matrix product


def gemm_4bit(
    x: Floats,
    packed: Bytes,
    absmax: Floats,
    shape: tuple[int, int],
    codebook: str,
    block_size: int,
    bias: Floats | None,
) -> npt.NDArray[np.float64]:
    """`x @ W.T + bias` in float64, with W = RN(value * absmax) in float32; shape is (N, K)."""
    weight = decode_4bit(packed, absmax, shape[0] * shape[1], codebook, block_size).reshape(shape)
    product = x.astype(np.float64) @ weight.astype(np.float64).T
    return product if bias is None else product + bias.astype(np.float64)


def gemm_4bit_transposed(
    x: Floats, packed: Bytes, absmax: Floats, shape: tuple[int, int], codebook: str, block_size: int
) -> npt.NDArray[np.float64]:
    """`x @ W` in float64, with W = RN(value * absmax) in float32; shape is (N, K)."""
    weight = decode_4bit(packed, absmax, shape[0] * shape[1], codebook, block_size).reshape(shape)
    product: npt.NDArray[np.float64] = x.astype(np.float64) @ weight.astype(np.float64)
    return product


INVERSE_127, INVERSE_127_SQUARED = np.array([0x3C010204, 0x38820610], np.uint32).view(np.float32)


def fused_multiply_add(a: Floats, b: Floats, c: Floats) -> Floats:
    """`RN(a * b + c)`: the product is exact in float64, the sum is rounded to odd there before float32."""
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        total = product + wide
        share = total - product
        error = (product - (total - share)) + (wide - share)
        inexact = np.isfinite(total) & (error != 0) & (total.view(np.int64) % 2 == 0)
        away = np.where((error > 0) == (total > 0), 1, -1)
        odd = np.where(inexact, total.view(np.int64) + away, total.view(np.int64)).view(np.float64)
        rounded: Floats = odd.astype(np.float32)
    return rounded


def gemm_int8(
    codes: npt.NDArray[np.int8],
    weight: npt.NDArray[np.int8],
    input_scales: Floats | None = None,
    weight_scales: Floats | None = None,
    bias: Floats | None = None,
) -> Floats:
    """The scaled sums [M, N] in float32, before the rounding to the output dtype."""
    sums = codes.astype(np.int64) @ weight.astype(np.int64).T
    rows = np.ones(len(codes), np.float32)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if input_scales is not None:
            rows = input_scales * INVERSE_127_SQUARED
        terms = sums.astype(np.float32) * rows[:, None]
    scales = np.ones(1, np.float32) if weight_scales is None else weight_scales
    addend = np.zeros(1, np.float32) if bias is None else bias
    return fused_multiply_add(*np.broadcast_arrays(terms, scales, addend))


def gemm_int8_outliers(
    codes: npt.NDArray[np.int8],
    input_scales: Floats,
    x: Floats,
    mask: npt.NDArray[np.bool_],
    weight: npt.NDArray[np.int8],
    weight_scales: Floats,
    bias: Floats | None,
    dtype: str,
) -> npt.NDArray[np.float64]:
    """The same with the masked columns of x in float64; the weight there is rounded to `dtype`."""
    decoded = (weight.astype(np.float32) * weight_scales[:, None]) * INVERSE_127
    stored = round_to(decoded, dtype)
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    product = x[:, mask].astype(np.float64) @ stored[:, mask].astype(np.float64).T
    return gemm_int8(codes, weight, input_scales, weight_scales, bias) + product


# -------------------------------------------------------------------------------------------- output dtypes


def round_to(x: Floats, dtype: str) -> npt.NDArray[np.generic]:
    """One rounding to float32, float16 or bfloat16; bfloat16 comes as its 16 bits."""
    if dtype == "float32":
        return x
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
