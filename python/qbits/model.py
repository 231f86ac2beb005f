"""Whole models: replace linear layers by quantized ones in place, layer by layer, and back."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from tqdm import tqdm

from qbits.errors import ArgumentTypeError, ArgumentValueError, QbitsWarning
from qbits.nn import (
    LAYER_CLASSES,
    Linear4bit,
    QuantizedLinear,
    SwitchBackLinear,
    is_converted,
    layer_class,
)
from qbits.report import LayerChange, QuantReport, measure_error, tensor_bytes
from qbits.schemes import Pattern, QuantScheme, SchemeRules, SwitchBack, fits_any, resolve

__all__ = [
    "FLOAT_DTYPES",
    "LinearGroup",
    "Skip",
    "check_finite",
    "dequantize_",
    "linear_groups",
    "quantize_",
    "replace_group_",
    "selector",
]

Skip: TypeAlias = Sequence[Pattern] | Callable[[str, nn.Module], bool] | Literal["auto"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Last part of the names that output heads have where the model does not tell (get_output_embeddings).
_HEAD_NAMES = frozenset({"lm_head", "embed_out", "output_projection", "classifier", "score", "qa_outputs"})


@dataclass
class LinearGroup:
    """Linear layers that share one weight Parameter, in the model's order, each with all of its names."""

    layers: list[tuple[nn.Linear, list[str]]]

    @property
    def name(self) -> str:
        """The first name of the first layer."""
        return self.layers[0][1][0]

    @property
    def first(self) -> nn.Linear:
        """The first layer."""
        return self.layers[0][0]


def linear_groups(model: nn.Module) -> list[LinearGroup]:
    """Every linear layer of a model, float or quantized; layers that share a weight are in one group."""
    names: dict[int, list[str]] = {}
    groups: dict[int, LinearGroup] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear):
            continue
        known = names.setdefault(id(module), [])
        known.append(name)
        if len(known) == 1:
            # A weight that is computed, as by weight_norm, is no Parameter: such a layer stands alone.
            shared_by = module._parameters.get("weight")
            key = id(module if shared_by is None else shared_by)
            groups.setdefault(key, LinearGroup([])).layers.append((module, known))
    return list(groups.values())


def replace_group_(model: nn.Module, group: LinearGroup, layer: nn.Linear) -> None:
    """Put ``layer`` in the place of a group; its further members get layers that share its weight.

    Bias objects, hooks, training flags and attributes that users added stay.
    """
    for old, names in group.layers:
        new = layer if old is group.first else _share_weight(layer)
        _carry_over(old, new)
        for name in names:
            model.set_submodule(name, new)
            parent = model.get_submodule(name.rpartition(".")[0])
            if isinstance(parent, nn.TransformerEncoderLayer):
                # Its fused inference path reads linear1.weight and linear2.weight itself, as floats.
                parent.activation_relu_or_gelu = 0


def _share_weight(layer: nn.Linear) -> nn.Linear:
    twin = copy.copy(layer)
    for key, value in vars(layer).items():
        if isinstance(value, dict | set):
            twin.__dict__[key] = copy.copy(value)
    return twin


def _carry_over(old: nn.Linear, new: nn.Linear) -> None:
    bias, converted = old._parameters.get("bias"), new._parameters.get("bias")
    if bias is not None and converted is not None and converted is not bias:
        if converted.is_meta and not bias.is_meta:
            bias = converted  # a Parameter with data cannot become one without
        else:
            bias.data = bias.data.to(converted.device, converted.dtype)
    new._parameters["bias"] = bias
    new.training = old.training
    own = {key for cls in {*LAYER_CLASSES, SwitchBackLinear, type(old)} for key in _own_attributes(cls)}
    for key, value in vars(old).items():
        if "hook" not in key:
            if key not in own and not hasattr(new, key):
                setattr(new, key, value)
        elif isinstance(value, dict) and new.__dict__[key]:
            new.__dict__[key].update(value)
        else:
            # The same dict object: a handle that the user holds still removes its hook.
            new.__dict__[key] = value


