"""The int8 quantizers on NumPy arrays, launched as the plans launch them: parameters, grids, order."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64

import numpy as np
from emulation.emulator import Array, Emulator, Launch
from emulation.kernels import Absmax, address, pointers, struct
from reference import ceil_div

ROWS, COLUMNS = ("rows", c_int64), ("columns", c_int64)
QuantizeRowwise = struct(
    "QuantizeRowwise",
    *pointers("input", "codes", "scales", "outlier_mask"),
    ROWS,
    COLUMNS,
    ("threshold", c_float),
)
OutlierColumns = struct("OutlierColumns", *pointers("outlier_mask", "codes"), ROWS, COLUMNS)
Dequantize = struct("Dequantize", *pointers("codes", "scales", "output"), ROWS, COLUMNS)
Quantize = struct(
    "Quantize",
    *pointers("input", "codes", "transposed", "row_scales", "column_scales", "partial_absmax"),
    ROWS,
    COLUMNS,
    ("num_partials", c_int32),
)
# most vectors of a row, threads of a CTA, its rows
ROW_KERNELS = (
    (64, 256, 8),
    (128, 256, 8),
    (256, 256, 4),
    (512, 256, 2),
    (1024, 256, 1),
    (2048, 512, 1),
    (4096, 1024, 1),
)


def vector_of(dtype: str) -> int:
    """Elements of sixteen bytes."""
    return 4 if dtype == "float32" else 8


class Int8Kernels:
    """The ops; at most `max_grid` CTAs share the work of kernels that walk on."""

    def __init__(self, emulator: Emulator, max_grid: int = 2**31 - 1) -> None:
        self._emulator = emulator
        self._max_grid = max_grid

    def _launch(
        self,
        module: str,
        kernel: str,
        params: ctypes.Structure,
        grid: int,
        threads: int,
        reads: Sequence[Array],
        writes: Sequence[Array] = (),
    ) -> None:
        """Named operands: the kernel waits for earlier ones. What it reads and writes back is not named."""
        if grid > 0:
            self._emulator.launch(Launch(module, kernel, grid, threads, inputs=reads, outputs=writes), params)

    def quantize_rowwise(
        self,
        x: Array,
        dtype: str,
        shape: tuple[int, int],
        codes: Array,
        scales: Array,
        mask: Array | None = None,
        threshold: float = 0.0,
    ) -> None:
        """Fills codes, scales and, where it is given, the mask of outlier columns."""
        rows, columns = shape
        vectors = ceil_div(columns, vector_of(dtype))
        kernel = next((kernel for kernel in ROW_KERNELS if vectors <= kernel[0]), None)
        outliers = "" if mask is None else "outliers_"
        params = QuantizeRowwise(
            address(x), address(codes), address(scales), address(mask), rows, columns, threshold
        )
        mask_params = OutlierColumns(address(mask), address(codes), rows, columns)
        if mask is not None and rows != 1:
            grid = min(ceil_div(columns, 4096), self._max_grid)
            self._launch("int8_rowwise", "clear_outlier_mask", mask_params, grid, 256, [], [mask])
        if kernel is None:
            name, grid, threads = f"quantize_rowwise_long_{outliers}{dtype}", rows, 512
        else:
            most, threads, per_cta = kernel
            name, grid = f"quantize_rowwise_{outliers}{dtype}_{most}", ceil_div(rows, per_cta)
        grid = min(grid, self._max_grid)
        self._launch("int8_rowwise", name, params, grid, threads, [x], [codes, scales])
        if mask is not None and rows != 1:
            grid = min(ceil_div(rows, 16), self._max_grid)
            self._launch("int8_rowwise", "zero_outlier_columns", mask_params, grid, 256, [mask])

    def by_columns(
        self,
        op: str,
        x: Array,
        dtype: str,
        shape: tuple[int, int],
        column_scales: Array,
        codes: Array | None = None,
        transposed: Array | None = None,
        row_scales: Array | None = None,
    ) -> None:
        """Codes by the scales of columns, and of rows where those are given."""
        rows, columns = shape
        params = Quantize(
            address(x),
            address(codes),
            address(transposed),
            address(row_scales),
            address(column_scales),
            None,
            rows,
            columns,
            0,
        )
        spans = ceil_div(columns, 32 * vector_of(dtype))
        scales = [column_scales] if row_scales is None else [column_scales, row_scales]
        length = max(columns, rows if row_scales is not None else 0)
        self._launch("int8_columns", "clear_maxima", params, ceil_div(length, 4096), 256, [], scales)
        search = "find_column_maxima" if row_scales is None else "find_row_and_column_maxima"
        grid = ceil_div(rows, 256) * spans
        self._launch("int8_columns", f"{search}_{dtype}", params, grid, 256, [x])
        is_plain = op == "quantize_columnwise"
        grid = ceil_div(rows, 64) * spans if is_plain else ceil_div(rows, 128) * ceil_div(columns, 64)
        outputs = [array for array in (codes, transposed) if array is not None]
        self._launch("int8_columns", f"{op}_{dtype}", params, grid, 256, [x], outputs)

    def by_tensor(
        self,
        op: str,
        x: Array,
        dtype: str,
        shape: tuple[int, int],
        scale: Array,
        codes: Array | None = None,
        transposed: Array | None = None,
    ) -> None:
        """Codes by the scale of the tensor."""
        rows, columns = shape
        per_cta = 1024 * vector_of(dtype)
        num_partials = min(max(ceil_div(x.size, per_cta), 1), 512)
        partials = np.empty(num_partials, np.uint32)
        absmax = Absmax(address(x), address(partials), x.size)
        self._emulator.launch(
            Launch("tensorwise", f"quantize_absmax_of_{dtype}", num_partials, inputs=[x]), absmax
        )
        params = Quantize(
            address(x),
            address(codes),
            address(transposed),
            None,
            address(scale),
            address(partials),
            rows,
            columns,
            num_partials,
        )
        grid = ceil_div(x.size, per_cta)
        if op != "quantize_global":
            grid = ceil_div(rows, 128) * ceil_div(columns, 64)
        outputs = [array for array in (codes, transposed) if array is not None]
        reads = [x, partials]
        self._launch("int8_columns", f"{op}_{dtype}", params, max(grid, 1), 256, reads, [scale, *outputs])

    def dequantize(
        self, op: str, codes: Array, scales: Array, dtype: str, shape: tuple[int, int], output: Array
    ) -> None:
        """Fills output; `op` is dequantize_rowwise or dequantize_columnwise."""
        rows, columns = shape
        params = Dequantize(address(codes), address(scales), address(output), rows, columns)
        tiles = rows * ceil_div(columns, 64 * vector_of(dtype))
        grid = min(ceil_div(tiles, 8), self._max_grid)
        self._launch("int8_rowwise", f"{op}_{dtype}", params, grid, 256, [codes, scales], [output])
