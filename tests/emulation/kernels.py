"""The quantizers on NumPy arrays, launched as the plans launch them: parameters, grids, order."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p

import numpy as np
from emulation.emulator import Array, Emulator, Launch
from reference import ZERO_CODE_4BIT, ceil_div

STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
NUM_SMS = 2


def struct(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    """A structure laid out as in the kernels' source."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


def pointers(*names: str) -> list[tuple[str, type]]:
    """Fields that hold addresses."""
    return [(name, c_void_p) for name in names]


N, BLOCK_SHIFT = ("n", c_int64), ("block_shift", c_int32)
Quantize4bit = struct("Quantize4bit", *pointers("input", "packed", "absmax"), N, BLOCK_SHIFT)
Dequantize4bit = struct(
    "Dequantize4bit",
    *pointers("packed", "absmax", "absmax_scale", "absmax_offset", "absmax_codebook", "output"),
    N,
    BLOCK_SHIFT,
)
Pack4bit = struct("Pack4bit", *pointers("codes", "packed"), N, ("zero_code", c_int32))
Unpack4bit = struct("Unpack4bit", *pointers("packed", "codes"), N)
QuantizeBlockwise = struct(
    "QuantizeBlockwise", *pointers("input", "codebook", "codes", "absmax"), N, BLOCK_SHIFT
)
Dequantize8bit = struct("Dequantize8bit", *pointers("codes", "absmax", "codebook", "output"), N, BLOCK_SHIFT)
Quantize = struct(
    "Quantize",
    *pointers("input", "codebook", "codes", "absmax", "partial_absmax"),
    N,
    ("num_partials", c_int32),
)
Absmax = struct("Absmax", *pointers("input", "partial_absmax"), N)
QuantizeAbsmax = struct("QuantizeAbsmax", *pointers("absmax", "codes", "scale", "offset", "run_sums"), N)


def address(array: Array | None) -> int | None:
    """Where the elements are; null for None."""
    return None if array is None else array.ctypes.data


