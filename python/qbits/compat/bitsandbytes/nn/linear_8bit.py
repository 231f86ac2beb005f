"""`Linear8bitLt` with bitsandbytes' constructor, state and state_dict keys, and `maybe_rearrange_weight`.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from qbits.compat.bitsandbytes.autograd.matmul_8bit_state import MatmulLtState
from qbits.compat.bitsandbytes.nn.int8_params import Int8Params
from qbits.compat.bitsandbytes.nn.moving import MovingWeight
from qbits.errors import QbitsWarning
from qbits.nn import linear_8bit as modern
from qbits.nn import state_8bit, tiles_8bit
from qbits.nn.outlier import OutlierPool
from qbits.nn.quantized_linear import move_bytes
from qbits.records import QWeight8

__all__ = ["Linear8bitLt", "maybe_rearrange_weight"]


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Turn a weight in a tiled layout into rows and take its ``weight_format`` out; a load pre-hook.

    Rows stay untouched. N is the number of scales; columns that padded K stay.

    Raises: CheckpointFormatError for a layout that is none, or a shape that it does not have.
    """
    key = f"{prefix}weight"
    weight = state_dict.get(key)
    if weight is None:
        return
    name = f"{prefix}{state_8bit.FORMAT}"
    format = state_8bit.read_format(state_dict.pop(name, "row"), name)
    if format != "row":
        scales = state_dict.get(f"{prefix}{state_8bit.SCALES}")
        num_rows = weight.shape[0] if scales is None else scales.numel()
        state_dict[key] = tiles_8bit.from_tiles(key, weight, format, num_rows, None)


class _LayerState(MatmulLtState):
    """A live view of a layer: what the weight or the layer holds is read and written there."""

    def __init__(self, layer: Linear8bitLt) -> None:
        # the layer keeps the other fields, so that no cycle keeps the layer alive
        self.__dict__ = layer._state_fields
        object.__setattr__(self, "_layer", layer)

    __slots__ = ("_layer",)
    _layer: Linear8bitLt

    @property
    def CB(self) -> torch.Tensor | None:
        """The weight's codes; None is not assigned."""
        return getattr(self._layer.weight, "CB", None)

    @CB.setter
    def CB(self, codes: torch.Tensor | None) -> None:
        if codes is not None:
            weight = self._layer.weight
            weight.requires_grad = False
            weight.data = codes

    @property
    def SCB(self) -> torch.Tensor | None:
        """The weight's scales; None is not assigned."""
        return self._layer._scales

    @SCB.setter
    def SCB(self, scales: torch.Tensor | None) -> None:
        if scales is not None:
            self._layer.weight.SCB = scales

    @property
    def threshold(self) -> float:
        """The layer's threshold."""
        return self._layer.threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._layer.scheme = modern.scheme_of(threshold)

    @property
    def has_fp16_weights(self) -> bool:
        """Whether the layer trains a float weight."""
        return self._layer.trainable

    @has_fp16_weights.setter
    def has_fp16_weights(self, value: bool) -> None:
        self._layer.trainable = self._layer.weight.has_fp16_weights = value

    @property
    def is_training(self) -> bool:
        """The layer's mode; `Module.train` alone changes it."""
        return self._layer.training

    @is_training.setter
    def is_training(self, value: bool) -> None:
        pass


