"""The product by LLM.int8(), with an int8 weight or a float one; here autograd or the plain op is picked.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits.autograd.matmul_int8 import MatmulInt8, MatmulInt8Frozen, frozen_product, training_product
from qbits.errors import ArgumentTypeError, ArgumentValueError, NotQuantizedError, ShapeError
from qbits.interop import compute_dtype
from qbits.schemes import check_threshold

__all__ = ["matmul_int8", "multiply_int8"]

_GRAD_WEIGHTS = ("int8", "16bit")
# bound here: a forward asks both, and every dot on the way takes time
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled


def matmul_int8(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    threshold: float = 0.0,
    grad_weight: str = "int8",
) -> torch.Tensor:
    """Multiply in int8: ``output = input @ weight.T + bias``, outlier columns of the input in 16 bits.

    The input is quantized row by row, so is a float weight. The columns of the input that hold an absolute
    value of at least ``threshold`` are left out of that, and multiplied by the weight's own columns, decoded
    from int8 where it is frozen; all is summed in float32 and rounded once. Nothing waits for the device.

    An int8 weight with its scales is frozen: gradients flow to input and bias, ``grad_input = grad @
    dequantize(weight)``. A float weight trains: ``grad_input`` is a product of int8 rows and columns, and so
    is ``grad_weight``, with scales over the tokens, but for outlier columns; ``grad_weight="16bit"`` takes
    all of it unquantized. Quantizing counts as the identity, and a second backward is refused.

    Args:
        input: Float tensor [*, K].
        weight: int8 codes, or a float matrix, [N, K], of any strides.
        weight_scales: Largest absolute value of each row before quantization, for int8 codes.
        bias: None, or [N], added before the rounding.
        threshold: From where on a value makes its column an outlier; 0 is off.
        grad_weight: "int8" or "16bit".

    Shapes: input [*, K]; weight [N, K]; weight_scales [N]; bias [N]; result [*, N].
    Dtypes: float32, float16, bfloat16 in any mixture; the result has autocast's dtype, else the input's.
    Raises: ShapeError, DtypeError, DeviceError; NotQuantizedError for codes without scales; ValueError for a
        threshold below 0, scales of a float weight, another grad_weight.
    Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3.

    >>> matmul_int8(torch.tensor([[127.0, -2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).round().tolist()
    [[127.0, -2.0]]
    """
    check_threshold("matmul_int8", threshold)
    if grad_weight not in _GRAD_WEIGHTS:
        raise ArgumentValueError(
            f"qbits::matmul_int8: grad_weight must be one of {list(_GRAD_WEIGHTS)}, got {grad_weight!r}"
        )
    operands: dict[str, Any] = {"input": input, "weight": weight}
    for name, tensor in operands.items():
        if not isinstance(tensor, torch.Tensor):
            rule = f"{name} must be a torch.Tensor, got {type(tensor).__name__}"
            raise ArgumentTypeError(f"qbits::matmul_int8: {rule}")
    if weight.dtype == torch.int8 and weight_scales is None:
        raise NotQuantizedError(
            "qbits::matmul_int8: weight_scales must be given for an int8 weight, got None"
        )
    if weight.dtype != torch.int8 and weight_scales is not None:
        raise ArgumentValueError(
            f"qbits::matmul_int8: weight_scales must be None for a {weight.dtype} weight, got a tensor"
        )
    return multiply_int8(input, weight, weight_scales, bias, threshold, grad_weight)[0]


def multiply_int8(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    threshold: float,
    grad_weight: str = "int8",
    pool: Any = None,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute `matmul_int8`, and the mask [K] of the outlier columns, None where ``threshold`` is 0.

    The columns of ``pool``, a `qbits.nn.OutlierPool`, are outliers, too, and it takes up those of this call.
    ``quantized`` are the row codes and scales of a float weight, where they are known.
    """
    shape = input.shape
    if weight.dim() != 2:
        raise ShapeError(f"qbits::matmul_int8: weight must have 2 dimensions, got shape {list(weight.shape)}")
    if not shape or shape[-1] != weight.shape[1]:
        rule = f"input must have shape [*, {weight.shape[1]}], got {list(shape)}"
        raise ShapeError(f"qbits::matmul_int8: {rule}")
    rows = input
    if _is_any_autocast_enabled():
        rows = rows.to(compute_dtype(input))
    rows = rows.contiguous()
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    trains = weight_scales is None
    recorded = _is_grad_enabled() and (
        rows.requires_grad or (trains and weight.requires_grad) or (bias is not None and bias.requires_grad)
    )
    pooled = None if pool is None or threshold == 0 else pool.mask(shape[-1], rows.device)
    result: Any
    if weight_scales is not None:
        product = MatmulInt8Frozen.apply if recorded else frozen_product
        result = product(rows, weight, weight_scales.contiguous(), bias, threshold, pooled)
    elif recorded:
        known = (None, None) if quantized is None else quantized
        result = MatmulInt8.apply(rows, weight, bias, threshold, grad_weight == "int8", pooled, *known)
    else:
        result = training_product(rows, weight, bias, threshold, pooled, quantized)
    output, mask = result
    if pool is not None and mask is not None:
        pool.add_mask(mask)
    return output, mask
