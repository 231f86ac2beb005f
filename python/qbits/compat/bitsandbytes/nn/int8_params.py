"""`Int8Params`: a weight that becomes int8 rows when it first moves to a device, with its scales beside it.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2.1.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits import ops
from qbits.compat.bitsandbytes.nn.moving import MovingParameter

__all__ = ["Int8Params"]


class Int8Params(MovingParameter):
    """A parameter that holds floats until it moves to a real device, then int8 rows, frozen.

    With ``has_fp16_weights`` it stays float and trains. All attributes are the instance's own, and
    ``Int8Params(data, **old.__dict__)`` carries scales and flags over.

    >>> weight = Int8Params(torch.tensor([[1.0, -2.0]])).to("cpu")
    >>> weight.tolist(), weight.SCB.tolist()
    ([[64, -127]], [2.0])
    """

    SCB: torch.Tensor | None
    _codes: torch.Tensor | None  # what was set as CB
    has_fp16_weights: bool

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: torch.Tensor | None = None,
        SCB: torch.Tensor | None = None,
        **ignored: Any,
    ) -> Int8Params:
        """Wrap ``data``: floats, or codes whose scales are ``SCB``."""
        data = torch.empty(0) if data is None else data
        needs_grad = requires_grad and data.dtype.is_floating_point
        self = torch.Tensor._make_subclass(cls, data.detach(), needs_grad)
        self.has_fp16_weights = has_fp16_weights
        self.CB = CB
        self.SCB = SCB
        return self

    @property
    def CB(self) -> torch.Tensor | None:
        """The codes: what was set, else the data itself, None while they are floats."""
        return self.data if self._codes is None and self.dtype == torch.int8 else self._codes

    @CB.setter
    def CB(self, codes: torch.Tensor | None) -> None:
        self._codes = codes

    def _with(self, data: torch.Tensor, statistics: torch.Tensor | None) -> Int8Params:
        return type(self)(data, self.requires_grad, self.has_fp16_weights, None, statistics)

    def _piece(self, piece: torch.Tensor, first_row: int) -> Int8Params:
        scales = None if self.SCB is None else self.SCB[first_row : first_row + piece.shape[0]]
        return self._with(piece, scales)

    def _quantize(self, device: torch.device | str) -> Int8Params:
        """Quantize in place on ``device``, straight from the dtype of the data."""
        values, scales = ops.quantize_rowwise(self.data.to(device).contiguous())
        self.requires_grad = False
        self.data = values
        self.CB, self.SCB = None, scales
        return self

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:
        """Quantize on the first real device, move or cast after that; all call forms of ``Tensor.to``.

        A cast leaves codes and scales alone; with ``has_fp16_weights`` everything is a plain move or cast.
        """
        device, _, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.dtype == torch.int8:
            data, scales = self.data, self.SCB
            if device is not None:
                data = data.to(device, non_blocking=non_blocking)
                scales = None if scales is None else scales.to(device, non_blocking=non_blocking)
            return self._with(data, scales)
        is_move = device is not None and device.type != "meta" and not self.is_meta
        if is_move and not self.has_fp16_weights:
            return self._quantize(device)
        return self._with(self.data.to(*args, **kwargs), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        if id(self) in memo:
            known: Int8Params = memo[id(self)]
            return known
        scales = None if self.SCB is None else self.SCB.clone()
        memo[id(self)] = copied = self._with(self.data.clone(), scales)
        return copied

    def __copy__(self) -> Int8Params:
        return self._with(self.data, self.SCB)
