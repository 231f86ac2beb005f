"""Linear layers whose weight is kept in 4 bits: `Linear4bit` and its two fixed forms.

Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from qbits import functional
from qbits.errors import ArgumentTypeError, CheckpointFormatError, DtypeError, NotQuantizedError, ShapeError
from qbits.nn import state_4bit
from qbits.records import QTensor4
from qbits.schemes import QuantScheme, as_scheme

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4"]

_COMPUTE_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


class Linear4bit(nn.Linear):
    """``output = input @ dequantize(weight).T + bias``, with a frozen 4-bit weight.

    A new layer holds a float weight until `quantize_` is called; `from_linear` makes a quantized one. A
    forward changes nothing. Casts reach the bias only: codes and absmax follow device moves alone.

    Quantized, it has these parameters, none of which requires a gradient (`qbits.nn.state_4bit` describes
    the layout): ``weight`` uint8, ``weight_absmax``, and with ``double_quant`` ``weight_absmax_scale`` and
    ``weight_absmax_offset``. Loading takes this layout, bitsandbytes' keys, and float weights, which a
    quantized layer quantizes.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether to add a bias [N], an ordinary float parameter.
        codebook: ``"nf4"``, ``"fp4"`` or ``"af4"``.
        block_size: Elements that share an absmax: a power of two from 32 to 4096.
        double_quant: Whether absmax values are quantized, too.
        compute_dtype: What operands are rounded to; None is the output's dtype (autocast's, else the
            input's).
        device: Where the parameters lie.
        dtype: Of bias and float weight.

    Shapes: input [*, K]; output [*, N].
    Dtypes: float32, float16, bfloat16.
    Raises: NotQuantizedError by a forward before `quantize_`; ShapeError and DtypeError.

    >>> layer = Linear4bit.from_linear(torch.nn.Linear(64, 2), "nf4")
    >>> layer(torch.ones(3, 64)).shape, layer.weight.shape
    (torch.Size([3, 2]), torch.Size([2, 32]))
    """

    default_scheme = "nf4"  # of from_linear, where none is given
    _parameter_names: tuple[str, ...] = tuple(state_4bit.PARAMETERS)
    scheme: QuantScheme

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codebook: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        scheme = {"codebook": codebook, "block_size": block_size, "double_quant": double_quant}
        self._construct(
            in_features, out_features, bias, QuantScheme.from_dict(scheme), compute_dtype, device, dtype
        )

    def _construct(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: QuantScheme,
        compute_dtype: torch.dtype | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if compute_dtype not in _COMPUTE_DTYPES:
            raise DtypeError(
                "qbits::Linear4bit: compute_dtype must be None, float32, float16 or bfloat16, "
                f"got {compute_dtype}"
            )
        nn.Module.__init__(self)  # nn.Linear's would make a float weight that requires a gradient
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.compute_dtype = compute_dtype
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
        """Whether the weight is in 4 bits."""
        return self._parameters["weight_absmax"] is not None

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weight before it was quantized, and of what `dequantize` returns."""
        return self._weight_dtype if self.is_quantized else self.weight.dtype

    @property
    def weight_quant_state(self) -> torch.Tensor:
        """The JSON header that a state_dict holds under this name; torch's sharded saves look for it here."""
        return state_4bit.header(self.record())

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
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: str | QuantScheme | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Linear4bit:
        """Return a quantized layer with the weight of ``linear``, which is left as it is; the bias is shared.

        Args:
            linear: A float layer.
            scheme: A preset's name or a scheme; None is the class's own (nf4, and fp4 for `LinearFP4`).
            compute_dtype: As for the constructor.
            device: Where to quantize, and where the new layer lies; None is the weight's device.

        >>> Linear4bit.from_linear(torch.nn.Linear(64, 2), "fp4").scheme.codebook
        'fp4'
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, Linear4bit):
            raise ArgumentTypeError(
                f"qbits::from_linear: linear must be a float nn.Linear, got {type(linear).__name__}"
            )
        chosen = as_scheme(cls.default_scheme if scheme is None else scheme)
        layer = cls.__new__(cls)
        weight = linear.weight
        layer._construct(
            linear.in_features, linear.out_features, False, chosen, compute_dtype, "meta", weight.dtype
        )
        layer.requantize_(weight.detach() if device is None else weight.detach().to(device))
        bias = linear.bias
        if bias is not None and device is not None and bias.device != layer.weight.device:
            bias = nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
        layer.bias = bias
        return layer.train(linear.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an `nn.Linear` with the decoded weight, and the same bias where its dtype allows.

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

    def quantize_(self) -> Linear4bit:
        """Quantize the float weight where it lies; a layer that is quantized stays as it is."""
        return self if self.is_quantized else self.requantize_(self.weight)

    @torch.no_grad()
    def requantize_(self, weight: torch.Tensor) -> Linear4bit:
        """Replace the weight by the 4-bit form of ``weight`` [N, K], on the device of ``weight``."""
        due = (self.out_features, self.in_features)
        if tuple(weight.shape) != due:
            raise ShapeError(
                f"qbits::requantize_: weight must have shape {list(due)}, got {list(weight.shape)}"
            )
        self.load_record(self._quantized(weight.detach()), adopt=True)
        return self

    def _quantized(self, weight: torch.Tensor) -> QTensor4:
        scheme = self.scheme
        return functional.quantize_4bit(
            weight, codebook=scheme.codebook, block_size=scheme.block_size, double_quant=scheme.double_quant
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the decoded weight [N, K], in ``dtype`` or the one that was quantized."""
        weight: torch.Tensor = functional.dequantize_4bit(self.record(), dtype=dtype)
        return weight

    def record(self) -> QTensor4:
        """Return the weight's tensors as the record that `qbits.functional` takes; nothing is copied."""
        tensors = self._parameters
        if tensors["weight_absmax"] is None:
            self._refuse_float()
        scheme = self.scheme
        return QTensor4(
            tensors["weight"],
            tensors["weight_absmax"],
            (self.out_features, self.in_features),
            self._weight_dtype,
            scheme.codebook,
            scheme.block_size,
            tensors["weight_absmax_scale"],
            tensors["weight_absmax_offset"],
            tensors["weight_absmax_codebook"],
        )

    def _refuse_float(self) -> NoReturn:
        raise NotQuantizedError(
            f"qbits::linear_4bit: weight must be quantized, call quantize_() first, got {self.weight.dtype} "
            f"{list(self.weight.shape)}"
        )

    def load_record(self, record: QTensor4, *, adopt: bool = False) -> None:
        """Install ``record`` and its scheme; with ``adopt``, new parameters are its tensors, not copies."""
        self._reserve(record, record.packed.device, adopt=adopt)
        with torch.no_grad():
            for name, tensor in self._tensors_of(record).items():
                parameter: Any = self._parameters[name]
                if parameter.data_ptr() != tensor.data_ptr():
                    parameter.copy_(tensor)

    def _tensors_of(self, record: QTensor4) -> dict[str, torch.Tensor]:
        """Return the tensors of ``record`` under the names and in the shapes of this layer's parameters."""
        return state_4bit.to_parameters(record)

    def _reserve(self, record: QTensor4, device: torch.device, *, adopt: bool) -> None:
        """Take over the scheme of ``record``, and make parameters of its form where they have another.

        A new parameter is the record's tensor itself (``adopt``), or memory on ``device`` without values yet.
        """
        self.scheme = QuantScheme.from_dict(
            {"codebook": record.codebook, "block_size": record.block_size, "double_quant": record.nested}
        )
        self._weight_dtype = record.dtype
        tensors = self._tensors_of(record)
        for name in self._parameter_names:
            old, new = self._parameters[name], tensors.get(name)
            if new is None:
                self._parameters[name] = None
            elif old is None or (old.dtype, old.shape, old.device) != (new.dtype, new.shape, device):
                memory = new if adopt else torch.empty(new.shape, dtype=new.dtype, device=device)
                self._parameters[name] = nn.Parameter(memory, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply ``input`` [*, K] by the weight and add the bias."""
        parameters = self._parameters
        # through nn.Module.__getattr__ only where it is no parameter: that takes as long as a launch's checks
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        weight = self._weight_arguments()
        output: torch.Tensor = functional.multiply_4bit(input, weight, bias, self.compute_dtype)
        return output

    def _weight_arguments(self) -> tuple[Any, ...]:
        """Return `functional.weight_arguments` of the record, which every forward would have to make."""
        tensors, scheme = self._parameters, self.scheme
        if tensors["weight_absmax"] is None:
            self._refuse_float()
        return (
            tensors["weight"],
            tensors["weight_absmax"],
            self.out_features,
            self.in_features,
            scheme.codebook,
            scheme.block_size,
            tensors["weight_absmax_scale"],
            tensors["weight_absmax_offset"],
            tensors["weight_absmax_codebook"],
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear4bit:
        held = {name: self._parameters[name] for name in self._parameter_names} if self.is_quantized else {}
        plain = {name: p for name, p in held.items() if type(p) is nn.Parameter}  # a DTensor moves itself
        self._parameters.update(dict.fromkeys(plain))  # super() skips None; the order of registration stays
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters.update(plain)
        for name, parameter in plain.items():
            moved = state_4bit.move_bytes(parameter, fn)
            if torch._has_compatible_shallow_copy_type(parameter, moved):
                parameter.data = moved
            else:
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_quantized:
            destination[f"{prefix}weight_quant_state"] = self.weight_quant_state

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
            device = record.packed.device if assign else self.weight.device
            self._reserve(record, device, adopt=False)
            entries.update({f"{prefix}{name}": tensor for name, tensor in self._tensors_of(record).items()})
        super()._load_from_state_dict(
            entries, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take_record(self, entries: dict[str, Any], prefix: str, assign: bool) -> QTensor4 | None:
        """Take a quantized weight out of ``entries``, or a float one, quantized as the layer is."""
        record = state_4bit.pop_record(entries, prefix)
        key = f"{prefix}weight"
        if record is not None:
            self._check_codebook(record.codebook, key)
            return record
        weight = entries.get(key)
        if not isinstance(weight, torch.Tensor):
            return None
        if self.is_quantized and weight.is_floating_point() and weight.dim() == 2:
            target = weight if assign or self.weight.is_meta else weight.to(self.weight.device)
            return self._quantized(target.detach() if assign else target.detach().to(self.weight_dtype))
        if not self.is_quantized and not weight.is_floating_point():
            raise CheckpointFormatError(
                f"qbits::load: {key} must stand beside {key}_quant_state or {key}.quant_state.*, "
                f"got {weight.dtype} alone"
            )
        return None

    def _check_codebook(self, codebook: str, key: str) -> None:
        if codebook != self.scheme.codebook:
            raise CheckpointFormatError(
                f"qbits::load: {key} must be {self.scheme.codebook} as the layer is, got {codebook}"
            )

    def extra_repr(self) -> str:
        """Return the arguments that made the layer."""
        scheme = self.scheme
        shape = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        blocks = f"block_size={scheme.block_size}, double_quant={scheme.double_quant}"
        return f"{shape}, scheme={scheme.codebook!r}, {blocks}"


class LinearNF4(Linear4bit):
    """`Linear4bit` with the nf4 codebook.

    >>> LinearNF4(64, 2).quantize_().scheme.codebook
    'nf4'
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = False,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            bias,
            codebook=type(self).default_scheme,
            block_size=block_size,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            device=device,
            dtype=dtype,
        )


class LinearFP4(LinearNF4):
    """`Linear4bit` with the fp4 codebook.

    >>> LinearFP4(64, 2).quantize_().scheme.codebook
    'fp4'
    """

    default_scheme = "fp4"
