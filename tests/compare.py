"""Inputs with chosen bits, outputs with canaries around them, and bit-for-bit comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from reference import Floats

CANARY_BYTES = 256
CANARY = 0xA5
POISON = 0xFF  # a NaN in every float dtype, an unlikely code in every table
INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of that name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def skip_without_memory(device: str, num_bytes: int) -> None:
    """Skip the test where the device (or the machine) has less free memory."""
    if device == "cpu":
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    else:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes / 2**30:.0f} GiB on {device}, {free / 2**30:.0f} are free")


class Guarded:
    """A poisoned output between two canaries, `offset` elements behind an aligned address."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: str, offset: int = 0) -> None:
        size = torch.empty(0, dtype=dtype).element_size()
        num_bytes = int(np.prod(shape, dtype=np.int64)) * size
        self._first = CANARY_BYTES + offset * size
        self._last = self._first + num_bytes
        self._memory = torch.full((self._last + CANARY_BYTES,), CANARY, dtype=torch.uint8, device=device)
        self._memory[self._first : self._last] = POISON
        self.tensor = self._memory[self._first : self._last].view(dtype).view(tuple(shape))

    def assert_intact(self) -> None:
        """Nothing was written outside the tensor."""
        assert bool((self._memory[: self._first] == CANARY).all()), "written before the output"
        assert bool((self._memory[self._last :] == CANARY).all()), "written behind the output"


def guarded_like(tensors: Iterable[torch.Tensor], offset: int = 0) -> list[Guarded]:
    """Outputs of the same shapes and dtypes, guarded."""
    return [Guarded(tuple(t.shape), t.dtype, str(t.device), offset) for t in tensors]


def tensor_of(x: npt.NDArray[np.generic], dtype: str, device: str, offset: int = 0) -> torch.Tensor:
    """The values rounded to `dtype`, in a view that begins `offset` elements into its memory."""
    memory = torch.zeros(x.size + offset, dtype=dtype_of(dtype), device=device)
    view = memory[offset:]
    view.copy_(torch.from_numpy(np.array(x).reshape(-1)))
    return view


def widened(tensor: torch.Tensor) -> Floats:
    """The exact float32 values of a float tensor, flat."""
    values: Floats = tensor.detach().float().cpu().reshape(-1).numpy()
    return values


def bits_of(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The bits of every element as integers, flat."""
    flat = tensor.detach().cpu().reshape(-1).contiguous()
    bits: npt.NDArray[np.generic] = flat.view(INTEGER_OF_SIZE[flat.element_size()]).numpy()
    return bits


def assert_same_bits(got: torch.Tensor, want: npt.NDArray[np.generic] | torch.Tensor, what: str = "") -> None:
    """Equal bits; where a NaN is wanted any NaN will do (its sign and payload are the hardware's)."""
    if isinstance(want, torch.Tensor):
        want_bits = bits_of(want)
        is_nan = torch.isnan(want).cpu().reshape(-1).numpy() if want.is_floating_point() else None
    else:
        flat = np.ascontiguousarray(want).reshape(-1)
        want_bits = flat.view(f"i{flat.itemsize}" if flat.itemsize > 1 else np.uint8)
        is_nan = bfloat16_nans(want_bits) if got.dtype == torch.bfloat16 else np.isnan(flat)
    got_bits = bits_of(got)
    assert got_bits.shape == want_bits.shape, f"{what}: {got_bits.size} elements, not {want_bits.size}"
    different = got_bits != want_bits
    if is_nan is not None and is_nan.any():
        different &= ~(is_nan & torch.isnan(got).cpu().reshape(-1).numpy())
    if different.any():
        i = int(np.flatnonzero(different)[0])
        got_hex, want_hex = (bits[i : i + 1].tobytes()[::-1].hex() for bits in (got_bits, want_bits))
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.size} differ, "
            f"first at {i}: got {got_hex}, want {want_hex}"
        )


def bfloat16_nans(bits: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Which bfloat16 bit patterns are NaN."""
    is_nan: npt.NDArray[np.bool_] = (bits.view(np.uint16) & 0x7FFF) > 0x7F80
    return is_nan


def around(values: Floats) -> Floats:
    """Each value with its two float32 neighbours, in both signs."""
    below, above = np.nextafter(values, np.float32(-4)), np.nextafter(values, np.float32(4))
    all_three = np.concatenate([values, below, above])
    return np.concatenate([all_three, -all_three])


def boundary_blocks(boundaries: Floats, block_size: int, scales: Sequence[float]) -> Floats:
    """Blocks that begin with their maximum and hold every boundary times it, with zeros and tiny values."""
    tiny = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1e-30, -1e-30, 1.0, -1.0], np.float32)
    special = np.concatenate([tiny, around(boundaries)])
    special = special[np.abs(special) <= 1]
    room = block_size - 1
    special = np.append(special, np.zeros(-special.size % room, np.float32))
    rows = np.concatenate([np.ones((special.size // room, 1), np.float32), special.reshape(-1, room)], axis=1)
    with np.errstate(under="ignore"):
        return np.concatenate([(rows * np.float32(s)).reshape(-1) for s in scales])


def corner_blocks(block_size: int) -> Floats:
    """Blocks with NaN, Inf, zero, subnormal and huge values at the first, a middle and the last place."""
    smallest = np.float32(2.0**-126)
    values = np.array(
        [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, smallest, -smallest / 2, 3.4e38], np.float32
    )
    blocks = []
    for value in values:
        for place in (0, 5, block_size - 1):
            for rest in (1.0, -0.25, 0.0, 1e-41):
                block = np.full(block_size, rest, np.float32)
                block[place] = value
                blocks.append(block)
    return np.concatenate(blocks)


# Of a block, in float32, that a decoder meets or could meet.
ODD_SCALES = np.array(
    [0.0, -0.0, 1e-45, 1e-40, 2.0**-126, 65504.0, 1e5, 3e38, np.inf, np.nan, -1.5, 1 + 2.0**-23], np.float32
)


def sizes_around(block_size: int) -> list[int]:
    """Every kind of tail."""
    blocks = [block_size - 1, block_size, block_size + 1, 3 * block_size + 5]
    return [0, 1, 2, 3, *blocks, 8 * 4096 + 2 * block_size + 37]


SCALES = (
    1.0,
    2.0**-126,
    2.0**-100,
    1.5 * 2**3,
    2.0**126,
    1.25 * 2.0**126,
    2.0**17,
    3.3281,
    1e30,
    3.4028235e38,
)
"""Block maxima from the smallest normal number to the largest; above 2^126 the reciprocal is subnormal."""