class Kernels:
    """The ops; outputs come from `allocate(n, dtype)`, and at most `max_grid` CTAs share the work."""

    def __init__(self, emulator: Emulator, max_grid: int = 2**31 - 1) -> None:
        self._emulator = emulator
        self._max_grid = max_grid

    def _launch(
        self,
        module: str,
        kernel: str,
        params: ctypes.Structure,
        grid: int,
        threads: int = 256,
        reads: Sequence[Array | None] = (),
        writes: Sequence[Array] = (),
    ) -> None:
        """Named operands: the kernel waits for earlier kernels, which may still write and read them."""
        inputs = [array for array in reads if array is not None]
        self._emulator.launch(Launch(module, kernel, grid, threads, inputs=inputs, outputs=writes), params)

    def _grid(self, n: int, elements: int, dtype: str = "bfloat16") -> int:
        return min(ceil_div(n, elements // 2 if dtype == "float32" else elements), self._max_grid)

    def quantize_4bit(
        self, x: Array, dtype: str, codebook: str, block_size: int, packed: Array, absmax: Array
    ) -> None:
        """Fills packed and absmax."""
        params = Quantize4bit(
            address(x), address(packed), address(absmax), x.size, block_size.bit_length() - 1
        )
        name, grid = f"quantize_4bit_{dtype}_{codebook}", self._grid(x.size, 8192, dtype)
        self._launch("blockwise_4bit", name, params, grid, reads=[x], writes=[packed, absmax])

    def dequantize_4bit(
        self,
        packed: Array,
        absmax: Array,
        codebook: str,
        block_size: int,
        dtype: str,
        output: Array,
        absmax_scale: Array | None = None,
        absmax_offset: Array | None = None,
        absmax_codebook: Array | None = None,
    ) -> None:
        """Fills output."""
        params = Dequantize4bit(
            address(packed),
            address(absmax),
            address(absmax_scale),
            address(absmax_offset),
            address(absmax_codebook),
            address(output),
            output.size,
            block_size.bit_length() - 1,
        )
        op = "dequantize_4bit" if absmax_scale is None else "dequantize_4bit_nested"
        grid = self._grid(output.size, 4096, dtype)
        reads = [packed, absmax, absmax_scale, absmax_offset, absmax_codebook]
        name = f"{op}_{dtype}_{codebook}"
        self._launch("blockwise_4bit", name, params, grid, reads=reads, writes=[output])

    def pack_4bit(self, codes: Array, codebook: str, packed: Array) -> None:
        """Fills packed."""
        params = Pack4bit(address(codes), address(packed), codes.size, ZERO_CODE_4BIT[codebook])
        grid = self._grid(codes.size, 8192)
        self._launch("blockwise_4bit", "pack_4bit", params, grid, reads=[codes], writes=[packed])

    def unpack_4bit(self, packed: Array, codes: Array) -> None:
        """Fills codes."""
        params = Unpack4bit(address(packed), address(codes), codes.size)
        grid = self._grid(codes.size, 8192)
        self._launch("blockwise_4bit", "unpack_4bit", params, grid, reads=[packed], writes=[codes])

    def quantize_blockwise(
        self, x: Array, dtype: str, codebook: Array, block_size: int, codes: Array, absmax: Array
    ) -> None:
        """Fills codes and absmax."""
        params = QuantizeBlockwise(
            address(x),
            address(codebook),
            address(codes),
            address(absmax),
            x.size,
            block_size.bit_length() - 1,
        )
        grid = self._grid(x.size, 2 * 8192, dtype)
        name = f"quantize_blockwise_{dtype}"
        self._launch("blockwise_8bit", name, params, grid, reads=[x, codebook], writes=[codes, absmax])

    def dequantize_blockwise(
        self, codes: Array, absmax: Array, codebook: Array, block_size: int, dtype: str, output: Array
    ) -> None:
        """Fills output."""
        params = Dequantize8bit(
            address(codes),
            address(absmax),
            address(codebook),
            address(output),
            codes.size,
            block_size.bit_length() - 1,
        )
        grid = self._grid(codes.size, 4096, dtype)
        name, reads = f"dequantize_blockwise_{dtype}", [codes, absmax, codebook]
        self._launch("blockwise_8bit", name, params, grid, reads=reads, writes=[output])

    def quantize(self, x: Array, dtype: str, codebook: Array, codes: Array, absmax: Array | None) -> None:
        """Fills codes and absmax; without absmax, elements are encoded as they are."""
        num_partials = min(self._grid(x.size, 8192, dtype), 1024)
        partials = np.empty(num_partials, np.uint32) if absmax is not None else None
        params = Quantize(
            address(x),
            address(codebook),
            address(codes),
            address(absmax),
            address(partials),
            x.size,
            num_partials,
        )
        if absmax is not None:
            absmax_params = Absmax(address(x), address(partials), x.size)
            self._launch("tensorwise", f"quantize_absmax_of_{dtype}", absmax_params, num_partials, reads=[x])
        grid = min(self._grid(x.size, 8192, dtype), 4 * NUM_SMS)
        self._launch("tensorwise", f"quantize_{dtype}", params, grid)

    def dequantize(
        self, codes: Array, absmax: Array | None, codebook: Array, dtype: str, output: Array
    ) -> None:
        """Fills output."""
        params = Dequantize8bit(
            address(codes), address(absmax), address(codebook), address(output), codes.size, 63
        )
        grid = self._grid(codes.size, 4096, dtype)
        name, reads = f"dequantize_{dtype}", [codes, absmax, codebook]
        self._launch("tensorwise", name, params, grid, reads=reads, writes=[output])

    def quantize_absmax(self, x: Array, codes: Array, scale: Array, offset: Array) -> None:
        """Fills codes, scale and offset."""
        run_sums = np.empty(ceil_div(x.size, 256), np.float64)
        params = QuantizeAbsmax(
            address(x), address(codes), address(scale), address(offset), address(run_sums), x.size
        )
        self._launch("nested", "quantize_absmax_sums", params, self._grid(x.size, 8192))
        self._launch("nested", "quantize_absmax_offset", params, 1, threads=1024)
        self._launch("nested", "quantize_absmax", params, self._grid(x.size, 4096))
