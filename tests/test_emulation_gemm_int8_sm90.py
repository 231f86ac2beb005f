"""The kernels for Hopper that multiply int8 codes, compiled for the CPU, bit by bit against the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from emulation import gemm_int8_sm90
from emulation.arrays import SANITIZE
from emulation.emulator import Emulator, build, needs_compiler
from emulation.gemm_int8_sm90 import OUTPUTS, Case, Product

KERNEL_BENCHES = Path(__file__).resolve().parents[1] / "bench" / "kernels"
CANDIDATES = "gemm_int8_candidates"
MODULES = ("gemm_int8_sm90", "gemm_int8_skinny_sm90")

TILES = ("256x128", "128x128")
SKINNY = (
    "16x128k1", "16x64k1", "16x64k2", "16x64k4", "64x64k1", "64x64k2", "64x64k4", "128x128k1", "128x128k2",
)  # fmt: skip

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernels of the bench, compiled for the CPU."""
    folder = tmp_path_factory.mktemp("candidates")
    build(folder, SANITIZE, (CANDIDATES,), KERNEL_BENCHES)
    return Emulator(folder, (CANDIDATES,))


def check(case: Case, launch: Callable[[Product], None]) -> None:
    """Every bit of the output, and nothing beside it."""
    product = Product(case)
    launch(product)
    product.output.equals(product.want(), str(case))


def cases(dtype: str, tokens: int, columns: int) -> list[Case]:
    """Every tail, more blocks of K than stages, each operand that may lack; outputs that TMA cannot write."""
    return [
        Case(dtype, (tokens, columns, 128), weight_scales=columns, bias="float32"),
        Case(dtype, (1, 1, 16)),
        Case(dtype, (tokens + 3, columns + 8, 272), weight_scales=1, weights_ready=True),
        Case(dtype, (7, 2 * columns - 1, 1424), weight_scales=2 * columns - 1, bias="float16"),
        Case(dtype, (tokens - 1, columns - 8, 400), False, columns - 8, "bfloat16", 1, True),
    ]


def check_tiles(emulator: Emulator, kernel: str, dtype: str, module: str) -> None:
    """More tiles than CTAs, too, in a ragged raster and one after the other."""
    tokens, columns = (int(number) for number in kernel.split("_")[0].split("x"))
    walked = Case(dtype, (3 * tokens - 5, 3 * columns + 16, 272), True, 1, "float32", 0, True)
    for case in [*cases(dtype, tokens, columns), walked]:
        check(case, lambda product: gemm_int8_sm90.tiles(emulator, product, kernel, 2, 2, module))
    check(
        Case(dtype, (2 * tokens + 1, columns + 8, 1424), True, columns + 8),
        lambda product: gemm_int8_sm90.tiles(emulator, product, kernel, 1, 8, module),
    )


def check_skinny(emulator: Emulator, kernel: str, dtype: str, module: str) -> None:
    """Every case."""
    tokens, columns, *_ = (int(number) for number in re.findall(r"\d+", kernel))
    for case in cases(dtype, tokens, columns):
        check(case, lambda product: gemm_int8_sm90.skinny(emulator, product, kernel, module))


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("kernel", TILES)
def test_gemm_int8_tiles_are_exact_for_every_shape(emulator, kernel, dtype):
    check_tiles(emulator, kernel, dtype, "gemm_int8_sm90")


@pytest.mark.parametrize("dtype", OUTPUTS)
@pytest.mark.parametrize("kernel", SKINNY)
def test_gemm_int8_skinny_kernels_are_exact_for_every_shape(emulator, kernel, dtype):
    check_skinny(emulator, kernel, dtype, "gemm_int8_skinny_sm90")


def test_gemm_int8_candidates_of_the_bench_are_exact(candidates):
    source = (KERNEL_BENCHES / f"{CANDIDATES}.cu").read_text()
    kernels = re.findall(r"^ +V\((\w+),", source, re.MULTILINE)
    assert len(kernels) > 30
    for kernel in kernels:
        check_one = check_skinny if "k" in kernel else check_tiles
        check_one(candidates, kernel, "bfloat16", CANDIDATES)


def test_gemm_int8_sums_are_exact_up_to_the_longest_k(emulator):
    longest = [Case(dtype, (2, 8, 131056), weight_scales=1, largest=True) for dtype in ("int32", "float32")]
    for case in longest:
        check(case, lambda product: gemm_int8_sm90.skinny(emulator, product, "16x64k2"))
    check(longest[0], lambda product: gemm_int8_sm90.tiles(emulator, product, "128x128"))
