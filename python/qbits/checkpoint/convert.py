"""Quantizing a checkpoint on disk: float files in, quantized files out, one tensor in memory at a time."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qbits.checkpoint import layouts
from qbits.checkpoint.config import quantization_config
from qbits.checkpoint.reader import CheckpointReader
from qbits.checkpoint.writer import TensorInfo, write_checkpoint
from qbits.errors import ArgumentValueError
from qbits.model import FLOAT_DTYPES, check_finite, selector
from qbits.nn import layer_class
from qbits.schemes import Pattern, QuantScheme, SchemeRules, resolve

__all__ = ["CheckpointChange", "quantize_checkpoint"]

_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"}
)

# Parts of the names of 2-D weights that are no linear layer, or an output head, where no model tells what
# they are.
_OTHER_PARTS = (
    "embed",
    "norm",
    "ln_",
    "wte",
    "wpe",
    "shared",
    "relative_attention_bias",
    "position",
    "lm_head",
)


@dataclass(frozen=True)
class CheckpointChange:
    """What `quantize_checkpoint` did."""

    schemes: dict[str, QuantScheme]  # by layer
    bytes_before: int
    bytes_after: int


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    scheme: SchemeRules = "nf4",
    *,
    skip: Sequence[Pattern] | Literal["auto"] = "auto",
    only: Sequence[Pattern] | None = None,
    format: layouts.Format = "auto",
    max_shard_size: str | int = "5GB",
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> CheckpointChange:
    """Quantize the linear layers of a checkpoint without building the model.

    One tensor is read, quantized and written at a time, so a checkpoint may be larger than the memory. Beside
    the weights the folder's other files are copied, and its ``config.json`` names the quantization.

    Which weights: with a ``config.json`` that transformers knows, those of its model's linear layers. What it
    does not know, or without transformers: each 2-D float ``*.weight`` whose name has no part that names an
    embedding, a norm or the output head.

    Args:
        src: A model folder with safetensors files, or one ``.safetensors`` file.
        dst: The folder to write; or a ``.safetensors`` file for the weights alone.
        scheme: As for `qbits.quantize_`.
        skip: As for `qbits.quantize_`, patterns only.
        only: As for `qbits.quantize_`.
        format: As for `qbits.save`.
        max_shard_size: As for `qbits.save`.
        device: Where to quantize.
        progress: Show a progress bar on a terminal.

    Raises:
        ValueError: a weight holds NaN or Inf, or nothing is there to quantize; nothing is left at ``dst``.
        CheckpointFormatError: ``src`` is damaged.
    """
    source, target = Path(src), Path(dst)
    config = _read_config(source)
    if target.resolve() == source.resolve():
        raise ArgumentValueError(f"qbits::quantize_checkpoint: dst must differ from src, got {target}")
    with CheckpointReader(source) as reader:
        schemes, floats = _choose_layers(source, config, reader, resolve(scheme), skip, only)
        if not schemes:
            raise ArgumentValueError(
                f"qbits::quantize_checkpoint: src must hold linear weights to quantize, got none in {source}"
            )
        floats_stay = sorted({str(s) for s in schemes.values() if not s.stores_codes})
        if floats_stay:
            raise ArgumentValueError(
                "qbits::quantize_checkpoint: scheme must be one with codes in the file, "
                f"got {', '.join(floats_stay)}, which leaves weights as they are"
            )
        chosen = layouts.choose_format(format, schemes.values())
        plan = [_plan(reader, key, schemes, chosen) for key in reader]
        tensors = _convert(reader, schemes, chosen, device, progress)
        write_checkpoint(target, plan, tensors, layouts.file_metadata(chosen, schemes, None), max_shard_size)
        before = sum(reader.info(key).num_bytes for key in reader)
        dtype = reader.info(f"{next(iter(schemes))}.weight").dtype
    if target.suffix != ".safetensors" and source.is_dir():
        _copy_other_files(source, target)
        if config is not None:
            config["quantization_config"] = quantization_config(chosen, list(schemes.values()), floats, dtype)
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with CheckpointReader(target) as written:
        after = sum(written.info(key).num_bytes for key in written)
    return CheckpointChange(schemes, before, after)


def _read_config(source: Path) -> dict[str, Any] | None:
    """The folder's config.json, or None where there is none."""
    file = source / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentValueError(f"qbits::quantize_checkpoint: {file} must be JSON, got: {error}") from error
    if not isinstance(config, dict) or config.get("quantization_config"):
        raise ArgumentValueError(
            f"qbits::quantize_checkpoint: {file} must be of a float model, got a quantized one"
        )
    return config


