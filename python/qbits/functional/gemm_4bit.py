"""The product with a frozen 4-bit weight; here autograd or the plain op is picked."""

from __future__ import annotations

from typing import Any

import torch

from qbits import interop, ops, outputs
from qbits.autograd import Gemm4bit
from qbits.errors import ArgumentValueError, ShapeError
from qbits.functional.expect import expect
from qbits.interop import contiguous, in_kind
from qbits.records import QTensor4

__all__ = ["linear_4bit", "multiply_4bit", "weight_arguments"]

# bound here: a forward asks both, and every dot on the way takes 15 to 25 ns
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled


def linear_4bit(
    input: Any,
    weight: QTensor4,
    bias: Any = None,
    *,
    compute_dtype: torch.dtype | None = None,
    out: Any = None,
) -> Any:
    """Multiply by a frozen 4-bit weight: ``output = input @ dequantize(weight).T + bias``, summed in float32.

    Operands are rounded to ``compute_dtype``, or to the output's dtype: autocast's where it is on, else the
    input's. Gradients flow to input and bias.

    Shapes: input [*, K]; weight.shape (N, K); bias [N]; result [*, N].
    Dtypes: float32, float16, bfloat16 for input and bias, in any mixture.
    Raises: ShapeError, DtypeError, DeviceError; NotQuantizedError for a float weight; RuntimeError for
        ``out`` where a gradient would be recorded.
    Reference: Dettmers et al., QLoRA, arXiv:2305.14314, equation 5.

    >>> from qbits.functional import quantize_4bit
    >>> linear_4bit(torch.ones(3, 2), quantize_4bit(torch.tensor([[1.0, -1.0]]))).tolist()
    [[0.0], [0.0], [0.0]]
    """
    if type(weight) is not QTensor4:
        expect(weight, QTensor4, "linear_4bit", "quantize_4bit")
    if len(weight.shape) != 2:
        raise ShapeError(
            f"qbits::linear_4bit: weight must have 2 dimensions, got shape {tuple(weight.shape)}"
        )
    return multiply_4bit(input, weight_arguments(weight), bias, compute_dtype, out)


def weight_arguments(weight: QTensor4) -> tuple[Any, ...]:
    """Return what `ops.gemm_4bit` takes of a weight, in its order: the bias stands before the last three."""
    N, K = weight.shape
    return (
        weight.packed,
        weight.absmax,
        N,
        K,
        weight.codebook,
        weight.block_size,
        weight.absmax_scale,
        weight.absmax_offset,
        weight.absmax_codebook,
    )


def multiply_4bit(
    input: Any, weight: tuple[Any, ...], bias: Any, compute_dtype: torch.dtype | None, out: Any = None
) -> Any:
    """Compute `linear_4bit` with a weight given as `weight_arguments` does."""
    packed, absmax, N, K, codebook, block_size, scale, offset, table = weight
    shape = input.shape
    if not shape or shape[-1] != K:
        raise ShapeError(f"qbits::linear_4bit: input must have shape [*, {K}], got {list(shape)}")
    if not isinstance(input, torch.Tensor):
        return _linear_4bit_foreign(input, weight, bias, compute_dtype, out)
    rows, dtype = input, None  # None: the input's
    if compute_dtype is not None or _is_any_autocast_enabled():
        rows, dtype = _rounded(input, compute_dtype)
    rows = rows.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    recorded = _is_grad_enabled() and (rows.requires_grad or (bias is not None and bias.requires_grad))
    if out is not None:
        outputs.refuse_gradient("linear_4bit", out, recorded)
        return _linear_4bit_into(out, input, rows, weight, bias, input.dtype if dtype is None else dtype)
    product = Gemm4bit.apply if recorded else ops.gemm_4bit
    result = product(rows, packed, absmax, N, K, codebook, block_size, bias, scale, offset, table)
    return result if dtype is None or result.dtype == dtype else result.to(dtype)


def _rounded(input: torch.Tensor, compute_dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
    """Return the input as operand, and the dtype of the output: autocast's where it is on."""
    dtype = interop.compute_dtype(input)
    operand_dtype = dtype if compute_dtype is None else compute_dtype
    return (input if input.dtype == operand_dtype else input.to(operand_dtype)), dtype


def _gemm_4bit(rows: Any, weight: tuple[Any, ...], bias: Any, out: Any) -> Any:
    packed, absmax, N, K, codebook, block_size, scale, offset, table = weight
    return ops.gemm_4bit(
        rows, packed, absmax, N, K, codebook, block_size, bias, scale, offset, table, out=out
    )


def _linear_4bit_into(
    out: torch.Tensor,
    input: torch.Tensor,
    rows: torch.Tensor,
    weight: tuple[Any, ...],
    bias: Any,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Fill ``out``; through a copy where it is strided or the operands are rounded to another dtype."""
    shape = (*input.shape[:-1], weight[2])

    def multiply(flat: Any) -> Any:
        target = None if flat is None else flat.view(shape)
        return _gemm_4bit(rows, weight, bias, target)

    direct = rows.dtype == dtype
    inputs = [input, bias, *weight]
    outputs.fill("linear_4bit", multiply, out, input, shape, dtype, inputs, direct=direct)
    return out


def _linear_4bit_foreign(input: Any, weight: tuple[Any, ...], bias: Any, compute_dtype: Any, out: Any) -> Any:
    """Multiply an array of another framework, in its own dtype."""
    if compute_dtype is not None:
        raise ArgumentValueError(
            f"qbits::linear_4bit: compute_dtype must be None for a foreign array, got {compute_dtype}"
        )
    result = _gemm_4bit(contiguous(input), weight, bias, out)
    return result if out is not None else in_kind(result, input, (*input.shape[:-1], weight[2]))
