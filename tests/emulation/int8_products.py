"""Products of 8-bit codes on NumPy arrays: random operands, launches as the plans have them, comparison."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int32, c_int64
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import reference
from emulation.arrays import Output, aligned, stored, widen
from emulation.emulator import Array, Emulator, Launch
from emulation.kernels import STORAGE, address, pointers, struct
from reference import DTYPES, Floats, ceil_div

RANDOM = np.random.default_rng(11)
# Relative error of one rounding of the output.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

GemmInt8 = struct(
    "GemmInt8",
    *pointers("input", "weight", "input_scales", "weight_scales", "bias", "output"),
    *pointers("outlier_input", "outliers", "num_outliers"),
    ("m", c_int64),
    ("n", c_int64),
    ("k", c_int64),
    ("weight_scale_stride", c_int32),
    ("bias_dtype", c_int32),
)
ListColumns = struct("ListColumns", *pointers("mask", "columns", "num_columns"), ("k", c_int64))


@dataclass
class Case:
    """One product; `shape` is m, n, k; `num_outliers` None means that the op has none."""

    dtype: str  # int32 too
    shape: tuple[int, int, int]
    bias: str | None = None
    one_scale: bool = False
    num_outliers: int | None = None
    offset: int = 0


@dataclass
class Operands:
    """What a kernel reads and writes."""

    case: Case
    input: Array
    weight: Array
    output: Array
    input_scales: Floats | None = None
    weight_scales: Floats | None = None
    bias: Array | None = None
    outlier_input: Array | None = None
    mask: npt.NDArray[np.bool_] | None = None
    outliers: Array = field(default_factory=lambda: np.zeros(0, np.int32))
    num_outliers: Array = field(default_factory=lambda: np.zeros(1, np.int32))

    def params(self) -> object:
        """The struct of the kernels for all GPUs."""
        return GemmInt8(
            address(self.input), address(self.weight), address(self.input_scales),
            address(self.weight_scales), address(self.bias), address(self.output),
            address(self.outlier_input), address(self.outliers), address(self.num_outliers),
            *self.case.shape,
            int(self.weight_scales is not None and self.weight_scales.size > 1),
            DTYPES.index(self.case.bias or "float32"),
        )  # fmt: skip

    def reads(self) -> list[Array]:
        """What earlier work may still write."""
        found = [
            self.input,
            self.weight,
            self.input_scales,
            self.weight_scales,
            self.bias,
            self.outlier_input,
        ]
        return [array for array in found if array is not None]


def list_columns(emulator: Emulator, mask: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """The columns of a mask, and how many they are."""
    columns, num = np.full(mask.size, -1, np.int32), np.full(1, -1, np.int32)
    launch = Launch(
        "gemm_int8_simt", "gemm_int8_list_columns", 1, 1024, inputs=[mask], outputs=[columns, num]
    )
    emulator.launch(launch, ListColumns(address(mask), address(columns), address(num), mask.size))
    return columns, num


def simt(emulator: Emulator, operands: Operands, *, long: bool = False) -> None:
    """By a kernel of cuda/gemm_int8_simt.cu."""
    m, n, _ = operands.case.shape
    kind = "simt" if operands.mask is None else "outliers_simt"
    name = f"gemm_int8_{kind}_{'long_' if long else ''}{operands.case.dtype}"
    grid = ceil_div(m, 64) * ceil_div(n, 64)
    launch = Launch("gemm_int8_simt", name, grid, 256, inputs=operands.reads(), outputs=[operands.output])
    emulator.launch(launch, operands.params())


def mma(emulator: Emulator, operands: Operands, tile: int) -> None:
    """By a kernel of cuda/gemm_int8_mma.cu with tiles of 32 or 128 rows."""
    m, n, _ = operands.case.shape
    kind = "mma" if operands.mask is None else "outliers_mma"
    name = f"gemm_int8_{kind}_{operands.case.dtype}_{tile}"
    grid = ceil_div(m, tile) * ceil_div(n, tile)
    launch = Launch(
        "gemm_int8_mma", name, grid, 256, shared_bytes=65536,
        inputs=operands.reads(), outputs=[operands.output],
    )  # fmt: skip
    emulator.launch(launch, operands.params())


def check(emulator: Emulator, case: Case, launch: Callable[[Operands], None]) -> None:
    """Launches; without outliers the output has the reference's bits, with them it is as near to float64."""
    m, n, k = case.shape
    codes, weight = (RANDOM.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (m, n))
    storage = {**STORAGE, "int32": np.int32}[case.dtype]
    output = Output(m * n, storage, case.offset)
    rows = columns = bias = wide_bias = None
    if case.dtype != "int32":
        rows, columns = (
            np.exp(RANDOM.uniform(-3, 3, size)).astype(np.float32) for size in (m, 1 if case.one_scale else n)
        )
    if case.bias is not None:
        bias, wide_bias = stored(RANDOM.standard_normal(n) * 10, case.bias, case.offset)
    operands = Operands(
        case, aligned(codes.reshape(-1), case.offset), aligned(weight.reshape(-1), case.offset),
        output.array, rows, columns, bias,
    )  # fmt: skip
    if case.num_outliers is not None:
        mask = np.zeros(k, bool)
        mask[RANDOM.permutation(k)[: case.num_outliers]] = True
        x, wide = stored(RANDOM.standard_normal(m * k) * 20, case.dtype)
        operands.outlier_input, operands.mask = x, mask
        operands.outliers, operands.num_outliers = list_columns(emulator, mask)
        num = int(operands.num_outliers[0])
        assert np.array_equal(operands.outliers[:num], np.flatnonzero(mask))
    launch(operands)
    if case.num_outliers is None:
        sums = codes.astype(np.int64) @ weight.astype(np.int64).T
        if case.dtype == "int32":
            return output.equals(sums.astype(np.int32).reshape(-1), str(case))
        exact = reference.gemm_int8(codes, weight, rows, columns, wide_bias)
        return output.equals(reference.round_to(exact.reshape(-1), case.dtype), str(case))
    assert rows is not None
    assert columns is not None
    wide = wide.reshape(m, k)
    want = reference.gemm_int8_outliers(codes, rows, wide, mask, weight, columns, wide_bias, case.dtype)
    part = np.abs(reference.gemm_int8(codes, weight, rows, columns, wide_bias))
    terms = np.abs(wide[:, mask]) @ np.abs(weight[:, mask].astype(np.float64) * columns[:, None] / 127).T
    limit = (mask.sum() + 2) * 2.0**-24 * (1.01 * terms + part) + ROUNDING[case.dtype] * np.abs(want)
    error = np.abs(widen(output.array, case.dtype).reshape(m, n) - want)
    assert (error <= limit + 2.0**-25)[np.abs(want) < 65000].all(), f"{case}: {error.max()}"
    assert output.is_intact(), f"{case}: written beside the output"
    return None
