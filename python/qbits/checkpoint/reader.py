"""Safetensors files and sharded folders, read lazily and one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qbits.checkpoint.writer import DTYPES, SINGLE_NAME, TensorInfo
from qbits.errors import CheckpointFormatError

__all__ = ["CheckpointReader"]


class CheckpointReader:
    """Tensors of a ``.safetensors`` file, or of a folder with one or with an index of shards, one at a time.

    Raises:
        FileNotFoundError: nothing there to read, or a shard that the index names is missing.
        CheckpointFormatError: a file that is no complete safetensors file, or an index that does not fit its
            shards.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: list[dict[str, str]] = []
        self._handles: dict[str, Any] = {}
        self._files: dict[str, str] = {}
        folder, files, index = _find_files(self.path)
        for file in files:
            try:
                handle = safe_open(folder / file, framework="pt")
                names = list(handle.keys())  # type: ignore[no-untyped-call]
                self.metadata.append(handle.metadata() or {})  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError) as error:
                raise CheckpointFormatError(
                    f"qbits::load: {folder / file} must be a complete safetensors file, got: {error}"
                ) from error
            self._handles[file] = handle
            for name in names:
                if name in self._files:
                    both = [self._files[name], file]
                    raise CheckpointFormatError(f"qbits::load: {name} must be in one file, got it in {both}")
                self._files[name] = file
        for name, file in index.items():
            if self._files.get(name) != file:
                raise CheckpointFormatError(
                    f"qbits::load: {name} must be in {file}, as the index says, "
                    f"got it in {self._files.get(name, 'none')}"
                )

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self._handles.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, from the header alone."""
        entry = self._handles[self._files[name]].get_slice(name)
        dtype = DTYPES.get(entry.get_dtype())
        if dtype is None:
            raise CheckpointFormatError(
                f"qbits::load: {name} must have one of the dtypes {list(DTYPES)}, got {entry.get_dtype()}"
            )
        return TensorInfo(name, dtype, tuple(entry.get_shape()))

    def view(self, name: str) -> Tensor:
        """A tensor as a view of the file: only what is looked at is read. Copy it before the file changes."""
        tensor: Tensor = self._handles[self._files[name]].get_tensor(name)
        return tensor

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A tensor in memory of its own."""
        return self.view(name).to(device, copy=True)


def _find_files(path: Path) -> tuple[Path, list[str], dict[str, str]]:
    """The folder, the file names in it, and the index's key to file (empty where there is none)."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointFormatError(
                f"qbits::load: path must be a .safetensors file or a folder, got {path}"
            )
        return path.parent, [path.name], {}
    if not path.is_dir():
        raise FileNotFoundError(f"qbits::load: path must be a .safetensors file or a folder, got {path}")
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        index = _read_index(indexes[0])
        return path, sorted(set(index.values())), index
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE_NAME in files:
        files = [SINGLE_NAME]
    if len(files) != 1 or indexes:
        raise FileNotFoundError(
            f"qbits::load: {path} must hold {SINGLE_NAME} or one index of shards, "
            f"got {files or 'no .safetensors file'}"
        )
    return path, files, {}


def _read_index(file: Path) -> dict[str, str]:
    """The ``weight_map`` of an index; its files must lie beside it."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        files = set(index.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointFormatError(
            f"qbits::load: {file} must be a JSON object with a weight_map, got {error!r}"
        ) from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointFormatError(
                f"qbits::load: {file} must name .safetensors files of its own folder, got {name!r}"
            )
        if not (file.parent / name).is_file():
            raise FileNotFoundError(f"qbits::load: {file.parent / name} must exist, as {file.name} names it")
    return dict(index)
