"""The kernels for Hopper that multiply by a 4-bit weight, compiled for the CPU, against float64."""

from __future__ import annotations

import pytest
from emulation import gemm_kernels
from emulation.emulator import Emulator, needs_compiler
from emulation.gemm_kernels import MID_LAUNCHES
from emulation.products import MMA_DTYPES, Case, check
from reference import BLOCK_SIZES_4BIT

MODULES = ("gemm_4bit_skinny_sm90", "gemm_4bit_mid_sm90", "gemm_4bit_transposed_sm90")

pytestmark = needs_compiler


# ----------------------------------------------------------------------------------------- one to eight rows


def check_skinny(emulator: Emulator, case: Case, num_sms: int = gemm_kernels.NUM_SMS) -> None:
    check(case, lambda product: gemm_kernels.skinny_sm90(emulator, product, num_sms))


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("m", range(1, 9))
def test_gemm_4bit_skinny_sm90_kernels_are_right_for_every_shape(emulator, m, dtype):
    check_skinny(emulator, Case(dtype, (m, 100, 256), bias="bfloat16"))
    check_skinny(emulator, Case(dtype, (m, 49, 2304), "fp4", weights_ready=True), num_sms=1)
    check_skinny(emulator, Case(dtype, (m, 17, 4096), "af4", bias="float32", weights_ready=True))
    # A panel less than the kernel for long rows has; of eight rows, an uneven one of two thread blocks
    check_skinny(emulator, Case(dtype, (m, 1, 8448), bias="float16"))
    if m > 4:
        check_skinny(emulator, Case(dtype, (m, 70, 9216), bias="bfloat16", weights_ready=True))


@pytest.mark.parametrize("dtype", MMA_DTYPES)
def test_gemm_4bit_skinny_sm90_kernels_know_nested_scales_and_every_block_size(emulator, dtype):
    for block_size in (64, 128, 256, 512):
        for m in (1, 2, 4, 7):
            check_skinny(emulator, Case(dtype, (m, 40, 2048), "nf4", block_size, weights_ready=m > 2))
    for block_size, k in ((64, 3072), (128, 4096)):
        for m in (1, 2, 3, 4, 6):
            case = Case(dtype, (m, 40, k), "nf4", block_size, True, m > 2, "float32", 0, m % 2 == 0)
            check_skinny(emulator, case)


@pytest.mark.parametrize("block_size", [64, 128])
def test_gemm_4bit_skinny_sm90_kernels_of_long_rows_know_nested_scales(emulator, block_size):
    for m in (1, 4, 7):
        check_skinny(emulator, Case("bfloat16", (m, 35, 10240), "nf4", block_size, True, weights_ready=m > 1))


# --------------------------------------------------------------------------------------------- transposed


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("m", [1, 3, 8, 11, 16, 20])
def test_gemm_4bit_transposed_sm90_kernels_are_right_for_every_shape(emulator, m, dtype):
    for shape, splits in (((m, 8, 256), 1), ((m, 136, 768), 2), ((m, 904, 512), 1)):
        case = Case(dtype, shape, ("nf4", "fp4", "af4")[splits], transposed=True)
        check(case, lambda product, splits=splits: gemm_kernels.transposed_sm90(emulator, product, splits))


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_gemm_4bit_transposed_sm90_kernels_know_every_block_size(emulator, nested, dtype):
    for block_size in (64, 128) if nested else (64, 128, 256, 512):
        for m in (5, 12):
            shape = (m, 40, block_size * (16 if nested else 4))
            case = Case(dtype, shape, "nf4", block_size, nested, block_size == 128, transposed=True)
            check(case, lambda product: gemm_kernels.transposed_sm90(emulator, product, 1))


# --------------------------------------------------------------------------------------------- dozens of rows


def check_mid(
    emulator: Emulator, kernel: str, rows_per_tile: int, case: Case, cluster: int = 1, num_sms: int = 2
) -> None:
    case.weights_ready = case.shape[0] % 2 == 1
    check(
        case,
        lambda product: gemm_kernels.mid(emulator, product, kernel, rows_per_tile, cluster, num_sms),
    )


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("kernel", MID_LAUNCHES)
def test_gemm_4bit_mid_kernels_are_right_for_every_shape(emulator, kernel, dtype):
    tokens, rows = map(int, kernel.split("x"))
    check_mid(emulator, kernel, rows, Case(dtype, (tokens, rows, 64)))
    check_mid(emulator, kernel, rows, Case(dtype, (tokens - 3, rows + 33, 832), "fp4"), cluster=2)
    check_mid(emulator, kernel, 48, Case(dtype, (tokens + 5, 50, 320), "af4", bias="float16"))
    # More tiles than CTAs, a number of stages that no number of groups divides
    check_mid(emulator, kernel, rows - 16, Case(dtype, (9, 3 * rows - 30, 1472), bias="bfloat16"))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kernel", MID_LAUNCHES)
def test_gemm_4bit_mid_kernels_know_every_block_size(emulator, kernel, nested):
    for block_size in BLOCK_SIZES_4BIT:
        for k in (256, 320):
            own_map = block_size == 128
            case = Case("bfloat16", (9, 40, k), "nf4", block_size, nested, own_map, "float32")
            check_mid(emulator, kernel, 64, case)
