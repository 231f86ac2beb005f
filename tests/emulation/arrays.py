"""Arrays at chosen addresses for emulated kernels: inputs with exact values, outputs with canaries."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import reference
from emulation.kernels import STORAGE, Array
from reference import Floats

SANITIZE = os.environ.get("QBITS_EMULATION_SANITIZE") == "1"
CANARY_BYTES = 0 if SANITIZE else 64  # AddressSanitizer watches the memory beside an array


class Output:
    """A poisoned array between canaries, `offset` elements behind an aligned address."""

    def __init__(self, n: int, dtype: str | type, offset: int = 0) -> None:
        size = np.dtype(dtype).itemsize
        self._first = CANARY_BYTES + offset * size
        self._last = self._first + n * size
        self._memory = np.full(self._last + CANARY_BYTES, 0xFF, np.uint8)
        self.array = self._memory[self._first : self._last].view(dtype)

    def equals(self, want: Array, what: str) -> None:
        """The array has these bits (any NaN for a NaN), and nothing beside it was written."""
        got = self.array
        same = got.view(np.uint8).reshape(-1, got.itemsize) == want.view(np.uint8).reshape(-1, got.itemsize)
        different = ~same.all(axis=1) & ~(is_nan(got) & is_nan(want))
        assert not different.any(), f"{what}: {different.sum()} of {got.size}, first at {different.argmax()}"
        assert (self._memory[: self._first] == 0xFF).all(), f"{what}: written before the output"
        assert (self._memory[self._last :] == 0xFF).all(), f"{what}: written behind the output"


def is_nan(x: Array) -> npt.NDArray[np.bool_]:
    """NaN of float arrays; 16-bit integers hold bfloat16."""
    if x.dtype == np.uint16:
        return (x & 0x7FFF) > 0x7F80
    return np.isnan(x) if x.dtype.kind == "f" else np.zeros(x.size, bool)


def stored(x: Array, dtype: str, offset: int = 0) -> tuple[Array, Floats]:
    """x as the kernel reads it, `offset` elements behind an aligned address, and its exact values."""
    memory = np.empty(x.size + offset, STORAGE[dtype])
    memory[offset:] = reference.round_to(x.astype(np.float32), dtype)
    if dtype == "bfloat16":
        return memory[offset:], (memory[offset:].astype(np.uint32) << 16).view(np.float32)
    return memory[offset:], memory[offset:].astype(np.float32)
