"""The int8 CUDA kernels, compiled for the CPU, against the reference: bit for bit, nothing beside outputs."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import reference
from emulation.arrays import Output, aligned, stored
from emulation.emulator import INT8, Emulator, needs_compiler
from emulation.int8_kernels import Int8Kernels, vector_of
from emulation.kernels import STORAGE
from matrices import corner_matrix, with_outliers
from reference import DTYPES, Floats

MODULES = INT8
RANDOM = np.random.default_rng(29)
# a single element, tails on both sides of tiles (128 x 64), spans (32 vectors) and vectors; 256 rows and more
SHAPES = [(1, 1), (1, 8), (3, 5), (5, 64), (16, 63), (17, 65), (33, 256), (129, 257), (128, 64), (260, 72)]

pytestmark = needs_compiler


@pytest.fixture
def kernels(emulator: Emulator) -> Int8Kernels:
    """The ops on full grids."""
    return Int8Kernels(emulator)


def check_rowwise(
    kernels: Int8Kernels, x: Floats, dtype: str, offset: int = 0, threshold: float | None = None
) -> None:
    shape = x.shape
    source, values = stored(x.reshape(-1), dtype, offset)
    codes, scales = Output(x.size, np.int8, offset), Output(shape[0], np.float32)
    mask = None if threshold is None else Output(shape[1], np.uint8, offset)
    kernels.quantize_rowwise(
        source,
        dtype,
        shape,
        codes.array,
        scales.array,
        None if mask is None else mask.array,
        threshold or 0.0,
    )
    want, want_scales, want_mask = reference.quantize_rowwise(values.reshape(shape), threshold)
    what = f"{dtype} {shape} offset {offset} threshold {threshold}"
    codes.equals(want.reshape(-1), f"codes of {what}")
    scales.equals(want_scales, f"scales of {what}")
    if mask is not None:
        mask.equals(want_mask.astype(np.uint8), f"mask of {what}")


def check_columns(kernels: Int8Kernels, x: Floats, dtype: str, offset: int = 0) -> None:
    """Columns plain, columns transposed, and both ways with row scales."""
    shape = rows, columns = x.shape
    source, values = stored(x.reshape(-1), dtype, offset)
    want, want_scales = reference.quantize_columnwise(values.reshape(shape))
    what = f"{dtype} {shape} offset {offset}"
    codes, scales = Output(x.size, np.int8, offset), Output(columns, np.float32)
    kernels.by_columns("quantize_columnwise", source, dtype, shape, scales.array, codes=codes.array)
    codes.equals(want.reshape(-1), f"codes of {what}")
    scales.equals(want_scales, f"scales of {what}")
    transposed, scales = Output(x.size, np.int8, offset), Output(columns, np.float32)
    op = "quantize_columnwise_and_transpose"
    kernels.by_columns(op, source, dtype, shape, scales.array, transposed=transposed.array)
    transposed.equals(np.ascontiguousarray(want.T).reshape(-1), f"transposed of {what}")
    scales.equals(want_scales, f"scales of transposed {what}")
    codes, transposed = Output(x.size, np.int8, offset), Output(x.size, np.int8, offset)
    scales, row_scales = Output(columns, np.float32), Output(rows, np.float32)
    kernels.by_columns(
        "quantize_dual_rowwise",
        source,
        dtype,
        shape,
        scales.array,
        codes.array,
        transposed.array,
        row_scales.array,
    )
    want_rows, want_row_scales, _ = reference.quantize_rowwise(values.reshape(shape))
    codes.equals(want_rows.reshape(-1), f"dual codes of {what}")
    row_scales.equals(want_row_scales, f"dual scales of {what}")
    transposed.equals(np.ascontiguousarray(want.T).reshape(-1), f"dual transposed of {what}")
    scales.equals(want_scales, f"dual transposed scales of {what}")


def check_global(kernels: Int8Kernels, x: Floats, dtype: str, offset: int = 0) -> None:
    """Plain, transposed, and both."""
    shape = x.shape
    source, values = stored(x.reshape(-1), dtype, offset)
    want, want_scale = reference.quantize_global(values.reshape(shape))
    for op in ("quantize_global", "quantize_global_transpose", "quantize_dual_global"):
        what = f"{op} {dtype} {shape} offset {offset}"
        codes, transposed = Output(x.size, np.int8, offset), Output(x.size, np.int8, offset)
        scale = Output(1, np.float32)
        kernels.by_tensor(
            op,
            source,
            dtype,
            shape,
            scale.array,
            None if op.endswith("transpose") else codes.array,
            None if op == "quantize_global" else transposed.array,
        )
        scale.equals(want_scale, f"scale of {what}")
        if not op.endswith("transpose"):
            codes.equals(want.reshape(-1), f"codes of {what}")
        if op != "quantize_global":
            transposed.equals(np.ascontiguousarray(want.T).reshape(-1), f"transposed of {what}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rowwise_kernels_equal_the_reference_at_every_length(kernels, dtype):
    vector = vector_of(dtype)
    for vectors in (64, 128, 256, 512, 1024, 2048, 4096):
        for columns in (vectors * vector, vectors * vector - 3):
            check_rowwise(kernels, RANDOM.standard_normal((3, columns)), dtype)
    for columns in (1, 7, 8, 9, 4096 * vector + 1, 4104 * vector):
        check_rowwise(kernels, RANDOM.standard_normal((9, columns)), dtype)
    check_rowwise(kernels, np.zeros((4, 0)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rowwise_kernels_mark_and_zero_outlier_columns(kernels, dtype):
    for rows, columns in ((1, 1), (1, 100), (1, 70_000), (2, 520), (20, 9000), (3, 40_000)):
        for num in (0, 1, 7, columns):
            check_rowwise(kernels, with_outliers(RANDOM, rows, columns, num), dtype, threshold=6.0)
    check_rowwise(kernels, corner_matrix(), dtype, threshold=6.0)
    for offset in (1, 2, 3):
        check_rowwise(kernels, with_outliers(RANDOM, 3, 160, 4), dtype, offset, threshold=6.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_equal_the_reference_for_every_shape(kernels, dtype, shape):
    x = RANDOM.standard_normal(shape)
    check_rowwise(kernels, x, dtype)
    check_columns(kernels, x, dtype)
    check_global(kernels, x, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_take_any_alignment(kernels, dtype):
    for offset in (1, 2, 3, 4, 8):
        for shape in ((80, 144), (35, 77)):
            x = RANDOM.standard_normal(shape)
            check_rowwise(kernels, x, dtype, offset)
            check_columns(kernels, x, dtype, offset)
            check_global(kernels, x, dtype, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_treat_nan_inf_zero_tiny_and_huge_by_rule(kernels, dtype):
    x = corner_matrix()
    check_rowwise(kernels, x, dtype)
    check_columns(kernels, x, dtype)
    check_columns(kernels, np.ascontiguousarray(x.T), dtype)
    for row in x:
        check_global(kernels, np.tile(row, (3, 1)), dtype)


def test_empty_matrices_have_scales_of_zero(kernels):
    for shape in ((0, 5), (5, 0), (0, 0)):
        check_columns(kernels, np.zeros(shape), "float16")
        check_global(kernels, np.zeros(shape), "float16")


def test_kernels_walk_on_beyond_the_largest_grid(emulator):
    kernels = Int8Kernels(emulator, max_grid=2)
    check_rowwise(kernels, RANDOM.standard_normal((37, 64)), "bfloat16")
    check_rowwise(kernels, RANDOM.standard_normal((7, 8192)), "bfloat16")
    check_rowwise(kernels, RANDOM.standard_normal((5, 16_400)), "float32")
    check_rowwise(kernels, with_outliers(RANDOM, 37, 12_300, 9), "float16", threshold=6.0)
    check_decoders(kernels, "float16", (37, 1100))


def check_decoders(kernels: Int8Kernels, dtype: str, shape: tuple[int, int], offset: int = 0) -> None:
    rows, columns = shape
    codes = RANDOM.integers(-128, 128, rows * columns).astype(np.int8)
    for op, num in (("dequantize_rowwise", rows), ("dequantize_columnwise", columns)):
        scales = RANDOM.uniform(0, 300, num).astype(np.float32)
        scales[: min(num, 4)] = np.array([np.inf, 0, np.nan, 1e38], np.float32)[: min(num, 4)]
        output = Output(codes.size, STORAGE[dtype], offset)
        kernels.dequantize(op, aligned(codes, offset), scales, dtype, shape, output.array)
        along = scales[:, None] if op == "dequantize_rowwise" else scales
        want = reference.round_to(reference.decode_int8(codes.reshape(shape), along), dtype)
        output.equals(want.reshape(-1), f"{op} {dtype} {shape} offset {offset}")


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 512), (5, 520), (9, 1031), (1, 20_000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoders_equal_the_reference(kernels, dtype, shape):
    for offset in (0, 1, 8):
        check_decoders(kernels, dtype, shape, offset)


def test_golden_vectors(kernels):
    source = np.frombuffer(bytes.fromhex(golden.INPUT_INT8), np.float16)
    for threshold, vector in ((None, golden.INT8), (6.0, golden.INT8_OUTLIERS)):
        codes, scales = Output(32, np.int8), Output(4, np.float32)
        mask = None if threshold is None else Output(8, np.uint8)
        kernels.quantize_rowwise(
            source,
            "float16",
            (4, 8),
            codes.array,
            scales.array,
            None if mask is None else mask.array,
            threshold or 0.0,
        )
        codes.equals(golden.bytes_of(vector.codes).view(np.int8), "codes")
        scales.equals(golden.float32_of(vector.scales), "scales")
        if mask is not None:
            assert np.flatnonzero(mask.array).tolist() == list(vector.outlier_columns)
