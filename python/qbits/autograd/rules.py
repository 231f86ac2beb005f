"""What the Functions have in common: shapes, products in float32, bias gradients, what may be saved."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "add_outlier_columns",
    "as_matrix",
    "as_output",
    "bias_gradient",
    "dense_product",
    "once_differentiable",
    "savable",
    "without_autocast",
]

# torch.mm(a, b, out_dtype=torch.float32) of 16-bit matrices, on CUDA devices
_HAS_MM_TO_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype")
_SECOND_BACKWARD = b"trying to differentiate twice a function that was marked with @once_differentiable"


def as_matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` [*, K] as [M, K]."""
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


def as_output(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``matrix`` [M, N] in the shape [*, N] for ``like`` [*, K].

    Not as a view: autograd forbids to write to a view that a Function has made.
    """
    if like.dim() == 2:
        return matrix
    output: torch.Tensor = torch.ops.aten._unsafe_view.default(matrix, [*like.shape[:-1], matrix.shape[1]])
    return output


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Return a context in which torch's products on ``tensor``'s device keep the dtypes they get."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


def dense_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``a @ b`` with float32 sums, rounded once to ``dtype``.

    Shapes: a [M, K] and b [K, N] of one dtype; any strides.
    """
    with without_autocast(a):
        if dtype == a.dtype:
            return a @ b
        if _HAS_MM_TO_FLOAT32 and a.is_cuda and a.dtype != torch.float32 and not torch.is_grad_enabled():
            product = torch.mm(a, b, out_dtype=torch.float32)
        else:
            product = a.float() @ b.float()
        return product.to(dtype)


def add_outlier_columns(
    output: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return ``output + rows[:, mask] @ weight[:, mask].T``, summed in float32, in the dtype of ``rows``.

    All columns are multiplied, zeros in place of the others: only the device knows how many are outliers.

    Shapes: output float32 [M, N]; rows [M, K]; mask bool [K]; weight [N, K].
    """
    outliers = torch.where(mask, rows, rows.new_zeros(()))
    return (output + dense_product(outliers, weight.to(rows.dtype).t(), torch.float32)).to(rows.dtype)


def bias_gradient(grad_output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the sum of ``grad_output`` [*, N] over all but the last dimension, in float32, as ``dtype``."""
    leading = tuple(range(grad_output.dim() - 1))
    total = grad_output.sum(leading, dtype=torch.float32) if leading else grad_output
    return total.to(dtype)


def savable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return ``tensor``, or a copy of one that was made in inference mode, which autograd refuses to save."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def once_differentiable(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """Make a second backward through ``backward`` raise, also with respect to what was saved.

    Torch's own decorator of this name lets it pass, with zeros, where the incoming gradient is a constant.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor) -> Any:
        is_recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not is_recorded:
            return results
        found = [i for i, result in enumerate(results) if result is not None]
        refuse = torch._C._functions.DelayedError(_SECOND_BACKWARD, len(found))
        marked = refuse(*(results[i].detach().requires_grad_() for i in found))
        marked = marked if isinstance(marked, tuple) else (marked,)
        full = dict(zip(found, marked, strict=True))
        return tuple(full.get(i) for i in range(len(results)))

    return run
