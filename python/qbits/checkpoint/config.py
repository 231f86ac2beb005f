"""The ``quantization_config`` of a ``config.json``: it tells loaders that a folder holds quantized layers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from qbits.checkpoint.reader import CheckpointReader
from qbits.errors import CheckpointFormatError, QbitsError
from qbits.schemes import Int8, LLMInt8, QuantScheme, Scheme4bit

__all__ = ["int8_schemes", "quantization_config"]


def quantization_config(
    format: Literal["bnb", "qbits"],
    schemes: Sequence[QuantScheme],
    skipped: Sequence[str],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The record that goes into ``config.json``.

    bitsandbytes' form has room for one type: where layers differ it names the most frequent one, and loaders
    take each layer's own from its quantization state.

    Args:
        format: Format of the weight files.
        schemes: Schemes of the quantized layers; not empty.
        skipped: Names of the linear layers that stay as they are.
        dtype: Dtype of the weights before quantization.
    """
    scheme = Counter(schemes).most_common(1)[0][0]
    if format == "qbits":
        return {"quant_method": "qbits", "scheme": scheme.to_dict(), "skip_modules": sorted(skipped)}
    in_4bit = isinstance(scheme, Scheme4bit)
    thresholds = [s.threshold for s in schemes if isinstance(s, Int8)]
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": in_4bit,
        "_load_in_8bit": not in_4bit,
        "load_in_4bit": in_4bit,
        "load_in_8bit": not in_4bit,
        "bnb_4bit_quant_type": scheme.codebook if isinstance(scheme, Scheme4bit) else "fp4",
        "bnb_4bit_use_double_quant": isinstance(scheme, Scheme4bit) and scheme.double_quant,
        "bnb_4bit_compute_dtype": str(dtype if in_4bit else torch.float32).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": float(Counter(thresholds or [6.0]).most_common(1)[0][0]),
        "llm_int8_skip_modules": sorted(skipped),  # None would mean a default list
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def int8_schemes(reader: CheckpointReader) -> Callable[[str], Int8]:
    """A function from the name of an int8 layer to its scheme; the tensors do not tell the threshold.

    The files' metadata decide, then the ``config.json`` beside them; without either nothing is an outlier.

    Raises:
        CheckpointFormatError: one of them is no record of schemes.
    """
    schemes: dict[str, QuantScheme] = {}
    for metadata in reader.metadata:
        if "qbits" in metadata:
            try:
                records = json.loads(metadata["qbits"])["schemes"].items()
                schemes.update((layer, QuantScheme.from_dict(record)) for layer, record in records)
            except (ValueError, KeyError, TypeError, AttributeError, QbitsError) as error:
                raise CheckpointFormatError(
                    f"qbits::load: metadata of {reader.path} must hold each layer's scheme, got {error!r}"
                ) from error
    usual = _configured(reader)

    def pick(layer: str) -> Int8:
        scheme = schemes.get(layer)
        return scheme if isinstance(scheme, Int8) else usual

    return pick


def _configured(reader: CheckpointReader) -> Int8:
    """What the ``quantization_config`` beside the files says of int8 layers."""
    file = reader.path / "config.json"
    if not file.is_file():
        return Int8()
    try:
        config = json.loads(file.read_text(encoding="utf-8")).get("quantization_config") or {}
        threshold = config.get("llm_int8_threshold", 0.0) if config.get("load_in_8bit") else 0.0
        return LLMInt8(threshold) if threshold else Int8()
    except (ValueError, TypeError, AttributeError, QbitsError) as error:
        raise CheckpointFormatError(
            f"qbits::load: {file} must be a model's configuration, got {error!r}"
        ) from error
