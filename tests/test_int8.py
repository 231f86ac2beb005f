"""int8 quantizers of rows, columns and tensors, and their inverses: bit for bit the reference."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import reference
import torch
from compare import Guarded, assert_same_bits, dtype_of, skip_without_memory, tensor_of, widened
from matrices import corner_matrix, with_outliers
from qbits import ops
from reference import DTYPES, Floats

RANDOM = np.random.default_rng(23)
# one element, tails of every kernel's tiles and vectors, more rows or columns than a thread block has
SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 9), (9, 1), (3, 31), (16, 64), (65, 63), (129, 257), (300, 72)]


def matrix_of(x: Floats, dtype: str, device: str, offset: int = 0) -> torch.Tensor:
    """The values as a matrix that begins `offset` elements into its memory."""
    return tensor_of(x, dtype, device, offset).view(x.shape)


def run(
    op: str, args: list[object], outputs: list[tuple[tuple[int, ...], str]], offset: int = 0
) -> list[Guarded]:
    """Calls an op with poisoned outputs between canaries."""
    device = str(next(arg.device for arg in args if isinstance(arg, torch.Tensor)))
    guards = [Guarded(shape, dtype_of(dtype), device, offset) for shape, dtype in outputs]
    out = tuple(guard.tensor for guard in guards)
    getattr(ops, op)(*args, out=out if len(out) > 1 else out[0])
    for guard in guards:
        guard.assert_intact()
    return guards


def transposed(codes: reference.Codes) -> reference.Codes:
    """As the kernels store it."""
    return np.ascontiguousarray(codes.T)


def quantize_and_compare(x: torch.Tensor, offset: int = 0) -> None:
    """Every quantizer of a matrix."""
    rows, columns = shape = tuple(x.shape)
    values, what = widened(x).reshape(shape), f"{x.dtype} {shape} offset {offset}"
    by_row, row_scales, _ = reference.quantize_rowwise(values)
    by_column, column_scales = reference.quantize_columnwise(values)
    by_tensor, scale = reference.quantize_global(values)
    plain, other_way = (shape, "int8"), ((columns, rows), "int8")
    rows_due, columns_due, one_due = ((rows,), "float32"), ((columns,), "float32"), ((1,), "float32")
    for op, outputs, wanted in (
        ("quantize_rowwise", [plain, rows_due], [by_row, row_scales]),
        ("quantize_columnwise", [plain, columns_due], [by_column, column_scales]),
        (
            "quantize_columnwise_and_transpose",
            [other_way, columns_due],
            [transposed(by_column), column_scales],
        ),
        ("quantize_global", [plain, one_due], [by_tensor, scale]),
        ("quantize_global_transpose", [other_way, one_due], [transposed(by_tensor), scale]),
        (
            "quantize_dual_rowwise",
            [plain, rows_due, other_way, columns_due],
            [by_row, row_scales, transposed(by_column), column_scales],
        ),
        ("quantize_dual_global", [plain, other_way, one_due], [by_tensor, transposed(by_tensor), scale]),
    ):
        for guard, want in zip(run(op, [x], outputs, offset), wanted, strict=True):
            assert_same_bits(guard.tensor, want, f"{op} of {what}")


def outliers_and_compare(x: torch.Tensor, threshold: float, offset: int = 0) -> None:
    """Codes, scales and mask."""
    rows, columns = shape = tuple(x.shape)
    outputs = [(shape, "int8"), ((rows,), "float32"), ((columns,), "bool")]
    guards = run("quantize_rowwise_outliers", [x, threshold], outputs, offset)
    wanted = reference.quantize_rowwise(widened(x).reshape(shape), threshold)
    for guard, want in zip(guards, wanted, strict=True):
        what = f"{x.dtype} {shape} threshold {threshold} offset {offset}"
        assert_same_bits(guard.tensor, want.view(np.uint8) if want.dtype == bool else want, what)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_equal_the_reference(device, dtype, shape):
    quantize_and_compare(matrix_of(RANDOM.standard_normal(shape, np.float32) * 3, dtype, device))


def test_allocated_outputs_have_the_declared_shapes_and_the_same_bits(device):
    x = matrix_of(RANDOM.standard_normal((20, 33), np.float32), "bfloat16", device)
    values = widened(x).reshape(20, 33)
    (by_row, row_scales, _), rest = reference.quantize_rowwise(values), reference.quantize_rowwise(values, 2)
    by_column, column_scales = reference.quantize_columnwise(values)
    by_tensor, scale = reference.quantize_global(values)
    for got, wanted in (
        (ops.quantize_rowwise(x), (by_row, row_scales)),
        (ops.quantize_rowwise_outliers(x, 2), (rest[0], rest[1], rest[2].view(np.uint8))),
        (ops.quantize_columnwise(x), (by_column, column_scales)),
        (ops.quantize_columnwise_and_transpose(x), (transposed(by_column), column_scales)),
        (ops.quantize_global(x), (by_tensor, scale)),
        (ops.quantize_global_transpose(x), (transposed(by_tensor), scale)),
        (ops.quantize_dual_rowwise(x), (by_row, row_scales, transposed(by_column), column_scales)),
        (ops.quantize_dual_global(x), (by_tensor, transposed(by_tensor), scale)),
    ):
        for tensor, want in zip(got, wanted, strict=True):
            assert tuple(tensor.shape) == want.shape
            assert_same_bits(tensor, want)
    codes, rows, columns, one = (
        torch.from_numpy(a).to(device) for a in (by_row, row_scales, column_scales, scale)
    )
    for got, along in (
        (ops.dequantize_rowwise(codes, rows, torch.float32), row_scales[:, None]),
        (ops.dequantize_columnwise(codes, columns, torch.float32), column_scales),
        (ops.dequantize_global(codes, one, torch.float32), scale),
    ):
        assert got.shape == x.shape
        assert_same_bits(got, reference.decode_int8(by_row, along))


@pytest.mark.parametrize("columns", [512, 1024, 2000, 4096, 8190, 16_384, 32_768, 33_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_equal_the_reference_for_rows_of_every_kernel(device, dtype, columns):
    x = RANDOM.standard_normal((5, columns), np.float32)
    quantize_and_compare(matrix_of(x, dtype, device))
    quantize_and_compare(matrix_of(np.ascontiguousarray(x.T), dtype, device))
    outliers_and_compare(matrix_of(with_outliers(RANDOM, 5, columns, 7), dtype, device), 6.0)


@pytest.mark.parametrize("offset", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_take_any_alignment(device, dtype, offset):
    for shape in ((35, 64), (128, 129)):
        x = matrix_of(RANDOM.standard_normal(shape, np.float32), dtype, device, offset)
        quantize_and_compare(x, offset)
        outliers_and_compare(x, 2.5, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_inf_zero_tiny_and_huge_are_treated_by_rule(device, dtype):
    x = corner_matrix()
    quantize_and_compare(matrix_of(x, dtype, device))
    quantize_and_compare(matrix_of(np.ascontiguousarray(x.T), dtype, device))
    outliers_and_compare(matrix_of(x, dtype, device), 1.0)
    for row in x:
        quantize_and_compare(matrix_of(row[None], dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_are_counted_from_the_threshold_on(device, dtype):
    x = np.array([[6.0, 5.9961, -6.0, 1.0], [0.5, 0.25, 7.0, np.nan], [np.inf, 0.0, 0.0, 0.0]], np.float32)
    outliers_and_compare(matrix_of(x, dtype, device), 6.0)
    for tiny in (2.0**-126, 1e-45, 3.4e38):
        outliers_and_compare(matrix_of(x, dtype, device), tiny)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 300), (70, 520), (300, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_outlier_columns_is_right(device, dtype, shape):
    for num in (0, 1, shape[1] // 2, shape[1]):
        x = with_outliers(RANDOM, *shape, num) if shape[0] else np.zeros(shape, np.float32)
        outliers_and_compare(matrix_of(x, dtype, device), 6.0)


def test_large_matrices_are_quantized_by_several_threads(device):
    for shape in ((1000, 700), (3, 100_003), (40_001, 17)):
        for dtype in ("float32", "bfloat16"):
            x = matrix_of(RANDOM.standard_normal(shape, np.float32), dtype, device)
            quantize_and_compare(x)
            outliers_and_compare(x, 3.5)


def test_quantize_global_takes_any_shape(device):
    x = matrix_of(RANDOM.standard_normal((3, 4, 5, 6), np.float32), "float16", device)
    values, scales = ops.quantize_global(x)
    want, want_scales = reference.quantize_global(widened(x))
    assert values.shape == x.shape
    assert_same_bits(values, want)
    assert_same_bits(scales, want_scales)


SCALES = np.array([0.0, np.inf, np.nan, 1e38, 1e-38, 3.5, 127.0, 65504.0, 1e5], np.float32)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (3, 7), (2, 512), (33, 520), (5, 33_001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoders_equal_the_reference(device, dtype, shape):
    codes = RANDOM.integers(-128, 128, shape).astype(np.int8)
    values = torch.from_numpy(codes).to(device)
    for op, along in (
        ("dequantize_rowwise", np.resize(SCALES, shape[0])),
        ("dequantize_columnwise", np.resize(SCALES, shape[1])),
        *(("dequantize_global", scale) for scale in SCALES.reshape(-1, 1)),
    ):
        scales = torch.from_numpy(along.copy()).to(device)
        (guard,) = run(op, [values, scales, dtype_of(dtype)], [(shape, dtype)])
        want = reference.decode_int8(codes, along[:, None] if op == "dequantize_rowwise" else along)
        assert_same_bits(guard.tensor, reference.round_to(want, dtype), f"{op} {dtype} {shape}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoders_take_any_alignment(device, dtype):
    codes = RANDOM.integers(-127, 128, 6 * 528).astype(np.int8)
    for offset in (1, 2, 4, 8):
        values = tensor_of(codes, "int8", device, offset).view(6, 528)
        for op, num in (("rowwise", 6), ("columnwise", 528), ("global", 1)):
            along = RANDOM.uniform(0.5, 3, num).astype(np.float32)
            args = [values, tensor_of(along, "float32", device), dtype_of(dtype)]
            (guard,) = run(f"dequantize_{op}", args, [((6, 528), dtype)], offset)
            want = reference.decode_int8(codes.reshape(6, 528), along[:, None] if op == "rowwise" else along)
            assert_same_bits(guard.tensor, reference.round_to(want, dtype), f"{op} {dtype} {offset}")


def test_decoding_inverts_quantizing_within_half_a_step(device):
    x = matrix_of(RANDOM.standard_normal((50, 300), np.float32), "float32", device)
    for quantize, decode, dim in (
        (ops.quantize_rowwise, ops.dequantize_rowwise, 1),
        (ops.quantize_columnwise, ops.dequantize_columnwise, 0),
    ):
        values, scales = quantize(x)
        error = (decode(values, scales, torch.float32) - x).abs()
        # 127 steps from 0 to the largest magnitude, and two roundings of float32
        assert bool((error <= scales.unsqueeze(dim) * (0.5 / 127 + 2.0**-22)).all())
    values, scales = ops.quantize_global(x)
    error = (ops.dequantize_global(values, scales, torch.float32) - x).abs()
    assert bool((error <= scales * (0.5 / 127 + 2.0**-22)).all())


def golden_matrix(text: str, device: str) -> torch.Tensor:
    """A float16 matrix of eight columns."""
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), np.float16).copy()).view(-1, 8).to(device)


def test_golden_vectors(device):
    x = golden_matrix(golden.INPUT_INT8, device)
    for matrix, vector in (
        (x, golden.INT8),
        (golden_matrix(golden.INPUT_INT8_WEIGHT, device), golden.INT8_WEIGHT),
    ):
        values, scales = ops.quantize_rowwise(matrix)
        assert_same_bits(values, golden.bytes_of(vector.codes))
        assert_same_bits(scales, golden.float32_of(vector.scales))
    values, scales, mask = ops.quantize_rowwise_outliers(x, 6.0)
    assert_same_bits(values, golden.bytes_of(golden.INT8_OUTLIERS.codes))
    assert_same_bits(scales, golden.float32_of(golden.INT8_OUTLIERS.scales))
    assert tuple(mask.nonzero().flatten().tolist()) == golden.INT8_OUTLIERS.outlier_columns


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(device):
    rows, columns = 3, 2**30 + 5
    skip_without_memory(device, 5 * rows * columns)
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    x[0, 0], x[1, 1], x[2, -1] = 3.0, -2.0, 1.0
    values, scales = ops.quantize_rowwise(x)
    assert scales.tolist() == [3.0, 2.0, 1.0]
    assert (values[0, 0], values[1, 1], values[2, -1], values.count_nonzero()) == (127, -127, 127, 3)
    values, scales = ops.quantize_global(x)
    assert scales.tolist() == [3.0]
    assert (values[0, 0], values[1, 1], values[2, -1], values.count_nonzero()) == (127, -85, 42, 3)
    values, scales = ops.quantize_columnwise_and_transpose(x)
    assert (scales[0], scales[1], scales[-1], scales.count_nonzero()) == (3.0, 2.0, 1.0, 3)
    assert (values[0, 0], values[1, 1], values[-1, 2], values.count_nonzero()) == (127, -127, 127, 3)
