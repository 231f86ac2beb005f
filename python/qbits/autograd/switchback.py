"""SwitchBack: output and input gradient of a linear layer in int8, its weight gradient in 16 bit.

Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
arXiv:2304.13013, section 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from qbits.interop import compute_dtype

__all__ = [
    "PreparedSwitchBack",
    "QuantizedWeight",
    "SwitchBackGlobal",
    "SwitchBackGlobalMemEfficient",
    "SwitchBackVectorwise",
    "SwitchBackVectorwiseMemEfficient",
    "decode_weight",
    "multiply_quantized",
    "quantize_weight",
    "switchback_function",
]


class QuantizedWeight(NamedTuple):
    """The int8 forms of a weight [N, K]: for the output and, unless None, transposed for the gradient."""

    codes: torch.Tensor  # int8 [N, K]
    scales: torch.Tensor  # float32 [N], or [1] for one scale
    transposed: torch.Tensor | None = None  # int8 [K, N]
    transposed_scales: torch.Tensor | None = None  # float32 [K], or [1] for one scale


def quantize_weight(weight: torch.Tensor, vectorwise: bool, *, both: bool = False) -> QuantizedWeight:
    """Quantize ``weight`` [N, K] by rows or as a whole; ``both`` adds transposed codes in the same read."""
    weight = weight.detach().contiguous()
    if vectorwise:
        return QuantizedWeight(*(ops.quantize_dual_rowwise if both else ops.quantize_rowwise)(weight))
    if both:
        codes, transposed, scales = ops.quantize_dual_global(weight)
        return QuantizedWeight(codes, scales, transposed, scales)
    return QuantizedWeight(*ops.quantize_global(weight))


def _quantize_transposed(weight: torch.Tensor, vectorwise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes [K, N] and scales that the gradient of the input takes."""
    weight = weight.contiguous()
    if vectorwise:
        return ops.quantize_columnwise_and_transpose(weight)
    return ops.quantize_global_transpose(weight)