def _own_attributes(cls: type[nn.Module]) -> Iterable[str]:
    """Names of what a quantized layer's class sets itself."""
    is_ours = issubclass(cls, QuantizedLinear | SwitchBackLinear)
    return vars(cls(1, 1, device="meta")) if is_ours else ()


def selector(
    model: nn.Module, skip: Skip, only: Sequence[Pattern] | None
) -> Callable[[str, nn.Module], bool]:
    """Whether a layer is to be quantized, by name and module; see `quantize_` for the rules."""
    for argument, value in (("skip", skip), ("only", only)):
        if isinstance(value, str) and value != "auto":
            raise ArgumentTypeError(
                f"qbits::quantize_: {argument} must be a list of patterns, got the text {value!r}"
            )
    skips: Callable[[str, nn.Module], bool]
    if callable(skip):
        skips = skip
    elif skip == "auto":
        head = _output_head(model)
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

        def skips(name: str, module: nn.Module) -> bool:
            is_head = module is head or name.rpartition(".")[2] in _HEAD_NAMES
            return is_head or id(module._parameters.get("weight")) in embeddings
    else:
        patterns = list(skip)

        def skips(name: str, module: nn.Module) -> bool:
            return fits_any(patterns, name)

    return lambda name, module: not skips(name, module) and (only is None or fits_any(only, name))


