"""The kernels for all GPUs that multiply by a 4-bit weight, compiled for the CPU, against float64."""

from __future__ import annotations

from typing import Any

import pytest
from emulation import gemm_kernels
from emulation.emulator import Emulator, needs_compiler
from emulation.products import MMA_DTYPES, Case, check
from reference import BLOCK_SIZES_4BIT, CODEBOOKS, DTYPES

MODULES = ("gemm_4bit_skinny", "gemm_4bit_transposed")

pytestmark = needs_compiler


def check_skinny(
    emulator: Emulator, kernel: str, case: Case, threads: int = 256, num_sms: int = gemm_kernels.NUM_SMS
) -> None:
    check(case, lambda product: gemm_kernels.skinny(emulator, product, kernel, threads, num_sms))


def check_transposed(
    emulator: Emulator, kernel: str, num_splits: int, dtype: str, shape: tuple[int, int, int], **more: Any
) -> None:
    case = Case(dtype, shape, **more, transposed=True)
    check(case, lambda product: gemm_kernels.transposed(emulator, product, kernel, num_splits))


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("kernel", ["rows32", "rows64"])
def test_gemm_4bit_mma_kernels_are_right_for_every_shape(emulator, kernel, dtype):
    for m in (1, 2, 3, 5, 8, 9, 17):
        check_skinny(emulator, kernel, Case(dtype, (m, 100, 192)))
    for n in (1, 15, 16, 17, 64, 145):
        check_skinny(emulator, kernel, Case(dtype, (3, n, 320), bias="bfloat16"))
    for k in (0, 64, 128, 192, 2112, 4096):
        check_skinny(emulator, kernel, Case(dtype, (6, 40, k), bias="float16"))
    check_skinny(emulator, kernel, Case(dtype, (3, 300, 256), bias="float32"), num_sms=3)
    check_skinny(emulator, kernel, Case(dtype, (8, 100, 2112)), threads=512)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_4bit_simt_kernels_are_right_for_every_shape(emulator, dtype):
    for m in (1, 2, 3, 5, 8, 9, 17):
        check_skinny(emulator, "words", Case(dtype, (m, 20, 96)))
        check_skinny(emulator, "general", Case(dtype, (m, 20, 63)))
    for n in (1, 7, 8, 9, 64, 145):
        check_skinny(emulator, "words", Case(dtype, (3, n, 104), bias="float32"))
        check_skinny(emulator, "general", Case(dtype, (1, n, 33), bias="float16"))
    for k in (0, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 100, 2112):
        check_skinny(emulator, "general", Case(dtype, (2, 19, k), bias="bfloat16"))
        if k % 8 == 0:
            check_skinny(emulator, "words", Case(dtype, (1, 19, k)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("kernel", ["rows32", "rows64", "words", "general"])
def test_gemm_4bit_kernels_know_every_codebook_and_block_size(emulator, kernel, codebook, nested):
    k = {"words": 328, "general": 329}.get(kernel, 320)
    for block_size in BLOCK_SIZES_4BIT:
        for dtype in MMA_DTYPES if kernel.startswith("rows") else DTYPES:
            case = Case(dtype, (5, 35, k), codebook, block_size, nested, own_map=block_size == 128)
            check_skinny(emulator, kernel, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_4bit_general_kernel_takes_any_alignment(emulator, dtype):
    for offset in (1, 2, 3, 5):
        check_skinny(emulator, "general", Case(dtype, (2, 19, 65), nested=offset == 3, offset=offset))


@pytest.mark.parametrize("dtype", MMA_DTYPES)
def test_gemm_4bit_transposed_mma_kernels_are_right_for_every_shape(emulator, dtype):
    for m in (1, 2, 3, 8, 9, 16, 17):
        check_transposed(emulator, "mma", 1, dtype, (m, 100, 96))
    for n in (0, 1, 15, 16, 17, 145, 300):
        check_transposed(emulator, "mma", 2, dtype, (3, n, 320))
    for k in (32, 64, 224, 256, 288, 544):
        check_transposed(emulator, "mma", 3, dtype, (10, 70, k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_4bit_transposed_simt_kernels_are_right_for_every_shape(emulator, dtype):
    for m in (1, 3, 4, 5, 9):
        check_transposed(emulator, "simt", 1, dtype, (m, 20, 63))
    for n in (0, 1, 16, 17, 90):
        check_transposed(emulator, "simt", 2, dtype, (2, n, 33))
    for k in (1, 2, 255, 256, 257):
        check_transposed(emulator, "simt", 1, dtype, (2, 19, k), offset=k % 3)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("kernel", ["mma", "simt"])
def test_gemm_4bit_transposed_kernels_know_every_codebook_and_block_size(emulator, kernel, codebook, nested):
    for block_size in BLOCK_SIZES_4BIT:
        for dtype in MMA_DTYPES if kernel == "mma" else DTYPES:
            options = {"codebook": codebook, "block_size": block_size, "nested": nested}
            own_map = block_size == 128
            check_transposed(emulator, kernel, 1, dtype, (5, 35, 160), **options, own_map=own_map)
