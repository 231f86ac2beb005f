"""Products of int8 codes by the kernels for Hopper, on NumPy arrays, launched as the plans launch them."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass

import numpy as np
import reference
from emulation.arrays import Output, aligned, widen
from emulation.emulator import Array, Emulator, Launch
from emulation.gemm_kernels import TensorMap, int32s, tensor_map
from emulation.gemm_kernels import aligned as aligned_struct
from emulation.kernels import STORAGE, address, pointers, struct
from reference import DTYPES, ceil_div

OUTPUTS = {**STORAGE, "int32": np.int32}
RANDOM = np.random.default_rng(11)

Operands = struct(
    "Operands",
    *pointers("input_scales", "weight_scales", "bias", "output"),
    *int32s("m", "n", "k", "weight_scale_stride", "bias_dtype", "weights_ready"),
)
MAPS = [("input", TensorMap), ("weight", TensorMap)]
Tiles = aligned_struct(
    "Tiles",
    *MAPS,
    ("output", TensorMap),
    ("operands", Operands),
    *int32s("num_token_tiles", "num_column_tiles", "raster_tokens", "output_by_tma"),
)
Skinny = aligned_struct("Skinny", *MAPS, ("operands", Operands))


@dataclass
class Case:
    """One product; `shape` is m, n, k. `offset`: elements of the output behind an aligned address."""

    dtype: str
    shape: tuple[int, int, int]
    input_scales: bool = True
    weight_scales: int | None = None
    bias: str | None = None
    offset: int = 0
    weights_ready: bool = False
    largest: bool = False


class Product:
    """Random operands of a case, its output between canaries, and the bits to expect."""

    def __init__(self, case: Case) -> None:
        m, n, k = case.shape
        self.case = case
        self.input, self.weight = (
            aligned(codes) for codes in (random_codes(m * k, case.largest), random_codes(n * k, case.largest))
        )
        is_raw = case.dtype == "int32"
        self.input_scales = positive(m) if case.input_scales and not is_raw else None
        self.weight_scales = None if case.weight_scales is None or is_raw else positive(case.weight_scales)
        self.bias_dtype = case.bias or "float32"
        self.bias = None
        if case.bias is not None and not is_raw:
            self.bias = reference.round_to(RANDOM.standard_normal(n).astype(np.float32), case.bias)
        self.output = Output(m * n, OUTPUTS[case.dtype], case.offset)

    def want(self) -> Array:
        """By the reference."""
        m, n, k = self.case.shape
        codes, weight = self.input.reshape(m, k), self.weight.reshape(n, k)
        if self.case.dtype == "int32":
            return (codes.astype(np.int64) @ weight.astype(np.int64).T).astype(np.int32).ravel()
        bias = None if self.bias is None else widen(self.bias, self.bias_dtype)
        scaled = reference.gemm_int8(codes, weight, self.input_scales, self.weight_scales, bias)
        return reference.round_to(scaled, self.case.dtype).ravel()

    def operands(self) -> ctypes.Structure:
        """What the kernels read without a map."""
        stride = int(self.weight_scales is not None and self.weight_scales.size > 1)
        return Operands(
            *(address(array) for array in (self.input_scales, self.weight_scales, self.bias)),
            address(self.output.array),
            *self.case.shape, stride, DTYPES.index(self.bias_dtype), self.case.weights_ready,
        )  # fmt: skip

    def code_maps(self, tokens: int, columns: int) -> tuple[TensorMap, TensorMap]:
        """Of input and weight."""
        m, n, k = self.case.shape
        return (
            tensor_map(self.input, (k, m), (1, k), (128, tokens), 1, 128),
            tensor_map(self.weight, (k, n), (1, k), (128, columns), 1, 128),
        )

    def earlier(self) -> dict[str, list[Array]]:
        """Of a dependent launch: what comes late, and what may not be written at once."""
        late = [self.input, self.bias, self.input_scales, self.weight_scales]
        late += [] if self.case.weights_ready else [self.weight]
        return {
            "inputs": [array for array in late if array is not None],
            "outputs": [self.output.array],
        }


def random_codes(num: int, is_largest: bool) -> Array:
    """All codes but -128, or codes whose sums are the largest."""
    choices = [-128, -127] if is_largest else np.arange(-127, 128)
    return RANDOM.choice(np.array(choices, np.int8), num)


def positive(num: int) -> Array:
    """Scales of several magnitudes."""
    return np.exp(RANDOM.uniform(-6, 6, num)).astype(np.float32)


# Stages of the ring for tokens and columns of a tile, where a kernel's name does not say
STAGES = {(256, 128): 4, (128, 128): 6, (256, 192): 3, (128, 192): 4}
SKINNY_STAGES = {(16, 128): 5, (16, 64): 10, (64, 64): 6, (128, 128): 5}


def tiles(
    emulator: Emulator,
    product: Product,
    kernel: str,
    num_sms: int = 2,
    raster_tokens: int = 8,
    module: str = "gemm_int8_sm90",
) -> None:
    """By a kernel named `gemm_int8_tile{kernel}_..`: tokens x columns, then `_c` CTAs of a cluster."""
    case = product.case
    m, n, _ = case.shape
    tokens, columns = (int(number) for number in kernel.split("_")[0].split("x"))
    cluster = 2 if "_c2" in kernel else 1
    size = OUTPUTS[case.dtype]().itemsize
    by_tma = n * size % 16 == 0 and product.output.array.ctypes.data % 16 == 0
    box = (128 // size, 128 // size)
    output = tensor_map(product.output.array, (n, m), (size, size * n), box, size, 128)
    token_tiles, column_tiles = ceil_div(m, tokens), ceil_div(n, columns * cluster)
    params = Tiles(
        *product.code_maps(tokens // cluster, columns), output if by_tma else TensorMap(),
        product.operands(), token_tiles, column_tiles, min(raster_tokens, token_tiles), by_tma,
    )  # fmt: skip
    grid = min(token_tiles * column_tiles, max(num_sms // cluster, 1)) * cluster
    consumers, stages = columns // 64, STAGES[tokens, columns]
    barriers = 16 * stages + 16 + 32 * consumers
    shared = stages * (tokens + columns) * 128 + consumers * 2 * 8192 + 4 * tokens + barriers
    name = f"gemm_int8_tile{kernel}_{case.dtype}"
    launch = Launch(module, name, grid, 128 * (1 + consumers), cluster, shared, **product.earlier())
    emulator.launch(launch, params)


def skinny(emulator: Emulator, product: Product, kernel: str, module: str = "gemm_int8_skinny_sm90") -> None:
    """By a kernel named `gemm_int8_skinny_{kernel}_..`: tokens x columns k parts, perhaps s stages."""
    m, n, _ = product.case.shape
    tokens, columns, parts, *stages = (int(number) for number in re.findall(r"\d+", kernel))
    num_stages = stages[0] if stages else SKINNY_STAGES[tokens, columns]
    warps = columns // 16
    parcels = (parts - 1) * tokens // 8 * (warps // parts) * 512
    shared = num_stages * (tokens + columns) * 128 + parcels + 4 * tokens + 16 * num_stages + 8
    params = Skinny(*product.code_maps(tokens, columns), product.operands())
    grid = (ceil_div(n, columns) * parts, ceil_div(m, tokens))
    name = f"gemm_int8_skinny_{kernel}_{product.case.dtype}"
    launch = Launch(module, name, grid, 32 * (warps + 1), parts, shared, **product.earlier())
    emulator.launch(launch, params)