def _output_head(model: nn.Module) -> nn.Module | None:
    """The layer that maps to logits, where the model can tell it as transformers' models do."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _obstacle(group: LinearGroup, owners: dict[int, int]) -> str | None:
    """Why a group cannot be quantized, or None."""
    for layer, _ in group.layers:
        if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
            return f"{type(layer).__name__} has a forward of its own"
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention reads its weight directly"
        if is_parametrized(layer) or "weight" not in layer._parameters:
            return "its weight is computed from other parameters"
    weight = group.first.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialized yet"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if owners[id(weight)] > len(group.layers):
        return "its weight is shared with a module that is no linear layer"
    return None


def _find_targets(
    model: nn.Module, scheme: SchemeRules, skip: Skip, only: Sequence[Pattern] | None
) -> tuple[list[tuple[LinearGroup, QuantScheme]], dict[str, str]]:
    """The groups to quantize with their schemes, and the layers that cannot be, each with the reason."""
    pick, wanted = resolve(scheme), selector(model, skip, only)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    targets, refused = [], {}
    for group in linear_groups(model):
        chosen = pick(group.name)
        names = [(name, layer) for layer, known in group.layers for name in known]
        if isinstance(group.first, QuantizedLinear | SwitchBackLinear) or chosen is None:
            continue
        if not all(wanted(name, layer) for name, layer in names):
            continue
        obstacle = _obstacle(group, owners)
        if obstacle is None:
            targets.append((group, chosen))
        else:
            refused[group.name] = obstacle
    return targets, refused


def check_finite(weight: torch.Tensor, name: str) -> None:
    """Raise ValueError naming the layer where its weight holds NaN or Inf."""
    if weight.is_meta or weight.numel() == 0:
        return
    # One pass without a temporary of the weight's size; NaN propagates.
    low, high = torch.aminmax(weight.detach())
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        raise ArgumentValueError(f"qbits::quantize_: weight of {name} must be finite, got NaN or Inf")


def _check_all(targets: Sequence[tuple[LinearGroup, QuantScheme]]) -> None:
    for group, _ in targets:
        check_finite(group.first.weight, group.name)


def quantize_(
    model: nn.Module,
    scheme: SchemeRules = "nf4",
    *,
    skip: Skip = "auto",
    only: Sequence[Pattern] | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    report: bool = False,
    strict: bool = False,
) -> nn.Module | QuantReport:
    """Replace the linear layers of a model by quantized ones, in place, one after another.

    Every weight is checked before the first one is changed. Then at most one layer exists twice: the extra
    memory is that of the largest layer. Shared weights stay shared; bias objects, hooks and training flags
    are kept. Layers that are quantized already are left alone.

    Args:
        model: Any module that holds linear layers.
        scheme: A preset ("nf4", "nf4-dq", "llm-int8", ...), a `QuantScheme`, or a mapping from globs or
            regular expressions (``"re:..."``) to either, or to None; its first pattern that fits decides.
        skip: Patterns, or a function of name and module, for layers to leave alone. "auto" leaves the output
            head and layers that share their weight with an input embedding.
        only: Patterns for the only layers to quantize.
        compute_dtype: Dtype of the products of 4-bit layers; None takes the input's.
        device: Where each layer is moved and quantized; the rest of the model follows. None leaves all where
            it is.
        progress: Show a progress bar on a terminal.
        report: Return a `QuantReport` with each layer's error in place of the model; needs one more float
            copy of a layer at a time.
        strict: Raise for a layer that is wanted but cannot be quantized, in place of one warning that lists
            them.

    Raises:
        ValueError: a weight holds NaN or Inf, an unknown scheme, or (strict) a layer that cannot be
            quantized.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> quantize_(model, {"0": "nf4"}, progress=False)[0].scheme.name
        'nf4'
    """
    if isinstance(model, nn.Linear):
        raise ArgumentValueError(
            "qbits::quantize_: model must hold its linear layers as submodules, "
            f"got a {type(model).__name__} itself"
        )
    targets, refused = _find_targets(model, scheme, skip, only)
    if refused:
        listed = "; ".join(f"{name} ({reason})" for name, reason in refused.items())
        if strict:
            raise ArgumentValueError(f"qbits::quantize_: layers must be convertible, got {listed}")
        warnings.warn(f"qbits::quantize_: left as they are: {listed}", QbitsWarning, stacklevel=2)
    _check_all(targets)
    changes = []
    with tqdm(total=len(targets), desc="quantize", unit="layer", disable=None if progress else True) as bar:
        while targets:
            group, chosen = targets.pop(0)  # popped: no list may keep the float weight alive
            layer = _converted(group.first, chosen, compute_dtype, device)
            if report:
                changes.append(_describe_change(group, layer, chosen))
            replace_group_(model, group, layer)
            bar.update()
    _leave_nested_tensors(model)
    if device is not None:
        model.to(device)
    return QuantReport(tuple(changes)) if report else model


def _converted(
    linear: nn.Linear,
    scheme: QuantScheme,
    compute_dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> QuantizedLinear | SwitchBackLinear:
    if isinstance(scheme, SwitchBack):
        return SwitchBackLinear.from_linear(linear, scheme, device=device)
    kind = layer_class(scheme)
    options = {"compute_dtype": compute_dtype} if kind is Linear4bit else {}
    return kind.from_linear(linear, scheme, device=device, **options)


def _describe_change(
    group: LinearGroup, layer: QuantizedLinear | SwitchBackLinear, scheme: QuantScheme
) -> LayerChange:
    weight = group.first.weight
    error = measure_error(weight, layer.dequantize(torch.float32))
    packed_bytes = sum(
        tensor_bytes(p) for key, p in layer._parameters.items() if p is not None and key != "bias"
    )
    return LayerChange(
        group.name, str(scheme), tensor_bytes(weight), packed_bytes, error["sqnr"], error["max_abs"]
    )


def _leave_nested_tensors(model: nn.Module) -> None:
    """Keep nn.TransformerEncoder from nested tensors, which only the fused path of its layers takes."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(is_converted(m) for m in module.modules()):
            module.use_nested_tensor = False


def dequantize_(
    model: nn.Module, dtype: torch.dtype | None = None, *, only: Sequence[Pattern] | None = None
) -> nn.Module:
    """Replace quantized layers by plain nn.Linear with the dequantized weights, in place; returns the model.

    Args:
        model: A model with quantized layers.
        dtype: Dtype of the weights; None takes what they had before quantization.
        only: Patterns for the only layers to convert.
    """
    groups = [
        group
        for group in linear_groups(model)
        if is_converted(group.first) and (only is None or fits_any(only, group.name))
    ]
    while groups:
        group = groups.pop(0)
        assert isinstance(group.first, QuantizedLinear | SwitchBackLinear)
        replace_group_(model, group, group.first.to_linear(dtype))
    return model
