"""`QuantState`: the statistics of one quantized tensor, with bitsandbytes' fields and dictionaries.

Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch

from qbits import codebooks
from qbits import quant_state as formats
from qbits.errors import CheckpointFormatError, NotQuantizedError
from qbits.records import QTensor4

__all__ = ["QuantState", "flat_bytes"]

_TOLERANCE = 1e-6


def flat_bytes(packed: torch.Tensor) -> torch.Tensor:
    """Return packed data of any storage dtype, (p, 1) or (1, p), as a flat uint8 view."""
    return packed.detach().reshape(-1).view(torch.uint8)


class QuantState:
    """What is needed to decode a quantized tensor.

    ``state[i]`` is, for i from 0 to 5: absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type.

    >>> QuantState(torch.ones(1), torch.Size([1, 64]), blocksize=64, dtype=torch.float32).nested
    False
    """

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: Any = None,
        code: Any = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2

    @property
    def nested(self) -> bool:
        """Whether the absmax values are themselves quantized."""
        return self.state2 is not None

    @property
    def bitsandbytes__nf4(self) -> torch.Tensor:
        """The JSON header of an nf4 state; sharding libraries resolve the checkpoint's key by this name."""
        return self._header("nf4")

    @property
    def bitsandbytes__fp4(self) -> torch.Tensor:
        """The JSON header of an fp4 state."""
        return self._header("fp4")

    def _header(self, quant_type: str) -> torch.Tensor:
        if self.quant_type != quant_type:
            raise AttributeError(f"this state is {self.quant_type}, not {quant_type}")
        header: torch.Tensor = self.as_dict(packed=True)[f"{formats.HEADER_MARK}{quant_type}"]
        return header

    def __getitem__(self, index: int) -> Any:
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        tensors = ("absmax", "code", "offset")
        plain = ("shape", "dtype", "blocksize", "quant_type", "state2")
        return all(_close(getattr(self, name), getattr(other, name)) for name in tensors) and all(
            getattr(self, name) == getattr(other, name) for name in plain
        )

    __hash__ = None  # type: ignore[assignment]

    def _apply(self, fn: Any) -> QuantState:
        """Replace every tensor by ``fn`` of it."""
        for name in ("absmax", "code", "offset"):
            tensor = getattr(self, name)
            if isinstance(tensor, torch.Tensor):
                setattr(self, name, fn(tensor))
        if self.state2 is not None:
            self.state2._apply(fn)
        return self

    def to(self, device: torch.device | str) -> QuantState:
        """Move the tensors to ``device`` in place."""
        return self._apply(lambda tensor: tensor.to(device))

    def copied_to(self, device: torch.device | str) -> QuantState:
        """Return a copy on ``device`` that shares no tensor with this one."""
        return self.shared()._apply(lambda tensor: tensor.to(device, copy=True))

    def shared(self) -> QuantState:
        """Return a copy of the fields that shares the tensors."""
        state = copy.copy(self)
        state.state2 = copy.copy(self.state2)
        return state

    @classmethod
    def from_record(cls, record: QTensor4) -> QuantState:
        """Return the state of ``record``; its packed data stays outside.

        The tensors are shared.
        """
        device = record.packed.device
        offset = state2 = None
        if record.nested:
            offset, table = record.absmax_offset.reshape(()), record.absmax_codebook
            table = codebooks.dynamic_map(device).clone() if table is None else table
            scale = record.absmax_scale.reshape(-1)
            state2 = cls(scale, code=table, blocksize=formats.NESTED_BLOCK_SIZE, dtype=torch.float32)
        code = codebooks.get_4bit_type(record.codebook, device)
        absmax, shape = record.absmax.reshape(-1), torch.Size(record.shape)
        return cls(absmax, shape, code, record.block_size, record.codebook, record.dtype, offset, state2)

    def record(self, packed: torch.Tensor) -> QTensor4:
        """Return ``packed`` and this state as the record that `qbits.functional` takes."""
        if self.shape is None or self.quant_type is None or self.dtype is None or self.blocksize is None:
            raise NotQuantizedError(
                "qbits::QuantState: state must hold shape, dtype, blocksize and quant_type of a 4-bit "
                f"tensor, got {self.shape}, {self.dtype}, {self.blocksize} and {self.quant_type}"
            )
        num_bytes = (math.prod(self.shape) + 1) // 2
        held = packed.numel() * packed.element_size()
        if held < num_bytes and getattr(packed, "quant_state", None) is self:
            raise NotQuantizedError(
                f"qbits::QuantState: packed data must be whole, {num_bytes} bytes for shape "
                f"{list(self.shape)}, got {held}; join the pieces first"
            )
        absmax = self.absmax
        nested: tuple[Any, ...] = ()
        if self.state2 is not None and self.offset is not None:
            scale, table = self.state2.absmax, self.state2.code
            if self.state2.blocksize == formats.NESTED_BLOCK_SIZE:
                nested = (scale, self.offset, table)
            else:
                absmax = formats.decode_absmax(absmax, scale, self.offset, table, self.state2.blocksize or 0)
        shape = tuple(self.shape)
        return QTensor4(
            flat_bytes(packed), absmax, shape, self.dtype, self.quant_type, self.blocksize, *nested
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Return the fields as plain values and tensors, or, ``packed``, as tensors alone.

        >>> from qbits.compat.bitsandbytes.functional import quantize_4bit
        >>> list(quantize_4bit(torch.zeros(64), quant_type="nf4")[1].as_dict(packed=True))
        ['absmax', 'quant_map', 'quant_state.bitsandbytes__nf4']
        """
        entries = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.offset is not None:
            entries["nested_absmax"] = self.state2.absmax
            entries["nested_blocksize"] = self.state2.blocksize
            entries["nested_quant_map"] = self.state2.code.clone()  # safetensors refuses shared memory
            entries["nested_dtype"] = str(self.state2.dtype).removeprefix("torch.")
            entries["nested_offset"] = self.offset.item()
        if not packed or self.quant_type is None:
            return entries
        tensors = {name: value for name, value in entries.items() if isinstance(value, torch.Tensor)}
        header = formats.QuantHeader(
            self.quant_type,
            entries["blocksize"],
            self.dtype or torch.float32,
            entries["shape"],
            entries.get("nested_blocksize"),
            entries.get("nested_offset"),
        )
        return {**tensors, f"{formats.HEADER_MARK}{self.quant_type}": formats.dump_header(header)}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> QuantState:
        """Return the state that `as_dict` described, packed or not, on ``device``; ``qs_dict`` stays so.

        Raises: CheckpointFormatError naming the entry that does not fit.

        >>> from qbits.compat.bitsandbytes.functional import quantize_4bit
        >>> state = quantize_4bit(torch.zeros(64), quant_type="nf4")[1]
        >>> QuantState.from_dict(state.as_dict(packed=True), "cpu") == state
        True
        """
        entries: dict[str, Any] = {}
        for key, value in qs_dict.items():
            name = key.rpartition(".")[2]
            if name.startswith("bitsandbytes__"):
                name = f"quant_state.{name}"
            if name in entries:
                raise CheckpointFormatError(f"qbits::load: {key} must occur once, got it under two prefixes")
            entries[name] = value.to(device) if isinstance(value, torch.Tensor) else value
        stats = formats.parse_statistics(entries, "qs_dict")
        header, state2, offset = stats.header, None, None
        if stats.nested_absmax is not None:
            offset = torch.tensor(header.nested_offset, dtype=torch.float32, device=stats.absmax.device)
            state2 = cls(
                stats.nested_absmax,
                code=stats.nested_quant_map,
                blocksize=header.nested_block_size,
                dtype=torch.float32,
            )
        code = codebooks.get_4bit_type(header.quant_type, stats.absmax.device)
        shape = torch.Size(header.shape)
        return cls(
            stats.absmax, shape, code, header.block_size, header.quant_type, header.dtype, offset, state2
        )


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=_TOLERANCE)
    return a is None and b is None
