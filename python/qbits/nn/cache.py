"""Quantized weights that several calls share, on request and for a block: `cached_weights`."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from qbits.errors import ArgumentTypeError

__all__ = ["CachedWeightModule", "WeightCache", "cached_weights"]

_Forms = TypeVar("_Forms")


class WeightCache:
    """The quantized forms of one layer's weight, each with the state of the weight that it was made from."""

    def __init__(self) -> None:
        self._entries: dict[Any, tuple[torch.Tensor, Any, Any]] | None = {}

    def get(self, weight: torch.Tensor, form: str, quantize: Callable[[], _Forms]) -> _Forms:
        """Return ``quantize()``, or what it gave for the same state of ``weight`` before, in the same stream.

        Never kept: what an inference tensor (it counts no writes) or a capture into a CUDA graph gave, whose
        replays would find the memory in other use.
        """
        entries, stream = self._entries, None
        if entries is None or weight.is_inference():
            return quantize()
        if weight.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return quantize()
            stream = torch.cuda.current_stream(weight.device).cuda_stream
        state = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        known = entries.get((form, stream))
        if known is not None and known[0] is weight and known[1] == state:
            forms: _Forms = known[2]
            return forms
        forms = quantize()
        entries[form, stream] = (weight, state, forms)
        return forms

    def clear(self) -> None:
        """Forget all forms."""
        if self._entries is not None:
            self._entries = {}

    def close(self) -> None:
        """Forget all forms, and keep none from here on."""
        self._entries = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # copies and pickles of a layer have no cache


class CachedWeightModule(nn.Module):
    """A layer whose float weight each call quantizes, unless `cached_weights` lets it keep the codes."""

    _weight_cache: WeightCache | None = None

    def _quantized(self, weight: torch.Tensor, form: str, quantize: Callable[[], _Forms]) -> _Forms | None:
        """Return the cached form of ``weight``, or None outside `cached_weights` and while tracing."""
        if torch.compiler.is_compiling() or self._weight_cache is None:
            return None
        return self._weight_cache.get(weight, form, quantize)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        if self._weight_cache is not None:
            self._weight_cache.clear()
        super()._load_from_state_dict(*arguments, **keywords)


class cached_weights:
    """A context in which the layers of ``model`` quantize a weight once, not in every call.

    For several forwards between two optimizer steps (gradient accumulation), or for evaluation. A layer
    quantizes again when its weight is another object or was written through torch since: the key is the
    parameter's identity, address, version, dtype and device. Loading a state_dict and leaving the context
    forget everything. Writes that torch does not count (``tensor.data``, other frameworks, sharded gathers
    into the same memory) must not happen inside. What `torch.compile` traces, captures into CUDA graphs, and
    inference tensors quantize in every call as ever.

    Args:
        model: A module; its layers with a float weight that calls quantize (`qbits.nn.SwitchBackLinear`) take
            part.

    Raises: ArgumentTypeError for anything but a module.

    >>> from qbits.nn import SwitchBackLinear
    >>> model = nn.Sequential(SwitchBackLinear(4, 2))
    >>> with cached_weights(model):
    ...     outputs = [model(torch.ones(3, 4)) for _ in range(2)]
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            rule = f"model must be a torch.nn.Module, got {type(model).__name__}"
            raise ArgumentTypeError(f"qbits::cached_weights: {rule}")
        self._model: nn.Module = model
        self._entered: list[list[CachedWeightModule]] = []  # one list for each time that it was entered

    def __enter__(self) -> cached_weights:
        layers = [m for m in self._model.modules() if isinstance(m, CachedWeightModule)]
        fresh = [layer for layer in layers if layer._weight_cache is None]  # others: an outer context's
        for layer in fresh:
            layer._weight_cache = WeightCache()
        self._entered.append(fresh)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer in self._entered.pop():
            if layer._weight_cache is not None:
                layer._weight_cache.close()
                layer._weight_cache = None
