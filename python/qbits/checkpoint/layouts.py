"""The names that a model's tensors have in a file: which keys a quantized weight has in each format.

"bnb" is bitsandbytes' layout (`qbits.quant_state`), "qbits" the modules' own (`qbits.nn.state_4bit`). Both
are known by their keys alone, so a file may mix them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qbits.checkpoint.reader import CheckpointReader
from qbits.checkpoint.writer import DTYPES, TensorInfo
from qbits.errors import ArgumentValueError
from qbits.nn import QuantizedLinear, layer_class, state_4bit, state_8bit
from qbits.quant_state import HEADER_MARK, pack_quant_state, quantized_names, read_quantized
from qbits.records import QTensor4, QWeight8
from qbits.schemes import Int8, QuantScheme

__all__ = [
    "Format",
    "choose_format",
    "file_metadata",
    "model_tensors",
    "plan_record",
    "read_record",
    "record_tensors",
    "tensor_infos",
    "weight_groups",
]

Format: TypeAlias = Literal["auto", "bnb", "qbits"]
Record: TypeAlias = QTensor4 | QWeight8

# what may stand beside a quantized weight, and is part of it
_LEAVES = frozenset(
    {*state_4bit.PARAMETERS, state_4bit.HEADER, *state_8bit.PARAMETERS, state_8bit.SCALES, state_8bit.FORMAT}
)
_FORMAT_VERSION = 1
_BNB = ("nf4", "fp4", "int8", "llm-int8")  # the codebooks that bitsandbytes can read


def choose_format(format: Format, schemes: Iterable[QuantScheme]) -> Literal["bnb", "qbits"]:
    """The format to write: "auto" is bitsandbytes' wherever it can hold every scheme.

    Raises:
        ValueError: an unknown format, or "bnb" for a scheme that bitsandbytes cannot read.
    """
    foreign = sorted({scheme.name for scheme in schemes if scheme.codebook not in _BNB})
    if format == "auto":
        return "qbits" if foreign else "bnb"
    if format not in ("bnb", "qbits"):
        raise ArgumentValueError(
            f"qbits::save: format must be one of ['auto', 'bnb', 'qbits'], got {format!r}"
        )
    if format == "bnb" and foreign:
        raise ArgumentValueError(f"qbits::save: format must be 'qbits' or 'auto' for {foreign}, got 'bnb'")
    return format


def file_metadata(
    format: Literal["bnb", "qbits"], schemes: Mapping[str, QuantScheme], extra: Mapping[str, str] | None
) -> dict[str, str]:
    """Metadata of a file: ``format`` for loaders, ``qbits`` with each layer's scheme, the caller's own.

    bitsandbytes' layout has schemes only where they are more than the tensors tell: an int8 threshold.
    """
    metadata = {"format": "pt"}
    if format == "qbits" or any(isinstance(scheme, Int8) for scheme in schemes.values()):
        record = {
            "version": _FORMAT_VERSION,
            "schemes": {name: s.to_dict() for name, s in sorted(schemes.items())},
        }
        metadata["qbits"] = json.dumps(record)
    for key, value in (extra or {}).items():
        if key in ("format", "qbits") or not isinstance(key, str) or not isinstance(value, str):
            raise ArgumentValueError(
                "qbits::save: metadata must map text to text and leave the keys format and qbits free, "
                f"got {key!r}: {value!r}"
            )
        metadata[key] = value
    return metadata


def record_tensors(record: Record, prefix: str, format: Literal["bnb", "qbits"]) -> dict[str, Tensor]:
    """The tensors of a quantized weight under the keys of a format; ``prefix`` ends in a dot."""
    if isinstance(record, QWeight8):
        to_entries = state_8bit.to_bnb if format == "bnb" else state_8bit.to_parameters
        return {prefix + name: tensor for name, tensor in to_entries(record).items()}
    if format == "bnb":
        return pack_quant_state(record, f"{prefix}weight")
    tensors = {prefix + name: tensor for name, tensor in state_4bit.to_parameters(record).items()}
    return tensors | {f"{prefix}{state_4bit.HEADER}": state_4bit.header(record)}


def plan_record(
    shape: Sequence[int],
    dtype: torch.dtype,
    scheme: QuantScheme,
    prefix: str,
    format: Literal["bnb", "qbits"],
) -> list[TensorInfo]:
    """What `record_tensors` will return for a weight that is still to be quantized, without its data."""
    empty = torch.empty(tuple(shape), dtype=dtype, device="meta")
    record = layer_class(scheme).quantize_weight(empty, scheme)
    if isinstance(record, QTensor4) and record.nested:
        # The header's text holds this number, so it needs a value; the text's length is open in any case.
        record = replace(record, absmax_offset=torch.zeros(1))
    return tensor_infos(record_tensors(record, prefix, format))


def tensor_infos(tensors: Mapping[str, Tensor]) -> list[TensorInfo]:
    """Names, dtypes and shapes; those of headers are left open."""
    return [
        TensorInfo(name, t.dtype, None if _is_header(name) else tuple(t.shape)) for name, t in tensors.items()
    ]


def _is_header(name: str) -> bool:
    return f".{HEADER_MARK}" in name or _is_native_header(name)


def _is_native_header(name: str) -> bool:
    return _leaf(name) == state_4bit.HEADER


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def model_tensors(model: nn.Module, format: Literal["bnb", "qbits"]) -> Iterator[dict[str, Tensor]]:
    """The tensors to store, a group per module, in the order of the state_dict; a shared tensor comes once.

    Raises:
        ValueError: a tensor on the meta device, of a dtype that safetensors lacks, or a state_dict entry that
            is none.
    """
    packed = {
        f"{name}.": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear) and module.is_quantized
    }
    seen: set[Any] = set()
    group: dict[str, Tensor] = {}
    group_prefix = None
    for key, tensor in model.state_dict().items():
        prefix = key[: key.rfind(".") + 1]
        if prefix != group_prefix:
            if group:
                yield group
            group, group_prefix = {}, prefix
        if prefix in packed and key != f"{prefix}bias":
            if key == f"{prefix}weight" and _is_first(packed[prefix].weight, key, seen):
                group |= record_tensors(packed[prefix].record(), prefix, format)
        elif _is_first(tensor, key, seen):
            group[key] = tensor
    if group:
        yield group


def _is_first(tensor: Any, key: str, seen: set[Any]) -> bool:
    """Whether a tensor has not been met before; raises where it cannot be stored."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.dtype not in DTYPES.values():
        got = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ArgumentValueError(
            f"qbits::save: {key} must be a tensor with data that safetensors knows, got {got}"
        )
    if tensor.numel() == 0:
        return True
    mark = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    known = mark in seen
    seen.add(mark)
    return not known


