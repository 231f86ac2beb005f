"""Cases of products with 4-bit weights: random operands, and float64 to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import reference
from emulation.arrays import Output, aligned, widen
from emulation.emulator import Array
from emulation.gemm_kernels import Product
from emulation.kernels import STORAGE

MMA_DTYPES = ("float16", "bfloat16")
RANDOM = np.random.default_rng(7)
# Relative error of one rounding: of the output, and of the codebook's values to the type of the tensor cores.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass
class Case:
    """One product; `shape` is m, n, k."""

    dtype: str
    shape: tuple[int, int, int]
    codebook: str = "nf4"
    block_size: int = 64
    nested: bool = False
    own_map: bool = False
    bias: str | None = None
    offset: int = 0
    weights_ready: bool = False
    transposed: bool = False


def normal(n: int, dtype: str) -> Array:
    """Standard normal numbers, stored."""
    return reference.round_to(RANDOM.standard_normal(n).astype(np.float32), dtype)


def quantized(case: Case) -> tuple[dict[str, Array | None], npt.NDArray[np.float64]]:
    """Standard normal weights [n, k]: the operands of Product, and what they stand for."""
    _, n, k = case.shape
    weight = RANDOM.standard_normal(n * k).astype(np.float32)
    packed, absmax = reference.quantize_4bit(weight, case.codebook, case.block_size)
    operands: dict[str, Array | None] = {"absmax": aligned(absmax)}
    if case.nested:
        codes, scale, offset = reference.quantize_absmax(absmax)
        own_map = np.sort(RANDOM.uniform(-1, 1, 256)).astype(np.float32) if case.own_map else None
        absmax = reference.decode_absmax(codes, scale, offset, own_map)
        operands = {
            "absmax": aligned(codes),
            "absmax_scale": scale,
            "absmax_offset": np.array([offset], np.float32),
            "absmax_codebook": own_map,
        }
    decoded = reference.decode_4bit(packed, absmax, n * k, case.codebook, case.block_size)
    return operands | {"packed": aligned(packed, case.offset)}, decoded.reshape(n, k).astype(np.float64)


def check(case: Case, launch: Callable[[Product], None]) -> None:
    """Launches; the output is float64's up to the roundings of the weight, the sums and the output."""
    m, n, _ = case.shape
    weight, decoded = quantized(case)
    if not case.transposed:
        decoded = decoded.T
    x = normal(m * decoded.shape[0], case.dtype)
    bias = None if case.bias is None else normal(n, case.bias)
    output = Output(m * decoded.shape[1], STORAGE[case.dtype], case.offset)
    product = Product(
        case.dtype, case.shape, case.codebook, case.block_size, aligned(x, case.offset),
        output=output.array, bias=bias, bias_dtype=case.bias or "float32",
        weights_ready=case.weights_ready, **weight,
    )  # fmt: skip
    launch(product)
    wide = widen(x, case.dtype).reshape(m, -1).astype(np.float64)
    want = wide @ decoded + (0 if bias is None else widen(bias, product.bias_dtype))
    terms = np.abs(wide) @ np.abs(decoded)
    # Each product is off by the rounding of its weight, the float32 sums by less than 1e-6 of the terms.
    limit = ROUNDING[case.dtype] * (terms + np.abs(want)) + 1e-6 * terms
    error = np.abs(widen(output.array, case.dtype).reshape(want.shape) - want)
    assert (error <= limit).all(), f"{case}: {error[~(error <= limit)]} beyond {limit[~(error <= limit)]}"
    assert output.is_intact(), f"{case}: written beside the output"
