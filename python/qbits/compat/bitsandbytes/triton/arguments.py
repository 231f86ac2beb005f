"""What the kernels' arguments must be, and the two products that differ in the scales of the weight."""

from __future__ import annotations

import torch

from qbits import functional
from qbits.errors import ShapeError

__all__ = ["expect_matrix", "multiply"]


def expect_matrix(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise unless the tensor has two dimensions."""
    if tensor.dim() != 2:
        raise ShapeError(f"qbits::{op}: {name} must have 2 dimensions, got shape {list(tensor.shape)}")


def multiply(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    state_x: torch.Tensor,
    state_w: torch.Tensor,
    num_scales: int,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute `functional.gemm_int8` for a weight [K, N] that has ``num_scales`` scales."""
    if state_w.numel() != num_scales:
        rule = f"state_w must have {num_scales} elements, got {state_w.numel()}"
        raise ShapeError(f"qbits::{op}: {rule}")
    result: torch.Tensor = functional.gemm_int8(
        a, b.t(), state_x.float(), state_w.float(), bias, out_dtype=out_dtype
    )
    return result
