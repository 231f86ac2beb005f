"""What bitsandbytes' parameters and their layers share: `MovingParameter` and `MovingWeight`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["MovingParameter", "MovingWeight"]

_PIECES = (torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split)


class MovingParameter(nn.Parameter):
    """A parameter whose ``to`` does more than move; every other spelling of a move or a cast leads there."""

    def to(self, *args: Any, **kwargs: Any) -> MovingParameter:
        """Move, cast or quantize; all call forms of ``Tensor.to``."""
        raise NotImplementedError

    def cuda(self, device: Any = None, non_blocking: bool = False) -> MovingParameter:  # type: ignore[override]
        """Return ``to`` a CUDA device, the current one if None."""
        index = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
        return self.to(index, non_blocking=non_blocking)

    def cpu(self) -> MovingParameter:  # type: ignore[override]
        """Return ``to("cpu")``."""
        return self.to("cpu")

    def xpu(self, device: Any = None, non_blocking: bool = False) -> MovingParameter:  # type: ignore[override]
        """Return ``to`` an XPU device, which qbits refuses to quantize on."""
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)

    def half(self) -> MovingParameter:
        """Return ``to(torch.float16)``."""
        return self.to(torch.float16)

    def bfloat16(self) -> MovingParameter:
        """Return ``to(torch.bfloat16)``."""
        return self.to(torch.bfloat16)

    def float(self) -> MovingParameter:
        """Return ``to(torch.float32)``."""
        return self.to(torch.float32)

    def _with(self, data: torch.Tensor, statistics: Any) -> MovingParameter:
        """Return a parameter of ``data`` and ``statistics`` with all other attributes of this one."""
        raise NotImplementedError

    def _piece(self, piece: torch.Tensor, first_row: int) -> MovingParameter:
        """Return ``piece``, which begins at row ``first_row`` of this parameter, with what belongs to it."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep class and attributes on the pieces of a chunk or a split; all else gives plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func not in _PIECES or not isinstance(source, MovingParameter):
            return result
        pieces, first_row = [], 0
        for piece in result:
            pieces.append(source._piece(piece, first_row))
            first_row += piece.shape[0] if piece.shape[0] < source.shape[0] else 0
        return tuple(pieces)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _restore, (type(self), self.data, self.requires_grad, self._state_to_pickle())

    def _state_to_pickle(self) -> dict[str, Any]:
        return dict(self.__dict__)


def _restore(
    cls: Callable[..., MovingParameter], data: torch.Tensor, requires_grad: bool, attributes: dict[str, Any]
) -> MovingParameter:
    return cls(data, requires_grad, **attributes)


class MovingWeight(nn.Module):
    """A layer whose ``weight`` is a `MovingParameter`: moves and casts of the layer reach it through that."""

    weight: Any

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        weight, self._parameters["weight"] = self.weight, None
        try:
            nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        self._move_weight(weight, fn)
        return self

    def _move_weight(self, weight: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move a float weight, which may quantize it; a subclass does what concerns codes."""
        with torch.no_grad():
            moved, grad = fn(weight), None if weight.grad is None else fn(weight.grad)
        if moved is not weight:
            moved = moved if isinstance(moved, MovingParameter) else weight._with(moved, None)
            self._replace_weight(moved)
        if grad is not None:
            self.weight.grad = grad

    def _replace_weight(self, moved: MovingParameter) -> None:
        """Take over ``moved``, inside the parameter that is there where torch can."""
        weight = self.weight
        if type(weight) is type(moved) and torch._has_compatible_shallow_copy_type(weight, moved):
            if weight.dtype != moved.dtype:
                weight.grad = None  # of another dtype; a caller that moves it puts it back
            if not moved.requires_grad:
                weight.requires_grad = False
            weight.data = moved.data
            weight.requires_grad = moved.requires_grad
            vars(weight).update(vars(moved))
        else:
            self.weight = moved
