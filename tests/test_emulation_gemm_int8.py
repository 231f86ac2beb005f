"""The kernels for all GPUs that multiply 8-bit codes, compiled for the CPU, against exact sums."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import int8_products
from emulation.emulator import Emulator, needs_compiler
from emulation.int8_products import Case, check, list_columns
from reference import DTYPES

MODULES = ("gemm_int8_simt", "gemm_int8_mma")

pytestmark = needs_compiler


def check_simt(emulator: Emulator, case: Case, *, long: bool = False) -> None:
    check(emulator, case, lambda operands: int8_products.simt(emulator, operands, long=long))


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_simt_kernels_are_right_for_every_shape(emulator, dtype, long):
    for shape in ((1, 1, 1), (3, 70, 64), (65, 5, 63), (64, 64, 144), (66, 129, 17), (2, 2, 0)):
        check_simt(emulator, Case(dtype, shape), long=long)
        check_simt(emulator, Case(dtype, shape, bias=dtype, one_scale=True), long=long)
    check_simt(emulator, Case(dtype, (5, 9, 33), bias="float32", offset=3), long=long)
    check_simt(emulator, Case(dtype, (5, 9, 64), bias="bfloat16", offset=1), long=long)


def test_simt_kernels_give_raw_sums(emulator):
    for shape in ((1, 1, 1), (3, 70, 64), (65, 5, 63), (2, 2, 0)):
        check_simt(emulator, Case("int32", shape))


def test_long_sums_need_64_bits(emulator):
    check_simt(emulator, Case("float32", (1, 2, 200_016)), long=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_simt_kernels_multiply_outliers_of_any_number(emulator, dtype):
    for num in (0, 1, 16, 63, 130):
        check_simt(emulator, Case(dtype, (5, 66, 130), num_outliers=num, bias=dtype))
    check_simt(emulator, Case(dtype, (3, 4, 130), num_outliers=7), long=True)


def check_mma(emulator: Emulator, tile: int, case: Case) -> None:
    check(emulator, case, lambda operands: int8_products.mma(emulator, operands, tile))


@pytest.mark.parametrize("tile", [32, 128])
@pytest.mark.parametrize("dtype", [*DTYPES, "int32"])
def test_mma_kernels_are_right_for_every_shape(emulator, dtype, tile):
    for shape in ((1, 1, 16), (3, 70, 64), (33, 5, 80), (129, 31, 144), (16, 130, 528), (2, 2, 0)):
        bias = None if dtype == "int32" else dtype
        check_mma(emulator, tile, Case(dtype, shape, bias=bias, one_scale=shape[2] == 80))
    check_mma(emulator, tile, Case(dtype, (5, 9, 1040)))


@pytest.mark.parametrize("tile", [32, 128])
def test_mma_kernels_walk_over_groups_of_tiles(emulator, tile):
    """More than eight blocks of rows: the tiles of the first group come before those of the second."""
    check_mma(emulator, tile, Case("bfloat16", (9 * tile + 1, tile + 1, 16), bias="float32"))


@pytest.mark.parametrize("tile", [32, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_kernels_multiply_outliers_of_any_number(emulator, dtype, tile):
    for num in (0, 1, 16, 17, 144):
        check_mma(emulator, tile, Case(dtype, (35, 66, 144), num_outliers=num, bias=dtype))
    check_mma(emulator, tile, Case(dtype, (3, 131, 64), num_outliers=5))


def test_columns_are_listed_ascending_and_whole(emulator):
    random = np.random.default_rng(3)
    for k in (1, 7, 8, 9, 255, 8191, 8192, 8193, 20_000):
        for density in (0.0, 0.01, 0.5, 1.0):
            mask = random.random(k) < density
            columns, num = list_columns(emulator, mask)
            want = np.flatnonzero(mask)
            assert num[0] == want.size
            assert np.array_equal(columns[: want.size], want)
            assert (columns[want.size :] == -1).all()
