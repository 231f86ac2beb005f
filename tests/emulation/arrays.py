"""Arrays at chosen addresses for emulated kernels: inputs with exact values, outputs with canaries."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import reference
from emulation.emulator import Array
from emulation.kernels import STORAGE
from reference import Floats

SANITIZE = os.environ.get("QBITS_EMULATION_SANITIZE") == "1"
# AddressSanitizer watches the memory beside an array, and aligns it.
CANARY_BYTES, ALIGNMENT = (0, 1) if SANITIZE else (64, 16)


class Output:
    """A poisoned array between canaries, `offset` elements behind an aligned address."""

    def __init__(self, n: int, dtype: str | type, offset: int = 0) -> None:
        size = np.dtype(dtype).itemsize
        self._memory = np.full((n + offset) * size + 2 * CANARY_BYTES + ALIGNMENT - 1, 0xFF, np.uint8)
        start = CANARY_BYTES + -(self._memory.ctypes.data + CANARY_BYTES) % ALIGNMENT
        self._first = start + offset * size
        self._last = self._first + n * size
        self.array = self._memory[self._first : self._last].view(dtype)

    def is_intact(self) -> bool:
        """Nothing beside the array was written."""
        return bool(
            (self._memory[: self._first] == 0xFF).all() and (self._memory[self._last :] == 0xFF).all()
        )

    def equals(self, want: Array, what: str) -> None:
        """The array has these bits (any NaN for a NaN), and nothing beside it was written."""
        got = self.array
        same = got.view(np.uint8).reshape(-1, got.itemsize) == want.view(np.uint8).reshape(-1, got.itemsize)
        different = ~same.all(axis=1) & ~(is_nan(got) & is_nan(want))
        assert not different.any(), f"{what}: {different.sum()} of {got.size}, first at {different.argmax()}"
        assert self.is_intact(), f"{what}: written beside the output"


def is_nan(x: Array) -> npt.NDArray[np.bool_]:
    """NaN of float arrays; 16-bit integers hold bfloat16."""
    if x.dtype == np.uint16:
        return (x & 0x7FFF) > 0x7F80
    return np.isnan(x) if x.dtype.kind == "f" else np.zeros(x.size, bool)


def stored(x: Array, dtype: str, offset: int = 0) -> tuple[Array, Floats]:
    """x as the kernel reads it, `offset` elements behind an aligned address, and its exact values."""
    memory = np.empty(x.size + offset, STORAGE[dtype])
    memory[offset:] = reference.round_to(x.astype(np.float32), dtype)
    return memory[offset:], widen(memory[offset:], dtype)


def widen(x: Array, dtype: str) -> Floats:
    """Stored elements as float32, exactly."""
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else x.astype(np.float32)


def aligned(x: Array, offset: int = 0) -> Array:
    """A copy of x, `offset` elements behind an aligned address."""
    copy = Output(x.size, x.dtype, offset)
    copy.array[:] = x
    return copy.array
