"""The ops on NumPy arrays, launched as the plans launch them: parameters, grids and order of the kernels."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import numpy as np
import numpy.typing as npt
from emulation.emulator import Emulator
from reference import CODEBOOKS, DTYPES, ZERO_CODE_4BIT, ceil_div

Array = npt.NDArray[np.generic]
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
QuantizeAbsmax = struct("QuantizeAbsmax", *pointers("absmax", "codes", "scale", "offset", "run_sums"), N)

Gemm4bitSkinny = struct(
    "Gemm4bitSkinny",
    *pointers("input", "packed", "absmax", "absmax_scale", "absmax_offset", "absmax_codebook"),
    *pointers("bias", "output"),
    ("m", c_int64),
    N,
    ("k", c_int64),
    BLOCK_SHIFT,
    ("codebook", c_int32),
    ("bias_dtype", c_int32),
    ("tiles_per_cta", c_int32),
    ("num_larger_ctas", c_int32),
)

Gemm4bitTransposed = struct(
    "Gemm4bitTransposed",
    *pointers("input", "packed", "absmax", "absmax_scale", "absmax_offset", "absmax_codebook"),
    *pointers("partial", "output"),
    ("m", c_int64),
    N,
    ("k", c_int64),
    ("rows_per_split", c_int64),
    BLOCK_SHIFT,
    ("codebook", c_int32),
    ("num_splits", c_int32),
)


class TensorMap(ctypes.Structure):
    """What stands in for a CUtensorMap: tests/emulation/ptx_sm90.cuh."""

    _fields_ = [
        ("data", c_void_p),
        ("sizes", c_int64 * 3),
        ("strides", c_int64 * 3),
        ("box", c_int32 * 3),
        ("element_bytes", c_int32),
        ("swizzle_bytes", c_int32),
        ("unused", c_int32 * 13),
    ]


Gemm4bitMid = struct(
    "Gemm4bitMid",
    ("input", TensorMap),
    ("packed", TensorMap),
    *pointers("absmax", "absmax_scale", "absmax_offset", "absmax_codebook", "bias", "output"),
    *((name, c_int32) for name in ("m", "n", "k", "block_shift", "codebook", "bias_dtype")),
    *((name, c_int32) for name in ("weights_ready", "padding", "rows_per_tile")),
    ("more_padding", c_int32 * 11),
)
# Of a kernel of cuda/gemm_4bit_mid_sm90.cu, as its head says: threads and columns of a stage.
MID_LAUNCHES = {
    "16x64": (640, 256),
    "16x128": (640, 256),
    "32x64": (640, 128),
    "32x128": (640, 256),
    "64x64": (512, 128),
    "64x128": (640, 128),
    "128x64": (384, 128),
    "128x128": (384, 128),
}


def address(array: Array | None) -> int | None:
    """Where the elements are; null for None."""
    return None if array is None else array.ctypes.data


class Kernels:
    """The ops; outputs come from `allocate(n, dtype)`, and at most `max_grid` CTAs share the work."""

    def __init__(self, emulator: Emulator, max_grid: int = 2**31 - 1) -> None:
        self._emulator = emulator
        self._max_grid = max_grid

    def _grid(self, n: int, elements: int, dtype: str = "bfloat16") -> int:
        return min(ceil_div(n, elements // 2 if dtype == "float32" else elements), self._max_grid)

    def quantize_4bit(
        self, x: Array, dtype: str, codebook: str, block_size: int, packed: Array, absmax: Array
    ) -> None:
        """Fills packed and absmax."""
        params = Quantize4bit(
            address(x), address(packed), address(absmax), x.size, block_size.bit_length() - 1
        )
        self._emulator.launch(
            "blockwise_4bit", f"quantize_4bit_{dtype}_{codebook}", params, self._grid(x.size, 8192, dtype)
        )

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
        self._emulator.launch("blockwise_4bit", f"{op}_{dtype}_{codebook}", params, grid)

    def pack_4bit(self, codes: Array, codebook: str, packed: Array) -> None:
        """Fills packed."""
        params = Pack4bit(address(codes), address(packed), codes.size, ZERO_CODE_4BIT[codebook])
        self._emulator.launch("blockwise_4bit", "pack_4bit", params, self._grid(codes.size, 8192))

    def unpack_4bit(self, packed: Array, codes: Array) -> None:
        """Fills codes."""
        params = Unpack4bit(address(packed), address(codes), codes.size)
        self._emulator.launch("blockwise_4bit", "unpack_4bit", params, self._grid(codes.size, 8192))

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
        self._emulator.launch("blockwise_8bit", f"quantize_blockwise_{dtype}", params, grid)

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
        self._emulator.launch("blockwise_8bit", f"dequantize_blockwise_{dtype}", params, grid)

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
            self._emulator.launch("tensorwise", f"quantize_absmax_of_{dtype}", params, num_partials)
        grid = min(self._grid(x.size, 8192, dtype), 4 * NUM_SMS)
        self._emulator.launch("tensorwise", f"quantize_{dtype}", params, grid)

    def dequantize(
        self, codes: Array, absmax: Array | None, codebook: Array, dtype: str, output: Array
    ) -> None:
        """Fills output."""
        params = Dequantize8bit(
            address(codes), address(absmax), address(codebook), address(output), codes.size, 63
        )
        grid = self._grid(codes.size, 4096, dtype)
        self._emulator.launch("tensorwise", f"dequantize_{dtype}", params, grid)

    def quantize_absmax(self, x: Array, codes: Array, scale: Array, offset: Array) -> None:
        """Fills codes, scale and offset."""
        run_sums = np.empty(ceil_div(x.size, 256), np.float64)
        params = QuantizeAbsmax(
            address(x), address(codes), address(scale), address(offset), address(run_sums), x.size
        )
        self._emulator.launch("nested", "quantize_absmax_sums", params, self._grid(x.size, 8192))
        self._emulator.launch("nested", "quantize_absmax_offset", params, 1, threads=1024)
        self._emulator.launch("nested", "quantize_absmax", params, self._grid(x.size, 4096))

    def gemm_4bit(
        self,
        x: Array,
        dtype: str,
        packed: Array,
        absmax: Array,
        shape: tuple[int, int, int],
        codebook: str,
        block_size: int,
        output: Array,
        kernel: str,
        threads: int = 256,
        num_sms: int = NUM_SMS,
        bias: Array | None = None,
        bias_dtype: str = "float32",
        absmax_scale: Array | None = None,
        absmax_offset: Array | None = None,
        absmax_codebook: Array | None = None,
    ) -> None:
        """Fills output by a kernel named `gemm_4bit_skinny_{kernel}_..`: rows32, rows64, words or general."""
        m, n, k = shape
        nested = "" if absmax_scale is None else "nested_"
        if kernel.startswith("rows"):
            kernel = "rows32_block32" if block_size == 32 else kernel
            tiles, slots = ceil_div(n, 16), num_sms * (512 // threads)
            grid = min(tiles, ceil_div(tiles, slots * (int(kernel[4:6]) // 16)) * slots)
            share = divmod(tiles, grid)
            tokens = 4 if block_size == 32 or m <= 4 else 8
        else:
            grid, share, tokens = ceil_div(n, 8), (0, 0), 1 if m == 1 else 4
        params = Gemm4bitSkinny(
            address(x), address(packed), address(absmax), address(absmax_scale), address(absmax_offset),
            address(absmax_codebook), address(bias), address(output), m, n, k, block_size.bit_length() - 1,
            CODEBOOKS.index(codebook), DTYPES.index(bias_dtype), *share,
        )  # fmt: skip
        name = f"gemm_4bit_skinny_{kernel}_{nested}{dtype}_{tokens}"
        self._emulator.launch("gemm_4bit_skinny", name, params, grid, threads)

    def gemm_4bit_transposed(
        self,
        x: Array,
        dtype: str,
        packed: Array,
        absmax: Array,
        shape: tuple[int, int, int],
        codebook: str,
        block_size: int,
        output: Array,
        kernel: str,
        num_splits: int,
        absmax_scale: Array | None = None,
        absmax_offset: Array | None = None,
        absmax_codebook: Array | None = None,
    ) -> None:
        """Fills output by gemm_4bit_transposed_{kernel}_..: mma or simt."""
        m, n, k = shape
        rows = max(ceil_div(n, num_splits * 16) * 16, 16)
        num_splits = max(ceil_div(n, rows), 1)
        partial = np.full(num_splits * m * k, np.nan, np.float32)
        params = Gemm4bitTransposed(
            address(x), address(packed), address(absmax), address(absmax_scale), address(absmax_offset),
            address(absmax_codebook), address(partial), address(output), m, n, k, rows,
            block_size.bit_length() - 1, CODEBOOKS.index(codebook), num_splits,
        )  # fmt: skip
        nested = "" if absmax_scale is None else "nested_"
        tokens = "" if kernel == "simt" else "_8" if m <= 8 else "_16"
        module, name = "gemm_4bit_transposed", f"gemm_4bit_transposed_{kernel}_{nested}{dtype}{tokens}"
        self._emulator.launch(module, name, params, ceil_div(k, 256) * num_splits)
        self._emulator.launch(module, f"gemm_4bit_transposed_sum_{dtype}", params, ceil_div(m * k, 256))

    def gemm_4bit_mid(
        self,
        x: Array,
        dtype: str,
        packed: Array,
        absmax: Array,
        shape: tuple[int, int, int],
        codebook: str,
        block_size: int,
        output: Array,
        kernel: str,
        rows_per_tile: int,
        cluster: int = 1,
        max_ctas: int = 132,
        bias: Array | None = None,
        bias_dtype: str = "float32",
        absmax_scale: Array | None = None,
        absmax_offset: Array | None = None,
        absmax_codebook: Array | None = None,
    ) -> None:
        """Fills output by a kernel named `gemm_4bit_mid_{kernel}_..`, a key of MID_LAUNCHES."""
        m, n, k = shape
        tokens = int(kernel.split("x")[0])
        threads, columns = MID_LAUNCHES[kernel]
        if block_size == 32:
            threads = 384 if kernel == "64x128" else threads
            kernel += "_block32"
        input_map = TensorMap(
            address(x), (64, m, k // 64), (2, 2 * k, 128), (64, tokens, columns // 64), 2, 128
        )
        packed_map = TensorMap(
            address(packed), (k // 2, n, 1), (1, k // 2, 0), (columns // 2, rows_per_tile, 1), 1, columns // 2
        )
        params = Gemm4bitMid(
            input_map, packed_map, address(absmax), address(absmax_scale), address(absmax_offset),
            address(absmax_codebook), address(bias), address(output), m, n, k, block_size.bit_length() - 1,
            CODEBOOKS.index(codebook), DTYPES.index(bias_dtype), m % 2, 0, rows_per_tile,
        )  # fmt: skip
        tiles = ceil_div(n, rows_per_tile)
        ctas = cluster * tiles if cluster > 1 else min(tiles, max_ctas)
        grid = (ctas, ceil_div(m, tokens))
        self._emulator.launch(
            "gemm_4bit_mid_sm90", f"gemm_4bit_mid_{kernel}_{dtype}", params, grid, threads, cluster
        )
