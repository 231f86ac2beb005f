"""Products with 4-bit weights on NumPy arrays, launched as the plans launch them."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass

import numpy as np
from emulation.emulator import Array, Emulator, Launch
from emulation.kernels import BLOCK_SHIFT, NUM_SMS, N, address, pointers, struct
from reference import CODEBOOKS, DTYPES, ceil_div


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


def tensor_map(
    array: Array,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    element_bytes: int,
    swizzle_bytes: int,
) -> TensorMap:
    """Of a matrix of two or three dimensions, the fastest first; strides in bytes."""
    pad = 3 - len(sizes)
    return TensorMap(
        address(array), (*sizes, *[1] * pad), (*strides, *[0] * pad), (*box, *[1] * pad),
        element_bytes, swizzle_bytes,
    )  # fmt: skip


def aligned(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    """A structure with tensor maps, which lies on 64 bytes and has a multiple of as many."""
    kind = struct(name, *fields)
    missing = -ctypes.sizeof(kind) % 64
    kind = struct(name, *fields, *([("padding_to_64", ctypes.c_uint8 * missing)] if missing else []))
    kind.alignment = 64  # type: ignore[attr-defined]
    return kind


def int32s(*names: str) -> list[tuple[str, type]]:
    """Fields of 32 bits."""
    return [(name, c_int32) for name in names]


ABSMAX = pointers("absmax", "absmax_scale", "absmax_offset", "absmax_codebook")
Gemm4bitSkinny = struct(
    "Gemm4bitSkinny",
    *pointers("input", "packed"),
    *ABSMAX,
    *pointers("bias", "output"),
    ("m", c_int64),
    N,
    ("k", c_int64),
    BLOCK_SHIFT,
    *int32s("codebook", "bias_dtype", "tiles_per_cta", "num_larger_ctas"),
)
Gemm4bitTransposed = struct(
    "Gemm4bitTransposed",
    *pointers("input", "packed"),
    *ABSMAX,
    *pointers("partial", "output"),
    ("m", c_int64),
    N,
    ("k", c_int64),
    ("rows_per_split", c_int64),
    BLOCK_SHIFT,
    *int32s("codebook", "num_splits"),
)
SkinnySm90 = aligned(
    "SkinnySm90",
    ("packed", TensorMap),
    ("absmax", TensorMap),
    ("problem", Gemm4bitSkinny),
    ("weights_ready", c_int32),
    ("zero", c_uint32),
)
TransposedSm90 = aligned(
    "TransposedSm90",
    *((name, TensorMap) for name in ("packed", "absmax", "input")),
    ("problem", Gemm4bitTransposed),
    ("zero", c_uint32),
)
Operands = struct(
    "Operands",
    *ABSMAX,
    *pointers("bias", "output"),
    *int32s("m", "n", "k", "block_shift", "codebook", "bias_dtype", "weights_ready"),
)
Mid = aligned(
    "Mid",
    *((name, TensorMap) for name in ("input", "packed", "absmax")),
    ("operands", Operands),
    *int32s("rows_per_tile", "scales_by_copy"),
)
Large = aligned(
    "Large",
    *((name, TensorMap) for name in ("input", "packed", "output")),
    ("operands", Operands),
    *int32s("num_row_tiles", "num_token_tiles", "raster_tokens", "output_by_tma"),
)

# Of a kernel of cuda/gemm_4bit_mid_sm90.cu, as its head says: threads, shared bytes, columns of a stage; then
# threads and shared bytes for blocks of 32.
MID_LAUNCHES = {
    "16x64": (640, 173568, 256, 640, 181760),
    "16x128": (640, 194048, 256, 640, 206336),
    "32x64": (640, 220672, 128, 640, 226816),
    "32x128": (640, 173568, 256, 640, 214528),
    "64x64": (512, 193024, 128, 512, 196096),
    "64x128": (384, 220672, 128, 384, 226816),
    "128x64": (384, 216576, 128, 384, 218624),
    "128x128": (384, 193024, 128, 384, 196096),
}


@dataclass
class Product:
    """What a kernel reads and writes; `shape` is m, n, k."""

    dtype: str
    shape: tuple[int, int, int]
    codebook: str
    block_size: int
    input: Array
    packed: Array
    absmax: Array
    output: Array
    bias: Array | None = None
    bias_dtype: str = "float32"
    absmax_scale: Array | None = None
    absmax_offset: Array | None = None
    absmax_codebook: Array | None = None
    weights_ready: bool = False

    @property
    def nested(self) -> str:
        """Part of the names of kernels."""
        return "" if self.absmax_scale is None else "nested_"

    @property
    def block_shift(self) -> int:
        """Log2 of the block size."""
        return self.block_size.bit_length() - 1

    def _weight(self) -> list[Array | None]:
        return [self.absmax, self.absmax_scale, self.absmax_offset, self.absmax_codebook]

    def absmax_addresses(self) -> list[int | None]:
        """In the order of ABSMAX."""
        return [address(array) for array in self._weight()]

    def numbers(self) -> tuple[int, int]:
        """Of codebook and dtype of the bias."""
        return CODEBOOKS.index(self.codebook), DTYPES.index(self.bias_dtype)

    def earlier(self) -> dict[str, list[Array]]:
        """Of a dependent launch: what comes late, and what may not be written at once."""
        late = [self.input, self.bias, *([] if self.weights_ready else [self.packed, *self._weight()])]
        return {"inputs": [array for array in late if array is not None], "outputs": [self.output]}

    def skinny(self, tiles_per_cta: int, num_larger_ctas: int) -> ctypes.Structure:
        """What every kernel of few rows reads."""
        return Gemm4bitSkinny(
            address(self.input), address(self.packed), *self.absmax_addresses(), address(self.bias),
            address(self.output), *self.shape, self.block_shift, *self.numbers(), tiles_per_cta,
            num_larger_ctas,
        )  # fmt: skip

    def operands(self) -> ctypes.Structure:
        """What the kernels on wgmma read without a map."""
        return Operands(
            *self.absmax_addresses(), address(self.bias), address(self.output), *self.shape, self.block_shift,
            *self.numbers(), self.weights_ready,
        )  # fmt: skip

    def input_map(self, rows: int, blocks: int) -> TensorMap:
        """The input [k / 64, m, 64]."""
        m, _, k = self.shape
        return tensor_map(self.input, (64, m, k // 64), (2, 2 * k, 128), (64, rows, blocks), 2, 128)

    def packed_map(self, rows: int, row_bytes: int) -> TensorMap:
        """The packed weight [n, k / 2]."""
        _, n, k = self.shape
        swizzle = row_bytes if row_bytes in (32, 64, 128) else 16
        return tensor_map(self.packed, (k // 2, n), (1, k // 2), (row_bytes, rows), 1, swizzle)


def skinny(
    emulator: Emulator, product: Product, kernel: str, threads: int = 256, num_sms: int = NUM_SMS
) -> None:
    """By a kernel named `gemm_4bit_skinny_{kernel}_..`: rows32, rows64, words or general."""
    m, n, _ = product.shape
    shared_bytes = 0
    if kernel.startswith("rows"):
        kernel = "rows32_block32" if product.block_size == 32 else kernel
        tiles, slots, rows = ceil_div(n, 16), num_sms * (512 // threads), int(kernel[4:6])
        grid = min(tiles, ceil_div(tiles, slots * (rows // 16)) * slots)
        share = divmod(tiles, grid)
        tokens = 4 if product.block_size == 32 or m <= 4 else 8
        shared_bytes = 33792 + threads * rows
    else:
        grid, share, tokens = ceil_div(n, 8), (0, 0), 1 if m == 1 else 4
    name = f"gemm_4bit_skinny_{kernel}_{product.nested}{product.dtype}_{tokens}"
    launch = Launch("gemm_4bit_skinny", name, grid, threads, shared_bytes=shared_bytes)
    emulator.launch(launch, product.skinny(*share))


def skinny_sm90(emulator: Emulator, product: Product, num_sms: int = NUM_SMS) -> None:
    """By a kernel of cuda/gemm_4bit_skinny_sm90.cu."""
    m, n, k = product.shape
    is_long = k > 8192
    tokens, threads, shared_bytes = (
        (1, 320, 107664) if m == 1
        else (2, 320, 108688) if m == 2
        else ((4, 576, 118928) if is_long else (4, 320, 112784)) if m <= 4
        else ((8, 576, 148624) if is_long else (8, 576, 127120))
    )  # fmt: skip
    if product.nested:
        threads, shared_bytes = threads + 32, shared_bytes + 6144
    cluster = 2 if tokens == 8 and is_long else 1
    item, row, rows, panel = product.absmax.itemsize, k // product.block_size, 16 * cluster, 2048 // cluster
    scales = max(panel // product.block_size, 16 // item)
    swizzle = scales * item if scales * item in (32, 64, 128) and not product.nested else 16
    tiles = ceil_div(n, rows)
    groups = min(tiles, num_sms // cluster)
    params = SkinnySm90(
        tensor_map(product.packed, (128, n, k // 256), (1, k // 2, 128), (128, rows, panel // 256), 1, 128),
        tensor_map(product.absmax, (row, n), (item, row * item), (scales, rows), item, swizzle),
        product.skinny(*divmod(tiles, groups)),
        product.weights_ready,
        0,
    )
    name = f"gemm_4bit_skinny_columns{14336 if is_long else 8192}_{product.nested}{product.dtype}_{tokens}"
    grid = groups * cluster
    launch = Launch(
        "gemm_4bit_skinny_sm90", name, grid, threads, cluster, shared_bytes, **product.earlier()
    )  # fmt: skip
    emulator.launch(launch, params)


def transposed(emulator: Emulator, product: Product, kernel: str, num_splits: int) -> None:
    """By gemm_4bit_transposed_{kernel}_..: mma or simt."""
    m, n, k = product.shape
    rows = max(ceil_div(n, num_splits * 16) * 16, 16)
    num_splits = max(ceil_div(n, rows), 1)
    partial = np.full(num_splits * m * k, np.nan, np.float32)
    params = Gemm4bitTransposed(
        address(product.input), address(product.packed), *product.absmax_addresses(), address(partial),
        address(product.output), m, n, k, rows, product.block_shift, product.numbers()[0], num_splits,
    )  # fmt: skip
    number = {"simt": 0}.get(kernel, 8 if m <= 8 else 16)
    module = "gemm_4bit_transposed"
    name = f"{module}_{kernel}_{product.nested}{product.dtype}" + (f"_{number}" if number else "")
    grid = ceil_div(k, 256) * num_splits
    emulator.launch(Launch(module, name, grid, shared_bytes=4096 * number), params)
    emulator.launch(Launch(module, f"{module}_sum_{product.dtype}", ceil_div(m * k, 256)), params)


def transposed_sm90(emulator: Emulator, product: Product, num_splits: int) -> None:
    """By a kernel of cuda/gemm_4bit_transposed_sm90.cu."""
    m, n, k = product.shape
    tokens, threads, shared_bytes = (8, 544, 191584) if m <= 8 else (16, 256, 203872)
    rows = ceil_div(n, num_splits * 128) * 128
    num_splits = ceil_div(n, rows)
    partial = np.full(num_splits * m * k, np.nan, np.float32)
    item, row = product.absmax.itemsize, k // product.block_size
    params = TransposedSm90(
        tensor_map(product.packed, (k // 2, n), (1, k // 2), (128, 128), 1, 128),
        tensor_map(product.absmax, (row, n), (item, row * item), (16 // item, 128), item, 16),
        tensor_map(product.input, (n, m), (2, 2 * n), (64, tokens), 2, 128),
        Gemm4bitTransposed(
            address(product.input), address(product.packed), *product.absmax_addresses(), address(partial),
            address(product.output), m, n, k, rows, product.block_shift, product.numbers()[0], num_splits,
        ),
        0,
    )  # fmt: skip
    module, name = "gemm_4bit_transposed_sm90", "gemm_4bit_transposed_columns"
    grid = ceil_div(k, 256) * num_splits * ceil_div(m, tokens)
    kernel = f"{name}_{product.nested}{product.dtype}_{tokens}"
    emulator.launch(Launch(module, kernel, grid, threads, shared_bytes=shared_bytes), params)
    emulator.launch(Launch(module, f"{name}_sum_{product.dtype}", ceil_div(m * k, 1024)), params)


def mid(
    emulator: Emulator,
    product: Product,
    kernel: str,
    rows_per_tile: int,
    cluster: int = 1,
    max_ctas: int = 132,
) -> None:
    """By a kernel named `gemm_4bit_mid_{kernel}_..`, a key of MID_LAUNCHES."""
    m, n, k = product.shape
    tokens = int(kernel.split("x")[0])
    threads, shared_bytes, columns, threads_block32, shared_block32 = MID_LAUNCHES[kernel]
    if product.block_size == 32:
        threads, shared_bytes = threads_block32, shared_block32
        kernel += "_block32"
    row, box = k // product.block_size, columns // product.block_size
    scales_by_copy = product.block_size <= 64 and not product.nested and row % 4 == 0 and box % 4 == 0
    absmax = TensorMap()
    if scales_by_copy:
        absmax = tensor_map(product.absmax, (row, n), (4, row * 4), (box, rows_per_tile), 4, 16)
    params = Mid(
        product.input_map(tokens, columns // 64),
        product.packed_map(rows_per_tile, columns // 2),
        absmax,
        product.operands(),
        rows_per_tile,
        scales_by_copy,
    )
    tiles = ceil_div(n, rows_per_tile)
    ctas = cluster * tiles if cluster > 1 else min(tiles, max_ctas)
    grid = (ctas, ceil_div(m, tokens))
    name = f"gemm_4bit_mid_{kernel}_{product.dtype}"
    emulator.launch(
        Launch("gemm_4bit_mid_sm90", name, grid, threads, cluster, shared_bytes, **product.earlier()), params
    )


def large(emulator: Emulator, product: Product, kernel: str, num_sms: int, raster_tokens: int = 8) -> None:
    """By a kernel named `gemm_4bit_large_{kernel}_..`: tokens of a tile, k, parts of K."""
    m, n, _ = product.shape
    tokens, parts = (int(number) for number in kernel.split("_")[0].split("k"))
    output_by_tma = n % 8 == 0 and product.output.ctypes.data % 16 == 0
    row_tiles, token_tiles = ceil_div(n, 128), ceil_div(m, tokens)
    box = (64, tokens // parts)
    params = Large(
        product.input_map(tokens, 1),
        product.packed_map(32, 64),
        tensor_map(product.output, (n, m), (2, 2 * n), box, 2, 128) if output_by_tma else TensorMap(),
        product.operands(), row_tiles, token_tiles, min(raster_tokens, token_tiles), output_by_tma,
    )  # fmt: skip
    tiles = row_tiles * token_tiles
    grid = min(tiles, num_sms) if parts == 1 else parts * tiles
    name = f"gemm_4bit_large_{kernel}_{product.dtype}"
    threads = 512 if tokens == 128 else 384
    launch = Launch("gemm_4bit_large_sm90", name, grid, threads, parts, 230656, **product.earlier())
    emulator.launch(launch, params)
