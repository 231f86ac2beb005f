"""The linear layers with bitsandbytes' constructors, attributes and state_dict keys.

Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3; LLM.int8(), arXiv:2208.07339.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qbits import codebooks, functional
from qbits.compat.bitsandbytes.nn.int8_params import Int8Params
from qbits.compat.bitsandbytes.nn.linear_8bit import Linear8bitLt, maybe_rearrange_weight
from qbits.compat.bitsandbytes.nn.moving import MovingParameter, MovingWeight
from qbits.compat.bitsandbytes.nn.params import Params4bit
from qbits.compat.bitsandbytes.state import QuantState
from qbits.errors import QbitsWarning
from qbits.nn import linear_4bit as modern
from qbits.nn.quantized_linear import move_bytes
from qbits.records import QTensor4
from qbits.schemes import QuantScheme

__all__ = [
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "maybe_rearrange_weight",
]


class Linear4bit(MovingWeight, modern.Linear4bit):
    """`qbits.nn.Linear4bit` whose weight is a `Params4bit`: it is quantized when the layer moves to a device.

    Shapes: input [*, K]; output [*, N].
    Dtypes: float32, float16, bfloat16.
    Raises: NotQuantizedError by a forward before the first ``.to(device)``; ValueError for an unknown type
        or storage.

    >>> layer = Linear4bit(64, 2, quant_type="nf4").to("cpu")
    >>> layer(torch.ones(3, 64)).shape
    torch.Size([3, 2])
    """

    default_scheme = "fp4"
    _how_to_quantize = ".to(device) or quantize_()"
    _parameter_names = ("weight",)
    _stripped_state: QuantState | None = None
    weight: Params4bit

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        scheme = QuantScheme.from_dict({"codebook": quant_type, "double_quant": compress_statistics})
        arguments = (input_features, output_features, bias, self._check_scheme(scheme), device, None)
        self._construct(*arguments, compute_dtype=compute_dtype)
        self.weight.quant_storage = self.quant_storage = quant_storage

    def _construct(self, *arguments: Any, **options: Any) -> None:
        super()._construct(*arguments, **options)
        scheme = self.scheme
        self._stripped_state = None
        self.quant_storage = torch.uint8
        self.compute_type_is_set = self.compute_dtype is not None
        self.weight = Params4bit(
            self.weight.data,
            blocksize=scheme.block_size,
            compress_statistics=scheme.double_quant,
            quant_type=scheme.codebook,
            module=self,
        )

    @property
    def quant_state(self) -> QuantState | None:
        """The weight's statistics; kept here, too, for a weight that sharding strips to a plain tensor."""
        state = getattr(self.weight, "quant_state", None)
        return self._stripped_state if state is None else state

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self._stripped_state = state

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is in 4 bits."""
        return self.quant_state is not None

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weight before it was quantized."""
        state = self.quant_state
        return self.weight.dtype if state is None or state.dtype is None else state.dtype

    def set_compute_type(self, x: torch.Tensor) -> None:
        """Take float32 or bfloat16 of ``x`` as the compute dtype; float16 keeps the given one.

        The forward does not call this: without a compute dtype every call computes in its own dtype.
        """
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype == torch.float32:
            warnings.warn(
                "qbits::set_compute_type: compute_dtype must be float16 for speed, got float32",
                QbitsWarning,
                stacklevel=2,
            )
        self.compute_type_is_set = True

    def record(self) -> QTensor4:
        """Return the weight's tensors as the record that `qbits.functional` takes; nothing is copied."""
        state = self.quant_state
        if state is None:
            self._refuse_float()
        return state.record(self.weight)

    def _weight_arguments(self) -> tuple[Any, ...]:
        return functional.weight_arguments(self.record())

    def _tensors_of(self, record: QTensor4) -> dict[str, torch.Tensor]:
        state = QuantState.from_record(record)
        packed = record.packed.reshape(-1)
        storage = self.quant_storage if packed.numel() % self.quant_storage.itemsize == 0 else torch.uint8
        weight = Params4bit(
            packed.view(storage).reshape(-1, 1),
            quant_state=state,
            blocksize=record.block_size,
            compress_statistics=record.nested,
            quant_type=record.codebook,
            quant_storage=storage,
            module=self,
            bnb_quantized=True,
        )
        return {"weight": weight}

    def _reserve(self, record: QTensor4, device: torch.device, *, adopt: bool) -> None:
        self.scheme = self._scheme_of(record)
        weight: Any = self._tensors_of(record)["weight"]
        if not adopt:
            old = self.weight.data
            same_form = (old.dtype, old.shape, old.device) == (weight.dtype, weight.shape, device)
            memory = old if same_form else torch.empty(weight.shape, dtype=weight.dtype, device=device)
            weight = weight._with(memory, weight.quant_state.copied_to(device))
        self._replace_weight(weight)

    def _check_codebook(self, codebook: str, key: str) -> None:
        """Accept either type: the layer takes over that of the checkpoint."""

    def _move_weight(self, weight: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if type(weight) is not Params4bit:  # stripped by sharding, which moves it itself
            self._parameters["weight"] = nn.Parameter(move_bytes(weight, fn), requires_grad=False)
        elif weight.bnb_quantized:
            self._move_quantized(weight, fn)
        else:
            super()._move_weight(weight, fn)

    def _move_quantized(self, weight: Params4bit, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move bytes and statistics; the code table is a constant, made anew where the bytes have gone."""
        state = weight.quant_state
        moved = move_bytes(weight, fn)
        if state is not None:
            state = state.shared()._apply(lambda tensor: move_bytes(tensor, fn))
            fresh = QuantState.from_record(state.record(moved))
            state.code = fresh.code
            if weight.is_meta and state.state2 is not None and fresh.state2 is not None:
                state.state2.code = codebooks.dynamic_map(moved.device).clone()
        self._replace_weight(weight._with(moved, state))

    def _replace_weight(self, moved: MovingParameter) -> None:
        super()._replace_weight(moved)
        self._stripped_state = self.weight.quant_state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.weight, Params4bit):
            self.weight.module = self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if self.quant_state is not None:
            for name, tensor in self.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{name}"] = tensor if keep_vars else tensor.detach()


class LinearFP4(Linear4bit):
    """`Linear4bit` to fp4.

    >>> LinearFP4(64, 2).weight.quant_type
    'fp4'
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features,
            output_features,
            bias,
            compute_dtype,
            compress_statistics,
            type(self).default_scheme,
            quant_storage,
            device,
        )


class LinearNF4(LinearFP4):
    """`Linear4bit` to nf4.

    >>> LinearNF4(64, 2).weight.quant_type
    'nf4'
    """

    default_scheme = "nf4"
