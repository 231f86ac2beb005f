"""Safetensors files and sharded folders, written one tensor at a time; equal tensors give equal bytes.

The safetensors package reads, but does not write, here: it orders the header's metadata at random, so that
two saves of one model differ, and it wants all tensors of a file at once. The format is the header's length
in eight bytes, a JSON header, and the tensors' bytes: known sizes give known offsets, so each tensor goes to
its place as soon as it exists.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qbits.errors import ArgumentValueError

__all__ = [
    "DTYPES",
    "INDEX_NAME",
    "SINGLE_NAME",
    "TensorInfo",
    "parse_size",
    "plan_shards",
    "write_checkpoint",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SHARD_PATTERN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

# Room for the JSON of a quantization state: its seven fields take less than 300 bytes for any 2-D weight.
_MAX_TEXT_BYTES = 512

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_UNITS: Mapping[str, int] = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("B", 1000), ("IB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def parse_size(size: str | int) -> int:
    """Bytes in a size such as ``"5GB"``, ``"200MiB"`` or 1000000.

    Raises:
        ValueError: not a positive number with one of the units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB.

    Example:
        >>> parse_size("1.5GB"), parse_size("2KiB")
        (1500000000, 2048)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match and match[2].upper() in _UNITS:
        num_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
        if num_bytes > 0:
            return num_bytes
    raise ArgumentValueError(
        f'qbits::save: max_shard_size must be a positive size such as "5GB" or "200MiB", got {size!r}'
    )


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor in a file; shape None is a JSON text of a length still unknown."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None

    @property
    def num_bytes(self) -> int:
        """Bytes in the file; for a JSON text the most that it may take."""
        if self.shape is None:
            return _MAX_TEXT_BYTES
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(groups: Iterable[Sequence[TensorInfo]], max_bytes: int) -> list[list[TensorInfo]]:
    """Distribute groups in order over shards of at most ``max_bytes``; a larger group has its own shard."""
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for group in groups:
        group_bytes = sum(info.num_bytes for info in group)
        if shards[-1] and used + group_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].extend(group)
        used += group_bytes
    return shards


def write_checkpoint(
    path: str | os.PathLike[str],
    groups: Iterable[Sequence[TensorInfo]],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    max_shard_size: str | int,
) -> None:
    """Write tensors to a ``.safetensors`` file, or to a folder in shards of ``max_shard_size``.

    ``tensors`` is drawn one at a time, in the order of ``groups``; tensors of one group stay in one file. The
    files get their names when all are complete; after an error there is none.
    """
    target, max_bytes = Path(path), parse_size(max_shard_size)
    single = target.suffix == ".safetensors"
    shards = [[info for group in groups for info in group]] if single else plan_shards(groups, max_bytes)
    folder = target.parent if single else target
    folder.mkdir(parents=True, exist_ok=True)
    names = [target.name] if single else [_shard_name(i, len(shards)) for i in range(len(shards))]
    parts = {name: folder / f".{name}.{os.getpid()}.part" for name in names}
    try:
        for name, shard in zip(names, shards, strict=True):
            with _SafetensorsWriter(parts[name], shard, metadata) as writer:
                for key, tensor in islice(tensors, len(shard)):
                    writer.write(key, tensor)
        for name, part in parts.items():
            part.replace(folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    if not single:
        _finish_folder(folder, dict(zip(names, shards, strict=True)))


def _shard_name(index: int, num_shards: int) -> str:
    """File name of a shard, as the Hugging Face loaders expect it."""
    return SINGLE_NAME if num_shards == 1 else f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def _finish_folder(folder: Path, shards: Mapping[str, Sequence[TensorInfo]]) -> None:
    """Write the index of several shards; remove weights of an earlier save, which a loader would mix in."""
    kept = {*shards, INDEX_NAME} if len(shards) > 1 else set(shards)
    if len(shards) > 1:
        total = sum(info.num_bytes for shard in shards.values() for info in shard if info.shape is not None)
        files = {info.name: name for name, shard in shards.items() for info in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        weights = file.name in (SINGLE_NAME, INDEX_NAME) or _SHARD_PATTERN.fullmatch(file.name)
        if weights and file.name not in kept:
            file.unlink()


class _SafetensorsWriter:
    """Writes one file, tensor by tensor in any order.

    Tensors lie by descending dtype size, then by name, so that each is aligned; JSON texts come last.
    """

    def __init__(self, path: Path, infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> None:
        ordered = sorted(infos, key=lambda info: (info.shape is None, -info.dtype.itemsize, info.name))
        self._metadata = dict(sorted(metadata.items()))
        self._infos = {info.name: info for info in ordered}
        self._texts: dict[str, Tensor] = {}
        self._pending = set(self._infos)
        self._starts: dict[str, int] = {}
        self._data_bytes = 0
        for info in ordered:
            if info.shape is not None:
                self._starts[info.name] = self._data_bytes
                self._data_bytes += info.num_bytes
        # With every text at its longest no offset has more digits, so the final header fits into this room.
        longest = self._header({info.name: _MAX_TEXT_BYTES for info in ordered if info.shape is None})
        self._header_bytes = -(-len(longest) // 8) * 8
        self._file: IO[bytes] = open(path, "wb")  # noqa: SIM115 closed by __exit__

    def __enter__(self) -> _SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._file:
            if kind is None:
                self._finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor's bytes at its place."""
        info = self._infos[name]
        self._pending.remove(name)
        text = info.shape is None and tensor.numel() <= _MAX_TEXT_BYTES
        if tensor.dtype != info.dtype or not (text or tuple(tensor.shape) == info.shape):
            raise ArgumentValueError(
                f"qbits::save: {name} must be {info.dtype} {info.shape}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if text:
            self._texts[name] = tensor.cpu()
        else:
            self._put(8 + self._header_bytes + self._starts[name], tensor)

    def _put(self, position: int, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        num_bytes = data.numel() * data.element_size()
        self._file.seek(position)
        if num_bytes:
            self._file.write(memoryview((ctypes.c_char * num_bytes).from_address(data.data_ptr())))

    def _finish(self) -> None:
        """Write the texts and the header, which needs their lengths."""
        if self._pending:
            raise ArgumentValueError(f"qbits::save: {min(self._pending)} must have data, got none")
        position = 8 + self._header_bytes + self._data_bytes
        for name in self._infos:
            if name in self._texts:
                self._put(position, self._texts[name])
                position += self._texts[name].numel()
        header = self._header({name: text.numel() for name, text in self._texts.items()})
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self._file.truncate(position)

    def _header(self, text_bytes: Mapping[str, int]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        end = self._data_bytes
        for name, info in self._infos.items():
            if info.shape is None:
                shape, start, end = [text_bytes[name]], end, end + text_bytes[name]
                stop = end
            else:
                shape, start = list(info.shape), self._starts[name]
                stop = start + info.num_bytes
            entries[name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": shape, "data_offsets": [start, stop]}
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
