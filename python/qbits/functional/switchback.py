"""The SwitchBack linear layer: checks, and the choice between int8 and 16 bit, recorded and not.

Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
arXiv:2304.13013, section 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from qbits.autograd.rules import as_matrix, as_output
from qbits.autograd.switchback import (
    PreparedSwitchBack,
    QuantizedWeight,
    multiply_quantized,
    quantize_weight,
    switchback_function,
)
from qbits.errors import ArgumentValueError
from qbits.functional.standard_linear import check_operands, linear_16bit
from qbits.interop import compute_dtype
from qbits.schemes import check_threshold

__all__ = [
    "check_form",
    "multiply_prepared",
    "multiply_switchback",
    "switchback_linear",
]


def switchback_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    vectorwise: bool = True,
    mem_efficient: bool = False,
    threshold: float = 0.0,
    min_rows: int = 0,
    keep_quantized_weight: bool = False,
) -> torch.Tensor:
    """Multiply by a float weight that trains: output and input gradient in int8, weight gradient in 16 bit.

    ``output = rq(input) @ rq(weight).T + bias``, and backward ``grad_input = rq(grad) @ cq(weight)``,
    ``grad_weight = grad.T @ input``, ``grad_bias = sum(grad)``, where rq has one scale per row and cq one per
    column. Quantizing counts as the identity; a second backward is refused.

    Args:
        input: Float tensor [*, K].
        weight: Float matrix [N, K]; quantized in this call from its own dtype, and never changed.
        bias: None, or [N] in any float dtype; added in float32.
        vectorwise: Whether the weight has one scale per row, and per column backward; else one in all.
        mem_efficient: Whether the backward takes the input from its int8 codes; no 16-bit copy is kept then.
        threshold: Columns of the input with an element that large are multiplied unquantized; 0 is off.
        min_rows: With fewer rows all three products run in 16 bit.
        keep_quantized_weight: Whether the forward also makes the weight's codes for the backward, and keeps
            them, in place of quantizing again.

    Shapes: input [*, K]; weight [N, K]; bias [N]; result [*, N].
    Dtypes: float32, float16, bfloat16, in any mixture; the result has autocast's dtype, else the input's.
    Raises: ShapeError, DtypeError, DeviceError; ValueError for a threshold below 0, or beside mem_efficient.
    Reference: Wortsman et al., arXiv:2304.13013, section 2.2, algorithms 1 to 3.

    >>> x, weight = torch.ones(3, 4), torch.nn.Parameter(torch.ones(2, 4))
    >>> switchback_linear(x, weight).tolist()
    [[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]
    """
    check_form("switchback_linear", threshold, mem_efficient)
    check_operands("switchback_linear", input, weight, bias)
    form = (vectorwise, mem_efficient, threshold, keep_quantized_weight)
    return multiply_switchback(input, weight, bias, *form, min_rows)


def multiply_switchback(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    vectorwise: bool,
    mem_efficient: bool,
    threshold: float,
    keep_quantized_weight: bool,
    min_rows: int,
    quantized: QuantizedWeight | None = None,
) -> torch.Tensor:
    """Compute `switchback_linear` of checked arguments, with the weight's codes where they are known."""
    dtype = compute_dtype(input)
    recorded = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    output: torch.Tensor
    if math.prod(input.shape[:-1]) < min_rows:
        return linear_16bit(input, weight, bias, dtype, recorded)
    if recorded:
        codes = (None,) * 4 if quantized is None else quantized
        apply = switchback_function(vectorwise, mem_efficient).apply
        output = apply(input, weight, bias, dtype, threshold, keep_quantized_weight, *codes)
        return output
    quantized = quantize_weight(weight, vectorwise) if quantized is None else quantized
    rows = as_matrix(input.to(dtype)).contiguous()
    return as_output(multiply_quantized(rows, quantized, bias, vectorwise, threshold, weight)[0], input)


def multiply_prepared(
    input: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    vectorwise: bool,
    threshold: float,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply by a weight that is kept in int8; gradients flow to input and bias.

    With ``threshold`` the outlier columns take ``weight``, or without one the decoded codes.
    """
    dtype = compute_dtype(input)
    weight = weight if threshold else None
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        weight = None if weight is None else weight.detach()
        output: torch.Tensor = PreparedSwitchBack.apply(
            input, codes, scales, bias, vectorwise, dtype, threshold, weight
        )
        return output
    rows, quantized = as_matrix(input.to(dtype)).contiguous(), QuantizedWeight(codes, scales)
    return as_output(multiply_quantized(rows, quantized, bias, vectorwise, threshold, weight)[0], input)


def check_form(op: str, threshold: Any, mem_efficient: bool) -> None:
    """Raise unless ``threshold`` is a number from 0 on, and 0 beside ``mem_efficient``."""
    check_threshold(op, threshold)
    if threshold and mem_efficient:
        rule = f"threshold must be 0 with mem_efficient, whose codes lack those columns, got {threshold}"
        raise ArgumentValueError(f"qbits::{op}: {rule}")
