"""The kernels that multiply by a 4-bit weight, compiled for the CPU, against float64."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import reference
from emulation.emulator import Emulator, build
from emulation.kernels import MID_LAUNCHES, STORAGE, Array, Kernels
from reference import BLOCK_SIZES_4BIT, CODEBOOKS, DTYPES, Floats

MODULES = ("gemm_4bit_skinny", "gemm_4bit_mid_sm90", "gemm_4bit_transposed")
ALIGNMENT = 16
CANARY_BYTES = 64
RANDOM = np.random.default_rng(7)
# Relative error of one rounding: of the output, and of the codebook's values to the type of the tensor cores.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
MMA_DTYPES = ("float16", "bfloat16")

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ and the System V ABI"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """The kernels, compiled once."""
    folder = tmp_path_factory.mktemp("emulation_gemm")
    build(folder, os.environ.get("QBITS_EMULATION_SANITIZE") == "1", MODULES)
    return Kernels(Emulator(folder, MODULES))


@dataclass
class Case:
    """One product and how it is launched."""

    kernel: str
    dtype: str
    shape: tuple[int, int, int]
    codebook: str = "nf4"
    block_size: int = 64
    nested: bool = False
    own_map: bool = False
    bias: str | None = None
    threads: int = 256
    num_sms: int = 2
    offset: int = 0
    rows_per_tile: int = 64
    cluster: int = 1


def widen(x: Array, dtype: str) -> Floats:
    """Stored elements as float32, exactly."""
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else x.astype(np.float32)


def normal(n: int, dtype: str) -> Array:
    """Standard normal numbers, stored."""
    return reference.round_to(RANDOM.standard_normal(n).astype(np.float32), dtype)


class Guarded:
    """A poisoned array between canaries, `offset` elements behind an aligned address."""

    def __init__(self, n: int, dtype: str | type, offset: int = 0) -> None:
        size = np.dtype(dtype).itemsize
        self._memory = np.full((n + offset) * size + 2 * CANARY_BYTES + ALIGNMENT, 0xFF, np.uint8)
        self._first = CANARY_BYTES + -(self._memory.ctypes.data + CANARY_BYTES) % ALIGNMENT + offset * size
        self._last = self._first + n * size
        self.array = self._memory[self._first : self._last].view(dtype)

    def is_intact(self) -> bool:
        """Nothing beside the array was written."""
        beside = np.delete(self._memory, slice(self._first, self._last))
        return bool((beside == 0xFF).all())


def guarded(x: Array, offset: int) -> Array:
    """A copy of x at that alignment."""
    copy = Guarded(x.size, x.dtype, offset)
    copy.array[:] = x
    return copy.array


@dataclass
class Weight:
    """A quantized weight [n, k]: what the kernels read, and what it stands for."""

    packed: Array
    absmax: Floats
    stored_absmax: Array
    nested: dict[str, Array | None]
    decoded: npt.NDArray[np.float64]


def random_weight(case: Case) -> Weight:
    """Standard normal weights."""
    _, n, k = case.shape
    weight = RANDOM.standard_normal(n * k).astype(np.float32)
    packed, absmax = reference.quantize_4bit(weight, case.codebook, case.block_size)
    stored_absmax, nested = absmax.copy(), {}
    if case.nested:
        stored_absmax, scale, offset = reference.quantize_absmax(absmax)
        own_map = np.sort(RANDOM.uniform(-1, 1, 256)).astype(np.float32) if case.own_map else None
        absmax = reference.decode_absmax(stored_absmax, scale, offset, own_map)
        nested = {
            "absmax_scale": scale,
            "absmax_offset": np.array([offset], np.float32),
            "absmax_codebook": own_map,
        }
    decoded = reference.decode_4bit(packed, absmax, n * k, case.codebook, case.block_size).reshape(n, k)
    return Weight(packed, absmax, stored_absmax, nested, decoded.astype(np.float64))


def assert_close(case: Case, want: Array, terms: Array, output: Guarded) -> None:
    """Each product is off by the rounding of its weight, the float32 sums by less than 1e-6 of the terms."""
    limit = ROUNDING[case.dtype] * (terms + np.abs(want)) + 1e-6 * terms
    error = np.abs(widen(output.array, case.dtype).reshape(want.shape) - want)
    assert (error <= limit).all(), f"{case}: {error[~(error <= limit)]} beyond {limit[~(error <= limit)]}"
    assert output.is_intact(), f"{case}: written beside the output"


def check(kernels: Kernels, case: Case) -> None:
    """Launches; the output is float64's up to the roundings of the weight, the sums and the output."""
    m, n, k = case.shape
    weight = random_weight(case)
    x = normal(m * k, case.dtype)
    bias = None if case.bias is None else normal(n, case.bias)
    output = Guarded(m * n, STORAGE[case.dtype], case.offset)
    operands = (
        guarded(x, case.offset), case.dtype, guarded(weight.packed, case.offset), weight.stored_absmax,
        case.shape, case.codebook, case.block_size, output.array, case.kernel,
    )  # fmt: skip
    biases = (bias, case.bias or "float32")
    if case.kernel in MID_LAUNCHES:
        tiling = (case.rows_per_tile, case.cluster, case.num_sms)
        kernels.gemm_4bit_mid(*operands, *tiling, *biases, **weight.nested)
    else:
        kernels.gemm_4bit(*operands, case.threads, case.num_sms, *biases, **weight.nested)
    wide = widen(x, case.dtype).reshape(m, k)
    wide_bias = None if bias is None else widen(bias, case.bias or "float32")
    arguments = (weight.absmax, (n, k), case.codebook, case.block_size)
    want = reference.gemm_4bit(wide, weight.packed, *arguments, wide_bias)
    assert_close(case, want, np.abs(wide).astype(np.float64) @ np.abs(weight.decoded).T, output)


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("kernel", ["rows32", "rows64"])
def test_gemm_4bit_mma_kernels_are_right_for_every_shape(kernels, kernel, dtype):
    for m in (1, 2, 3, 5, 8, 9, 17):
        check(kernels, Case(kernel, dtype, (m, 100, 192)))
    for n in (1, 15, 16, 17, 64, 145):
        check(kernels, Case(kernel, dtype, (3, n, 320), bias="bfloat16"))
    for k in (0, 64, 128, 192, 2112, 4096):
        check(kernels, Case(kernel, dtype, (6, 40, k), bias="float16"))
    check(kernels, Case(kernel, dtype, (3, 300, 256), num_sms=3, bias="float32"))
    check(kernels, Case(kernel, dtype, (8, 100, 2112), threads=512))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_4bit_simt_kernels_are_right_for_every_shape(kernels, dtype):
    for m in (1, 2, 3, 5, 8, 9, 17):
        check(kernels, Case("words", dtype, (m, 20, 96)))
        check(kernels, Case("general", dtype, (m, 20, 63)))
    for n in (1, 7, 8, 9, 64, 145):
        check(kernels, Case("words", dtype, (3, n, 104), bias="float32"))
        check(kernels, Case("general", dtype, (1, n, 33), bias="float16"))
    for k in (0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 100, 2112):
        check(kernels, Case("general", dtype, (2, 19, k), bias="bfloat16"))
        if k % 8 == 0:
            check(kernels, Case("words", dtype, (1, 19, k)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("kernel", ["rows32", "rows64", "words", "general"])
def test_gemm_4bit_kernels_know_every_codebook_and_block_size(kernels, kernel, codebook, nested):
    k = {"words": 328, "general": 329}.get(kernel, 320)
    for block_size in BLOCK_SIZES_4BIT:
        for dtype in MMA_DTYPES if kernel.startswith("rows") else DTYPES:
            own_map = block_size == 128
            check(kernels, Case(kernel, dtype, (5, 35, k), codebook, block_size, nested, own_map))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_4bit_general_kernel_takes_any_alignment(kernels, dtype):
    for offset in (1, 2, 3, 5):
        check(kernels, Case("general", dtype, (2, 19, 65), nested=offset == 3, offset=offset))


def check_transposed(kernels: Kernels, case: Case, num_splits: int) -> None:
    """As `check`, for the product with the transposed weight."""
    m, n, k = case.shape
    weight = random_weight(case)
    x = normal(m * n, case.dtype)
    output = Guarded(m * k, STORAGE[case.dtype], case.offset)
    kernels.gemm_4bit_transposed(
        guarded(x, case.offset), case.dtype, guarded(weight.packed, case.offset), weight.stored_absmax,
        case.shape, case.codebook, case.block_size, output.array, case.kernel, num_splits, **weight.nested,
    )  # fmt: skip
    wide = widen(x, case.dtype).reshape(m, n).astype(np.float64)
    assert_close(case, wide @ weight.decoded, np.abs(wide) @ np.abs(weight.decoded), output)


@pytest.mark.parametrize("dtype", MMA_DTYPES)
def test_gemm_4bit_transposed_mma_kernels_are_right_for_every_shape(kernels, dtype):
    for m in (1, 2, 3, 8, 9, 16, 17):
        check_transposed(kernels, Case("mma", dtype, (m, 100, 96)), 1)
    for n in (0, 1, 15, 16, 17, 145, 300):
        check_transposed(kernels, Case("mma", dtype, (3, n, 320)), 2)
    for k in (32, 64, 224, 256, 288, 544):
        check_transposed(kernels, Case("mma", dtype, (10, 70, k)), 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_4bit_transposed_simt_kernels_are_right_for_every_shape(kernels, dtype):
    for m in (1, 3, 4, 5, 9):
        check_transposed(kernels, Case("simt", dtype, (m, 20, 63)), 1)
    for n in (0, 1, 16, 17, 90):
        check_transposed(kernels, Case("simt", dtype, (2, n, 33)), 2)
    for k in (1, 2, 255, 256, 257):
        check_transposed(kernels, Case("simt", dtype, (2, 19, k), offset=k % 3), 1)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("kernel", ["mma", "simt"])
def test_gemm_4bit_transposed_kernels_know_every_codebook_and_block_size(kernels, kernel, codebook, nested):
    for block_size in BLOCK_SIZES_4BIT:
        for dtype in MMA_DTYPES if kernel == "mma" else DTYPES:
            case = Case(kernel, dtype, (5, 35, 160), codebook, block_size, nested, block_size == 128)
            check_transposed(kernels, case, 1)


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("kernel", MID_LAUNCHES)
def test_gemm_4bit_mid_kernels_are_right_for_every_shape(kernels, kernel, dtype):
    tokens, rows = map(int, kernel.split("x"))
    check(kernels, Case(kernel, dtype, (tokens, rows, 64), rows_per_tile=rows))
    check(kernels, Case(kernel, dtype, (tokens - 3, rows + 33, 832), "fp4", rows_per_tile=rows, cluster=2))
    check(kernels, Case(kernel, dtype, (tokens + 5, 50, 320), "af4", bias="float16", rows_per_tile=48))
    # More tiles than CTAs, a number of stages that no number of groups divides
    check(kernels, Case(kernel, dtype, (9, 3 * rows - 30, 1472), bias="bfloat16", rows_per_tile=rows - 16))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kernel", MID_LAUNCHES)
def test_gemm_4bit_mid_kernels_know_every_block_size(kernels, kernel, nested):
    for block_size in BLOCK_SIZES_4BIT:
        for k in (256, 320):
            own_map = block_size == 128
            case = Case(kernel, "bfloat16", (9, 40, k), "nf4", block_size, nested, own_map, "float32")
            check(kernels, case)
