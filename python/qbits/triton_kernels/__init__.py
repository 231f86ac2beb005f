"""The int8 quantizers and the int8 product in Triton, for GPUs that no native kernel fits; the same bits.

Wortsman et al., Stable and low-precision training for large-scale vision-language models (SwitchBack),
arXiv:2304.13013. Only `qbits.ops` calls what is here, with arguments that the declarations have accepted, and
only then is triton imported. Under ``TRITON_INTERPRET=1`` the kernels run on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qbits.triton_kernels import device

__all__ = [
    "dequantize_columnwise",
    "dequantize_global",
    "dequantize_rowwise",
    "gemm_int8",
    "quantize_columnwise",
    "quantize_columnwise_and_transpose",
    "quantize_dual_global",
    "quantize_dual_rowwise",
    "quantize_global",
    "quantize_global_transpose",
    "quantize_rowwise",
]

TILE = 64  # rows and columns of a tile that is transposed
ELEMENTS = 4096  # of a tile of rows
ABSMAX_STEPS = 8  # tiles that one program searches for the largest magnitude
EXACT_K = 131_071  # (2^31 - 1) / 128^2: up to here int32 sums are exact, -128 included


def _launch(kernel: Any, num_programs: int, tensor: Tensor, *arguments: Any, **constants: Any) -> None:
    """Enqueue on the current stream of the tensor's device."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[(num_programs,)](*arguments, **constants, enable_fp_fusion=False)
    else:
        kernel[(num_programs,)](*arguments, **constants)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _empty_or_zeros(input: Tensor, num_scales: int) -> Tensor:
    """Scales for a kernel to write; zeros where the input is empty and no kernel runs."""
    make = input.new_empty if input.numel() else input.new_zeros
    return make(num_scales, dtype=torch.float32)


