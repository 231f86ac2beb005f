"""What quantization did to a model: its bytes by layer and scheme, and each layer's error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qbits.errors import ArgumentTypeError, ArgumentValueError
from qbits.nn import QuantizedLinear, SwitchBackLinear, is_converted

__all__ = [
    "ErrorReport",
    "LayerChange",
    "LayerError",
    "LayerMemory",
    "MemoryReport",
    "QuantReport",
    "compare",
    "markdown_table",
    "measure_error",
    "memory_report",
    "tensor_bytes",
]

METRICS = ("sqnr", "cos", "max_abs")
_TITLES: Mapping[str, str] = {"sqnr": "SQNR dB", "cos": "cosine", "max_abs": "max abs error"}

# Elements that are compared at a time: in float64 three copies of them take 24 MiB, whatever the layer's
# size.
_CHUNK = 1 << 20


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first is flush left, the others flush right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "| "
        + " | ".join(
            c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0] + " |", rule, *(line + " |" for line in lines[1:])])


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of the tensors that a module holds itself; one that is shared counts where it comes first."""

    name: str
    scheme: str
    num_bytes: int


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a model's parameters and buffers."""

    total: int
    by_scheme: dict[str, int]  # "nf4", ... for packed weights with their statistics, else a dtype's name
    by_layer: dict[str, LayerMemory]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table by scheme, with the total last."""
        rows = [(scheme, f"{n:,}", f"{n / max(self.total, 1):.1%}") for scheme, n in self.by_scheme.items()]
        return markdown_table(("scheme", "bytes", "share"), [*rows, ("total", f"{self.total:,}", "")])


def memory_report(model: nn.Module) -> MemoryReport:
    """Count the bytes of a model's parameters and buffers, each shared tensor once.

    Example:
        >>> memory_report(nn.Linear(64, 4, dtype=torch.float16)).by_scheme
        {'float16': 520}
    """
    seen: set[int] = set()
    by_scheme: dict[str, int] = {}
    by_layer: dict[str, LayerMemory] = {}
    for name, module in model.named_modules():
        packed = isinstance(module, QuantizedLinear) and module.is_quantized
        num_bytes = 0
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            label = (
                str(module.scheme) if packed and key != "bias" else str(tensor.dtype).removeprefix("torch.")
            )
            by_scheme[label] = by_scheme.get(label, 0) + tensor_bytes(tensor)
            num_bytes += tensor_bytes(tensor)
        if num_bytes:
            scheme = str(module.scheme) if is_converted(module) else "float"
            by_layer[name] = LayerMemory(name, scheme, num_bytes)
    return MemoryReport(sum(by_scheme.values()), by_scheme, by_layer)


@dataclass(frozen=True)
class LayerChange:
    """What `quantize_` did to one layer."""

    name: str
    scheme: str
    bytes_before: int
    bytes_after: int
    sqnr: float  # dB
    max_abs: float


@dataclass(frozen=True)
class QuantReport:
    """What `quantize_` did, layer by layer, in the model's order."""

    layers: tuple[LayerChange, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all the quantized layers' weights before."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of all the quantized layers' weights and statistics after."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def to_markdown(self) -> str:
        """A table with a row per layer."""
        rows = (
            (
                c.name,
                c.scheme,
                f"{c.bytes_before:,}",
                f"{c.bytes_after:,}",
                f"{c.sqnr:.2f}",
                f"{c.max_abs:.3g}",
            )
            for c in self.layers
        )
        return markdown_table(("layer", "scheme", "bytes before", "after", "SQNR dB", "max abs error"), rows)


@dataclass(frozen=True)
class LayerError:
    """A layer's metrics, by their names in ``metrics``."""

    name: str
    scheme: str
    values: dict[str, float]


@dataclass(frozen=True)
class ErrorReport:
    """Each quantized layer's error against the original: of its weight, or of its output with inputs."""

    metrics: tuple[str, ...]
    layers: tuple[LayerError, ...]

    def worst(self, n: int = 1) -> tuple[LayerError, ...]:
        """The ``n`` layers with the largest error by the first metric."""
        metric = self.metrics[0]
        upwards = 1 if metric == "max_abs" else -1
        return tuple(sorted(self.layers, key=lambda layer: -upwards * layer.values[metric])[:n])

    def mean(self, metric: str) -> float:
        """The metric's mean over the layers."""
        return sum(layer.values[metric] for layer in self.layers) / max(len(self.layers), 1)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        return {"metrics": list(self.metrics), "layers": [asdict(layer) for layer in self.layers]}

    def to_markdown(self) -> str:
        """A table with a row per layer."""
        rows = ((e.name, e.scheme, *(f"{e.values[m]:.5g}" for m in self.metrics)) for e in self.layers)
        return markdown_table(("layer", "scheme", *(_TITLES[m] for m in self.metrics)), rows)

    def plot(self, file: str | os.PathLike[str], *, metric: str = "sqnr") -> None:
        """Draw one dot per layer into an image file; the suffix decides the format.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the report does not hold this metric.
        """
        if metric not in self.metrics:
            raise ArgumentValueError(
                f"qbits::ErrorReport.plot: metric must be one of {list(self.metrics)}, got {metric!r}"
            )
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("qbits::ErrorReport.plot: needs matplotlib; install qbits[demo]") from error
        figure = Figure(figsize=(8, 0.9 + 0.2 * len(self.layers)), layout="constrained")
        axes = figure.add_subplot()
        values = [layer.values[metric] for layer in self.layers]
        axes.scatter(values, range(len(values)), s=24, color="#4c72b0", zorder=2)
        axes.set_yticks(range(len(values)), [layer.name for layer in self.layers], fontsize=7)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlabel(_TITLES[metric])
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.savefig(file, dpi=150)


def measure_error(reference: Tensor, approximation: Tensor) -> dict[str, float]:
    """Error of an approximation, in float64: ``sqnr``, ``cos`` and ``max_abs``.

    ``sqnr = 10 log10(sum(r^2) / sum((r - a)^2))``, infinite where they are equal; ``cos`` is the cosine of
    the flattened tensors, ``max_abs = max|r - a|``.

    Shapes: both the same, any.
    Units: sqnr in dB.
    """
    if reference.shape != approximation.shape:
        raise ArgumentValueError(
            f"qbits::measure_error: approximation must have shape {tuple(reference.shape)}, "
            f"got {tuple(approximation.shape)}"
        )
    signal = noise = size = dot = max_abs = 0.0
    original, flat = reference.detach().reshape(-1), approximation.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        r = original[start : start + _CHUNK].to(flat.device).double()
        a = flat[start : start + _CHUNK].double()
        signal += r.square().sum().item()
        size += a.square().sum().item()
        dot += (r @ a).item()
        difference = a.sub_(r)
        noise += difference.square().sum().item()
        max_abs = max(max_abs, difference.abs().max().item())
    return {
        "sqnr": _decibel(signal, noise),
        "cos": dot / math.sqrt(signal * size) if signal * size > 0 else float(signal == size),
        "max_abs": max_abs,
    }


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def compare(
    ref: nn.Module,
    quantized: nn.Module,
    inputs: Any = None,
    *,
    metrics: Sequence[str] = METRICS,
) -> ErrorReport:
    """Error of each quantized layer against the layer of the same name in the original model.

    Without ``inputs`` the weights are compared. With them both models run, and the layers' outputs are
    compared, so that the errors of the layers before count too. ``inputs`` is a tensor, a sequence of
    positional arguments, or a mapping of keyword arguments. Neither model is changed.

    Units: sqnr in dB.

    Raises:
        ValueError: an unknown metric, or the models have no quantized layer in common.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ArgumentValueError(
            f"qbits::compare: metrics must be some of {list(METRICS)}, got {list(metrics)}"
        )
    originals = dict(ref.named_modules())
    pairs = {
        name: (originals[name], layer)
        for name, layer in quantized.named_modules()
        if isinstance(layer, QuantizedLinear | SwitchBackLinear)
        and is_converted(layer)
        and isinstance(originals.get(name), nn.Linear)
    }
    if not pairs:
        raise ArgumentValueError(
            "qbits::compare: quantized must share quantized layers with ref by name, got none"
        )
    if inputs is None:
        errors = {name: measure_error(_weight(a), _weight(b)) for name, (a, b) in pairs.items()}
    else:
        errors = _output_errors(ref, quantized, pairs, inputs)
    rows = (
        LayerError(name, str(pairs[name][1].scheme), {metric: values[metric] for metric in metrics})
        for name, values in errors.items()
    )
    return ErrorReport(tuple(metrics), tuple(rows))


def _weight(layer: nn.Module) -> Tensor:
    if isinstance(layer, QuantizedLinear | SwitchBackLinear) and is_converted(layer):
        return layer.dequantize(torch.float32)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _output_errors(
    ref: nn.Module, quantized: nn.Module, pairs: Mapping[str, tuple[nn.Module, nn.Module]], inputs: Any
) -> dict[str, dict[str, float]]:
    """Run both models; the original's outputs wait on the CPU for the quantized layers' calls."""
    waiting: dict[str, list[Tensor]] = {name: [] for name in pairs}
    calls: dict[str, list[dict[str, float]]] = {name: [] for name in pairs}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        waiting[name].append(output.detach().cpu())

    def check(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if waiting[name]:
            calls[name].append(measure_error(waiting[name].pop(0), output.detach().cpu()))

    _run_with_hooks(ref, {name: (pair[0], keep) for name, pair in pairs.items()}, inputs)
    _run_with_hooks(quantized, {name: (pair[1], check) for name, pair in pairs.items()}, inputs)
    return {
        name: {
            "sqnr": min(call["sqnr"] for call in found),
            "cos": min(call["cos"] for call in found),
            "max_abs": max(call["max_abs"] for call in found),
        }
        for name, found in calls.items()
        if found
    }


def _run_with_hooks(
    model: nn.Module, hooks: Mapping[str, tuple[nn.Module, Callable[..., None]]], inputs: Any
) -> None:
    handles = [module.register_forward_hook(partial(hook, name)) for name, (module, hook) in hooks.items()]
    try:
        with torch.no_grad():
            if isinstance(inputs, Tensor):
                model(inputs)
            elif isinstance(inputs, Mapping):
                model(**inputs)
            elif isinstance(inputs, Sequence):
                model(*inputs)
            else:
                raise ArgumentTypeError(
                    "qbits::compare: inputs must be a tensor, a sequence or a mapping, "
                    f"got {type(inputs).__name__}"
                )
    finally:
        for handle in handles:
            handle.remove()
