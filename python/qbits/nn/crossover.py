"""When int8 pays: the fewest rows from which a SwitchBack layer trains faster in int8 than in 16 bit.

Two of three products gain by int8; quantizing the input, the gradient and the weight is what it costs. The
first of `MEASURED` that fits a layer and its device decides; without one, the first of `MODELS` that fits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

__all__ = ["MEASURED", "MODELS", "NEVER", "CostModel", "Crossover", "crossover_table", "min_rows"]

NEVER = 2**62  # more rows than any call has

_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (5120, 1280), (1280, 5120), (256, 256))


@dataclass(frozen=True)
class Crossover:
    """One measurement: from ``rows`` on int8 was faster for a weight [N, K]."""

    device: str  # a part of the GPU's name
    N: int
    K: int
    rows: int


@dataclass(frozen=True)
class CostModel:
    """An estimate for every shape: bytes and operations at the rates of a device.

    A row saves two products of 2 N K operations at the 16-bit rate, pays for them at the int8 rate, and has
    3 (N + K) bytes of input and gradient quantized; each step quantizes the weight twice (8 N K bytes) and
    takes ``fixed_us`` for the launches. The crossover is where savings are ``margin`` times the costs.

    Units: tops in 1e12 operations per second, bandwidth in 1e12 bytes per second.
    """

    device: str  # a part of the GPU's name; "" is every GPU
    tops_16bit: float
    tops_int8: float
    terabytes_per_s: float
    fixed_us: float
    margin: float

    def min_rows(self, N: int, K: int) -> int:
        """Return the fewest rows for a weight [N, K]."""
        saved_us = 4 * N * K * (1 / self.tops_16bit - 1 / self.tops_int8) * 1e-6
        saved_us -= 3 * (N + K) / self.terabytes_per_s * 1e-6
        cost_us = 8 * N * K / self.terabytes_per_s * 1e-6 + self.fixed_us
        return math.ceil(self.margin * cost_us / saved_us) if saved_us > 0 else NEVER


# bench/switchback.py prints the rows for this table
MEASURED: tuple[Crossover, ...] = ()

# No whole layer was measured yet: these come from the rates of single kernels on an H200, 790 TFLOP/s of
# cuBLAS in bfloat16, 1300 TOPS as the least of the int8 product, 4 TB/s of copies, and a margin on top.
MODELS: tuple[CostModel, ...] = (
    CostModel("H200", 790, 1300, 4.0, fixed_us=12, margin=1.5),
    CostModel("", 790, 1300, 3.0, fixed_us=20, margin=3.0),
)


def min_rows(N: int, K: int, device: torch.device) -> int:
    """Return the fewest rows from which a layer [N, K] on ``device`` trains in int8; `NEVER` on a CPU.

    >>> min_rows(4096, 4096, torch.device("cpu")) == NEVER
    True
    """
    if device.type != "cuda":
        return NEVER
    return _of_gpu(N, K, torch.cuda.current_device() if device.index is None else device.index)


# Dynamo calls it while it traces, and takes the number for a constant: names of devices are out of its reach
min_rows._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _of_gpu(N: int, K: int, index: int) -> int:
    name = torch.cuda.get_device_name(index)
    for known in MEASURED:
        if known.device in name and (known.N, known.K) == (N, K):
            return known.rows
    return next(model for model in MODELS if model.device in name).min_rows(N, K)


def crossover_table() -> str:
    """Return the rule as Markdown: what was measured, and the estimates at models' shapes.

    >>> crossover_table().splitlines()[0]
    '| GPU | N | K | rows | from |'
    """
    lines = ["| GPU | N | K | rows | from |", "| --- | --: | --: | --: | --- |"]
    lines += [f"| {known.device} | {known.N} | {known.K} | {known.rows} | measured |" for known in MEASURED]
    for model in MODELS:
        for N, K in _SHAPES:
            fewest = model.min_rows(N, K)
            rows = "never" if fewest == NEVER else fewest
            lines.append(f"| {model.device or 'any other'} | {N} | {K} | {rows} | estimate |")
    return "\n".join(lines)
