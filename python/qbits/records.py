"""The records of quantized tensors: frozen, and nodes of torch's pytrees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["QRows8", "QTensor4", "QTensor8", "QWeight8"]


@dataclass(frozen=True, eq=False)
class QTensor4:
    """A tensor of ``n = prod(shape)`` elements in 4-bit codes, one ``absmax`` per block of the flat order.

    Element ``i`` is ``codebook[code[i]] * absmax[i // block_size]``. The last three fields are None unless
    the absmax values are quantized themselves (nested): then ``absmax`` holds codes and a block's absmax is
    ``absmax_codebook[absmax[j]] * absmax_scale[j // 256] + absmax_offset``, rounded after the product and
    after the sum.

    Shapes: packed, ceil_div(n, 2) bytes in any contiguous shape; absmax, ceil_div(n, block_size) elements.
    Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
    """

    packed: Any  # uint8, element 2j in the high nibble of byte j
    absmax: Any  # float32; uint8 codes when nested
    shape: tuple[int, ...]  # of the tensor that was quantized
    dtype: torch.dtype  # of the tensor that was quantized, and of what dequantizing returns
    codebook: str  # "nf4", "fp4" or "af4"
    block_size: int
    absmax_scale: Any = None  # float32 [ceil_div(num_blocks, 256)]
    absmax_offset: Any = None  # float32, one element
    absmax_codebook: Any = None  # float32 [256]; None is the signed dynamic map

    @property
    def nested(self) -> bool:
        """Whether the absmax values are themselves quantized."""
        return self.absmax_scale is not None

    @property
    def num_elements(self) -> int:
        """Number of elements of the tensor that was quantized."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class QTensor8:
    """A tensor in 8-bit codes of a 256-entry map, one ``absmax`` per block, or one where block_size is None.

    Element ``i`` is ``codebook[codes[i]] * absmax[i // block_size]``.

    Shapes: codes as the tensor; absmax [ceil_div(n, block_size)], or [] for the whole tensor; codebook [256].
    Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.
    """

    codes: Any  # uint8
    absmax: Any  # float32
    shape: tuple[int, ...]
    dtype: torch.dtype
    codebook: Any  # float32 [256], ascending
    block_size: int | None


@dataclass(frozen=True, eq=False)
class QWeight8:
    """The weight of a linear layer in int8, one scale per row: ``values[n, k] * scales[n] / 127``.

    Shapes: values [N, K]; scales [N].
    Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2.1.
    """

    values: Any  # int8
    scales: Any  # float32, the largest absolute value of each row
    dtype: torch.dtype | None  # of the weight that was quantized; None where a file does not tell

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.values.shape)


@dataclass(frozen=True, eq=False)
class QRows8:
    """int8 codes with one scale per row, per column, or for all: element ``values * scales / 127``.

    Transposing quantizers give transposed values. Columns of ``outlier_mask`` have codes of 0: they stay in
    the tensor that was quantized.

    Shapes: values [M, K] or [K, M]; scales [M], [K] or [1]; outlier_mask [K].
    Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, sections 2 and 3.
    """

    values: Any  # int8, -127 to 127
    scales: Any  # float32, largest magnitudes
    outlier_mask: Any = None  # bool; None where no threshold was given

    @property
    def pair(self) -> tuple[Any, Any]:
        """Values and scales, as the decoders and products take them."""
        return self.values, self.scales


def _register(record: type, leaves: tuple[str, ...], rest: tuple[str, ...]) -> None:
    """Make ``record`` a pytree node: ``leaves`` that are not None are its children, all else its context."""

    def flatten(q: Any) -> tuple[list[Any], tuple[Any, ...]]:
        present = tuple(name for name in leaves if getattr(q, name) is not None)
        return [getattr(q, name) for name in present], (present, *(getattr(q, name) for name in rest))

    def flatten_with_keys(q: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children, context = flatten(q)
        return [
            (pytree.GetAttrKey(name), child) for name, child in zip(context[0], children, strict=True)
        ], context

    def unflatten(children: Any, context: Any) -> Any:
        return record(
            **dict(zip(context[0], children, strict=True)), **dict(zip(rest, context[1:], strict=True))
        )

    def dump(context: Any) -> list[Any]:
        return [
            str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for value in context
        ]

    def restore(dumped: Any) -> tuple[Any, ...]:
        as_read = {"shape": tuple, "dtype": lambda name: name and getattr(torch, name)}
        values = (
            as_read.get(name, lambda value: value)(value)
            for name, value in zip(rest, dumped[1:], strict=True)
        )
        return (tuple(dumped[0]), *values)

    pytree.register_pytree_node(
        record,
        flatten,
        unflatten,
        serialized_type_name=f"{record.__module__}.{record.__qualname__}",
        to_dumpable_context=dump,
        from_dumpable_context=restore,
        flatten_with_keys_fn=flatten_with_keys,
    )


_register(
    QTensor4,
    ("packed", "absmax", "absmax_scale", "absmax_offset", "absmax_codebook"),
    ("shape", "dtype", "codebook", "block_size"),
)
_register(QTensor8, ("codes", "absmax", "codebook"), ("shape", "dtype", "block_size"))
_register(QWeight8, ("values", "scales"), ("dtype",))
_register(QRows8, ("values", "scales", "outlier_mask"), ())
