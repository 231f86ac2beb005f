"""Checkpoints of quantized models: safetensors in bitsandbytes' or the native format, streamed both ways."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qbits.checkpoint import layouts
from qbits.checkpoint.config import quantization_config
from qbits.checkpoint.convert import quantize_checkpoint
from qbits.checkpoint.layouts import Format
from qbits.checkpoint.loader import Loader
from qbits.checkpoint.reader import CheckpointReader
from qbits.checkpoint.writer import write_checkpoint
from qbits.model import linear_groups
from qbits.nn import QuantizedLinear

__all__ = ["CheckpointReader", "Format", "load", "quantize_checkpoint", "save"]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: Format = "auto",
    max_shard_size: str | int = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a model with its quantized layers; the same model always gives the same bytes.

    Tensors are written one at a time. A model with a ``config`` as transformers' models have gets a
    ``config.json`` in the folder, which names the quantization.

    Args:
        model: Any module; a tensor that several layers share is stored once.
        path: A ``.safetensors`` file, or a folder for shards of at most ``max_shard_size``.
        format: "bnb" is bitsandbytes' layout, "qbits" the modules' own; "auto" takes "bnb" where it can hold
            the model.
        max_shard_size: Bytes, or text such as "5GB"; a single layer may exceed it.
        metadata: Text for the files' headers.

    Raises:
        ValueError: the format cannot hold a layer, or a tensor has no data.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and module.is_quantized
    }
    schemes = {name: layer.scheme for name, layer in layers.items()}
    chosen = layouts.choose_format(format, schemes.values())
    header = layouts.file_metadata(chosen, schemes, metadata)
    infos = [layouts.tensor_infos(group) for group in layouts.model_tensors(model, chosen)]
    tensors = (item for group in layouts.model_tensors(model, chosen) for item in group.items())
    write_checkpoint(path, infos, tensors, header, max_shard_size)
    to_json = getattr(getattr(model, "config", None), "to_json_string", None)
    if callable(to_json) and Path(path).suffix != ".safetensors":
        config = json.loads(to_json())
        config.pop("quantization_config", None)
        if layers:
            floats = (g.name for g in linear_groups(model) if not isinstance(g.first, QuantizedLinear))
            dtype = next(iter(layers.values())).weight_dtype
            config["quantization_config"] = quantization_config(
                chosen, list(schemes.values()), list(floats), dtype
            )
        (Path(path) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    strict: bool = True,
) -> nn.Module | dict[str, Tensor]:
    """Load a checkpoint into a model, or as a dictionary of its tensors where no model is given.

    Layers that are quantized in the file replace the model's linear layers; the others are copied. Everything
    is checked before the model is changed, and read one layer at a time, so that a checkpoint is never held
    beside the model. A model on the meta device gets its memory here.

    Args:
        path: A ``.safetensors`` file, or a folder with one or with shards and their index.
        model: Module with the names of the file.
        device: Where everything goes; None is where the model is, or the CPU.
        strict: Raise where the file's names and the model's differ, in place of loading what fits.

    Raises:
        CheckpointFormatError: naming the key that is damaged, contradicts another one, or does not fit the
            model.
        FileNotFoundError: nothing there to read.
    """
    with CheckpointReader(path) as reader:
        quantized = layouts.weight_groups(reader)
        if model is None:
            for name, keys in quantized.items():
                layouts.read_record(reader, name, keys)
            return {key: reader.read(key, device or "cpu") for key in reader}
        Loader(reader, quantized, model, device).run(strict)
    return model
