"""How a 4-bit weight lies in a module's parameters and in a state_dict, and how every known layout is read.

Native layout: ``weight`` uint8 and ``weight_absmax``, row by row ([N, K/2] and [N, K/block_size]) where a
block never straddles rows, else flat; for nested statistics ``weight_absmax_scale``,
``weight_absmax_offset`` [1] and, where it is not the built-in one, ``weight_absmax_codebook`` [256]; and
``weight_quant_state``, the JSON header of `qbits.quant_state` as uint8, which carries what no tensor shows:
codebook, block size, original dtype and shape.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits import codebooks, quant_state
from qbits.errors import CheckpointFormatError
from qbits.quant_state import QuantHeader
from qbits.records import QTensor4
from qbits.schemes import QuantScheme, Scheme4bit

__all__ = ["PARAMETERS", "from_parameters", "header", "pop_record", "scheme_of", "to_parameters"]

# the names of a quantized weight's parameters, each with the field of QTensor4 that it holds
PARAMETERS = {
    "weight": "packed",
    "weight_absmax": "absmax",
    "weight_absmax_scale": "absmax_scale",
    "weight_absmax_offset": "absmax_offset",
    "weight_absmax_codebook": "absmax_codebook",
}
HEADER = "weight_quant_state"


def to_parameters(record: QTensor4) -> dict[str, torch.Tensor]:
    """Return the tensors of ``record`` under the parameters' names, in their shapes, absent ones left out."""
    tensors = {name: getattr(record, field) for name, field in PARAMETERS.items()}
    num_rows, row = record.shape
    if num_rows and row and row % record.block_size == 0:
        tensors["weight"] = tensors["weight"].reshape(num_rows, -1)
        tensors["weight_absmax"] = tensors["weight_absmax"].reshape(num_rows, -1)
    else:
        tensors["weight"] = tensors["weight"].reshape(-1)
        tensors["weight_absmax"] = tensors["weight_absmax"].reshape(-1)
    if record.nested:
        tensors["weight_absmax_offset"] = tensors["weight_absmax_offset"].reshape(1)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def scheme_of(record: QTensor4) -> Scheme4bit:
    """Return the scheme that makes records such as ``record``."""
    fields = {"codebook": record.codebook, "block_size": record.block_size, "double_quant": record.nested}
    scheme = QuantScheme.from_dict(fields)
    assert isinstance(scheme, Scheme4bit)
    return scheme


def from_parameters(tensors: Any, header: QuantHeader) -> QTensor4:
    """Return the record that ``tensors`` (by parameter name, None where absent) and ``header`` make."""
    fields = {field: tensors.get(name) for name, field in PARAMETERS.items()}
    return QTensor4(
        **fields,
        shape=header.shape,
        dtype=header.dtype,
        codebook=header.quant_type,
        block_size=header.block_size,
    )


def header(record: QTensor4) -> torch.Tensor:
    """Return the JSON header for the native layout; nested statistics stand in tensors, not in it."""
    fields = QuantHeader(record.codebook, record.block_size, record.dtype, tuple(record.shape))
    return quant_state.dump_header(fields)


def pop_record(entries: dict[str, Any], prefix: str) -> QTensor4 | None:
    """Take the quantized weight at ``prefix`` out of ``entries``, in either layout; None where there is none.

    Raises: CheckpointFormatError naming the key that does not fit.
    """
    name = f"{prefix}weight"
    if any(key.startswith(f"{name}.") for key in entries):
        record = quant_state.read_quantized(entries, name)
        for key in [key for key in entries if key == name or key.startswith(f"{name}.")]:
            del entries[key]
        return record
    if f"{prefix}{HEADER}" in entries:
        return _pop_native(entries, prefix)
    return None


def _pop_native(entries: dict[str, Any], prefix: str) -> QTensor4:
    fields = quant_state.parse_header(entries.pop(f"{prefix}{HEADER}"), f"{prefix}{HEADER}")
    tensors = {name: entries.pop(f"{prefix}{name}", None) for name in PARAMETERS}
    nested = tensors["weight_absmax_scale"] is not None
    num_groups = -(-fields.num_blocks // quant_state.NESTED_BLOCK_SIZE)
    due = {
        "weight": (torch.uint8, -(-fields.num_elements // 2)),
        "weight_absmax": (torch.uint8 if nested else torch.float32, fields.num_blocks),
        "weight_absmax_scale": (torch.float32, num_groups),
        "weight_absmax_offset": (torch.float32, 1),
        "weight_absmax_codebook": (torch.float32, 256),
    }
    absent = {"weight_absmax_codebook"} if nested else set(due) - {"weight", "weight_absmax"}
    for name, (dtype, count) in due.items():
        if tensors[name] is None and name in absent:
            continue
        quant_state.check_tensor(f"{prefix}{name}", tensors[name], dtype, count)
        if not nested and name in absent:
            raise CheckpointFormatError(
                f"qbits::load: {prefix}{name} must stand beside {prefix}weight_absmax_scale, got it alone"
            )
    record = from_parameters(tensors, fields)
    if not nested:
        quant_state.check_scales(f"{prefix}weight_absmax", record.absmax, record.absmax)
        return record
    table = record.absmax_codebook
    if table is None:
        table = codebooks.dynamic_map(record.absmax.device)
    quant_state.check_map(f"{prefix}weight_absmax_codebook", table)
    decoded = quant_state.decode_absmax(
        record.absmax, record.absmax_scale, record.absmax_offset, table, quant_state.NESTED_BLOCK_SIZE
    )
    quant_state.check_scales(f"{prefix}weight_absmax_scale", record.absmax_scale, decoded)
    return record
