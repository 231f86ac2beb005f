"""Quantized layers for the tests of modules, and every byte that a module would save."""

from __future__ import annotations

from typing import Any

import torch
from qbits.nn import Linear4bit, QuantizedLinear, layer_class
from qbits.schemes import QuantScheme, as_scheme
from torch import nn

SHAPES = [(8, 64), (5, 130), (3, 7)]  # blocks within rows; straddling rows; N*K odd and below a block


def quantized(
    scheme: str | QuantScheme = "nf4", shape: tuple[int, int] = (8, 64), **options: Any
) -> QuantizedLinear:
    N, K = shape
    return layer_class(as_scheme(scheme)).from_linear(nn.Linear(K, N, **options), scheme)


def bytes_of_state(module: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """Every entry of a state_dict with dtype and bytes."""
    return {
        key: (t.dtype, bytes(t.detach().cpu().reshape(-1).view(torch.uint8).tolist()))
        for key, t in module.state_dict().items()
    }


def native_of(layer: nn.Linear) -> Linear4bit:
    """The same weight in `qbits.nn`'s own layer."""
    native = Linear4bit(layer.in_features, layer.out_features, double_quant=layer.quant_state.nested)
    native.load_state_dict(layer.state_dict())
    return native
