"""The unquantized linear layer: what SwitchBack is compared with, and does where int8 would not pay."""

from __future__ import annotations

from typing import Any

import torch

from qbits.autograd.standard_linear import StandardLinearFunction, multiply_dense
from qbits.errors import ArgumentTypeError, DeviceError, DtypeError, ShapeError
from qbits.interop import FLOATS, compute_dtype

__all__ = ["check_operands", "is_plain", "linear_16bit", "standard_linear"]

# bound here: a forward asks it, and every dot on the way takes 15 to 25 ns
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def standard_linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply by a float weight: ``output = input @ weight.T + bias``; a second backward works.

    Operands are rounded to the output's dtype, sums are float32, the bias is added in float32.

    Shapes: input [*, K]; weight [N, K]; bias [N]; result [*, N].
    Dtypes: float32, float16, bfloat16, in any mixture; the result has autocast's dtype, else the input's.
    Raises: ShapeError, DtypeError, DeviceError.

    >>> standard_linear(torch.ones(1, 4), torch.ones(2, 4)).tolist()
    [[4.0, 4.0]]
    """
    check_operands("standard_linear", input, weight, bias)
    tensors = (input, weight) if bias is None else (input, weight, bias)
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _multiply(input, weight, bias, compute_dtype(input), recorded)


def linear_16bit(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, recorded: bool
) -> torch.Tensor:
    """Multiply without codes; by torch's own layer, which takes the host less, where the dtypes are alike."""
    if is_plain(input, weight, bias):
        return torch.nn.functional.linear(input, weight, bias)
    return _multiply(input, weight, bias, dtype, recorded)


def _multiply(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, recorded: bool
) -> torch.Tensor:
    if not recorded:
        return multiply_dense(input, weight, bias, dtype)
    output: torch.Tensor = StandardLinearFunction.apply(input, weight, bias, dtype)
    return output


def is_plain(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether torch's own linear layer follows the same rules here, and has nothing to refuse."""
    dtype = input.dtype
    return (
        dtype == weight.dtype
        and (bias is None or dtype == bias.dtype)
        and dtype in FLOATS
        and input.shape[-1:] == weight.shape[1:]
        and input.device == weight.device
        and not _is_any_autocast_enabled()
    )


def check_operands(
    op: str, input: Any, weight: Any, bias: Any, weight_dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """Raise where tensors do not fit each other; K is the weight's second size, N its first."""
    named = [("weight", weight), ("input", input)] + ([] if bias is None else [("bias", bias)])
    for name, tensor in named:
        if not isinstance(tensor, torch.Tensor):
            rule = f"{name} must be a torch.Tensor, got {type(tensor).__name__}"
            raise ArgumentTypeError(f"qbits::{op}: {rule}")
        if tensor.dtype not in (weight_dtypes if name == "weight" else FLOATS):
            rule = f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}".replace("torch.", "")
            raise DtypeError(f"qbits::{op}: {rule}")
        if tensor.device != weight.device:
            rule = f"{name} must be on {weight.device} like the weight, got {tensor.device}"
            raise DeviceError(f"qbits::{op}: {rule}")
    if weight.dim() != 2:
        raise ShapeError(f"qbits::{op}: weight must have 2 dimensions, got shape {list(weight.shape)}")
    N, K = weight.shape
    if input.dim() == 0 or input.shape[-1] != K:
        raise ShapeError(f"qbits::{op}: input must have shape [*, {K}], got {list(input.shape)}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ShapeError(f"qbits::{op}: bias must have shape [{N}], got {list(bias.shape)}")