class Linear8bitLt(MovingWeight, modern.Linear8bit):
    """`qbits.nn.Linear8bit` whose weight is an `Int8Params`: frozen, it is quantized when the layer moves.

    Args:
        input_features: K.
        output_features: N.
        bias: Whether to add a bias.
        has_fp16_weights: Whether the weight stays float and trains.
        threshold: Columns of the input with a value of at least this are multiplied in 16 bits; 0 is off. A
            bool in this place is the positional order of early versions: memory_efficient_backward,
            threshold, index, device.
        index: Stored, for callers that read it.
        device: Where the parameters lie.
        early: The eighth argument of the early order.
        memory_efficient_backward: Accepted; the backward always is.

    Shapes: input [*, K]; output [*, N].
    Dtypes: float32, float16, bfloat16.
    Raises: NotQuantizedError by a forward of a frozen layer before the first ``.to(device)``.

    >>> layer = Linear8bitLt(64, 2, has_fp16_weights=False, threshold=6.0).to("cpu")
    >>> layer(torch.ones(3, 64)).shape, list(layer.state_dict())
    (torch.Size([3, 2]), ['weight', 'bias', 'SCB', 'weight_format'])
    """

    _how_to_quantize = ".to(device) or quantize_()"
    _parameter_names = ("weight",)
    weight: Int8Params

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | None = None,
        *early: Any,
        memory_efficient_backward: bool = False,
    ) -> None:
        if isinstance(threshold, bool):
            memory_efficient_backward = threshold
            threshold, index, device = (0.0 if index is None else index), device, (early or (None,))[0]
        elif early:
            raise TypeError(f"Linear8bitLt takes at most 7 positional arguments, got {7 + len(early)}")
        if memory_efficient_backward:
            warnings.warn(
                "qbits::Linear8bitLt: memory_efficient_backward must be left out, got True: it always is",
                QbitsWarning,
                stacklevel=2,
            )
        arguments = (input_features, output_features, bias, modern.scheme_of(threshold), device, None)
        self._construct(*arguments, trainable=has_fp16_weights)
        self.index = index
        self._state_fields["use_pool"] = threshold > 0 and not has_fp16_weights

    def _construct(self, *arguments: Any, trainable: bool = False, **options: Any) -> None:
        super()._construct(*arguments, trainable=trainable, **options)
        self.index = None
        self._state_fields = vars(MatmulLtState())
        for name in ("CB", "SCB", "threshold", "has_fp16_weights", "is_training"):
            del self._state_fields[name]
        self.weight = Int8Params(self.weight.data, requires_grad=trainable, has_fp16_weights=trainable)

    @property
    def state(self) -> MatmulLtState:
        """A live view of weight, scales, threshold and flags."""
        return _LayerState(self)

    @property
    def outlier_pool(self) -> OutlierPool | None:
        """The pool that the state names and asks for."""
        return self.state.pool

    @outlier_pool.setter
    def outlier_pool(self, pool: OutlierPool | None) -> None:
        if pool is not None:  # the modern constructor sets None before there is a state
            self.state.outlier_pool = pool

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is in int8."""
        return self._scales is not None

    @property
    def _scales(self) -> torch.Tensor | None:
        return getattr(self.weight, "SCB", None)

    def init_8bit_state(self) -> None:
        """Do nothing: weight and state always agree."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply ``input`` [*, K] by the weight and add the bias."""
        output, mask = self._multiply(input)
        if not torch.compiler.is_compiling():
            self._state_fields["idx"] = mask
        return output

    def _weight_and_scales(self) -> tuple[Any, Any]:
        scales = self._scales
        if scales is not None:
            return self.weight.CB, scales
        if not self.trainable:
            self._refuse_float()
        return self.weight, None

    def record(self) -> QWeight8:
        """Return the weight's tensors as a record; nothing is copied."""
        scales = self._scales
        if scales is None:
            self._refuse_float()
        return QWeight8(self.weight.CB, scales, self._weight_dtype)

    def _tensors_of(self, record: QWeight8) -> dict[str, torch.Tensor]:
        return {"weight": Int8Params(record.values, requires_grad=False, SCB=record.scales)}

    def _reserve(self, record: QWeight8, device: torch.device, *, adopt: bool) -> None:
        self._weight_dtype = record.dtype or self.weight_dtype
        weight: Any = self._tensors_of(record)["weight"]
        if not adopt:
            old = self.weight.data
            same_form = (old.dtype, old.shape, old.device) == (weight.dtype, weight.shape, device)
            memory = old if same_form else torch.empty(weight.shape, dtype=weight.dtype, device=device)
            weight = weight._with(memory, record.scales.to(device, copy=True))
        self._replace_weight(weight)

    def _move_weight(self, weight: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_quantized:
            self._weight_dtype = weight.dtype
            super()._move_weight(weight, fn)
            return
        self._replace_weight(weight._with(move_bytes(weight, fn), move_bytes(weight.SCB, fn)))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_quantized:
            entries = state_8bit.to_bnb(self.record())
            for name in (state_8bit.SCALES, state_8bit.FORMAT):
                destination[f"{prefix}{name}"] = entries[name]
