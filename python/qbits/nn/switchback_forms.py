"""The four fixed forms of `SwitchBackLinear`, and what is done to all such layers of a model."""

from __future__ import annotations

from torch import nn

from qbits.nn.switchback import SwitchBackLinear

__all__ = [
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
    "SwitchBackLinearVectorwiseMemEfficient",
    "prepare_for_eval",
    "unprepare",
]


class SwitchBackLinearGlobal(SwitchBackLinear):
    """`SwitchBackLinear` with one scale for the weight.

    >>> SwitchBackLinearGlobal(4, 2).vectorwise
    False
    """

    _fixed_vectorwise = False
    _fixed_mem_efficient = False


class SwitchBackLinearGlobalMemEfficient(SwitchBackLinear):
    """`SwitchBackLinear` with one scale for the weight, which keeps the input as int8 codes.

    >>> SwitchBackLinearGlobalMemEfficient(4, 2).mem_efficient
    True
    """

    _fixed_vectorwise = False
    _fixed_mem_efficient = True


class SwitchBackLinearVectorwise(SwitchBackLinear):
    """`SwitchBackLinear` with one scale per row of the weight, and per column backward.

    >>> SwitchBackLinearVectorwise(4, 2).vectorwise
    True
    """

    _fixed_vectorwise = True
    _fixed_mem_efficient = False


class SwitchBackLinearVectorwiseMemEfficient(SwitchBackLinear):
    """`SwitchBackLinearVectorwise` that keeps the input as int8 codes.

    >>> SwitchBackLinearVectorwiseMemEfficient(4, 2).mem_efficient
    True
    """

    _fixed_vectorwise = True
    _fixed_mem_efficient = True


def prepare_for_eval(model: nn.Module, *, keep_weight: bool = True) -> nn.Module:
    """Call `SwitchBackLinear.prepare_for_eval` of every such layer; returns the model.

    >>> prepare_for_eval(nn.Sequential(SwitchBackLinear(4, 2)))[0].is_prepared
    True
    """
    for layer in model.modules():
        if isinstance(layer, SwitchBackLinear):
            layer.prepare_for_eval(keep_weight=keep_weight)
    return model


def unprepare(model: nn.Module) -> nn.Module:
    """Call `SwitchBackLinear.unprepare` of every such layer; returns the model.

    >>> unprepare(prepare_for_eval(nn.Sequential(SwitchBackLinear(4, 2))))[0].is_prepared
    False
    """
    for layer in model.modules():
        if isinstance(layer, SwitchBackLinear):
            layer.unprepare()
    return model
