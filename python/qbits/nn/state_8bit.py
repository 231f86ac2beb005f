"""How an int8 weight lies in a module's parameters and in a state_dict, and how every known layout is read.

Native layout: ``weight`` int8 [N, K] and ``weight_scale`` float32 [N]. bitsandbytes' layout: ``weight``,
``SCB``, the same scales, and ``weight_format``, a number that is 0 for rows; old versions wrote tiled orders
(`qbits.nn.tiles_8bit`), which are turned into rows here. No layout tells the dtype before quantization.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits import quant_state
from qbits.errors import CheckpointFormatError
from qbits.nn import tiles_8bit
from qbits.records import QWeight8

__all__ = [
    "FORMAT",
    "PARAMETERS",
    "SCALES",
    "SCALE_NAMES",
    "pop_record",
    "read_format",
    "to_bnb",
    "to_parameters",
]

# the names of a quantized weight's parameters, each with the field of QWeight8 that it holds
PARAMETERS = {"weight": "values", "weight_scale": "scales"}
SCALES = "SCB"
FORMAT = "weight_format"
SCALE_NAMES = ("weight_scale", SCALES)  # either tells that the weight beside it is in int8


def to_parameters(record: QWeight8) -> dict[str, torch.Tensor]:
    """Return the tensors of ``record`` under the parameters' names."""
    return {name: getattr(record, field) for name, field in PARAMETERS.items()}


def to_bnb(record: QWeight8) -> dict[str, torch.Tensor]:
    """Return the tensors of ``record`` under bitsandbytes' names."""
    rows = torch.zeros((), dtype=torch.uint8, device=record.values.device)
    return {"weight": record.values, SCALES: record.scales, FORMAT: rows}


def pop_record(entries: dict[str, Any], prefix: str, row: int | None = None) -> QWeight8 | None:
    """Take the int8 weight at ``prefix`` out of ``entries``, in either layout; None where there is none.

    Args:
        entries: Tensors by key.
        prefix: Ends in a dot, or is empty.
        row: K, where the layer is known: a tiled layout pads it.

    Raises: CheckpointFormatError naming the key that does not fit.
    """
    name = next((name for name in SCALE_NAMES if f"{prefix}{name}" in entries), None)
    if name is None:
        return None
    key = f"{prefix}weight"
    scales = entries.pop(f"{prefix}{name}")
    format = read_format(entries.pop(f"{prefix}{FORMAT}", 0), f"{prefix}{FORMAT}")
    values = entries.pop(key, None)
    plain = isinstance(values, torch.Tensor) and values.layout == torch.strided and values.is_contiguous()
    if not plain or values.dtype != torch.int8 or values.dim() != 2:
        got = f"{values.dtype} {list(values.shape)}" if isinstance(values, torch.Tensor) else "none"
        raise CheckpointFormatError(
            f"qbits::load: {key} must be a contiguous int8 matrix beside {prefix}{name}, "
            f"got {got.removeprefix('torch.')}"
        )
    if format != "row":
        num_rows = scales.numel() if isinstance(scales, torch.Tensor) else 0
        values = tiles_8bit.from_tiles(key, values, format, num_rows, row)
    quant_state.check_tensor(f"{prefix}{name}", scales, torch.float32, values.shape[0])
    quant_state.check_scales(f"{prefix}{name}", scales, scales)
    return QWeight8(values, scales.reshape(-1), None)


def read_format(value: Any, key: str) -> str:
    """Return the name of a layout given as name, number or tensor with one.

    Raises: CheckpointFormatError for a layout that is none.

    >>> read_format(torch.tensor(2, dtype=torch.uint8), "weight_format")
    'col_turing'
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    formats = tiles_8bit.FORMATS
    if type(value) is int and 0 <= value < len(formats):
        return formats[value]
    if isinstance(value, torch.Tensor) and value.is_meta:
        return formats[0]
    if value not in formats:
        raise CheckpointFormatError(
            f"qbits::load: {key} must be one of {list(formats)} or its number, got {value!r}"
        )
    return str(value)
