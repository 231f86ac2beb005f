"""Any parameter of any module kept in 4 bits and decoded where it is read, for example 3-D expert weights.

Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from qbits.compat.bitsandbytes import functional
from qbits.compat.bitsandbytes.state import QuantState
from qbits.errors import ArgumentTypeError

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]


class Bnb4bitParametrization(nn.Module):
    """Decodes a packed parameter when it is read, once within a forward of the module that owns it.

    >>> packed, state = functional.quantize_4bit(torch.tensor([[1.0, -1.0]]))
    >>> Bnb4bitParametrization(state)(packed).tolist()
    [[1.0, -1.0]]
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state
        self._running: dict[
            int, list[torch.Tensor]
        ] = {}  # by thread: what its forward has decoded, or nothing yet

    def begin(self) -> None:
        """Keep what is decoded from now on, in this thread."""
        if not torch.compiler.is_compiling():
            self._running.setdefault(threading.get_ident(), [])

    def end(self) -> None:
        """Drop it."""
        if not torch.compiler.is_compiling():
            self._running.pop(threading.get_ident(), None)

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """Return the decoded parameter."""
        if torch.compiler.is_compiling():
            return functional.dequantize_4bit(quantized_param, self.quant_state)
        kept = self._running.get(threading.get_ident())
        if kept:
            return kept[0]
        value = functional.dequantize_4bit(quantized_param, self.quant_state)
        if kept is not None:
            kept.append(value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": {}}


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize ``module.<param_name>``, of any rank; reading it decodes.

    The state_dict keeps the name: ``<name>``, ``<name>.absmax`` and so on.

    Raises: AttributeError where there is no such name; TypeError where it is no Parameter.

    >>> layer = nn.Linear(64, 2)
    >>> replace_parameter_4bit(layer, "weight")
    >>> list(layer.state_dict())
    ['bias', 'weight', 'weight.absmax', 'weight.quant_map', 'weight.quant_state.bitsandbytes__nf4']
    """
    parameter = _parameter(module, param_name)
    packed, state = functional.quantize_4bit(
        parameter.detach(),
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: Mapping[str, Any], device: torch.device | str
) -> None:
    """Decode ``module.<param_name>``, which already holds packed bytes, by the statistics of a checkpoint.

    Raises: AttributeError where there is no such name; TypeError where it is no Parameter;
        CheckpointFormatError for statistics that do not fit.
    """
    _parameter(module, param_name)
    _parametrize(module, param_name, QuantState.from_dict(qs_dict, device))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(
            "qbits::replace_parameter_4bit: param_name must name a parameter of "
            f"{type(module).__name__}, got {name!r}"
        )
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise ArgumentTypeError(
            f"qbits::replace_parameter_4bit: {name} must be a Parameter, got {type(parameter).__name__}"
        )
    return parameter


def _parametrize(module: nn.Module, name: str, state: QuantState) -> None:
    decoder = Bnb4bitParametrization(state)
    parametrize.register_parametrization(module, name, decoder, unsafe=True)
    module.register_state_dict_post_hook(partial(_rename_saved, name))  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(partial(_take_loaded, name))  # type: ignore[no-untyped-call]
    # looked up at each call: a deepcopy of the module owns another decoder
    module.register_forward_pre_hook(partial(_begin, name))
    module.register_forward_hook(partial(_end, name), always_call=True)  # also where the forward raised


def _decoder(module: Any, name: str) -> Bnb4bitParametrization:
    decoder: Bnb4bitParametrization = module.parametrizations[name][0]
    return decoder


def _begin(name: str, module: nn.Module, inputs: Any) -> None:
    _decoder(module, name).begin()


def _end(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    _decoder(module, name).end()


def _rename_saved(name: str, module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """Write the packed parameter under its own name, and its statistics beside it."""
    original = f"{prefix}parametrizations.{name}.original"
    if original in state_dict:
        state_dict[f"{prefix}{name}"] = state_dict.pop(original)
        for key, tensor in _decoder(module, name).quant_state.as_dict(packed=True).items():
            state_dict[f"{prefix}{name}.{key}"] = tensor


def _take_loaded(name: str, module: nn.Module, state_dict: Any, prefix: str, *rest: Any) -> None:
    """Read what `_rename_saved` wrote."""
    key = f"{prefix}{name}"
    statistics = {k: state_dict.pop(k) for k in list(state_dict) if k.startswith(f"{key}.")}
    if key not in state_dict:
        return
    decoder = _decoder(module, name)
    if statistics:
        decoder.quant_state = QuantState.from_dict(statistics, decoder.quant_state.absmax.device)
    state_dict[f"{prefix}parametrizations.{name}.original"] = state_dict.pop(key)
