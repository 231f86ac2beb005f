"""Quantize, dequantize, multiply tensors of any shape and stride; here alone autograd or the op is picked.

Without a gradient every call takes arrays of any framework that speaks DLPack, and answers in that framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qbits import codebooks, ops, outputs
from qbits.autograd import Gemm4bit
from qbits.codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from qbits.errors import ArgumentTypeError, ArgumentValueError, NotQuantizedError, ShapeError
from qbits.interop import FLOATS, contiguous, dtype_of, in_kind
from qbits.records import QTensor4, QTensor8

# bound here: a forward asks both, and every dot on the way takes 15 to 25 ns
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled

__all__ = [
    "QTensor4",
    "QTensor8",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_no_absmax",
    "get_4bit_type",
    "linear_4bit",
    "pack_4bit",
    "quantize",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_no_absmax",
    "unpack_4bit",
]


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
    _expect(q, QTensor4, "dequantize_4bit", "quantize_4bit")
    dtype = q.dtype if dtype is None else dtype
    tensors = [None if t is None else contiguous(t) for t in _tensors_4bit(q)]
    packed, absmax, scale, offset, table = tensors

    def decode(flat: Any) -> Any:
        return ops.dequantize_4bit(
            packed, absmax, q.num_elements, q.codebook, q.block_size, dtype, scale, offset, table, out=flat
        )

    return outputs.fill("dequantize_4bit", decode, out, q.packed, tuple(q.shape), dtype, tensors)


def linear_4bit(
    input: Any,
    weight: QTensor4,
    bias: Any = None,
    *,
    compute_dtype: torch.dtype | None = None,
    out: Any = None,
) -> Any:
    """Multiply by a frozen 4-bit weight: ``output = input @ dequantize(weight).T + bias``, summed in float32.

    Operands are rounded to ``compute_dtype``, or to the output's dtype: autocast's where it is on, else the
    input's. Gradients flow to input and bias.

    Shapes: input [*, K]; weight.shape (N, K); bias [N]; result [*, N].
    Dtypes: float32, float16, bfloat16 for input and bias, in any mixture.
    Raises: ShapeError, DtypeError, DeviceError; NotQuantizedError for a float weight; RuntimeError for
        ``out`` where a gradient would be recorded.
    Reference: Dettmers et al., QLoRA, arXiv:2305.14314, equation 5.

    >>> linear_4bit(torch.ones(3, 2), quantize_4bit(torch.tensor([[1.0, -1.0]]))).tolist()
    [[0.0], [0.0], [0.0]]
    """
    if type(weight) is not QTensor4:
        _expect(weight, QTensor4, "linear_4bit", "quantize_4bit")
    if len(weight.shape) != 2:
        raise ShapeError(
            f"qbits::linear_4bit: weight must have 2 dimensions, got shape {tuple(weight.shape)}"
        )
    return multiply_4bit(input, weight_arguments(weight), bias, compute_dtype, out)


def weight_arguments(weight: QTensor4) -> tuple[Any, ...]:
    """Return what `ops.gemm_4bit` takes of a weight, in its order: the bias stands before the last three."""
    N, K = weight.shape
    return (
        weight.packed,
        weight.absmax,
        N,
        K,
        weight.codebook,
        weight.block_size,
        weight.absmax_scale,
        weight.absmax_offset,
        weight.absmax_codebook,
    )


def multiply_4bit(
    input: Any, weight: tuple[Any, ...], bias: Any, compute_dtype: torch.dtype | None, out: Any = None
) -> Any:
    """Compute `linear_4bit` with a weight given as `weight_arguments` does."""
    packed, absmax, N, K, codebook, block_size, scale, offset, table = weight
    shape = input.shape
    if not shape or shape[-1] != K:
        raise ShapeError(f"qbits::linear_4bit: input must have shape [*, {K}], got {list(shape)}")
    if not isinstance(input, torch.Tensor):
        return _linear_4bit_foreign(input, weight, bias, compute_dtype, out)
    rows, dtype = input, None  # None: the input's
    if compute_dtype is not None or _is_any_autocast_enabled():
        rows, dtype = _rounded(input, compute_dtype)
    rows = rows.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    recorded = _is_grad_enabled() and (rows.requires_grad or (bias is not None and bias.requires_grad))
    if out is not None:
        outputs.refuse_gradient("linear_4bit", out, recorded)
        return _linear_4bit_into(out, input, rows, weight, bias, input.dtype if dtype is None else dtype)
    product = Gemm4bit.apply if recorded else ops.gemm_4bit
    result = product(rows, packed, absmax, N, K, codebook, block_size, bias, scale, offset, table)
    return result if dtype is None or result.dtype == dtype else result.to(dtype)


def _rounded(input: torch.Tensor, compute_dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.dtype]:
    """Return the input as operand, and the dtype of the output: autocast's where it is on."""
    dtype, device_type = input.dtype, input.device.type
    if dtype in FLOATS and device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    operand_dtype = dtype if compute_dtype is None else compute_dtype
    return (input if input.dtype == operand_dtype else input.to(operand_dtype)), dtype


def _gemm_4bit(rows: Any, weight: tuple[Any, ...], bias: Any, out: Any) -> Any:
    packed, absmax, N, K, codebook, block_size, scale, offset, table = weight
    return ops.gemm_4bit(
        rows, packed, absmax, N, K, codebook, block_size, bias, scale, offset, table, out=out
    )


def _linear_4bit_into(
    out: torch.Tensor,
    input: torch.Tensor,
    rows: torch.Tensor,
    weight: tuple[Any, ...],
    bias: Any,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Fill ``out``; through a copy where it is strided or the operands are rounded to another dtype."""
    shape = (*input.shape[:-1], weight[2])

    def multiply(flat: Any) -> Any:
        target = None if flat is None else flat.view(shape)
        return _gemm_4bit(rows, weight, bias, target)

    direct = rows.dtype == dtype
    inputs = [input, bias, *weight]
    outputs.fill("linear_4bit", multiply, out, input, shape, dtype, inputs, direct=direct)
    return out


def _linear_4bit_foreign(input: Any, weight: tuple[Any, ...], bias: Any, compute_dtype: Any, out: Any) -> Any:
    """Multiply an array of another framework, in its own dtype."""
    if compute_dtype is not None:
        raise ArgumentValueError(
            f"qbits::linear_4bit: compute_dtype must be None for a foreign array, got {compute_dtype}"
        )
    result = _gemm_4bit(contiguous(input), weight, bias, out)
    return result if out is not None else in_kind(result, input, (*input.shape[:-1], weight[2]))


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
    _expect(q, QTensor8, op, "quantize_blockwise")
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

    >>> dequantize_no_absmax(torch.tensor([127, 255], dtype=torch.uint8), create_dynamic_map()).tolist()
    [0.0, 1.0]
    """
    table = codebooks.table_for(codes, codebook, "dequantize_no_absmax")
    source = contiguous(codes)

    def decode(flat: Any) -> Any:
        return ops.dequantize_no_absmax(source, table, dtype, out=flat)

    return outputs.fill("dequantize_no_absmax", decode, out, codes, tuple(codes.shape), dtype, [codes, table])


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


def _expect(q: Any, record: type, op: str, maker: str) -> None:
    """Raise unless ``q`` is a record; a float tensor in its place is a weight that was not quantized yet."""
    if isinstance(q, record):
        return
    rule = f"qbits::{op}: weight must be a {record.__name__}, which {maker}() makes, got {type(q).__name__}"
    raise NotQuantizedError(rule) if isinstance(q, torch.Tensor) else ArgumentTypeError(rule)
