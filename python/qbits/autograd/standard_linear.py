"""The unquantized linear layer as a Function of our own: what SwitchBack is compared with, and falls back to.

Reference: Wortsman et al., arXiv:2304.13013, section 2.2, figure 2.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits.autograd.rules import as_matrix, as_output, bias_gradient, dense_product, savable, without_autocast
from qbits.interop import compute_dtype

__all__ = ["StandardLinearFunction", "multiply_dense"]


def multiply_dense(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return ``input @ weight.T + bias``, operands rounded to ``dtype``, the bias added in float32."""
    rows, operand = as_matrix(input.to(dtype)), weight.to(dtype)
    with without_autocast(rows):
        if bias is None or bias.dtype == dtype:
            product = torch.nn.functional.linear(rows, operand, bias)
        else:
            product = (dense_product(rows, operand.t(), torch.float32) + bias.float()).to(dtype)
    return as_output(product, input)


class StandardLinearFunction(torch.autograd.Function):
    """``output = input @ weight.T + bias``.

    ``grad_input = grad_output @ weight``, ``grad_weight = grad_output.T @ input``, ``grad_bias =
    sum(grad_output)``; operands are brought to the dtype of grad_output, sums are float32, and a gradient has
    the dtype of its tensor. Input and weight are saved, the bias is not. A second backward works.

    Shapes: input [*, K]; weight [N, K]; bias [N] or None; output [*, N].
    Dtypes: float32, float16, bfloat16, in any mixture; the output has ``dtype``, by default autocast's, else
        the input's.

    >>> StandardLinearFunction.apply(torch.ones(3, 4), torch.ones(2, 4), torch.zeros(2)).tolist()
    [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Multiply, and save what a gradient needs."""
        ctx.input_dtype, ctx.weight_dtype = input.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        needs_input, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            savable(input) if needs_weight else None, savable(weight) if needs_input else None
        )
        return multiply_dense(input, weight, bias, compute_dtype(input) if dtype is None else dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        """Return the gradients of input, weight and bias, each only where it is needed."""
        grad_input = grad_weight = grad_bias = None
        input, weight = ctx.saved_tensors
        dtype = grad_output.dtype
        if ctx.needs_input_grad[0]:
            grad_input = dense_product(grad_output, weight.to(dtype), ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            rows = as_matrix(input.to(dtype))
            grad_weight = dense_product(as_matrix(grad_output).t(), rows, ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = bias_gradient(grad_output, ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None
