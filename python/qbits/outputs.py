"""The rules of ``out=``: what it must be, that nothing else may lie in it, and a copy where it is strided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qbits.errors import ArgumentValueError, DeviceError, DtypeError, ShapeError
from qbits.interop import in_kind

__all__ = ["fill", "fill_all", "refuse_gradient"]


def fill(
    op: str,
    compute: Callable[[Any], Any],
    out: Any,
    like: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    inputs: Sequence[Any],
    *,
    direct: bool = True,
) -> Any:
    """Return what ``compute`` gives, in ``shape`` and in the framework of ``like``, or fill ``out`` with it.

    ``compute`` takes the flat output, or None to allocate one. ``direct`` says that it writes ``dtype``
    itself.
    """
    if out is None:
        return in_kind(compute(None), like, shape)
    if not isinstance(out, torch.Tensor):
        compute(out)
        return out

    def compute_all(targets: tuple[Any, ...]) -> tuple[Any, ...]:
        (target,) = targets
        return (compute(None if target is None else target.view(-1)),)

    fill_all(op, compute_all, (out,), like, [(shape, dtype)], inputs, direct=direct)
    return out


def fill_all(
    op: str,
    compute: Callable[[tuple[Any, ...]], tuple[Any, ...]],
    outs: tuple[torch.Tensor, ...],
    like: torch.Tensor,
    due: Sequence[tuple[tuple[int, ...], torch.dtype]],
    inputs: Sequence[Any],
    *,
    direct: bool = True,
) -> None:
    """Fill each of ``outs`` with what ``compute`` gives for it, after checks by shape and dtype in ``due``.

    ``compute`` takes one target for each, None where the values are to be allocated and then copied.
    """
    for out, (shape, dtype) in zip(outs, due, strict=True):
        refuse_gradient(op, out, False)
        _check(op, out, like, shape, dtype)
    if not torch.compiler.is_compiling():  # a traced tensor has no address
        tensors = [tensor for tensor in inputs if isinstance(tensor, torch.Tensor)]
        if any(_overlap(out, tensor) for out in outs for tensor in tensors):
            raise ArgumentValueError(f"qbits::{op}: out must not overlap an input, got one that does")
    targets = tuple(out if direct and out.is_contiguous() else None for out in outs)
    results = compute(targets)
    for out, target, result in zip(outs, targets, results, strict=True):
        if target is None:
            out.copy_(result.view(out.shape))


def refuse_gradient(op: str, out: Any, recorded: bool) -> None:
    """Raise RuntimeError where writing ``out`` would have to be recorded for a gradient."""
    if recorded or (isinstance(out, torch.Tensor) and out.requires_grad and torch.is_grad_enabled()):
        raise RuntimeError(f"qbits::{op}: out must be None where a gradient is recorded, got a tensor")


def _check(op: str, out: torch.Tensor, like: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(out.shape) != shape:
        raise ShapeError(f"qbits::{op}: out must have shape {list(shape)}, got {list(out.shape)}")
    if out.dtype != dtype:
        raise DtypeError(f"qbits::{op}: out must be {dtype}, got {out.dtype}")
    if out.device != like.device:
        raise DeviceError(f"qbits::{op}: out must be on {like.device}, got {out.device}")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of the first byte and of the one past the last."""
    elements = (
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    )
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _columns(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Bytes of a row and bytes between rows, for a tensor that is a window of columns; None for any other."""
    if tensor.dim() != 2 or tensor.stride(1) != 1 or tensor.stride(0) < tensor.shape[1]:
        return None
    return tensor.shape[1] * tensor.element_size(), tensor.stride(0) * tensor.element_size()


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether tensors may share bytes: exact for contiguous ones and for windows of one matrix's columns."""
    if a.device != b.device or a.is_meta or a.numel() == 0 or b.numel() == 0:
        return False
    (a_first, a_last), (b_first, b_last) = _span(a), _span(b)
    if a_last <= b_first or b_last <= a_first:
        return False
    a_columns, b_columns = _columns(a), _columns(b)
    if a_columns is None or b_columns is None or a_columns[1] != b_columns[1]:
        return True
    pitch = a_columns[1]
    gap = (b_first - a_first) % pitch
    return gap < a_columns[0] or gap + b_columns[0] > pitch
