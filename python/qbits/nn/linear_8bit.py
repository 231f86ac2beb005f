"""`Linear8bit`: a linear layer with an int8 weight, or a float one that is multiplied in int8.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qbits import functional
from qbits.nn import state_8bit
from qbits.nn.outlier import OutlierPool
from qbits.nn.quantized_linear import QuantizedLinear
from qbits.records import QWeight8
from qbits.schemes import Int8, LLMInt8, QuantScheme

__all__ = ["Linear8bit", "scheme_of"]


class Linear8bit(QuantizedLinear):
    """``output = input @ weight.T + bias`` by an int8 product (LLM.int8()).

    Frozen, it holds a float weight until `quantize_` is called; `from_linear` makes a quantized one. Its
    parameters are then ``weight`` int8 [N, K] and ``weight_scale`` float32 [N], none of which requires a
    gradient. ``trainable`` keeps the float weight, which every forward quantizes; gradients flow to it, and
    the state_dict is that of `nn.Linear`.

    Loading takes ``weight`` and ``weight_scale``, bitsandbytes' keys (``weight``, ``SCB`` and
    ``weight_format``), and float weights, which a quantized layer quantizes.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether to add a bias [N], an ordinary float parameter.
        threshold: Columns of the input that hold an absolute value of at least this are multiplied in 16
            bits; 0 multiplies all in int8.
        trainable: Whether the weight stays float and is trained.
        device: Where the parameters lie.
        dtype: Of bias and float weight.

    Shapes: input [*, K]; output [*, N].
    Dtypes: float32, float16, bfloat16.
    Raises: NotQuantizedError by a forward before `quantize_`; ValueError for a negative threshold; ShapeError
        and DtypeError.

    >>> layer = Linear8bit.from_linear(torch.nn.Linear(64, 2), "llm-int8")
    >>> layer(torch.ones(3, 64)).shape, layer.weight.dtype, layer.threshold
    (torch.Size([3, 2]), torch.int8, 6.0)
    """

    scheme_class = Int8
    default_scheme = "int8"
    _op = "matmul_int8"
    _parameter_names = tuple(state_8bit.PARAMETERS)
    scheme: Int8
    trainable: bool
    outlier_pool: OutlierPool | None
    """Pool of outlier columns that the layer shares with others; set it to use one."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 0.0,
        trainable: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments = (in_features, out_features, bias, scheme_of(threshold), device, dtype)
        self._construct(*arguments, trainable=trainable)

    def _construct(self, *arguments: Any, trainable: bool = False, **options: Any) -> None:
        super()._construct(*arguments, **options)
        self.trainable = trainable
        self.outlier_pool = None
        self.weight.requires_grad_(trainable)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: nn.Linear,
        scheme: str | QuantScheme | None = None,
        *,
        device: torch.device | str | None = None,
        trainable: bool = False,
    ) -> Linear8bit:
        """Return a layer with the weight of ``linear``, quantized, or, ``trainable``, the parameter itself.

        Args:
            linear: A float layer, which is left as it is; the bias is shared.
            scheme: "int8", "llm-int8" or a scheme; None is "int8".
            device: Where to quantize, and where the new layer lies; None is the weight's device.
            trainable: Whether to keep the float weight and train it.

        >>> Linear8bit.from_linear(torch.nn.Linear(64, 2)).weight.dtype
        torch.int8
        """
        if not trainable:
            return super().from_linear(linear, scheme, device=device)
        cls._check_linear(linear)
        layer = cls._like(linear, cls._chosen(scheme), linear.weight.dtype, trainable=True)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training).to(device)

    @property
    def threshold(self) -> float:
        """From where on an input's value makes its column an outlier; 0 is off."""
        return self.scheme.threshold

    @staticmethod
    def quantize_weight(weight: torch.Tensor, scheme: Int8) -> QWeight8:
        """Return ``weight`` [N, K] in int8, whatever the scheme's threshold."""
        rows = functional.quantize_rowwise(weight)
        return QWeight8(rows.values, rows.scales, weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the decoded weight [N, K], in ``dtype`` or the one that was quantized."""
        record = self.record()
        dtype = self.weight_dtype if dtype is None else dtype
        weight: torch.Tensor = functional.dequantize_rowwise(record.values, record.scales, out_dtype=dtype)
        return weight

    def record(self) -> QWeight8:
        """Return the weight's tensors as a record; nothing is copied."""
        tensors = self._parameters
        if tensors["weight_scale"] is None:
            self._refuse_float()
        return QWeight8(tensors["weight"], tensors["weight_scale"], self._weight_dtype)

    def accepts(self, record: Any) -> bool:
        """Whether ``record`` is in int8; the threshold is the layer's own."""
        return isinstance(record, QWeight8)

    def _tensors_of(self, record: QWeight8) -> dict[str, torch.Tensor]:
        return state_8bit.to_parameters(record)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply ``input`` [*, K] by the weight and add the bias."""
        return self._multiply(input)[0]

    def _multiply(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output, and with a threshold the mask [K] of the outlier columns."""
        weight, scales = self._weight_and_scales()
        parameters = self._parameters
        # through nn.Module.__getattr__ only where it is no parameter: that takes as long as a launch's checks
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        threshold, pool = self.scheme.threshold, self.outlier_pool
        return functional.multiply_int8(input, weight, scales, bias, threshold, pool=pool)

    def _weight_and_scales(self) -> tuple[Any, Any]:
        """Return the codes and their scales, or the float weight of a trainable layer and None."""
        weight, scales = self._parameters["weight"], self._parameters["weight_scale"]
        if scales is None and not self.trainable:
            self._refuse_float()
        return weight, scales

    def _pop_record(self, entries: dict[str, Any], prefix: str) -> QWeight8 | None:
        return state_8bit.pop_record(entries, prefix, self.in_features)

    def _statistics_of(self, key: str) -> str:
        return f"{key}_scale or {key.removesuffix('weight')}SCB"

    def extra_repr(self) -> str:
        """Return the arguments that made the layer."""
        trainable = ", trainable=True" if self.trainable else ""
        return f"{super().extra_repr()}, threshold={self.threshold:g}{trainable}"


def scheme_of(threshold: float) -> Int8:
    """Return the scheme of a threshold; zero has none of the paper's."""
    scheme = Int8(threshold)
    return LLMInt8(threshold) if threshold > 0 else scheme