def weight_groups(keys: Iterable[str]) -> dict[str, list[str]]:
    """The quantized weights of a file by name, in either format, each with all its keys, its own included.

    Example:
        >>> weight_groups(["a.bias", "a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"])
        {'a.weight': ['a.weight', 'a.weight.absmax', 'a.weight.quant_state.bitsandbytes__nf4']}
    """
    names = list(keys)
    native = [f"{name.removesuffix(state_4bit.HEADER)}weight" for name in names if _is_native_header(name)]
    int8 = [f"{name.rpartition('.')[0]}.weight" for name in names if _leaf(name) in state_8bit.SCALE_NAMES]
    groups: dict[str, list[str]] = {name: [] for name in [*quantized_names(names), *native, *int8]}
    for name in names:
        prefix = name[: name.rfind(".") + 1]
        owners = [name, prefix[:-1], name.rpartition(f".{HEADER_MARK}")[0]]
        if name[len(prefix) :] in _LEAVES:
            owners.append(f"{prefix}weight")
        owner = next((owner for owner in owners if owner in groups), None)
        if owner is not None:
            groups[owner].append(name)
    return groups


def read_record(
    reader: CheckpointReader,
    name: str,
    keys: Iterable[str],
    device: torch.device | str = "cpu",
    row: int | None = None,
) -> Record:
    """Read and check a quantized weight; its tensors are views of the file unless they go to another device.

    ``row`` is K where the layer is known, for layouts that pad it.

    Raises:
        CheckpointFormatError: naming the key that does not fit.
    """
    entries: dict[str, Any] = {key: reader.view(key) for key in keys}
    record: Record | None = None
    if name.endswith("weight"):
        prefix = name.removesuffix("weight")
        record = state_8bit.pop_record(entries, prefix, row) or state_4bit.pop_record(entries, prefix)
    if record is None:
        record = read_quantized(entries, name)
    moved: Record = pytree.tree_map(lambda t: t.to(device), record)
    return moved
