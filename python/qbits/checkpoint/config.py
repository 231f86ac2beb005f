"""The ``quantization_config`` of a ``config.json``: it tells loaders that a folder holds quantized layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch

from qbits.schemes import QuantScheme

__all__ = ["quantization_config"]


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
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": scheme.codebook,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": sorted(skipped),  # None would mean a default list
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }
