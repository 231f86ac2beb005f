"""The Function of the 4-bit product: what is saved, which gradient."""

from __future__ import annotations

from typing import Any

import torch

from qbits import ops
from qbits.autograd.rules import bias_gradient, savable, without_autocast

__all__ = ["Gemm4bit"]


class Gemm4bit(torch.autograd.Function):
    """``output = input @ dequantize(weight).T + bias``, with a frozen 4-bit weight.

    ``grad_input = grad_output @ dequantize(weight)`` and ``grad_bias = sum(grad_output)`` in float32:
    linear in grad_output, so that a second backward works. The backward dequantizes again instead of
    saving: N*K/2 bytes stay alive between forward and backward, not N*K*2. The input is never saved.

    Shapes: input [*, K]; packed, N*K/2 bytes; absmax [N * K / block_size]; bias [N]; the rest as
        `ops.gemm_4bit` has it.
    Dtypes: input float32, float16 or bfloat16, and the output as it; bias any of them.
    Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        N: int,
        K: int,
        codebook: str,
        block_size: int,
        bias: torch.Tensor | None,
        absmax_scale: torch.Tensor | None,
        absmax_offset: torch.Tensor | None,
        absmax_codebook: torch.Tensor | None,
    ) -> Any:
        """Multiply, and save the weight where the input needs a gradient."""
        ctx.bias_dtype = None if bias is None else bias.dtype
        if ctx.needs_input_grad[0]:
            ctx.weight = (N, K, codebook, block_size)
            saved = (packed, absmax, absmax_scale, absmax_offset, absmax_codebook)
            ctx.save_for_backward(*(savable(tensor) for tensor in saved))
        return ops.gemm_4bit(
            input,
            packed,
            absmax,
            N,
            K,
            codebook,
            block_size,
            bias,
            absmax_scale,
            absmax_offset,
            absmax_codebook,
        )

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        """Return the gradients of input and bias, each only where it is needed."""
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            packed, absmax, *nested = ctx.saved_tensors
            N, K, codebook, block_size = ctx.weight
            weight = (packed, absmax, N, K, codebook, block_size, *nested)
            if torch.is_grad_enabled() and grad_output.requires_grad:
                grad_input = _differentiable_product(grad_output, *weight)
            else:
                grad_input = ops.gemm_4bit_transposed(grad_output.contiguous(), *weight)
        if ctx.needs_input_grad[7]:
            grad_bias = bias_gradient(grad_output, ctx.bias_dtype)
        return grad_input, None, None, None, None, None, None, grad_bias, None, None, None


def _differentiable_product(
    grad_output: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    N: int,
    K: int,
    codebook: str,
    block_size: int,
    *nested: torch.Tensor | None,
) -> torch.Tensor:
    """The product with the transposed weight by torch's own operations, for a second backward."""
    num_elements, dtype = N * K, grad_output.dtype
    flat = ops.dequantize_4bit(packed, absmax, num_elements, codebook, block_size, dtype, *nested)
    # an autocast around backward() must not round a product whose dtype the forward has chosen
    with without_autocast(grad_output):
        return torch.matmul(grad_output, flat.view(N, K))
