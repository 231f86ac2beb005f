"""The kernels: what each rounds, and when, is what the CUDA kernels round; see docs/NUMERICS.md, section 4.

Triton compiles a variant of a kernel for sizes that are 1, multiples of 16, and neither; no size is a
constant of a kernel. Every launch must forbid the compiler to fuse multiply
and add: the numerics round twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(0x04000000)  # bits of 2^-119: groups whose largest magnitude lies below are zero
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
C1 = tl.constexpr(0.007874015718698502)  # 1 / 127 in float32
C2 = tl.constexpr(6.2000123e-05)  # 1 / 127^2 in float32: 0x38820610
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, half to even


@triton.jit
def _widened(x):
    """The float32 values of any float dtype."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


# Triton's interpreter truncates float32 to bfloat16 and rounds twice in tl.fma, so what is exact stands here.
INTERPRETED = tl.constexpr(not isinstance(_widened, triton.JITFunction))


@triton.jit
def _magnitude(x):
    """The bits of |x|, which order as the magnitudes do, Inf and then NaN behind all others."""
    return _widened(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(largest):
    """The scale of a group from the bits of its largest magnitude."""
    bits = tl.where(largest < FLOOR, 0, tl.where(largest > INFINITY, NAN, largest))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _encoded(x, largest):
    """int8 codes of x in groups whose largest magnitudes have these bits: rint(x * (127 / s)), or 0."""
    is_coded = (largest >= FLOOR) & (largest < INFINITY)
    scale = tl.where(is_coded, largest, 0x3F800000).to(tl.float32, bitcast=True)
    scaled = _widened(x) * tl.math.div_rn(tl.full(scale.shape, 127.0, tl.float32), scale)
    codes = (scaled + TO_INTEGER).to(tl.int32, bitcast=True) & 0xFF
    return tl.where(is_coded, codes, 0).to(tl.int8)


@triton.jit
def _fma(a, b, c):
    """Return a * b + c, rounded once."""
    if INTERPRETED:
        # The product is exact in float64. The sum is rounded to odd there, so that rounding to float32
        # gives what the exact sum would (Boldo and Melquiond, Emulation of FMA, doi:10.1109/TC.2007.70819).
        product, addend = a.to(tl.float64) * b.to(tl.float64), c.to(tl.float64)
        total = product + addend
        part = total - product
        rest = (product - (total - part)) + (addend - part)
        bits = total.to(tl.int64, bitcast=True)
        is_inexact = ((rest > 0) | (rest < 0)) & ((bits & 1) == 0)
        outwards = tl.where((rest > 0) == (total > 0), 1, -1)
        odd = tl.where(is_inexact, bits + outwards, bits)
        return odd.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _rounded(y, dtype: tl.constexpr):
    """The float32 values rounded to a float dtype, half to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(y == y, upper, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return y.to(dtype)


@triton.jit
def quantize_rowwise(
    input,  # [M, K]  any float
    values,  # [M, K]  int8
    scales,  # [M]     float32
    M,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows a program, read twice in chunks of COLUMNS: the second time from a cache."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    row_inside = rows < M
    places = rows[:, None] * K + columns[None, :]
    largest = tl.zeros((ROWS,), tl.int32)
    for start in range(0, K, COLUMNS):
        inside = row_inside[:, None] & (start + columns < K)[None, :]
        x = tl.load(input + places + start, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.max(_magnitude(x), axis=1))
    tl.store(scales + rows, _scale(largest), mask=row_inside)
    for start in range(0, K, COLUMNS):
        inside = row_inside[:, None] & (start + columns < K)[None, :]
        x = tl.load(input + places + start, mask=inside, other=0.0)
        tl.store(values + places + start, _encoded(x, largest[:, None]), mask=inside)


@triton.jit
def largest_of_columns(
    input,  # [M, K]  any float
    largest,  # [K]     int32, zeros: the bits of each column's largest magnitude
    M,
    K,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One slab of TILE * STEPS rows and TILE columns a program; a maximum is the same in any order."""
    num_tiles = tl.cdiv(K, TILE)
    columns = (tl.program_id(0) % num_tiles) * TILE + tl.arange(0, TILE)
    first = (tl.program_id(0) // num_tiles).to(tl.int64) * (TILE * STEPS)
    own = tl.zeros((TILE,), tl.int32)
    for step in range(STEPS):
        rows = first + step * TILE + tl.arange(0, TILE)
        inside = (rows < M)[:, None] & (columns < K)[None, :]
        x = tl.load(input + rows[:, None] * K + columns[None, :], mask=inside, other=0.0)
        own = tl.maximum(own, tl.max(_magnitude(x), axis=0))
    tl.atomic_max(largest + columns, own, mask=columns < K)


@triton.jit
def largest_of_all(
    input,  # [n]  any float
    largest,  # [1]  int32, zero
    n,
    ELEMENTS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """ELEMENTS * STEPS elements a program."""
    first = tl.program_id(0).to(tl.int64) * (ELEMENTS * STEPS)
    own = tl.zeros((ELEMENTS,), tl.int32)
    for step in range(STEPS):
        places = first + step * ELEMENTS + tl.arange(0, ELEMENTS)
        own = tl.maximum(own, _magnitude(tl.load(input + places, mask=places < n, other=0.0)))
    tl.atomic_max(largest, tl.max(own, axis=0))


@triton.jit
def quantize_global(
    input,  # [n]  any float
    values,  # [n]  int8
    largest,  # [1]  int32
    scales,  # [1]  float32
    n,
    ELEMENTS: tl.constexpr,
):
    """ELEMENTS elements a program; the first also writes the scale."""
    bits = tl.load(largest)
    if tl.program_id(0) == 0:
        tl.store(scales, _scale(bits))
    places = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = tl.load(input + places, mask=places < n, other=0.0)
    tl.store(values + places, _encoded(x, bits + tl.zeros((1,), tl.int32)), mask=places < n)


@triton.jit
def quantize_transposed(
    input,  # [M, K]  any float
    values,  # [K, M]  int8
    largest,  # [K] int32, or [1] where IS_GLOBAL
    scales,  # [K] float32, or [1]
    M,
    K,
    TILE: tl.constexpr,
    IS_GLOBAL: tl.constexpr,
):
    """One tile a program; the first rows' tiles also write the scales."""
    num_tiles = tl.cdiv(K, TILE)
    columns = (tl.program_id(0) % num_tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    rows = (tl.program_id(0) // num_tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    if IS_GLOBAL:
        groups, is_first = columns * 0, tl.program_id(0) == 0
    else:
        groups, is_first = columns, tl.program_id(0) < num_tiles
    bits = tl.load(largest + groups, mask=columns < K, other=0)
    if is_first:
        tl.store(scales + groups, _scale(bits), mask=columns < K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(input + rows[:, None] * K + columns[None, :], mask=inside, other=0.0)
    codes = tl.trans(_encoded(x, bits[None, :]))
    inside = (columns < K)[:, None] & (rows < M)[None, :]
    tl.store(values + columns[:, None] * M + rows[None, :], codes, mask=inside)


@triton.jit
def dequantize(
    values,  # [M, K]  int8
    scales,  # [M], [K] or [1]  float32
    output,  # [M, K]  any float
    M,
    K,
    row_stride,  # of the scales: 1 and 0, 0 and 1, or 0 and 0
    column_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS rows and COLUMNS columns a program: (q * s) * c1, rounded three times."""
    num_tiles = tl.cdiv(K, COLUMNS)
    columns = (tl.program_id(0) % num_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    rows = (tl.program_id(0) // num_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    places = rows[:, None] * K + columns[None, :]
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    scale_places = scales + rows[:, None] * row_stride + columns[None, :] * column_stride
    scale = tl.load(scale_places, mask=inside, other=0.0)
    codes = tl.load(values + places, mask=inside, other=0).to(tl.float32)
    tl.store(output + places, _rounded(codes * scale * C1, output.dtype.element_ty), mask=inside)


@triton.jit
def gemm_int8(
    input,  # [M, K]  int8
    weight,  # [N, K]  int8
    input_scales,  # [M]     float32, or None: r is 1
    weight_scales,  # [N]     float32, [1] where HAS_ONE_WEIGHT_SCALE, or None: 1
    bias,  # [N]     any float, or None
    output,  # [M, N]  any float, or int32: the sums
    M,
    N,
    K,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    EXACT_TILES: tl.constexpr,  # of K, that an int32 sum may span; 0 where it spans all
    HAS_ONE_WEIGHT_SCALE: tl.constexpr,
):
    """One tile of the output a program, columns of tiles first within bands of eight tile rows."""
    num_m, num_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    band = tl.program_id(0) // (8 * num_n)
    rows_of_band = tl.minimum(num_m - band * 8, 8)
    within = tl.program_id(0) % (8 * num_n)
    rows = (band * 8 + within % rows_of_band).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    columns = (within // rows_of_band).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    ks = tl.arange(0, TILE_K)
    row_inside, column_inside = rows < M, columns < N
    input_places = input + rows[:, None] * K + ks[None, :]
    weight_places = weight + columns[None, :] * K + ks[:, None]
    sums = tl.zeros((TILE_M, TILE_N), tl.int32)
    long_sums = tl.zeros((TILE_M, TILE_N), tl.int64 if EXACT_TILES else tl.int32)
    for tile in range(0, tl.cdiv(K, TILE_K)):
        k_inside = tile * TILE_K + ks < K
        a = tl.load(input_places, mask=row_inside[:, None] & k_inside[None, :], other=0)
        b = tl.load(weight_places, mask=column_inside[None, :] & k_inside[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        input_places += TILE_K
        weight_places += TILE_K
        if EXACT_TILES:  # noqa: SIM102 (a constant, beside a value of the loop)
            if tile % EXACT_TILES == EXACT_TILES - 1:
                long_sums += sums.to(tl.int64)
                sums = tl.zeros((TILE_M, TILE_N), tl.int32)
    places = output + rows[:, None] * N + columns[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    if output.dtype.element_ty == tl.int32:
        tl.store(places, sums, mask=inside)
    else:
        t = (sums + long_sums).to(tl.float32)
        scale, addend = tl.full(t.shape, 1.0, tl.float32), tl.zeros_like(t)
        if input_scales is not None:
            r = tl.load(input_scales + rows, mask=row_inside, other=0.0) * C2
            t *= r[:, None]
        if weight_scales is not None:
            weight_rows = columns * 0 if HAS_ONE_WEIGHT_SCALE else columns
            scale *= tl.load(weight_scales + weight_rows, mask=column_inside, other=0.0)[None, :]
        if bias is not None:
            addend += _widened(tl.load(bias + columns, mask=column_inside, other=0.0))[None, :]
        tl.store(places, _rounded(_fma(t, scale, addend), output.dtype.element_ty), mask=inside)