def _is_matrix(reader: CheckpointReader, key: str) -> bool:
    if not key.endswith(".weight"):
        return False
    info = reader.info(key)
    return info.dtype in FLOAT_DTYPES and len(info.shape or ()) == 2


def _choose_layers(
    source: Path,
    config: dict[str, Any] | None,
    reader: CheckpointReader,
    pick: Callable[[str], QuantScheme | None],
    skip: Sequence[Pattern] | Literal["auto"],
    only: Sequence[Pattern] | None,
) -> tuple[dict[str, QuantScheme], list[str]]:
    """The layers to quantize with their schemes, and the linear layers to leave, in the file's order."""
    model = _meta_model(source) if config is not None else None
    modules = {} if model is None else dict(model.named_modules())
    base = "" if model is None else f"{getattr(model, 'base_model_prefix', '')}."
    wanted = selector(model or nn.Module(), skip, only)
    schemes, floats = {}, []
    for key in reader:
        name = key.removesuffix(".weight")
        if not _is_matrix(reader, key):
            continue
        module = modules.get(name) or modules.get(base + name) or modules.get(name.removeprefix(base))
        if module is None:
            linear = skip != "auto" or not any(part in name.lower() for part in _OTHER_PARTS)
        else:
            linear = isinstance(module, nn.Linear)
        scheme = pick(name) if linear and wanted(name, module or nn.Module()) else None
        if scheme is not None:
            schemes[name] = scheme
        elif linear:
            floats.append(name)
    return schemes, floats


def _meta_model(source: Path) -> nn.Module | None:
    """The model of a config.json, without memory; None where transformers is missing or does not know it."""
    try:
        transformers = importlib.import_module("transformers")
        config = transformers.AutoConfig.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, config.architectures[0])(config)
    except Exception:
        # Whatever keeps a model from being built is no error here: the names decide instead.
        return None
    return model


def _plan(
    reader: CheckpointReader, key: str, schemes: dict[str, QuantScheme], format: Literal["bnb", "qbits"]
) -> list[TensorInfo]:
    """What a tensor of the source becomes."""
    info = reader.info(key)
    layer, _, leaf = key.rpartition(".")
    if leaf == "weight" and layer in schemes:
        return layouts.plan_record(info.shape or (), info.dtype, schemes[layer], f"{layer}.", format)
    return [info]


def _convert(
    reader: CheckpointReader,
    schemes: dict[str, QuantScheme],
    format: Literal["bnb", "qbits"],
    device: torch.device | str,
    progress: bool,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors to write, in the order of the plan."""
    for key in tqdm(reader, desc="quantize", unit="tensor", disable=None if progress else True):
        layer, _, leaf = key.rpartition(".")
        if leaf != "weight" or layer not in schemes:
            yield key, reader.view(key)
            continue
        scheme = schemes[layer]
        weight = reader.view(key).to(device)
        check_finite(weight, layer)
        record = layer_class(scheme).quantize_weight(weight, scheme)
        del weight
        yield from layouts.record_tensors(record, f"{layer}.", format).items()
        del record  # else it waits beside the next layer's


def _copy_other_files(source: Path, target: Path) -> None:
    """Copy tokenizer, configuration and the like; weights of any format stay behind."""
    files = [file for file in source.rglob("*") if file.is_file()]
    for file in files:
        relative = file.relative_to(source)
        weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        hidden = any(part.startswith(".") for part in relative.parts)
        if not weights and not hidden and target.resolve() not in file.resolve().parents:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / relative)
