"""`Params4bit`: a weight that is quantized when it first moves to a device, with its statistics beside it.

Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from qbits import quant_state as formats
from qbits.compat.bitsandbytes import functional
from qbits.compat.bitsandbytes.nn.moving import MovingParameter
from qbits.compat.bitsandbytes.state import QuantState
from qbits.errors import CheckpointFormatError

__all__ = ["Params4bit"]


class Params4bit(MovingParameter):
    """A parameter that holds floats until it moves to a real device, then packed 4-bit codes, frozen.

    ``__dict__`` holds exactly the keyword names of the constructor, so that ``Params4bit(data,
    **old.__dict__)`` works.

    >>> weight = Params4bit(torch.zeros(2, 64), quant_type="nf4").to("cpu")
    >>> weight.shape, weight.quant_state.shape
    (torch.Size([64, 1]), torch.Size([2, 64]))
    """

    quant_state: QuantState | None
    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    bnb_quantized: bool

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = 64,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Any = None,
        bnb_quantized: bool = False,
        **ignored: Any,
    ) -> Params4bit:
        """Wrap ``data``; `module` may be the module or a weak reference to it."""
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data.detach(), requires_grad and not bnb_quantized)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @property
    def module(self) -> torch.nn.Module | None:
        """The module that holds the parameter, if it still lives."""
        reference = self.__dict__.get("module")
        return None if reference is None else reference()

    @module.setter
    def module(self, module: Any) -> None:
        self.__dict__["module"] = (
            module if module is None or isinstance(module, weakref.ref) else weakref.ref(module)
        )

    @property
    def absmax(self) -> torch.Tensor | None:
        """Scales of the blocks, or their codes when nested."""
        return None if self.quant_state is None else self.quant_state.absmax

    @property
    def code(self) -> torch.Tensor | None:
        """The 16 values of the type."""
        return None if self.quant_state is None else self.quant_state.code

    quant_map = code

    @property
    def offset(self) -> torch.Tensor | None:
        """The mean that nested scales were reduced by."""
        return None if self.quant_state is None else self.quant_state.offset

    nested_offset = offset

    @property
    def state2(self) -> QuantState | None:
        """The statistics of nested scales."""
        return None if self.quant_state is None else self.quant_state.state2

    @property
    def nested_absmax(self) -> torch.Tensor | None:
        """Scales of the nested blocks."""
        return None if self.state2 is None else self.state2.absmax

    @property
    def nested_blocksize(self) -> int | None:
        """Size of the nested blocks."""
        return None if self.state2 is None else self.state2.blocksize

    @property
    def nested_quant_map(self) -> torch.Tensor | None:
        """Map of the nested codes."""
        return None if self.state2 is None else self.state2.code

    @property
    def nested_dtype(self) -> torch.dtype | None:
        """Dtype of the scales before they were nested."""
        return None if self.state2 is None else self.state2.dtype

    @classmethod
    def from_prequantized(
        cls,
        data: torch.Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | None = None,
        module: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Return a quantized parameter of packed ``data`` and a checkpoint's statistics.

        Raises: CheckpointFormatError for statistics that do not fit ``data`` or each other.
        """
        device = data.device if device is None else device
        state = QuantState.from_dict(quantized_stats, device)
        header = formats.QuantHeader(
            state.quant_type or "", state.blocksize or 0, data.dtype, tuple(state.shape)
        )
        formats.parse_packed(data, header, "data")
        if requires_grad:
            raise CheckpointFormatError("qbits::load: requires_grad must be False for packed data, got True")
        return cls(
            data.to(device),
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "",
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )._linked()

    def _linked(self) -> Params4bit:
        """Tell the module of the new state."""
        if self.module is not None:
            setattr(self.module, "quant_state", self.quant_state)  # noqa: B010 - any module may hold a weight
        return self

    def _with(self, data: torch.Tensor, quant_state: QuantState | None) -> Params4bit:
        """Return a parameter of ``data`` and ``quant_state`` with all other attributes of this one."""
        attributes = {**self.__dict__, "quant_state": quant_state}
        return type(self)(data, self.requires_grad, **attributes)

    def _quantize(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Params4bit:
        """Quantize in place on ``device`` from the original precision; ``dtype`` is what decoding returns."""
        source = self.data.to(device)
        packed, state = functional.quantize_4bit(
            source,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        state.dtype = state.dtype if dtype is None else dtype
        self.requires_grad = False
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        return self._linked()

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Quantize on the first real device, move or cast after that; all call forms of ``Tensor.to``.

        A cast of a quantized parameter changes what decoding returns, never its bytes.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self.bnb_quantized:
            if device is None or device.type == "meta" or self.is_meta:
                return self._with(self.data.to(*args, **kwargs), None)
            return self._quantize(device, dtype)
        state = self.quant_state
        data = self.data if device is None else self.data.to(device, non_blocking=non_blocking)
        if state is not None:
            state = state.shared() if device is None else state.copied_to(device)
            state.dtype = state.dtype if dtype is None else dtype
        return self._with(data, state)

    def _piece(self, piece: torch.Tensor, first_row: int) -> Params4bit:
        return self._with(piece, self.quant_state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) in memo:
            known: Params4bit = memo[id(self)]
            return known
        state = None if self.quant_state is None else self.quant_state.copied_to(self.device)
        copied = self._with(self.data.clone(), state)
        memo[id(self)] = copied
        copied.module = memo.get(id(self.module), self.module)
        return copied

    def __copy__(self) -> Params4bit:
        return self._with(self.data, self.quant_state)

    def _state_to_pickle(self) -> dict[str, Any]:
        # a weak reference cannot be pickled: the module links its weight again when it is restored
        return {**self.__dict__, "module": None}
