"""Linear layers whose weight is kept in 4 bits: `Linear4bit` and its two fixed forms.

Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits import functional
from qbits.errors import CheckpointFormatError, DtypeError
from qbits.nn import state_4bit
from qbits.nn.quantized_linear import QuantizedLinear
from qbits.records import QTensor4
from qbits.schemes import QuantScheme, Scheme4bit

__all__ = ["Linear4bit", "LinearFP4", "LinearNF4"]

_COMPUTE_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


class Linear4bit(QuantizedLinear):
    """``output = input @ dequantize(weight).T + bias``, with a frozen 4-bit weight.

    A new layer holds a float weight until `quantize_` is called; `from_linear` makes a quantized one.

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

    scheme_class = Scheme4bit
    default_scheme = "nf4"
    _op = "linear_4bit"
    _parameter_names = tuple(state_4bit.PARAMETERS)
    scheme: Scheme4bit
    compute_dtype: torch.dtype | None

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
            in_features,
            out_features,
            bias,
            self._check_scheme(QuantScheme.from_dict(scheme)),
            device,
            dtype,
            compute_dtype=compute_dtype,
        )

    def _construct(self, *arguments: Any, compute_dtype: torch.dtype | None = None, **options: Any) -> None:
        if compute_dtype not in _COMPUTE_DTYPES:
            raise DtypeError(
                "qbits::Linear4bit: compute_dtype must be None, float32, float16 or bfloat16, "
                f"got {compute_dtype}"
            )
        super()._construct(*arguments, **options)
        self.compute_dtype = compute_dtype

    @property
    def weight_quant_state(self) -> torch.Tensor:
        """The JSON header that a state_dict holds under this name; torch's sharded saves look for it here."""
        return state_4bit.header(self.record())

    @staticmethod
    def quantize_weight(weight: torch.Tensor, scheme: Scheme4bit) -> QTensor4:
        """Return ``weight`` [N, K] in 4 bits."""
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

    def accepts(self, record: Any) -> bool:
        """Whether ``record`` has the layer's codebook."""
        return isinstance(record, QTensor4) and record.codebook == self.scheme.codebook

    def _tensors_of(self, record: QTensor4) -> dict[str, torch.Tensor]:
        return state_4bit.to_parameters(record)

    def _scheme_of(self, record: QTensor4) -> Scheme4bit:
        return state_4bit.scheme_of(record)

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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_quantized:
            destination[f"{prefix}weight_quant_state"] = self.weight_quant_state

    def _pop_record(self, entries: dict[str, Any], prefix: str) -> QTensor4 | None:
        record = state_4bit.pop_record(entries, prefix)
        if record is not None:
            self._check_codebook(record.codebook, f"{prefix}weight")
        return record

    def _statistics_of(self, key: str) -> str:
        return f"{key}_quant_state or {key}.quant_state.*"

    def _check_codebook(self, codebook: str, key: str) -> None:
        if codebook != self.scheme.codebook:
            raise CheckpointFormatError(
                f"qbits::load: {key} must be {self.scheme.codebook} as the layer is, got {codebook}"
            )

    def extra_repr(self) -> str:
        """Return the arguments that made the layer."""
        scheme = self.scheme
        return f"{super().extra_repr()}, block_size={scheme.block_size}, double_quant={scheme.double_quant}"


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
