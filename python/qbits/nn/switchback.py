"""The linear layer that trains with int8 products.

Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
arXiv:2304.13013, section 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from qbits.autograd.switchback import QuantizedWeight, decode_weight, quantize_weight, switchback_function
from qbits.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointFormatError,
    NotQuantizedError,
    QbitsWarning,
)
from qbits.functional.standard_linear import check_operands, is_plain
from qbits.functional.switchback import (
    check_form,
    multiply_prepared,
    multiply_switchback,
)
from qbits.nn import crossover
from qbits.nn.cache import CachedWeightModule
from qbits.nn.quantized_linear import move_bytes
from qbits.schemes import QuantScheme, SwitchBack, as_scheme

__all__ = ["SwitchBackLinear"]


class SwitchBackLinear(CachedWeightModule, nn.Linear):
    """`nn.Linear` whose output and input gradient are int8 products; the weight gradient stays in 16 bit.

    Parameters, their initialisation and the state_dict are those of `nn.Linear`; every call quantizes the
    weight anew, except as `prepare_for_eval` and `qbits.cached_weights` say.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether to add a bias [N].
        vectorwise: Whether the weight has one scale per row (and per column backward); else one in all.
        mem_efficient: Whether the input is kept for the backward as int8 codes.
        keep_quantized_weight: Whether the forward makes the weight's codes for the backward, too, in the same
            read, and keeps them until then: 1 byte an element against another quantization.
        threshold: Columns of the input with an element that large are multiplied unquantized; 0 is off.
        min_rows: Fewer rows train in 16 bit. "auto" is the rule of `qbits.nn.crossover`, which
            ``print(qbits.nn.crossover_table())`` shows; 0 is always int8. Without effect in eval mode.
        device: Where the parameters lie.
        dtype: Of the parameters.
        vector_wise_quantization: Another name of ``vectorwise``.

    Shapes: input [*, K]; output [*, N].
    Dtypes: float32, float16, bfloat16.
    Raises: ShapeError, DtypeError, DeviceError; ValueError for arguments that contradict each other or the
        class; NotQuantizedError where a layer that was prepared without its weight is to train.
    Reference: Wortsman et al., arXiv:2304.13013, section 2.2.

    >>> layer = SwitchBackLinear(64, 8, min_rows=0)
    >>> layer(torch.ones(3, 64)).sum().backward()
    >>> layer.weight.grad.shape
    torch.Size([8, 64])
    """

    _fixed_vectorwise: ClassVar[bool | None] = None
    _fixed_mem_efficient: ClassVar[bool | None] = None
    weight: nn.Parameter
    W_int8: torch.Tensor | None
    state_W: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        vectorwise: bool | None = None,
        mem_efficient: bool | None = None,
        keep_quantized_weight: bool = False,
        threshold: float = 0.0,
        min_rows: int | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool | None = None,
    ) -> None:
        cls = type(self)
        given = {"vectorwise": vectorwise, "vector_wise_quantization": vector_wise_quantization}
        vectorwise = cls._chosen(given, cls._fixed_vectorwise, True)
        mem_efficient = cls._chosen({"mem_efficient": mem_efficient}, cls._fixed_mem_efficient, False)
        check_form("SwitchBackLinear", threshold, mem_efficient)
        if min_rows != "auto" and not (type(min_rows) is int and min_rows >= 0):
            raise ArgumentValueError(
                f"qbits::SwitchBackLinear: min_rows must be 'auto' or an int >= 0, got {min_rows!r}"
            )
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.vectorwise = vectorwise
        self.mem_efficient = mem_efficient
        self.keep_quantized_weight = keep_quantized_weight
        self.threshold = float(threshold)
        self.min_rows = min_rows
        self._weight_dtype = self.weight.dtype
        self.register_buffer("W_int8", None, persistent=False)
        self.register_buffer("state_W", None, persistent=False)

    @classmethod
    def _chosen(cls, given: dict[str, bool | None], fixed: bool | None, default: bool) -> bool:
        """Return the one value of an option that its names and the class agree on."""
        chosen = fixed
        for name, value in given.items():
            if value is None:
                continue
            if not isinstance(value, bool):
                raise ArgumentTypeError(f"qbits::{cls.__name__}: {name} must be a bool, got {value!r}")
            if chosen is not None and value != chosen:
                raise ArgumentValueError(f"qbits::{cls.__name__}: {name} must be {chosen}, got {value}")
            chosen = value
        return default if chosen is None else chosen

    @property
    def vector_wise_quantization(self) -> bool:
        """Another name of ``vectorwise``."""
        return self.vectorwise

    @property
    def _fn(self) -> type[torch.autograd.Function]:
        """The Function that records a forward."""
        return switchback_function(self.vectorwise, self.mem_efficient)

    @property
    def scheme(self) -> SwitchBack:
        """What `qbits.quantize_` makes such a layer of."""
        return SwitchBack(vectorwise=self.vectorwise)

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare_for_eval` has made the weight's codes."""
        return self._buffers["W_int8"] is not None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: str | QuantScheme | None = None,
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> SwitchBackLinear:
        """Return a layer that shares the parameters of ``linear``; options as for the constructor.

        ``scheme`` gives ``vectorwise``; ``device`` is where the parameters are moved, in place.

        >>> SwitchBackLinear.from_linear(torch.nn.Linear(4, 2), threshold=6.0).threshold
        6.0
        """
        weight = linear._parameters.get("weight") if isinstance(linear, nn.Linear) else None
        if weight is None or not weight.is_floating_point():
            raise ArgumentTypeError(
                f"qbits::from_linear: linear must be a float nn.Linear, got {type(linear).__name__}"
            )
        chosen = None if scheme is None else as_scheme(scheme)
        if chosen is not None:
            if not isinstance(chosen, SwitchBack):
                raise ArgumentValueError(f"qbits::from_linear: scheme must be switchback, got {chosen}")
            options["vectorwise"] = chosen.vectorwise
        layer = cls(linear.in_features, linear.out_features, False, device="meta", **options)
        layer.weight, layer.bias = weight, linear.bias
        if device is not None:
            layer.to(device)
        layer._weight_dtype = weight.dtype
        return layer.train(linear.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an `nn.Linear` that shares the parameters; with another ``dtype`` it has copies.

        Of a layer that was prepared without its weight it gets the decoded codes.
        """
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta")
        weight = self._parameters["weight"]
        linear.weight = nn.Parameter(self.dequantize()) if weight is None else weight
        linear.bias = self.bias
        if dtype is not None:
            for name, p in linear.named_parameters():
                if p.dtype != dtype:
                    setattr(linear, name, nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad))
        return linear.train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply ``input`` [*, K] by the weight and add the bias."""
        weight: Any = self._parameters["weight"]
        codes, scales = self._buffers["W_int8"], self._buffers["state_W"]
        if codes is not None and scales is not None and (weight is None or not self.training):
            return self._forward_prepared(input, codes, scales)
        # through nn.Module.__getattr__ only where it is no parameter: that takes a microsecond
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias  # noqa: SIM401
        fewest: Any = self.min_rows if self.training else 0
        if fewest == "auto":
            fewest = crossover.min_rows(self.out_features, self.in_features, weight.device)
        if fewest and is_plain(input, weight, bias) and input.numel() < fewest * self.in_features:
            return torch.nn.functional.linear(input, weight, bias)  # what follows would do it, too, but later
        check_operands("switchback_linear", input, weight, bias)
        form = (self.vectorwise, self.mem_efficient, self.threshold, self.keep_quantized_weight)
        known = None if self._weight_cache is None else self._cached(weight)
        return multiply_switchback(input, weight, bias, *form, fewest, known)

    def _cached(self, weight: nn.Parameter) -> QuantizedWeight | None:
        """Return the codes that `qbits.cached_weights` keeps, made now where there are none."""
        return self._quantized(weight, "both" if self.keep_quantized_weight else "one", self._quantize)

    def _forward_prepared(
        self, input: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self._refuse_to_train()
        check_operands("switchback_linear", input, codes, self.bias, (torch.int8,))
        weight = self._parameters["weight"]
        return multiply_prepared(input, codes, scales, self.bias, self.vectorwise, self.threshold, weight)

    def _refuse_to_train(self) -> None:
        raise NotQuantizedError(
            "qbits::switchback_linear: weight must be there to train, call unprepare() first, "
            "got a layer that was prepared without it"
        )

    def _quantize(self, *, both: bool | None = None) -> QuantizedWeight:
        both = self.keep_quantized_weight if both is None else both
        return quantize_weight(self.weight, self.vectorwise, both=both)

    @torch.no_grad()
    def prepare_for_eval(self, *, keep_weight: bool = True) -> SwitchBackLinear:
        """Keep the weight's codes in the buffers ``W_int8`` and ``state_W``, and use them in eval mode.

        The outputs are the same bits. With ``keep_weight`` the state_dict stays as it is, and training mode
        forgets the codes; without it ``weight`` becomes None, and the state_dict holds the codes instead.
        A second call refreshes the codes; where there is no weight any more, it does nothing.
        """
        if self._parameters["weight"] is None:
            return self
        forms = self._quantize(both=False)
        self._hold(forms.codes, forms.scales, keep_weight=keep_weight)
        return self

    def _hold(self, codes: torch.Tensor | None, scales: torch.Tensor | None, *, keep_weight: bool) -> None:
        """Take codes and scales as buffers, which a state_dict holds where the weight goes."""
        self.W_int8, self.state_W = codes, scales
        names = {"W_int8", "state_W"}
        if keep_weight:
            self._non_persistent_buffers_set |= names
        else:
            self._non_persistent_buffers_set -= names
            self._weight_dtype = self._dtype()
            self._parameters["weight"] = None

    def unprepare(self) -> SwitchBackLinear:
        """Undo `prepare_for_eval`; a weight that was not kept is decoded from its codes, with a warning."""
        if not self.is_prepared:
            return self
        if self._parameters["weight"] is None:
            warnings.warn(
                "qbits::unprepare: weight must be kept to come back exactly, got its int8 codes",
                QbitsWarning,
                stacklevel=2,
            )
            self.weight = nn.Parameter(self.dequantize())
        self._hold(None, None, keep_weight=True)
        return self

    def train(self, mode: bool = True) -> SwitchBackLinear:
        """Set the mode; training forgets the codes of a layer whose weight was kept, eval refreshes them."""
        was_training = self.training
        super().train(mode)
        if self.is_prepared and self._parameters["weight"] is not None:
            if mode:
                self.unprepare()
            elif was_training:
                self.prepare_for_eval()
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SwitchBackLinear:
        held = {name: self._buffers[name] for name in ("W_int8", "state_W")}
        self._buffers.update(dict.fromkeys(held))  # super() would cast the scales
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(held)
        for name, tensor in held.items():
            self._buffers[name] = None if tensor is None else move_bytes(tensor, fn)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        has_weight = f"{prefix}weight" in state_dict
        assign = local_metadata.get("assign_to_params_buffers", False)
        if f"{prefix}W_int8" in state_dict and not has_weight:
            found = self._read_codes(state_dict, prefix, error_msgs)
            if found is None:
                return
            codes, scales = found
            if not assign:
                codes, scales = (torch.empty_like(t, device=self._device()).copy_(t) for t in found)
            self._hold(codes, scales, keep_weight=False)
            state_dict = {**state_dict, f"{prefix}W_int8": codes, f"{prefix}state_W": scales}
        elif has_weight and self._parameters["weight"] is None:
            shape = (self.out_features, self.in_features)
            memory = torch.empty(shape, dtype=self._weight_dtype, device=self._device())
            self.weight = nn.Parameter(memory)
            self._hold(self.W_int8, self.state_W, keep_weight=True)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if has_weight and self.is_prepared:
            self.prepare_for_eval()

    def _device(self) -> torch.device:
        """Where the weight lies, or what is left of it."""
        weight, codes = self._parameters["weight"], self._buffers["W_int8"]
        return (codes if weight is None else weight).device  # type: ignore[union-attr]  # one is there

    def _dtype(self) -> torch.dtype:
        """Of the weight, or of what it was."""
        weight = self._parameters["weight"]
        return self._weight_dtype if weight is None else weight.dtype

    def _read_codes(
        self, state_dict: Any, prefix: str, error_msgs: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return codes and float32 scales of a state_dict, or None where a shape is wrong, which is noted."""
        codes, scales = state_dict[f"{prefix}W_int8"], state_dict.get(f"{prefix}state_W")
        if not isinstance(codes, torch.Tensor) or codes.dtype != torch.int8:
            got = getattr(codes, "dtype", type(codes).__name__)
            raise CheckpointFormatError(f"qbits::load: {prefix}W_int8 must be int8, got {got}")
        if not isinstance(scales, torch.Tensor) or not scales.is_floating_point():
            got = getattr(scales, "dtype", type(scales).__name__)
            raise CheckpointFormatError(
                f"qbits::load: {prefix}state_W must hold the scales of {prefix}W_int8, got {got}"
            )
        due: tuple[int, ...] = (self.out_features, self.in_features)
        num_scales = self.out_features if self.vectorwise else 1
        if tuple(codes.shape) != due:
            name, got = "W_int8", tuple(codes.shape)
        elif scales.numel() != num_scales:
            name, got, due = "state_W", tuple(scales.shape), (num_scales,)
        else:
            return codes.detach(), scales.detach().to(torch.float32).reshape(num_scales)
        error_msgs.append(
            f"size mismatch for {prefix}{name}: copying a param with shape {got} from checkpoint, "
            f"the shape in current model is {due}."
        )
        return None

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the weight [N, K] as its codes have it, in ``dtype`` or its own."""
        codes, scales = self._buffers["W_int8"], self._buffers["state_W"]
        forms = (
            self._quantize(both=False) if codes is None or scales is None else QuantizedWeight(codes, scales)
        )
        return decode_weight(forms, self.vectorwise, self._dtype() if dtype is None else dtype)

    def extra_repr(self) -> str:
        """Return the arguments that made the layer."""
        form = f"vectorwise={self.vectorwise}, mem_efficient={self.mem_efficient}"
        rest = f", threshold={self.threshold}" if self.threshold else ""
        rest += ", keep_quantized_weight=True" if self.keep_quantized_weight else ""
        rest += ", prepared" if self.is_prepared else ""
        return f"{super().extra_repr()}, scheme='switchback', {form}, min_rows={self.min_rows!r}{rest}"
