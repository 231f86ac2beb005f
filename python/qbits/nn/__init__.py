"""Modules with quantized weights; each holds parameters and calls `qbits.functional`."""

from torch import nn

from qbits.nn.cache import cached_weights
from qbits.nn.crossover import crossover_table
from qbits.nn.linear_4bit import Linear4bit, LinearFP4, LinearNF4
from qbits.nn.linear_8bit import Linear8bit
from qbits.nn.outlier import OutlierPool
from qbits.nn.quantized_linear import QuantizedLinear
from qbits.nn.standard_linear import StandardLinear
from qbits.nn.switchback import SwitchBackLinear
from qbits.nn.switchback_forms import (
    SwitchBackLinearGlobal,
    SwitchBackLinearGlobalMemEfficient,
    SwitchBackLinearVectorwise,
    SwitchBackLinearVectorwiseMemEfficient,
    prepare_for_eval,
    unprepare,
)
from qbits.schemes import QuantScheme

__all__ = [
    "Linear4bit",
    "Linear8bit",
    "LinearFP4",
    "LinearNF4",
    "OutlierPool",
    "QuantizedLinear",
    "StandardLinear",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
    "SwitchBackLinearVectorwiseMemEfficient",
    "cached_weights",
    "crossover_table",
    "prepare_for_eval",
    "unprepare",
]

LAYER_CLASSES: tuple[type[QuantizedLinear], ...] = (Linear4bit, Linear8bit)
"""One for each class of schemes."""


def is_converted(module: nn.Module) -> bool:
    """Whether a layer computes by a scheme: its weight is quantized, or quantized in every call."""
    if isinstance(module, SwitchBackLinear):
        return True
    return isinstance(module, QuantizedLinear) and module.is_quantized


def layer_class(scheme: QuantScheme) -> type[QuantizedLinear]:
    """Return the class of layers that have such a scheme.

    >>> from qbits.schemes import LLMInt8
    >>> layer_class(LLMInt8()).__name__
    'Linear8bit'
    """
    return next(cls for cls in LAYER_CLASSES if isinstance(scheme, cls.scheme_class))
