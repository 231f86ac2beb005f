"""`QuantizedLinear`: what linear layers with a frozen quantized weight share: making, moving, loading.

A subclass names its parameters, and says how a weight becomes a record (`qbits.records`), how a record lies
in the parameters, and how a state_dict is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from qbits.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointFormatError,
    NotQuantizedError,
    ShapeError,
)
from qbits.schemes import QuantScheme, as_scheme

__all__ = ["QuantizedLinear", "move_bytes"]

Layer = TypeVar("Layer", bound="QuantizedLinear")


class QuantizedLinear(nn.Linear):
    """A linear layer that holds a float weight until `quantize_` is called, then frozen codes and statistics.

    A forward changes nothing. Casts reach the bias only: codes and statistics follow device moves alone, and
    parameters keep their identity.

    >>> from qbits.nn import Linear4bit
    >>> isinstance(Linear4bit(64, 2), QuantizedLinear), Linear4bit(64, 2).is_quantized
    (True, False)
    """

    scheme_class: type[QuantScheme] = QuantScheme  # of the schemes that this class's layers can have
    default_scheme = ""  # of from_linear, where none is given
    _op = ""  # what messages name
    _how_to_quantize = "quantize_()"
    _parameter_names: tuple[str, ...] = ()  # "weight" first; the second is None while the weight is float
    scheme: QuantScheme

    def _construct(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: QuantScheme,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **options: Any,
    ) -> None:
        """Make a float layer; ``options`` are those of the subclass that no scheme holds."""
        nn.Module.__init__(self)  # nn.Linear's would make a float weight that requires a gradient
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self._weight_dtype = weight.dtype
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        for name in self._parameter_names[1:]:
            self.register_parameter(name, None)
        self.reset_parameters()

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is quantized."""
        return self._parameters[self._parameter_names[1]] is not None

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weight before it was quantized, and of what `dequantize` returns."""
        return self._weight_dtype if self.is_quantized else self.weight.dtype

    def reset_parameters(self) -> None:
        """Draw weight and bias anew as `nn.Linear` does, and quantize them where the layer is quantized."""
        if not self.is_quantized:
            super().reset_parameters()
            return
        like = {"device": self.weight.device, "dtype": self.weight_dtype}
        fresh = nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)
        self.requantize_(fresh.weight)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(fresh.bias)

    @classmethod
    def _like(
        cls: type[Layer], linear: nn.Linear, scheme: QuantScheme, dtype: torch.dtype, **options: Any
    ) -> Layer:
        """Return a layer of the form of ``linear`` on the meta device, without a bias."""
        layer = cls.__new__(cls)
        layer._construct(linear.in_features, linear.out_features, False, scheme, "meta", dtype, **options)
        return layer

    @classmethod
    def from_linear(
        cls: type[Layer],
        linear: nn.Linear,
        scheme: str | QuantScheme | None = None,
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Layer:
        """Return a quantized layer with the weight of ``linear``, which is left as it is; the bias is shared.

        Args:
            linear: A float layer.
            scheme: A preset's name or a scheme; None is the class's own.
            device: Where to quantize, and where the new layer lies; None is the weight's device.
            **options: What else the class's constructor takes beside the scheme's options.

        Raises: TypeError for anything but a float layer; ValueError for a scheme of another class.

        >>> from qbits.nn import Linear4bit
        >>> Linear4bit.from_linear(torch.nn.Linear(64, 2), "fp4").scheme.codebook
        'fp4'
        """
        cls._check_linear(linear)
        weight = linear.weight
        layer = cls._like(linear, cls._chosen(scheme), weight.dtype, **options)
        layer.requantize_(weight.detach() if device is None else weight.detach().to(device))
        bias = linear.bias
        if bias is not None and device is not None and bias.device != layer.weight.device:
            bias = nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
        layer.bias = bias
        return layer.train(linear.training)

    @classmethod
    def from_record(cls: type[Layer], linear: nn.Linear, record: Any, scheme: QuantScheme) -> Layer:
        """Return a layer of the form of ``linear`` with a copy of ``record`` as its weight, without bias."""
        layer = cls._like(linear, scheme, record.dtype or linear.weight.dtype)
        layer.load_record(record)
        return layer

    @staticmethod
    def _check_linear(linear: Any) -> None:
        if not isinstance(linear, nn.Linear) or isinstance(linear, QuantizedLinear):
            raise ArgumentTypeError(
                f"qbits::from_linear: linear must be a float nn.Linear, got {type(linear).__name__}"
            )

    @classmethod
    def _chosen(cls, scheme: str | QuantScheme | None) -> QuantScheme:
        return cls._check_scheme(as_scheme(cls.default_scheme if scheme is None else scheme))

    @classmethod
    def _check_scheme(cls, scheme: QuantScheme) -> QuantScheme:
        """Return ``scheme``, or raise where it is none of this class's."""
        if not isinstance(scheme, cls.scheme_class):
            rule = f"scheme must be a {cls.scheme_class.__name__}, got {type(scheme).__name__}"
            raise ArgumentValueError(f"qbits::{cls.__name__}: {rule}")
        return scheme

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an `nn.Linear` with the decoded weight, and the same bias where its dtype allows.

        >>> from qbits.nn import Linear4bit
        >>> Linear4bit.from_linear(torch.nn.Linear(64, 2)).to_linear().weight.dtype
        torch.float32
        """
        weight = self.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, False, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight)
        bias = self.bias
        if bias is not None and dtype is not None and bias.dtype != dtype:
            bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
        linear.bias = bias
        return linear.train(self.training)

    def quantize_(self: Layer) -> Layer:
        """Quantize the float weight where it lies; a layer that is quantized stays as it is."""
        return self if self.is_quantized else self.requantize_(self.weight)

    @torch.no_grad()
    def requantize_(self: Layer, weight: torch.Tensor) -> Layer:
        """Replace the weight by the quantized form of ``weight`` [N, K], on the device of ``weight``."""
        due = (self.out_features, self.in_features)
        if tuple(weight.shape) != due:
            raise ShapeError(
                f"qbits::requantize_: weight must have shape {list(due)}, got {list(weight.shape)}"
            )
        self.load_record(self.quantize_weight(weight.detach(), self.scheme), adopt=True)
        return self

    @staticmethod
    def quantize_weight(weight: torch.Tensor, scheme: Any) -> Any:
        """Return ``weight`` [N, K] as the record that this class's layers hold."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the decoded weight [N, K], in ``dtype`` or the one that was quantized."""
        raise NotImplementedError

    def record(self) -> Any:
        """Return the weight's tensors as a record; nothing is copied."""
        raise NotImplementedError

    def _refuse_float(self) -> NoReturn:
        raise NotQuantizedError(
            f"qbits::{self._op}: weight must be quantized, call {self._how_to_quantize} first, "
            f"got {self.weight.dtype} {list(self.weight.shape)}"
        )

    def load_record(self, record: Any, *, adopt: bool = False) -> None:
        """Install ``record`` and its scheme; with ``adopt``, new parameters are its tensors, not copies."""
        tensors = self._tensors_of(record)
        self._reserve(record, tensors["weight"].device, adopt=adopt)
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameter: Any = self._parameters[name]
                if parameter.data_ptr() != tensor.data_ptr():
                    parameter.copy_(tensor)

    def _tensors_of(self, record: Any) -> dict[str, torch.Tensor]:
        """Return the tensors of ``record`` under the names and in the shapes of this layer's parameters."""
        raise NotImplementedError

    def accepts(self, record: Any) -> bool:
        """Whether the layer can hold ``record`` and stay what it is."""
        raise NotImplementedError

    def _scheme_of(self, record: Any) -> QuantScheme:
        """Return this layer's scheme once it holds ``record``."""
        return self.scheme

    def _reserve(self, record: Any, device: torch.device, *, adopt: bool) -> None:
        """Take over the scheme of ``record``, and make parameters of its form where they have another.

        A new parameter is the record's tensor itself (``adopt``), or memory on ``device`` without values yet.
        """
        self.scheme, self._weight_dtype = self._scheme_of(record), record.dtype or self.weight_dtype
        tensors = self._tensors_of(record)
        for name in self._parameter_names:
            old, new = self._parameters[name], tensors.get(name)
            if new is None:
                self._parameters[name] = None
            elif old is None or (old.dtype, old.shape, old.device) != (new.dtype, new.shape, device):
                memory = new if adopt else torch.empty(new.shape, dtype=new.dtype, device=device)
                self._parameters[name] = nn.Parameter(memory, requires_grad=False)

    def _apply(self: Layer, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Layer:
        held = {name: self._parameters[name] for name in self._parameter_names} if self.is_quantized else {}
        plain = {name: p for name, p in held.items() if type(p) is nn.Parameter}  # a DTensor moves itself
        self._parameters.update(dict.fromkeys(plain))  # super() skips None; the order of registration stays
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters.update(plain)
        for name, parameter in plain.items():
            moved = move_bytes(parameter, fn)
            if torch._has_compatible_shallow_copy_type(parameter, moved):
                parameter.data = moved
            else:
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
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
        entries = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        assign = local_metadata.get("assign_to_params_buffers", False)
        record = self._take_record(entries, prefix, assign)
        if record is not None:
            due = (self.out_features, self.in_features)
            if tuple(record.shape) != due:
                error_msgs.append(
                    f"size mismatch for {prefix}weight: copying a param with shape {tuple(record.shape)} "
                    f"from checkpoint, the shape in current model is {due}."
                )
                return
            tensors = self._tensors_of(record)
            self._reserve(record, tensors["weight"].device if assign else self.weight.device, adopt=False)
            entries.update({f"{prefix}{name}": tensor for name, tensor in tensors.items()})
        super()._load_from_state_dict(
            entries, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take_record(self, entries: dict[str, Any], prefix: str, assign: bool) -> Any:
        """Take a quantized weight out of ``entries``, or a float one, quantized as the layer is."""
        key = f"{prefix}weight"
        record = self._pop_record(entries, prefix)
        if record is not None:
            return record
        weight = entries.get(key)
        if not isinstance(weight, torch.Tensor):
            return None
        if self.is_quantized and weight.is_floating_point() and weight.dim() == 2:
            target = weight if assign or self.weight.is_meta else weight.to(self.weight.device)
            target = target.detach() if assign else target.detach().to(self.weight_dtype)
            return self.quantize_weight(target, self.scheme)
        if not weight.is_floating_point():
            raise CheckpointFormatError(
                f"qbits::load: {key} must stand beside {self._statistics_of(key)}, got {weight.dtype} alone"
            )
        return None

    def _pop_record(self, entries: dict[str, Any], prefix: str) -> Any:
        """Take the quantized weight at ``prefix`` out of ``entries``, in any layout; or return None."""
        raise NotImplementedError

    def _statistics_of(self, key: str) -> str:
        """Return the keys beside which a quantized weight at ``key`` must stand, for a message."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the arguments that made the layer."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bias={self.bias is not None}, scheme={self.scheme.codebook!r}"


def move_bytes(tensor: torch.Tensor, fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply ``fn`` of `Module._apply` to the bytes of ``tensor``: it moves them, and has no float to cast."""
    as_bytes = tensor.detach().reshape(-1).view(torch.uint8)
    moved = fn(as_bytes)
    if moved.dtype != torch.uint8:  # Module.type() casts integers, too
        moved = as_bytes.to(moved.device)
    return moved.view(tensor.dtype).view(tensor.shape)
