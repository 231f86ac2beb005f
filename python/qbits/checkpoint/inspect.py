"""What a checkpoint holds: its quantized layers with their scales, its other tensors, its bytes."""

from __future__ import annotations

import os

import torch

from qbits.checkpoint import layouts
from qbits.checkpoint.reader import CheckpointReader
from qbits.errors import CheckpointFormatError
from qbits.records import QTensor4, QWeight8
from qbits.report import markdown_table

__all__ = ["inspect_checkpoint"]


def inspect_checkpoint(path: str | os.PathLike[str]) -> tuple[str, bool]:
    """Describe a checkpoint as Markdown; the second value says whether every quantized layer is sound.

    Raises:
        CheckpointFormatError: the file as a whole cannot be read.
    """
    rows, faults, packed_bytes = [], [], 0
    with CheckpointReader(path) as reader:
        groups = layouts.weight_groups(reader)
        for name, keys in groups.items():
            num_bytes = sum(reader.info(key).num_bytes for key in keys)
            packed_bytes += num_bytes
            try:
                rows.append((name, *_describe(layouts.read_record(reader, name, keys)), f"{num_bytes:,}"))
            except CheckpointFormatError as error:
                faults.append(f"- {error}")
        statistics = {key for keys in groups.values() for key in keys}
        plain = [reader.info(key) for key in reader if key not in statistics]
        num_keys = len(list(reader))
    parts = []
    if rows:
        header = ("quantized weight", "scheme", "shape", "dtype", "scales", "zero blocks", "bytes")
        parts.append(markdown_table(header, rows))
    if plain:
        described = [
            (t.name, str(t.dtype).removeprefix("torch."), str(list(t.shape or ())), f"{t.num_bytes:,}")
            for t in plain
        ]
        parts.append(markdown_table(("other tensor", "dtype", "shape", "bytes"), described))
    plain_bytes = sum(info.num_bytes for info in plain)
    parts.append(
        f"{num_keys} keys: {len(groups)} quantized weights in {packed_bytes:,} bytes, "
        f"{len(plain)} other tensors in {plain_bytes:,} bytes"
    )
    parts.append("\n".join(["damaged:", *faults]) if faults else "every scale is finite and fits its weight")
    return "\n\n".join(parts), not faults


def _describe(record: QTensor4 | QWeight8) -> tuple[str, ...]:
    """Scheme, shape, original dtype, range of the scales, and how many blocks (rows of int8) are zero."""
    if isinstance(record, QWeight8):
        scales, dtype = record.scales, "-"
        return "int8", str(list(record.shape)), dtype, _range(scales), str(int((scales == 0).sum()))
    scheme = f"{record.codebook}{'-dq' if record.nested else ''} / {record.block_size}"
    scales = record.absmax_scale if record.nested else record.absmax
    zeros = "-" if record.nested else str(int((scales == 0).sum()))
    dtype = str(record.dtype).removeprefix("torch.")
    return scheme, str(list(record.shape)), dtype, _range(scales), zeros


def _range(scales: torch.Tensor) -> str:
    if scales.numel() == 0:
        return "-"
    low, high = scales.aminmax()
    return f"{low.item():.3g} .. {high.item():.3g}"