def _row_tile(K: int) -> dict[str, int]:
    """Whole rows where they are short; one of seven shapes."""
    columns = min(max(triton.next_power_of_2(K), 64), ELEMENTS)
    return {"ROWS": ELEMENTS // columns, "COLUMNS": columns}


def quantize_rowwise(input: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the rows of [M, K]: codes int8 [M, K], scales float32 [M].

    ``s = max |x|; codes = rint(x * (127 / s))``; zeros where s is 0, below 2^-119, NaN or Inf.
    """
    M, K = input.shape
    values = torch.empty_like(input, dtype=torch.int8)
    scales = _empty_or_zeros(input, M)
    if input.numel():
        tile = _row_tile(K)
        programs = _ceil_div(M, tile["ROWS"])
        _launch(device.quantize_rowwise, programs, input, input, values, scales, M, K, **tile)
    return values, scales


def _quantized_transposed(input: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [K, M] and the scale of each entry of ``largest``, which stands for a column or for all."""
    M, K = input.shape
    values = input.new_empty((K, M), dtype=torch.int8)
    scales = _empty_or_zeros(input, largest.numel())
    is_global = largest.numel() != K or K == 1
    programs = _ceil_div(M, TILE) * _ceil_div(K, TILE)
    arguments = (input, values, largest, scales, M, K)
    if programs:
        _launch(device.quantize_transposed, programs, input, *arguments, TILE=TILE, IS_GLOBAL=is_global)
    return values, scales


def quantize_columnwise_and_transpose(input: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the columns of [M, K]: codes int8 [K, M], scales float32 [K]."""
    M, K = input.shape
    largest = input.new_zeros(K, dtype=torch.int32)
    programs = _ceil_div(M, TILE * ABSMAX_STEPS) * _ceil_div(K, TILE)
    constants = {"TILE": TILE, "STEPS": ABSMAX_STEPS}
    if programs:
        _launch(device.largest_of_columns, programs, input, input, largest, M, K, **constants)
    return _quantized_transposed(input, largest)


def _largest_magnitude(input: Tensor) -> Tensor:
    """The bits of the largest magnitude, int32 [1]."""
    largest = input.new_zeros(1, dtype=torch.int32)
    programs = _ceil_div(input.numel(), ELEMENTS * ABSMAX_STEPS)
    constants = {"ELEMENTS": ELEMENTS, "STEPS": ABSMAX_STEPS}
    if programs:
        _launch(device.largest_of_all, programs, input, input, largest, input.numel(), **constants)
    return largest


def quantize_global(input: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a tensor of any shape with one scale: codes int8 of its shape, scales float32 [1]."""
    largest = _largest_magnitude(input)
    values, scales = torch.empty_like(input, dtype=torch.int8), _empty_or_zeros(input, 1)
    programs = _ceil_div(input.numel(), ELEMENTS)
    arguments = (input, values, largest, scales, input.numel())
    if programs:
        _launch(device.quantize_global, programs, input, *arguments, ELEMENTS=ELEMENTS)
    return values, scales


def quantize_global_transpose(input: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize [M, K] with one scale: codes int8 [K, M], scales float32 [1]."""
    return _quantized_transposed(input, _largest_magnitude(input))


def quantize_columnwise(input: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the columns of [M, K]: codes int8 [M, K], scales float32 [K]."""
    transposed, scales = quantize_columnwise_and_transpose(input)
    return transposed.t().contiguous(), scales


def quantize_dual_rowwise(input: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the results of `quantize_rowwise` and of `quantize_columnwise_and_transpose`."""
    return *quantize_rowwise(input), *quantize_columnwise_and_transpose(input)


def quantize_dual_global(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize [N, K] with one scale: codes int8 [N, K], the same transposed, scales float32 [1]."""
    values, scales = quantize_global(input)
    return values, values.t().contiguous(), scales


def _decoded(values: Tensor, scales: Tensor, dtype: torch.dtype, *strides: int) -> Tensor:
    """``codes * s * (1 / 127)``; the strides of the scales are those along rows and columns."""
    output = torch.empty_like(values, dtype=dtype)
    if values.numel():
        K = values.shape[-1]
        M, tile = values.numel() // K, _row_tile(K)
        programs = _ceil_div(M, tile["ROWS"]) * _ceil_div(K, tile["COLUMNS"])
        _launch(device.dequantize, programs, values, values, scales, output, M, K, *strides, **tile)
    return output


def dequantize_rowwise(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode int8 [M, K] with a scale per row."""
    return _decoded(values, scales, dtype, 1, 0)


def dequantize_columnwise(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode int8 [M, K] with a scale per column."""
    return _decoded(values, scales, dtype, 0, 1)


def dequantize_global(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode int8 of any shape with one scale."""
    return _decoded(values, scales, dtype, 0, 0)


def _gemm_tile(M: int, K: int) -> tuple[dict[str, int], dict[str, int]]:
    """One of four tiles, and how it is launched; the tile of few rows also where sums need 64 bits."""
    if K > EXACT_K:
        tile = {"TILE_M": 32, "TILE_N": 64, "TILE_K": 64, "EXACT_TILES": EXACT_K // 64}
        return tile, {"num_warps": 4, "num_stages": 3}
    if M <= 64:
        tile = {"TILE_M": 16 if M <= 16 else 64, "TILE_N": 64, "TILE_K": 128, "EXACT_TILES": 0}
        return tile, {"num_warps": 4, "num_stages": 4}
    tile = {"TILE_M": 128, "TILE_N": 128, "TILE_K": 64, "EXACT_TILES": 0}
    return tile, {"num_warps": 8, "num_stages": 3}


def gemm_int8(
    input: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    input_scales: Tensor | None,
    weight_scales: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Multiply codes [M, K] by [N, K]: ``sums * (input_scales / 127^2) * weight_scales + bias``.

    The scales of the weight are one per row [N], or one for all [1]. int32 output: the sums.
    """
    (M, K), N = input.shape, weight.shape[0]
    output = input.new_empty((M, N), dtype=dtype)
    if output.numel():
        tile, options = _gemm_tile(M, K)
        programs = _ceil_div(M, tile["TILE_M"]) * _ceil_div(N, tile["TILE_N"])
        has_one = weight_scale is not None
        scales = weight_scale if has_one else weight_scales
        arguments = (input, weight, input_scales, scales, bias, output, M, N, K)
        _launch(
            device.gemm_int8, programs, input, *arguments, HAS_ONE_WEIGHT_SCALE=has_one, **tile, **options
        )
    return output