def decode_weight(quantized: QuantizedWeight, vectorwise: bool, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [N, K] that the codes stand for."""
    decode = ops.dequantize_rowwise if vectorwise else ops.dequantize_global
    weight: torch.Tensor = decode(quantized.codes, quantized.scales, dtype)
    return weight


def _gemm_int8(
    codes: torch.Tensor,
    code_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    vectorwise: bool,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    by_row, single = (scales, None) if vectorwise else (None, scales)
    result: torch.Tensor = ops.gemm_int8(codes, weight, dtype, code_scales, by_row, single, bias)
    return result


def multiply_quantized(
    rows: torch.Tensor,
    quantized: QuantizedWeight,
    bias: torch.Tensor | None,
    vectorwise: bool,
    threshold: float = 0.0,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output, and codes and scales of ``rows``.

    With ``threshold`` the columns of ``rows`` that reach it meet those of ``weight`` unquantized.

    Shapes: rows [M, K]; weight [N, K]; bias [N]; output [M, N] in the dtype of ``rows``.
    """
    dtype, bias = rows.dtype, None if bias is None else bias.contiguous()
    if threshold == 0:
        codes, code_scales = ops.quantize_rowwise(rows)
        operands = (codes, code_scales, quantized.codes, quantized.scales, vectorwise, bias)
        return _gemm_int8(*operands, dtype), codes, code_scales
    codes, code_scales, mask = ops.quantize_rowwise_outliers(rows, threshold)
    if weight is None and vectorwise:
        output = ops.gemm_int8_outliers(
            codes, code_scales, rows, mask, quantized.codes, quantized.scales, bias
        )
        return output, codes, code_scales
    weight = decode_weight(quantized, vectorwise, dtype) if weight is None else weight
    operands = (codes, code_scales, quantized.codes, quantized.scales, vectorwise, bias)
    int8_part = _gemm_int8(*operands, torch.float32)
    return add_outlier_columns(int8_part, rows, mask, weight), codes, code_scales


def _forward(
    ctx: Any,
    vectorwise: bool,
    mem_efficient: bool,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    keep_quantized_weight: bool = False,
    *quantized: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply, and save what `_backward` needs: nothing for a gradient that is not asked for."""
    dtype = compute_dtype(input) if dtype is None else dtype
    rows = as_matrix(input.to(dtype)).contiguous()
    if not quantized or quantized[0] is None:
        both = keep_quantized_weight and ctx.needs_input_grad[0]
        forms = quantize_weight(weight, vectorwise, both=both)
    else:
        forms = QuantizedWeight(*quantized)  # type: ignore[arg-type]
    output, codes, code_scales = multiply_quantized(rows, forms, bias, vectorwise, threshold, weight)
    ctx.vectorwise, ctx.mem_efficient, ctx.keep = vectorwise, mem_efficient, keep_quantized_weight
    ctx.input_dtype, ctx.weight_dtype = input.dtype, weight.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    saved: list[torch.Tensor | None] = []
    if ctx.needs_input_grad[0]:
        if keep_quantized_weight:
            saved += [forms.transposed, forms.transposed_scales]
        else:
            saved += [weight]
    if ctx.needs_input_grad[1]:
        saved += [codes, code_scales] if mem_efficient else [rows]
    ctx.save_for_backward(*(savable(tensor) for tensor in saved))
    return as_output(output, input)


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
    """Return the gradients of input, weight and bias, each only where it is needed."""
    saved = list(ctx.saved_tensors)
    grad_input = grad_weight = grad_bias = None
    rows = as_matrix(grad_output).contiguous()
    if ctx.needs_input_grad[0]:
        if ctx.keep:
            transposed, scales = saved.pop(0), saved.pop(0)
        else:
            transposed, scales = _quantize_transposed(saved.pop(0), ctx.vectorwise)
        codes, code_scales = ops.quantize_rowwise(rows)
        product = _gemm_int8(codes, code_scales, transposed, scales, ctx.vectorwise, None, ctx.input_dtype)
        grad_input = product.view(*grad_output.shape[:-1], product.shape[1])
    if ctx.needs_input_grad[1]:
        input = ops.dequantize_rowwise(saved[0], saved[1], rows.dtype) if ctx.mem_efficient else saved[0]
        grad_weight = dense_product(rows.t(), input, ctx.weight_dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = bias_gradient(rows, ctx.bias_dtype)
    return grad_input, grad_weight, grad_bias, *(None,) * 7


class SwitchBackVectorwise(torch.autograd.Function):
    """``output = rq(input) @ rq(weight).T + bias`` with one scale per row of both, products in int8.

    ``grad_input = rq(grad_output) @ cq(weight)`` in int8 with one scale per column of the weight;
    ``grad_weight = grad_output.T @ input`` unquantized, in the dtype of grad_output with float32 sums; and
    ``grad_bias = sum(grad_output)`` in float32. Quantizing counts as the identity. Saved are the weight
    itself, which the backward quantizes anew (``keep_quantized_weight``: its transposed codes), and the
    input. A second backward is refused.

    Shapes: input [*, K]; weight [N, K]; bias [N] or None; output [*, N].
    Dtypes: float32, float16, bfloat16, in any mixture; the output has ``dtype``, by default autocast's, else
        the input's.
    Reference: Wortsman et al., arXiv:2304.13013, section 2.2, algorithm 3.

    >>> x, weight = torch.ones(3, 4, requires_grad=True), torch.ones(2, 4)
    >>> SwitchBackVectorwise.apply(x, weight, None).shape
    torch.Size([3, 2])
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        """Multiply; arguments as `_forward` has them after the two flags."""
        return _forward(ctx, True, False, *arguments)

    backward = staticmethod(once_differentiable(_backward))


class SwitchBackGlobal(torch.autograd.Function):
    """`SwitchBackVectorwise` with one scale for the whole weight, so that both products use the same codes.

    Reference: Wortsman et al., arXiv:2304.13013, section 2.2, algorithm 1.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        """Multiply; arguments as `_forward` has them after the two flags."""
        return _forward(ctx, False, False, *arguments)

    backward = staticmethod(once_differentiable(_backward))


class SwitchBackVectorwiseMemEfficient(torch.autograd.Function):
    """`SwitchBackVectorwise` that saves the input's int8 codes; grad_weight takes them decoded.

    Reference: Wortsman et al., arXiv:2304.13013, section 2.2, algorithm 2, with scales as in algorithm 3.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        """Multiply; arguments as `_forward` has them after the two flags."""
        return _forward(ctx, True, True, *arguments)

    backward = staticmethod(once_differentiable(_backward))


class SwitchBackGlobalMemEfficient(torch.autograd.Function):
    """`SwitchBackGlobal` that saves the input's int8 codes; grad_weight takes them decoded.

    Reference: Wortsman et al., arXiv:2304.13013, section 2.2, algorithm 2.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        """Multiply; arguments as `_forward` has them after the two flags."""
        return _forward(ctx, False, True, *arguments)

    backward = staticmethod(once_differentiable(_backward))


def switchback_function(vectorwise: bool, mem_efficient: bool) -> type[torch.autograd.Function]:
    """Return the Function of a form of SwitchBack."""
    if vectorwise:
        return SwitchBackVectorwiseMemEfficient if mem_efficient else SwitchBackVectorwise
    return SwitchBackGlobalMemEfficient if mem_efficient else SwitchBackGlobal


class PreparedSwitchBack(torch.autograd.Function):
    """``output = rq(input) @ codes.T + bias`` with a weight that is kept in int8.

    ``grad_input = grad_output @ dequantize(codes)`` in the dtype of grad_output, and ``grad_bias =
    sum(grad_output)`` in float32.

    Shapes: input [*, K]; codes [N, K] int8; scales [N], or [1] where not ``vectorwise``; bias [N] or None;
        weight [N, K] for the outlier columns of ``threshold``, or None: then they take the decoded codes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        vectorwise: bool,
        dtype: torch.dtype,
        threshold: float,
        weight: torch.Tensor | None,
    ) -> Any:
        """Multiply, and save the codes where the input needs a gradient."""
        ctx.vectorwise, ctx.input_dtype = vectorwise, input.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(savable(codes), savable(scales))
        rows, forms = as_matrix(input.to(dtype)).contiguous(), QuantizedWeight(codes, scales)
        return as_output(multiply_quantized(rows, forms, bias, vectorwise, threshold, weight)[0], input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        """Return the gradients of input and bias, each only where it is needed."""
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            forms = QuantizedWeight(*ctx.saved_tensors)
            weight = decode_weight(forms, ctx.vectorwise, grad_output.dtype)
            grad_input = dense_product(grad_output, weight, ctx.input_dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = bias_gradient(grad_output, ctx.bias_dtype)
        return grad_input, None, None, grad_bias, None, None, None, None
