"""qbits: quantization of PyTorch models to 8 and 4 bits, exact on CPU and GPU.

``qbits.quantize_(model, "nf4")`` quantizes a model in place, ``qbits.nn`` has the layers,
``qbits.functional`` the operations on any DLPack array, ``qbits.ops`` the bare operators.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qbits import errors, ops
from qbits._core import Buffer, __version__
from qbits.errors import QbitsError, QbitsWarning

if TYPE_CHECKING:
    from qbits import checkpoint, compat, functional, model, nn, report, schemes
    from qbits.checkpoint import load, quantize_checkpoint, save
    from qbits.dependent import dependent_launch
    from qbits.model import dequantize_, quantize_
    from qbits.nn import cached_weights
    from qbits.report import compare, memory_report
    from qbits.schemes import available_schemes

__all__ = [
    "Buffer",
    "QbitsError",
    "QbitsWarning",
    "__version__",
    "available_schemes",
    "cached_weights",
    "checkpoint",
    "compare",
    "compat",
    "dependent_launch",
    "dequantize_",
    "errors",
    "functional",
    "is_available",
    "load",
    "memory_report",
    "model",
    "nn",
    "ops",
    "quantize_",
    "quantize_checkpoint",
    "report",
    "save",
    "schemes",
]

_MODULES = {"checkpoint", "compat", "functional", "model", "nn", "report", "schemes"}
_ATTRIBUTES = {
    "available_schemes": "schemes",
    "cached_weights": "nn",
    "compare": "report",
    "dependent_launch": "dependent",
    "dequantize_": "model",
    "load": "checkpoint",
    "memory_report": "report",
    "quantize_checkpoint": "checkpoint",
    "quantize_": "model",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Submodules and the functions at the top level are imported when they are first used."""
    if name in _MODULES:
        return importlib.import_module(f"qbits.{name}")
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(f"qbits.{_ATTRIBUTES[name]}"), name)
    raise AttributeError(f"module 'qbits' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def is_available(device: str = "cuda") -> bool:
    """Whether the ops run on such a device: always on "cpu", on "cuda" with a GPU that a kernel fits."""
    if device == "cpu":
        return True
    from qbits import _core

    return any(found["usable"] for found in _core.info()["devices"])
