"""Tensors in 4-bit codes: quantize, dequantize, pack, unpack."""

from __future__ import annotations

from typing import Any

import torch

from qbits import ops, outputs
from qbits.functional.expect import expect
from qbits.interop import contiguous, dtype_of, in_kind
from qbits.records import QTensor4

__all__ = ["dequantize_4bit", "pack_4bit", "quantize_4bit", "unpack_4bit"]


def quantize_4bit(
    input: Any, *, codebook: str = "nf4", block_size: int = 64, double_quant: bool = False
) -> QTensor4:
    """Quantize to 4-bit codes with one absmax per block of the flat row-major order.

    ``code[i] = nearest(codebook, input[i] / absmax[i // block_size])``; ``double_quant`` quantizes the
    absmax values, too.

    Shapes: input any; packed [ceil_div(n, 2)]; absmax [ceil_div(n, block_size)].
    Dtypes: float32, float16, bfloat16.
    Raises: DtypeError; ValueError for a block size or a codebook that is none.
    Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.

    >>> quantize_4bit(torch.tensor([[1.0, -0.5], [0.0, 2.0]])).packed.tolist()
    [196, 127]
    """
    source = contiguous(input)
    packed, absmax = ops.quantize_4bit(source, codebook, block_size)
    scale = offset = None
    if double_quant:
        absmax, scale, offset = ops.quantize_absmax(absmax)
        scale, offset = in_kind(scale, input), in_kind(offset, input)
    shape = tuple(input.shape)
    return QTensor4(
        in_kind(packed, input),
        in_kind(absmax, input),
        shape,
        dtype_of(input),
        codebook,
        block_size,
        scale,
        offset,
    )


def dequantize_4bit(q: QTensor4, *, dtype: torch.dtype | None = None, out: Any = None) -> Any:
    """Decode a 4-bit tensor: ``codebook[code] * absmax`` in float32, then one rounding to ``dtype``.

    Shapes: result q.shape.
    Dtypes: float32, float16, bfloat16; None is the dtype that was quantized.
    Raises: ShapeError where the lengths in ``q`` or ``out`` do not fit q.shape; DtypeError.
    Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.

    >>> dequantize_4bit(quantize_4bit(torch.tensor([[1.0, -1.0]]))).tolist()
    [[1.0, -1.0]]
    """
    expect(q, QTensor4, "dequantize_4bit", "quantize_4bit")
    dtype = q.dtype if dtype is None else dtype
    tensors = [None if t is None else contiguous(t) for t in _tensors_4bit(q)]
    packed, absmax, scale, offset, table = tensors

    def decode(flat: Any) -> Any:
        return ops.dequantize_4bit(
            packed, absmax, q.num_elements, q.codebook, q.block_size, dtype, scale, offset, table, out=flat
        )

    return outputs.fill("dequantize_4bit", decode, out, q.packed, tuple(q.shape), dtype, tensors)


def pack_4bit(codes: Any, *, codebook: str = "nf4") -> Any:
    """Put two codes into a byte, the even element in the high four bits; the zero code pads an odd count.

    Shapes: codes any; result [ceil_div(n, 2)].
    Dtypes: uint8.
    Raises: DtypeError; ValueError for an unknown codebook.
    Reference: arXiv:2305.14314, section 3.

    >>> pack_4bit(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist()
    [18, 55]
    """
    return in_kind(ops.pack_4bit(contiguous(codes), codebook), codes)


def unpack_4bit(packed: Any, num_elements: int) -> Any:
    """Return one code per element, the inverse of `pack_4bit`.

    Shapes: packed, ceil_div(num_elements, 2) bytes; result [num_elements].
    Dtypes: uint8.
    Raises: DtypeError; ShapeError where the number of bytes does not fit.
    Reference: arXiv:2305.14314, section 3.

    >>> unpack_4bit(torch.tensor([18, 55], dtype=torch.uint8), 3).tolist()
    [1, 2, 3]
    """
    return in_kind(ops.unpack_4bit(contiguous(packed), num_elements), packed)


def _tensors_4bit(q: QTensor4) -> tuple[Any, ...]:
    return q.packed, q.absmax, q.absmax_scale, q.absmax_offset, q.absmax_codebook
