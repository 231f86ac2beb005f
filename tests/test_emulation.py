"""The CUDA kernels, compiled for the CPU, against the reference: codes bit for bit, memory byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
import reference
from compare import SCALES, boundary_blocks, corner_blocks
from emulation.arrays import SANITIZE, Output, stored
from emulation.emulator import QUANTIZERS, Emulator, needs_compiler
from emulation.kernels import STORAGE, Kernels
from reference import BLOCK_SIZES_4BIT, BLOCK_SIZES_8BIT, CODEBOOKS, DTYPES, MAPS, Floats, ceil_div

MODULES = QUANTIZERS
RANDOM = np.random.default_rng(5)

pytestmark = needs_compiler


@pytest.fixture
def kernels(emulator: Emulator) -> Kernels:
    """The ops on full grids."""
    return Kernels(emulator)


# ------------------------------------------------------------------------------------------------- 4 bits


def check_4bit(
    kernels: Kernels, x: Floats, dtype: str, codebook: str, block_size: int, offset: int = 0
) -> None:
    """Quantizes, and decodes what came out; both must equal the reference."""
    source, values = stored(x, dtype, offset)
    n = values.size
    what = f"{dtype} {codebook} block {block_size} n {n} offset {offset}"
    packed, absmax = Output(ceil_div(n, 2), np.uint8, offset), Output(ceil_div(n, block_size), np.float32)
    kernels.quantize_4bit(source, dtype, codebook, block_size, packed.array, absmax.array)
    want_packed, want_absmax = reference.quantize_4bit(values, codebook, block_size)
    packed.equals(want_packed, f"packed of {what}")
    absmax.equals(want_absmax, f"absmax of {what}")

    output = Output(n, STORAGE[dtype], offset)
    kernels.dequantize_4bit(packed.array, absmax.array, codebook, block_size, dtype, output.array)
    want = reference.decode_4bit(want_packed, want_absmax, n, codebook, block_size)
    output.equals(reference.round_to(want, dtype), f"decoded {what}")


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_kernels_equal_the_reference_at_every_block_size(kernels, dtype, codebook):
    for block_size in BLOCK_SIZES_4BIT:
        check_4bit(kernels, RANDOM.standard_normal(3 * 4096 + 37), dtype, codebook, block_size)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 63, 64, 65, 1000, 4097, 8191, 8192, 8193])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_kernels_equal_the_reference_at_every_tail(kernels, dtype, n):
    for block_size in (64, 4096):
        check_4bit(kernels, RANDOM.standard_normal(n), dtype, "nf4", block_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_kernels_take_any_alignment(kernels, dtype):
    for offset in (1, 2, 3, 4, 8):
        check_4bit(kernels, RANDOM.standard_normal(2100), dtype, "fp4", 64, offset)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_codes_are_exact_at_every_threshold_and_bucket_edge(kernels, dtype, codebook):
    edges = np.arange(-16, 17) / np.float32(15.5), np.arange(-15, 16) / np.float32(15)
    boundaries = np.concatenate([reference.THRESHOLDS_4BIT[codebook], *edges]).astype(np.float32)
    check_4bit(kernels, boundary_blocks(boundaries, 64, SCALES), dtype, codebook, 64)


@pytest.mark.parametrize("block_size", [32, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_kernels_treat_nan_inf_zero_and_huge_blocks_by_rule(kernels, dtype, block_size):
    for codebook in CODEBOOKS:
        x = corner_blocks(block_size)
        check_4bit(kernels, x if block_size == 32 else x[:: 1 + x.size // 65536], dtype, codebook, block_size)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_4bit_golden_vectors(kernels, codebook):
    source = np.frombuffer(bytes.fromhex(golden.INPUT_4BIT), np.uint16)
    packed, absmax = Output(64, np.uint8), Output(2, np.float32)
    kernels.quantize_4bit(source, "bfloat16", codebook, 64, packed.array, absmax.array)
    packed.equals(golden.bytes_of(golden.PACKED_4BIT[codebook]), "packed")
    absmax.equals(golden.float32_of(golden.ABSMAX_4BIT), "absmax")
    for dtype in DTYPES:
        output = Output(128, STORAGE[dtype])
        kernels.dequantize_4bit(packed.array, absmax.array, codebook, 64, dtype, output.array)
        assert golden.sha256(output.array) == golden.DECODED_4BIT_SHA256[codebook, dtype]


@pytest.mark.parametrize("name", sorted(golden.EDGES_4BIT))
def test_4bit_golden_edges(kernels, name):
    edge = golden.EDGES_4BIT[name]
    source = golden.float32_of(edge.input)
    for codebook, want in (("nf4", edge.nf4), ("fp4", edge.fp4)):
        packed, absmax = Output(ceil_div(source.size, 2), np.uint8), Output(1, np.float32)
        kernels.quantize_4bit(source, "float32", codebook, 64, packed.array, absmax.array)
        packed.equals(golden.bytes_of(want), name)
        absmax.equals(golden.float32_of(edge.absmax), name)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 8191, 8192 + 35])
def test_pack_and_unpack_equal_the_reference(kernels, n, codebook):
    for offset in (0, 1):
        codes = np.array(RANDOM.integers(0, 256, n + offset), np.uint8)[offset:]
        packed, unpacked = Output(ceil_div(n, 2), np.uint8, offset), Output(n, np.uint8, offset)
        kernels.pack_4bit(codes, codebook, packed.array)
        packed.equals(reference.pack_4bit(codes, codebook), f"packed {n} offset {offset}")
        kernels.unpack_4bit(packed.array, unpacked.array)
        unpacked.equals(codes & 15, f"unpacked {n} offset {offset}")


# ------------------------------------------------------------------------------------------------- nested


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_decoding_rounds_twice_as_the_reference_does(kernels, dtype):
    other_map = np.sort(RANDOM.uniform(-1, 1, 256)).astype(np.float32)
    for n, block_size, codebook in (
        (1, 64, "nf4"),
        (8191, 32, "fp4"),
        (3 * 8192 + 5, 64, "af4"),
        (8193, 4096, "nf4"),
    ):
        num_blocks = ceil_div(n, block_size)
        packed = RANDOM.integers(0, 256, ceil_div(n, 2)).astype(np.uint8)
        codes = RANDOM.integers(0, 256, num_blocks).astype(np.uint8)
        scale = RANDOM.uniform(0, 3, ceil_div(num_blocks, 256)).astype(np.float32)
        offset = np.array([2.718], np.float32)
        for table in (None, other_map):
            output = Output(n, STORAGE[dtype])
            kernels.dequantize_4bit(
                packed, codes, codebook, block_size, dtype, output.array, scale, offset, table
            )
            absmax = reference.decode_absmax(codes, scale, offset, table)
            want = reference.decode_4bit(packed, absmax, n, codebook, block_size)
            output.equals(reference.round_to(want, dtype), f"{dtype} {codebook} n {n}")


def check_quantize_absmax(kernels: Kernels, absmax: Floats) -> None:
    """Codes, scale and offset of the second level."""
    n = absmax.size
    codes, scale = Output(n, np.uint8), Output(ceil_div(n, 256), np.float32)
    offset = Output(1, np.float32)
    kernels.quantize_absmax(absmax, codes.array, scale.array, offset.array)
    want_codes, want_scale, want_offset = reference.quantize_absmax(absmax)
    offset.equals(np.array([want_offset]), f"offset of {n}")
    scale.equals(want_scale, f"scale of {n}")
    codes.equals(want_codes, f"codes of {n}")


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 8191, 8193, 70_001])
def test_quantize_absmax_equals_the_reference(kernels, n):
    check_quantize_absmax(kernels, RANDOM.uniform(0.01, 0.1, n).astype(np.float32))


def test_quantize_absmax_adds_in_order_where_the_order_counts(kernels):
    # magnitudes from 2^-60 to 2^60: no 53 bits hold such a sum, so every order gives another one
    wide = np.ldexp(RANDOM.standard_normal(1500 * 256), RANDOM.integers(-60, 60, 1500 * 256)).astype(
        np.float32
    )
    check_quantize_absmax(kernels, wide)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 1e-42, 3e38])
def test_quantize_absmax_treats_unusual_values_by_rule(kernels, value):
    absmax = RANDOM.uniform(0.01, 0.1, 1000).astype(np.float32)
    absmax[500] = value
    check_quantize_absmax(kernels, absmax)
    check_quantize_absmax(kernels, np.full(700, value, np.float32))


def test_nested_golden_vector(kernels):
    x = golden.nested_input()
    packed, absmax = Output(9600, np.uint8), Output(300, np.float32)
    kernels.quantize_4bit(x, "float32", "nf4", 64, packed.array, absmax.array)
    codes, scale, offset = Output(300, np.uint8), Output(2, np.float32), Output(1, np.float32)
    kernels.quantize_absmax(absmax.array, codes.array, scale.array, offset.array)
    output = Output(19_200, np.float32)
    kernels.dequantize_4bit(
        packed.array, codes.array, "nf4", 64, "float32", output.array, scale.array, offset.array
    )
    assert golden.sha256(packed.array) == golden.NESTED_PACKED_SHA256
    assert golden.sha256(codes.array) == golden.NESTED_CODES_SHA256
    scale.equals(golden.float32_of(golden.NESTED_SCALE), "scale")
    offset.equals(golden.float32_of(golden.NESTED_OFFSET), "offset")
    assert golden.sha256(output.array) == golden.NESTED_DECODED_SHA256


# ------------------------------------------------------------------------------------------------- 8 bits


def map_with_a_tie_at_zero() -> Floats:
    """The midpoint of codes 127 and 128 is 0 and goes up: zeros take 128, the least negative value 127."""
    half = np.cumsum(RANDOM.uniform(0.5, 1.5, 128)).astype(np.float32)
    return np.concatenate([-half[::-1], half]) / half[-1]


FOREIGN_MAPS: dict[str, Floats] = {
    "random": np.sort(RANDOM.uniform(-1, 1, 256)).astype(np.float32),
    "crowded": np.sort(np.float32(0.5) + RANDOM.uniform(0, 1e-5, 256).astype(np.float32)),
    "repeated": np.repeat(np.sort(RANDOM.standard_normal(64)), 4).astype(np.float32),
    "constant": np.full(256, 0.25, np.float32),
    "tie_at_zero": map_with_a_tie_at_zero(),
    "wide": np.sort(np.ldexp(RANDOM.standard_normal(256), RANDOM.integers(-140, 100, 256))).astype(
        np.float32
    ),
    "beyond_one": reference.linear_map() * np.float32(448),
    "nearly_dynamic": np.where(np.arange(256) == 200, 0.236, reference.dynamic_map()).astype(np.float32),
}
ALL_MAPS = (
    {name: make() for name, make in MAPS.items()}
    | {"linear_no_zero": reference.linear_map(add_zero=False)}
    | FOREIGN_MAPS
)


def check_8bit(
    kernels: Kernels, x: Floats, dtype: str, table: Floats, block_size: int, offset: int = 0
) -> None:
    """Quantizes, and decodes what came out; both must equal the reference."""
    source, values = stored(x, dtype, offset)
    n = values.size
    what = f"{dtype} block {block_size} n {n} offset {offset}"
    codes, absmax = Output(n, np.uint8, offset), Output(ceil_div(n, block_size), np.float32)
    kernels.quantize_blockwise(source, dtype, table, block_size, codes.array, absmax.array)
    want_codes, want_absmax = reference.quantize_blockwise(values, table, block_size)
    codes.equals(want_codes, f"codes of {what}")
    absmax.equals(want_absmax, f"absmax of {what}")

    output = Output(n, STORAGE[dtype], offset)
    kernels.dequantize_blockwise(codes.array, absmax.array, table, block_size, dtype, output.array)
    want = reference.decode_blockwise(want_codes, want_absmax, table, block_size)
    output.equals(reference.round_to(want, dtype), f"decoded {what}")


@pytest.mark.parametrize("name", ["dynamic", "linear", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_kernels_equal_the_reference_at_every_block_size(kernels, dtype, name):
    for block_size in BLOCK_SIZES_8BIT:
        check_8bit(kernels, RANDOM.standard_normal(2 * 4096 + 37), dtype, ALL_MAPS[name], block_size)


@pytest.mark.parametrize("n", [1, 3, 63, 64, 65, 4097, 8193])
@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_kernels_equal_the_reference_at_every_tail(kernels, dtype, n):
    for block_size in (64, 4096):
        check_8bit(kernels, RANDOM.standard_normal(n), dtype, ALL_MAPS["dynamic"], block_size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_kernels_take_any_alignment(kernels, dtype):
    for offset in (1, 2, 4, 8):
        for name in ("dynamic", "dynamic_unsigned"):
            check_8bit(kernels, RANDOM.standard_normal(2100), dtype, ALL_MAPS[name], 64, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_grid_walks_over_everything(emulator, dtype):
    x = RANDOM.standard_normal(5 * 8192 + 77)
    for max_grid in (1, 3):
        few = Kernels(emulator, max_grid)
        check_8bit(few, x, dtype, ALL_MAPS["dynamic"], 256)
        check_8bit(few, x[: 3 * 8192 + 5], dtype, ALL_MAPS["e4m3"], 4096)
        check_4bit(few, x, dtype, "nf4", 4096)
        check_tensorwise(few, x, dtype, ALL_MAPS["linear"])
        check_quantize_absmax(few, np.abs(x).astype(np.float32))


@pytest.mark.parametrize("name", sorted(ALL_MAPS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_codes_are_exact_at_every_midpoint_and_entry(kernels, dtype, name):
    table = ALL_MAPS[name]
    boundaries = np.concatenate([reference.midpoints(table), table])
    scales = SCALES if name in ("dynamic", "dynamic_unsigned") else SCALES[3:5]
    check_8bit(kernels, boundary_blocks(boundaries, 256, scales), dtype, table, 256)


@pytest.mark.parametrize("name", ["dynamic", "dynamic_unsigned", "e4m3", "crowded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_8bit_kernels_treat_nan_inf_zero_and_huge_blocks_by_rule(kernels, dtype, name):
    check_8bit(kernels, corner_blocks(64), dtype, ALL_MAPS[name], 64)


def test_an_unsorted_map_is_read_and_written_within_bounds(kernels):
    x = RANDOM.standard_normal(9000).astype(np.float32)
    for _ in range(20):
        scale = np.ldexp(1.0, RANDOM.integers(-60, 30, 256))
        table = (RANDOM.standard_normal(256) * scale).astype(np.float32)
        table[RANDOM.integers(0, 256, 3)] = [np.nan, np.inf, -np.inf]
        codes, absmax = Output(x.size, np.uint8), Output(ceil_div(x.size, 64), np.float32)
        kernels.quantize_blockwise(x, "float32", table, 64, codes.array, absmax.array)
        codes.equals(codes.array.copy(), "codes")
        absmax.equals(reference.quantize_blockwise(x, table, 64)[1], "absmax")
        kernels.quantize(x, "float32", table, codes.array, None)
        codes.equals(codes.array.copy(), "codes without absmax")


def test_8bit_golden_vectors(kernels):
    source = np.frombuffer(bytes.fromhex(golden.INPUT_8BIT), np.uint16)
    codes, absmax, output = Output(256, np.uint8), Output(1, np.float32), Output(256, np.float32)
    kernels.quantize_blockwise(source, "bfloat16", ALL_MAPS["dynamic"], 256, codes.array, absmax.array)
    codes.equals(golden.bytes_of(golden.CODES_8BIT), "codes")
    absmax.equals(golden.float32_of(golden.ABSMAX_8BIT), "absmax")
    kernels.dequantize_blockwise(codes.array, absmax.array, ALL_MAPS["dynamic"], 256, "float32", output.array)
    assert golden.sha256(output.array) == golden.DECODED_8BIT_SHA256
    for name, (first, sha256) in golden.CODES_8BIT_OF_MAP.items():
        x = source & 0x7FFF if name == "dynamic_unsigned" else source
        kernels.quantize_blockwise(x, "bfloat16", ALL_MAPS[name], 256, codes.array, absmax.array)
        assert codes.array[:8].tobytes().hex() == first
        assert golden.sha256(codes.array) == sha256
    ties = golden.float32_of(golden.TIES_8BIT)
    tie_codes = Output(ties.size, np.uint8)
    kernels.quantize_blockwise(ties, "float32", ALL_MAPS["dynamic"], 256, tie_codes.array, absmax.array)
    tie_codes.equals(golden.bytes_of(golden.TIES_8BIT_CODES), "ties")


# ------------------------------------------------------------------------------------------- whole tensor


def check_tensorwise(kernels: Kernels, x: Floats, dtype: str, table: Floats, offset: int = 0) -> None:
    """Both forms, there and back."""
    source, values = stored(x, dtype, offset)
    n = values.size
    what = f"{dtype} n {n} offset {offset}"
    codes, absmax = Output(n, np.uint8, offset), Output(1, np.float32)
    kernels.quantize(source, dtype, table, codes.array, absmax.array)
    with np.errstate(invalid="ignore"):
        want_codes, want_absmax = reference.quantize(values, table)
    absmax.equals(np.array([want_absmax]), f"absmax of {what}")
    codes.equals(want_codes, f"codes of {what}")
    output = Output(n, STORAGE[dtype], offset)
    kernels.dequantize(codes.array, absmax.array, table, dtype, output.array)
    want = reference.decode(want_codes, want_absmax, table)
    output.equals(reference.round_to(want, dtype), f"decoded {what}")

    kernels.quantize(source, dtype, table, codes.array, None)
    want_codes = reference.quantize_no_absmax(values, table)
    codes.equals(want_codes, f"codes of {what} without absmax")
    kernels.dequantize(codes.array, None, table, dtype, output.array)
    want = reference.decode_no_absmax(want_codes, table)
    output.equals(reference.round_to(want, dtype), f"decoded {what} without absmax")


@pytest.mark.parametrize("name", sorted(ALL_MAPS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorwise_codes_are_exact_at_every_midpoint_and_entry(kernels, dtype, name):
    table = ALL_MAPS[name]
    x = boundary_blocks(np.concatenate([reference.midpoints(table), table]), 2048, SCALES[:1])
    check_tensorwise(kernels, x, dtype, table)


@pytest.mark.parametrize("n", [1, 5, 4097, 8193, 70_001])
def test_tensorwise_kernels_equal_the_reference_at_every_tail(kernels, n):
    for dtype, offset in (("float32", 0), ("float16", 1), ("bfloat16", 8)):
        check_tensorwise(kernels, RANDOM.standard_normal(n), dtype, ALL_MAPS["dynamic"], offset)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 1e-42, 3e38])
def test_tensorwise_kernels_treat_unusual_values_by_rule(kernels, value):
    x = RANDOM.standard_normal(1000).astype(np.float32)
    x[500] = value
    for name in ("dynamic", "tie_at_zero", "beyond_one", "crowded"):
        check_tensorwise(kernels, x, "float32", ALL_MAPS[name])
        check_tensorwise(kernels, np.full(70, value, np.float32), "float32", ALL_MAPS[name])


# ---------------------------------------------------------------------------------------------- sanitizer


@pytest.mark.skipif(SANITIZE, reason="runs inside")
def test_kernels_stay_in_bounds_under_address_sanitizer():
    library = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {
        "QBITS_EMULATION_SANITIZE": "1",
        "LD_PRELOAD": library,
        # Python and torch keep memory to the end; coroutines have stacks that the sanitizer does not know.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    chosen = "tail or alignment or bounds or pack or nested or small_grid or largest_grid"
    files = [str(Path(__file__)), str(Path(__file__).with_name("test_emulation_int8.py"))]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *files, "-k", chosen],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
