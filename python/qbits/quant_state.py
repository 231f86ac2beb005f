"""The statistics of a 4-bit weight as checkpoints store them: read, checked against each other, and written.

The layout is bitsandbytes' (0.37 to 0.50): beside the packed weight ``P`` stand ``P.absmax``,
``P.quant_map``, for nested statistics ``P.nested_absmax`` and ``P.nested_quant_map``, and
``P.quant_state.bitsandbytes__<type>``, the bytes of a JSON object. A file is not to be trusted: whatever
leaves this module fits its shape, so that no kernel reads out of bounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from qbits import codebooks, ops
from qbits.errors import CheckpointFormatError
from qbits.records import QTensor4

__all__ = [
    "QuantHeader",
    "QuantStats",
    "dump_header",
    "pack_quant_state",
    "parse_header",
    "parse_packed",
    "parse_statistics",
    "quantized_names",
    "read_quantized",
    "to_record",
]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256  # the only one that the ops fuse; statistics of any other are decoded on reading
HEADER_MARK = "quant_state.bitsandbytes__"  # then the type

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_MAX_HEADER_BYTES = 4096
_MAX_RANK = 8
_MAX_ELEMENTS = 2**40
_PLAIN_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_NESTED_TENSORS = ("nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class QuantHeader:
    """What the JSON object says of one 4-bit weight."""

    quant_type: str  # "nf4" or "fp4"; "af4" in native files only
    block_size: int
    dtype: torch.dtype  # of the weight before it was quantized
    shape: tuple[int, ...]
    nested_block_size: int | None = None
    nested_offset: float | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        """Number of absmax values."""
        return -(-self.num_elements // self.block_size)


@dataclass(frozen=True, eq=False)
class QuantStats:
    """A header and the tensors beside it; the last two are None unless the statistics are nested."""

    header: QuantHeader
    absmax: torch.Tensor  # float32 [num_blocks]; uint8 when nested
    nested_absmax: torch.Tensor | None = None  # float32 [ceil_div(num_blocks, nested_block_size)]
    nested_quant_map: torch.Tensor | None = None  # float32 [256]


def _refuse(key: str, rule: str, got: Any) -> NoReturn:
    raise CheckpointFormatError(f"qbits::load: {key} must {rule}, got {got}")


def _describe(tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def parse_header(blob: torch.Tensor, key: str) -> QuantHeader:
    """Read the JSON tensor that stands under ``key``.

    Shapes: blob [2 to 4096] uint8.
    Raises: CheckpointFormatError, naming ``key``, for anything but one object with exactly the known fields.
    """
    if not isinstance(blob, torch.Tensor) or blob.dtype != torch.uint8 or blob.dim() != 1 or blob.is_meta:
        _refuse(key, "be a 1-D uint8 tensor holding JSON", _describe(blob))
    if not 2 <= blob.numel() <= _MAX_HEADER_BYTES:
        _refuse(key, f"hold 2 to {_MAX_HEADER_BYTES} bytes", blob.numel())
    try:
        fields = json.loads(
            bytes(blob.tolist()).decode("utf-8", "strict"),
            object_pairs_hook=_distinct,
            parse_constant=_reject_constant,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"qbits::load: {key} must be strict JSON, got {error}") from None
    if not isinstance(fields, dict):
        _refuse(key, "be one JSON object", type(fields).__name__)
    return _header(fields, key)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a field that occurs twice")
    return dict(pairs)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"the literal {name}")


def _header(fields: Mapping[str, Any], key: str) -> QuantHeader:
    """Check the values of the fields, which came from JSON or from an unpacked dictionary."""
    nested = any(name in fields for name in _NESTED_FIELDS)
    known = _PLAIN_FIELDS + (_NESTED_FIELDS if nested else ())
    if set(fields) != set(known):
        _refuse(key, f"have exactly the fields {list(known)}", sorted(map(str, fields)))
    quant_type = _one_of(fields, "quant_type", ("nf4", "fp4", "af4"), key)
    block_size = _one_of(fields, "blocksize", BLOCK_SIZES, key)
    dtype = _DTYPES[_one_of(fields, "dtype", tuple(_DTYPES), key)]
    shape = _shape(fields["shape"], key)
    if not nested:
        return QuantHeader(quant_type, block_size, dtype, shape)
    nested_block_size = _one_of(fields, "nested_blocksize", BLOCK_SIZES[1:], key)
    _one_of(fields, "nested_dtype", ("float32",), key)
    offset = fields["nested_offset"]
    if type(offset) not in (int, float) or not abs(offset) <= torch.finfo(torch.float32).max:
        _refuse(f"nested_offset of {key}", "be a finite float32", repr(offset))
    return QuantHeader(quant_type, block_size, dtype, shape, nested_block_size, float(offset))


def _one_of(fields: Mapping[str, Any], name: str, accepted: tuple[Any, ...], key: str) -> Any:
    value = fields[name]
    if type(value) is not type(accepted[0]) or value not in accepted:  # True is no block size, nor is 64.0
        _refuse(f"{name} of {key}", f"be one of {list(accepted)}", repr(value))
    return value


def _shape(value: Any, key: str) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= _MAX_RANK:
        _refuse(f"shape of {key}", f"be 1 to {_MAX_RANK} integers", repr(value))
    if any(type(size) is not int or size < 1 for size in value):
        _refuse(f"shape of {key}", "hold integers >= 1", repr(value))
    if math.prod(value) > _MAX_ELEMENTS:
        _refuse(f"shape of {key}", "have at most 2^40 elements", repr(value))
    return tuple(value)


def dump_header(header: QuantHeader) -> torch.Tensor:
    """Write the JSON tensor, byte for byte as bitsandbytes writes it.

    Shapes: [number of bytes] uint8.
    """
    fields: dict[str, Any] = {
        "quant_type": header.quant_type,
        "blocksize": header.block_size,
        "dtype": str(header.dtype).removeprefix("torch."),
        "shape": list(header.shape),
    }
    if header.nested_block_size is not None:
        fields["nested_blocksize"] = header.nested_block_size
        fields["nested_dtype"] = "float32"
        fields["nested_offset"] = header.nested_offset
    return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)


def parse_statistics(entries: Mapping[str, Any], key: str, *, allow_nonfinite: bool = False) -> QuantStats:
    """Read the statistics of the weight ``key`` from ``entries``, whose names carry no prefix.

    Packed: one ``quant_state.bitsandbytes__<type>`` tensor beside the others. Unpacked: its fields as plain
    values.

    Raises: CheckpointFormatError naming the entry that does not fit.
    """
    marked = [name for name in entries if name.startswith(HEADER_MARK)]
    if len(marked) > 1 or (not marked and "quant_type" not in entries):
        _refuse(key, f"have exactly one entry {HEADER_MARK}nf4 or {HEADER_MARK}fp4", marked or "none")
    if marked:
        header = parse_header(entries[marked[0]], f"{key}.{marked[0]}")
        if header.quant_type != marked[0].removeprefix(HEADER_MARK):
            _refuse(f"quant_type of {key}.{marked[0]}", "equal the key's", repr(header.quant_type))
    else:
        names = {*_PLAIN_FIELDS, *_NESTED_FIELDS}
        header = _header({name: value for name, value in entries.items() if name in names}, key)
    if header.quant_type == "af4":
        _refuse(f"quant_type of {key}", "be one of ['nf4', 'fp4']", "'af4'")
    nested = header.nested_block_size is not None
    due = {"absmax", "quant_map", *(_NESTED_TENSORS if nested else ())}
    found = set(entries) - {*marked} - (set() if marked else {*_PLAIN_FIELDS, *_NESTED_FIELDS})
    if found != due:
        _refuse(key, f"have exactly the entries {sorted(due)} beside the header", sorted(found))
    _check_entries(entries, header, key)
    stats = QuantStats(
        header,
        entries["absmax"],
        entries["nested_absmax"] if nested else None,
        entries["nested_quant_map"] if nested else None,
    )
    if not allow_nonfinite:
        check_scales(f"{key}.nested_absmax" if nested else f"{key}.absmax", *_scales(stats))
    return stats


def _check_entries(entries: Mapping[str, Any], header: QuantHeader, key: str) -> None:
    """Check dtypes, lengths, devices and the two code tables."""
    absmax = entries["absmax"]
    if isinstance(absmax, torch.Tensor) and absmax.dtype == torch.bfloat16 and absmax.dim() == 2:
        _refuse(
            f"{key}.absmax",
            "be 1-D float32; bitsandbytes' CPU forward repacks weights in place and then saves wrong ones: "
            "save the model anew, before any forward",
            _describe(absmax),
        )
    due = {"absmax": (torch.float32, header.num_blocks), "quant_map": (torch.float32, 16)}
    if header.nested_block_size is not None:
        due["absmax"] = (torch.uint8, header.num_blocks)
        due["nested_absmax"] = (torch.float32, -(-header.num_blocks // header.nested_block_size))
        due["nested_quant_map"] = (torch.float32, 256)
    for name, (dtype, length) in due.items():
        tensor = entries[name]
        check_tensor(f"{key}.{name}", tensor, dtype, length)
        if tensor.dim() != 1:
            _refuse(f"{key}.{name}", "have 1 dimension", _describe(tensor))
        if tensor.device != absmax.device:
            _refuse(f"{key}.{name}", f"lie on {absmax.device} as {key}.absmax does", tensor.device)
    table = entries["quant_map"]
    if table.is_meta:
        return
    builtin = codebooks.get_4bit_type(header.quant_type, table.device)
    if not torch.allclose(table, builtin, rtol=0, atol=1e-6):
        _refuse(f"{key}.quant_map", f"be the table of {header.quant_type} to 1e-6", table.tolist())
    if header.nested_block_size is not None:
        check_map(f"{key}.nested_quant_map", entries["nested_quant_map"])


def check_tensor(key: str, tensor: Any, dtype: torch.dtype, count: int) -> None:
    """Refuse anything but a contiguous tensor of ``count`` elements of ``dtype``."""
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.is_contiguous()
    if not plain or tensor.dtype != dtype or tensor.numel() != count:
        name = str(dtype).removeprefix("torch.")
        _refuse(key, f"be contiguous {name} with {count} elements", _describe(tensor))


def check_map(key: str, table: torch.Tensor) -> None:
    """Refuse a map of nested statistics that does not ascend within [-1, 1]."""
    if not table.is_meta and not bool((table[1:] >= table[:-1]).all() & (table.abs() <= 1).all()):
        _refuse(key, "ascend within [-1, 1]", "other values")


def check_scales(key: str, scales: torch.Tensor, decoded: torch.Tensor) -> None:
    """Refuse scales that are negative or not finite, and nested ones that decode to what is not finite."""
    if scales.is_meta:
        return
    for tensor, wrong in (
        (scales, ~torch.isfinite(scales) | (scales < 0)),
        (decoded, ~torch.isfinite(decoded)),
    ):
        if bool(wrong.any()):
            at = int(wrong.reshape(-1).nonzero()[0])
            _refuse(key, "be finite and >= 0", f"{tensor.reshape(-1)[at].item()} at {at}")


def decode_absmax(
    codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, table: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return the float32 absmax of each block: ``(table[code] * scale) + offset``, rounded twice."""
    scaled: torch.Tensor = ops.dequantize_blockwise(codes, scale, table, block_size, torch.float32)
    return scaled + offset.reshape(())


