"""The kernels for Hopper that multiply many rows by a 4-bit weight, compiled for the CPU, against float64."""

from __future__ import annotations

import pytest
from emulation import gemm_kernels
from emulation.emulator import Emulator, needs_compiler
from emulation.products import MMA_DTYPES, Case, check
from reference import BLOCK_SIZES_4BIT

MODULES = ("gemm_4bit_large_sm90",)

KERNELS = ("256k1", "256k2", "128k1", "128k2", "256k1_unit32", "128k2_unit32")

pytestmark = needs_compiler


def check_large(
    emulator: Emulator, kernel: str, case: Case, num_sms: int = 2, raster_tokens: int = 8
) -> None:
    check(case, lambda product: gemm_kernels.large(emulator, product, kernel, num_sms, raster_tokens))


@pytest.mark.parametrize("dtype", MMA_DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_4bit_large_kernels_are_right_for_every_shape(emulator, kernel, dtype):
    tokens = int(kernel.split("k")[0])
    check_large(emulator, kernel, Case(dtype, (tokens, 128, 64)))
    check_large(emulator, kernel, Case(dtype, (tokens + 3, 100, 320), "fp4", bias="float16"))
    # More tiles than CTAs in a ragged raster, more blocks of K than stages
    case = Case(dtype, (2 * tokens + 9, 136, 832), "af4", bias="bfloat16", weights_ready=True)
    check_large(emulator, kernel, case, num_sms=3, raster_tokens=2)
    check_large(emulator, kernel, Case(dtype, (5, 257, 576), offset=1, bias="float32", weights_ready=True))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm_4bit_large_kernels_know_every_block_size(emulator, kernel, nested):
    for block_size in BLOCK_SIZES_4BIT:
        if ("unit32" in kernel) != (block_size == 32):
            continue
        for k in (256, 320):
            own_map = block_size == 128
            case = Case("bfloat16", (130, 40, k), "nf4", block_size, nested, own_map, "float32")
            check_large(emulator, kernel, case)
