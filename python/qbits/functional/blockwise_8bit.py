"""Tensors in codes of a 256-entry map, with a scale for each block, for the whole tensor, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qbits import codebooks, ops, outputs
from qbits.functional.expect import expect
from qbits.interop import contiguous, dtype_of, in_kind
from qbits.records import QTensor8

__all__ = [
    "dequantize",
    "dequantize_blockwise",
    "dequantize_no_absmax",
    "quantize",
    "quantize_blockwise",
    "quantize_no_absmax",
]


def quantize_blockwise(
    input: Any, *, codebook: Any = None, block_size: int = 256, out: tuple[Any, Any] | None = None
) -> QTensor8:
    """Quantize to codes of a 256-entry map with one absmax per block of the flat row-major order.

    ``codes[i] = nearest(codebook, input[i] / absmax[i // block_size])``, ties to the even index.

    Shapes: input any; codebook [256], the signed dynamic map if None; ``out`` is (codes, absmax).
    Dtypes: float32, float16, bfloat16.
    Raises: DtypeError; ShapeError and ValueError for a codebook or a block size that does not fit.
    Reference: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.

    >>> quantize_blockwise(torch.tensor([0.0, 1.0])).codes.tolist()
    [127, 255]
    """
    table = codebooks.table_for(input, codebook, "quantize_blockwise")
    source = contiguous(input)

    def encode(targets: Any) -> Any:
        return ops.quantize_blockwise(source, table, block_size, out=targets)

    return _record8("quantize_blockwise", encode, input, codebook, table, block_size, out)


def quantize(input: Any, *, codebook: Any = None, out: tuple[Any, Any] | None = None) -> QTensor8:
    """Quantize to codes of a 256-entry map with one absmax for the whole tensor.

    ``codes[i] = nearest(codebook, input[i] / max |input|)``, ties to the even index.

    Shapes: input any; codebook [256], the signed dynamic map if None; ``out`` is (codes, absmax []).
    Dtypes: float32, float16, bfloat16.
    Raises: DtypeError; ShapeError and ValueError for a codebook that does not fit.
    Reference: Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, section 2.

    >>> quantize(torch.tensor([0.0, 3.0])).absmax.item()
    3.0
    """
    table = codebooks.table_for(input, codebook, "quantize")
    source = contiguous(input)

    def encode(targets: Any) -> Any:
        return ops.quantize(source, table, out=targets)

    return _record8("quantize", encode, input, codebook, table, None, out)


def _record8(
    op: str,
    encode: Callable[[Any], Any],
    input: Any,
    codebook: Any,
    table: Any,
    block_size: int | None,
    out: tuple[Any, Any] | None,
) -> QTensor8:
    """Encode, into ``out`` (codes, absmax) where it is given."""
    shape = tuple(input.shape)
    if out is None or not isinstance(out[0], torch.Tensor):
        codes, absmax = encode(out)
    else:
        blocks = () if block_size is None else (-(-input.numel() // block_size),)
        due = [(shape, torch.uint8), (blocks, torch.float32)]
        outputs.fill_all(op, encode, out, input, due, [input, table])
        codes, absmax = out
    table = table if codebook is None else codebook
    return QTensor8(
        in_kind(codes, input, shape), in_kind(absmax, input), shape, dtype_of(input), table, block_size
    )


def dequantize_blockwise(q: QTensor8, *, dtype: torch.dtype | None = None, out: Any = None) -> Any:
    """Decode an 8-bit tensor: ``codebook[codes] * absmax`` in float32, then one rounding to ``dtype``.

    Shapes: result q.shape.
    Dtypes: float32, float16, bfloat16; None is the dtype that was quantized.
    Raises: ShapeError where the lengths in ``q`` or ``out`` do not fit q.shape; DtypeError.
    Reference: arXiv:2110.02861, section 2.

    >>> dequantize_blockwise(quantize_blockwise(torch.tensor([0.0, 2.0]))).tolist()
    [0.0, 2.0]
    """
    return _dequantize8(q, "dequantize_blockwise", dtype, out)


def dequantize(q: QTensor8, *, dtype: torch.dtype | None = None, out: Any = None) -> Any:
    """Decode an 8-bit tensor that has one absmax: ``codebook[codes] * absmax``, one rounding to ``dtype``.

    Shapes: result q.shape.
    Dtypes: float32, float16, bfloat16; None is the dtype that was quantized.
    Raises: ShapeError where the lengths in ``q`` or ``out`` do not fit q.shape; DtypeError.
    Reference: arXiv:1511.04561, section 2.

    >>> dequantize(quantize(torch.tensor([0.0, 2.0]))).tolist()
    [0.0, 2.0]
    """
    return _dequantize8(q, "dequantize", dtype, out)


def _dequantize8(q: QTensor8, op: str, dtype: torch.dtype | None, out: Any) -> Any:
    expect(q, QTensor8, op, "quantize_blockwise")
    dtype = q.dtype if dtype is None else dtype
    codes, absmax = contiguous(q.codes), contiguous(q.absmax)
    table = codebooks.table_for(q.codes, q.codebook, op)

    def decode(flat: Any) -> Any:
        if q.block_size is None:
            return ops.dequantize(codes, absmax, table, dtype, out=flat)
        return ops.dequantize_blockwise(codes, absmax, table, q.block_size, dtype, out=flat)

    return outputs.fill(op, decode, out, q.codes, tuple(q.shape), dtype, [codes, absmax, table])


def quantize_no_absmax(input: Any, codebook: Any, *, out: Any = None) -> Any:
    """Quantize values that are scaled already: the nearest entry of ``codebook``; what is outside saturates.

    Shapes: input any; codebook [256]; result as input.
    Dtypes: float32, float16, bfloat16 in, uint8 out.
    Raises: DtypeError; ShapeError and ValueError for a codebook that does not fit.
    Reference: arXiv:1511.04561, section 2.

    >>> from qbits.functional import create_dynamic_map
    >>> quantize_no_absmax(torch.tensor([0.0, 7.0]), create_dynamic_map()).tolist()
    [127, 255]
    """
    table = codebooks.table_for(input, codebook, "quantize_no_absmax")
    source = contiguous(input)

    def encode(flat: Any) -> Any:
        return ops.quantize_no_absmax(source, table, out=flat)

    return outputs.fill(
        "quantize_no_absmax", encode, out, input, tuple(input.shape), torch.uint8, [input, table]
    )


def dequantize_no_absmax(
    codes: Any, codebook: Any, *, dtype: torch.dtype = torch.float32, out: Any = None
) -> Any:
    """Look codes up: ``codebook[codes]``.

    Shapes: codes any; codebook [256]; result as codes.
    Dtypes: uint8 in; float32, float16, bfloat16 out.
    Raises: DtypeError; ShapeError and ValueError for a codebook that does not fit.
    Reference: arXiv:1511.04561, section 2.

    >>> from qbits.functional import create_dynamic_map
    >>> dequantize_no_absmax(torch.tensor([127, 255], dtype=torch.uint8), create_dynamic_map()).tolist()
    [0.0, 1.0]
    """
    table = codebooks.table_for(codes, codebook, "dequantize_no_absmax")
    source = contiguous(codes)

    def decode(flat: Any) -> Any:
        return ops.dequantize_no_absmax(source, table, dtype, out=flat)

    return outputs.fill("dequantize_no_absmax", decode, out, codes, tuple(codes.shape), dtype, [codes, table])