def _scales(stats: QuantStats) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outermost scales, and the absmax of every block."""
    block_size = stats.header.nested_block_size
    if block_size is None or stats.nested_absmax is None or stats.nested_quant_map is None:
        return stats.absmax, stats.absmax
    offset = torch.tensor(stats.header.nested_offset, dtype=torch.float32, device=stats.absmax.device)
    table = stats.nested_quant_map
    return stats.nested_absmax, decode_absmax(stats.absmax, stats.nested_absmax, offset, table, block_size)


def parse_packed(packed: Any, header: QuantHeader, key: str) -> torch.Tensor:
    """Return the packed bytes as a flat uint8 view.

    Shapes: packed [r, 1], [1, r] or [r], in any of the four storage dtypes; result [ceil_div(n, 2)] uint8.
    Raises: CheckpointFormatError where dtype, rank or the number of bytes does not fit the header.
    """
    num_bytes = -(-header.num_elements // 2)
    if not isinstance(packed, torch.Tensor) or packed.dtype not in _STORAGE_DTYPES:
        _refuse(key, "be packed bytes in uint8, float16, bfloat16 or float32", _describe(packed))
    flat = packed.dim() == 1 or (packed.dim() == 2 and 1 in packed.shape)
    if not flat or packed.numel() * packed.element_size() != num_bytes:
        _refuse(
            key,
            f"hold {num_bytes} bytes in one row or column for shape {list(header.shape)}",
            _describe(packed),
        )
    return packed.detach().reshape(-1).contiguous().view(torch.uint8)


def to_record(packed: torch.Tensor, stats: QuantStats) -> QTensor4:
    """Join flat packed bytes and their statistics; statistics that no kernel fuses are decoded to float32."""
    header = stats.header
    if header.nested_block_size != NESTED_BLOCK_SIZE:
        absmax = _scales(stats)[1]
        return QTensor4(packed, absmax, header.shape, header.dtype, header.quant_type, header.block_size)
    table: Any = stats.nested_quant_map
    builtin = table.is_meta or bool(torch.equal(table, codebooks.dynamic_map(table.device)))
    return QTensor4(
        packed,
        stats.absmax,
        header.shape,
        header.dtype,
        header.quant_type,
        header.block_size,
        stats.nested_absmax,
        torch.tensor(header.nested_offset, dtype=torch.float32, device=packed.device),
        None if builtin else table,
    )


def quantized_names(keys: Iterable[str]) -> list[str]:
    """Return the names of the weights that have a header among ``keys``, in the order found, each once.

    >>> quantized_names(["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"])
    ['a.weight']
    """
    marked = (key.rpartition("." + HEADER_MARK)[0] for key in keys)
    return list(dict.fromkeys(name for name in marked if name))


def read_quantized(
    tensors: Mapping[str, torch.Tensor], name: str, *, allow_nonfinite: bool = False
) -> QTensor4:
    """Read the weight ``name`` (for example ``"layers.0.weight"``) and its statistics out of ``tensors``.

    Raises: CheckpointFormatError naming the key that is missing, unknown or does not fit.
    """
    if name not in tensors:
        _refuse(name, "stand beside its statistics", "no such key")
    entries = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}
    stats = parse_statistics(entries, name, allow_nonfinite=allow_nonfinite)
    packed = parse_packed(tensors[name], stats.header, name)
    if packed.device != stats.absmax.device:
        _refuse(name, f"lie on {stats.absmax.device} as {name}.absmax does", packed.device)
    return to_record(packed, stats)


def pack_quant_state(record: QTensor4, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of ``record`` under bitsandbytes' keys, in its order: weight first, header last.

    Raises: CheckpointFormatError for af4, which bitsandbytes cannot read.
    """
    if record.codebook not in ("nf4", "fp4"):
        _refuse(name, "be nf4 or fp4 to be written in bitsandbytes' format", record.codebook)
    device = record.packed.device
    tensors = {
        name: record.packed.reshape(-1, 1),
        f"{name}.absmax": record.absmax.reshape(-1),
        f"{name}.quant_map": codebooks.get_4bit_type(record.codebook, device),
    }
    nested: dict[str, Any] = {}
    if record.nested:
        table = record.absmax_codebook
        tensors[f"{name}.nested_absmax"] = record.absmax_scale.reshape(-1)
        tensors[f"{name}.nested_quant_map"] = (
            codebooks.dynamic_map(device).clone() if table is None else table
        )
        nested = {"nested_block_size": NESTED_BLOCK_SIZE, "nested_offset": record.absmax_offset.item()}
    header = QuantHeader(record.codebook, record.block_size, record.dtype, tuple(record.shape), **nested)
    tensors[f"{name}.{HEADER_MARK}{record.codebook}"] = dump_header(header).to(device)
    return tensors
