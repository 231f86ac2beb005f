"""The autograd Functions of `functional.matmul_int8`: an int8 weight that is frozen, a float one that trains.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, sections 2.1 and 3.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits import ops
from qbits.autograd.rules import (
    add_outlier_columns,
    as_matrix,
    as_output,
    bias_gradient,
    dense_product,
    once_differentiable,
    savable,
)

__all__ = ["MatmulInt8", "MatmulInt8Frozen", "frozen_product", "training_product"]


def frozen_product(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    pooled: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multiply by an int8 weight, outlier columns by its decoded columns; return the outlier mask, too."""
    rows = as_matrix(input)
    codes, scales, mask = _quantize_input(rows, threshold, pooled)
    if mask is None:
        output = ops.gemm_int8(codes, weight, input.dtype, scales, weight_scales, None, bias)
    else:
        output = ops.gemm_int8_outliers(codes, scales, rows, mask, weight, weight_scales, bias)
    return as_output(output, input), mask


def training_product(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    pooled: torch.Tensor | None,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multiply by a float weight in int8, outlier columns by its own values; return the outlier mask, too."""
    rows = as_matrix(input)
    codes, scales, mask = _quantize_input(rows, threshold, pooled)
    weight_codes, weight_scales = ops.quantize_rowwise(weight) if quantized is None else quantized
    dtype = input.dtype if mask is None else torch.float32
    output = ops.gemm_int8(codes, weight_codes, dtype, scales, weight_scales, None, bias)
    if mask is not None:
        output = add_outlier_columns(output, rows, mask, weight)
    return as_output(output, input), mask


class MatmulInt8Frozen(torch.autograd.Function):
    """``output = input @ dequantize(weight).T + bias`` by an int8 product, with a frozen weight.

    ``grad_input = grad_output @ dequantize(weight)``, in 16 bits for 16-bit inputs, and ``grad_bias =
    sum(grad_output)`` in float32. Nothing of the input is saved.

    Shapes: input [*, K]; weight int8 [N, K]; weight_scales [N]; bias [N]; pooled [K] or None; results [*, N]
        and the outlier mask [K], None where the threshold is 0.
    Dtypes: input float32, float16 or bfloat16, and the output as it; bias any of them.
    Reference: arXiv:2208.07339, section 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        weight_scales: torch.Tensor,
        bias: torch.Tensor | None,
        threshold: float,
        pooled: torch.Tensor | None,
    ) -> Any:
        """Multiply, and save the weight where the input needs a gradient."""
        ctx.bias_dtype = None if bias is None else bias.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(savable(weight), savable(weight_scales))
        output, mask = frozen_product(input, weight, weight_scales, bias, threshold, pooled)
        if mask is not None:
            ctx.mark_non_differentiable(mask)
        return output, mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, _: Any) -> Any:
        """Return the gradients of input and bias, each only where it is needed."""
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight, weight_scales = ctx.saved_tensors
            decoded = ops.dequantize_rowwise(weight, weight_scales, grad_output.dtype)
            rows = dense_product(as_matrix(grad_output.contiguous()), decoded, grad_output.dtype)
            grad_input = as_output(rows, grad_output)
        if ctx.needs_input_grad[3]:
            grad_bias = bias_gradient(grad_output, ctx.bias_dtype)
        return grad_input, None, None, grad_bias, None, None


class MatmulInt8(torch.autograd.Function):
    """``output = input @ weight.T + bias`` by an int8 product, with a float weight that trains.

    All gradients are products of codes whose scales stand on the sides that remain: ``grad_input`` of the
    rows of grad_output and the columns of the weight, ``grad_weight`` of the columns of grad_output and of
    the input, over the tokens. The weight's columns that met outliers, and with ``int8_grad_weight`` false
    all of them, get their gradient from a product in the input's dtype.

    Shapes: input [*, K]; weight [N, K]; bias [N]; pooled [K] or None; codes int8 [N, K] and scales [N] of the
        weight, or None; results [*, N] and the outlier mask [K], None where the threshold is 0.
    Dtypes: float32, float16, bfloat16 in any mixture; the output has the input's.
    Reference: arXiv:2208.07339, sections 2.1 and 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        threshold: float,
        int8_grad_weight: bool,
        pooled: torch.Tensor | None,
        codes: torch.Tensor | None,
        scales: torch.Tensor | None,
    ) -> Any:
        """Multiply, and save what the gradients that are needed take."""
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.weight_dtype, ctx.int8_grad_weight = weight.dtype, int8_grad_weight
        quantized = None if codes is None or scales is None else (codes, scales)
        output, mask = training_product(input, weight, bias, threshold, pooled, quantized)
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            savable(input) if needs_weight else None,
            savable(weight) if needs_input else None,
            mask if needs_weight and int8_grad_weight else None,
        )
        if mask is not None:
            ctx.mark_non_differentiable(mask)
        return output, mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor, _: Any) -> Any:
        """Return the gradients of input, weight and bias, each only where it is needed."""
        grad_input = grad_weight = grad_bias = None
        input, weight, mask = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        rows = as_matrix(grad_output)
        if ctx.needs_input_grad[0]:
            codes, scales = ops.quantize_rowwise(rows)
            columns, column_scales = ops.quantize_columnwise_and_transpose(weight)
            product = ops.gemm_int8(codes, columns, rows.dtype, scales, column_scales)
            grad_input = as_output(product, grad_output)
        if ctx.needs_input_grad[1]:
            grad_weight = _grad_weight(rows, as_matrix(input), mask, ctx.int8_grad_weight, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = bias_gradient(grad_output, ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, *(None,) * 5


def _grad_weight(
    grad_rows: torch.Tensor,
    input_rows: torch.Tensor,
    mask: torch.Tensor | None,
    in_int8: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``grad_rows.T @ input_rows`` [N, K]: in int8 with scales over the tokens, outlier columns in none."""
    if not in_int8:
        return dense_product(grad_rows.t(), input_rows, dtype)
    grad_codes, grad_scales = ops.quantize_columnwise_and_transpose(grad_rows)
    codes, scales = ops.quantize_columnwise_and_transpose(input_rows)
    grad_weight: torch.Tensor = ops.gemm_int8(grad_codes, codes, dtype, grad_scales, scales)
    if mask is None:
        return grad_weight
    # a column's codes count in its own column alone, so those of outliers need not be left out above
    return torch.where(mask, dense_product(grad_rows.t(), input_rows, dtype), grad_weight)


def _quantize_input(
    rows: torch.Tensor, threshold: float, pooled: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales, and the mask of the outlier columns, whose codes are zero."""
    if threshold == 0:
        return *ops.quantize_rowwise(rows), None
    codes, scales, mask = ops.quantize_rowwise_outliers(rows, threshold)
    if pooled is not None:
        mask = mask | pooled
        codes = codes.masked_fill(mask, 0)
    return codes, scales, mask
