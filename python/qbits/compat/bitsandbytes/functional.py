"""bitsandbytes' quantizers: its argument names, defaults and tuples over `qbits.functional`.

Reference: Dettmers et al., QLoRA, arXiv:2305.14314; 8-bit Optimizers via Block-wise Quantization,
    arXiv:2110.02861.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits import codebooks, functional, ops, outputs
from qbits.codebooks import create_dynamic_map, create_fp8_map, create_linear_map, create_normal_map
from qbits.compat.bitsandbytes.autograd._functions import matmul_4bit
from qbits.compat.bitsandbytes.functional_gemm_int8 import (
    batched_igemm,
    igemm,
    int8_linear_matmul,
    int8_mm_dequant,
)
from qbits.compat.bitsandbytes.functional_int8 import (
    double_quant,
    int8_double_quant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from qbits.compat.bitsandbytes.state import QuantState, flat_bytes
from qbits.errors import ArgumentValueError, ShapeError
from qbits.records import QTensor4, QTensor8

__all__ = [
    "QuantState",
    "batched_igemm",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "dequantize_no_absmax",
    "double_quant",
    "gemv_4bit",
    "get_4bit_type",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "quantize",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "quantize_no_absmax",
]

_STORAGE_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


def get_4bit_type(
    typename: str, device: torch.device | str | None = None, blocksize: int = 64
) -> torch.Tensor:
    """Return the 16 values of a 4-bit type, in the order of its codes.

    >>> get_4bit_type("fp4")[3].item()
    1.0
    """
    return codebooks.get_4bit_type(typename, device, blocksize)


def quantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize to 4 bits; the packed bytes are (p, 1) of ``quant_storage``, a bit view only.

    Given ``absmax`` and ``out`` buffers are filled and used.

    Raises: ValueError for an unknown type, block size or storage, and for a storage that the bytes do not
        fill.

    >>> quantize_4bit(torch.zeros(128), quant_type="nf4")[0].shape
    torch.Size([64, 1])
    """
    if quant_type not in ("nf4", "fp4"):
        raise ArgumentValueError(
            f"qbits::quantize_4bit: quant_type must be one of ['nf4', 'fp4'], got {quant_type!r}"
        )
    if quant_storage not in _STORAGE_DTYPES:
        raise ArgumentValueError(
            "qbits::quantize_4bit: quant_storage must be uint8, float16, bfloat16 or float32, "
            f"got {quant_storage}"
        )
    num_bytes = -(-A.numel() // 2)
    if num_bytes % quant_storage.itemsize:
        raise ArgumentValueError(
            f"qbits::quantize_4bit: quant_storage must divide {num_bytes} packed bytes, got {quant_storage}"
        )
    q = functional.quantize_4bit(
        A, codebook=quant_type, block_size=64 if blocksize is None else blocksize, double_quant=False
    )
    if absmax is not None:
        q = _with(q, absmax=_into(absmax, q.absmax, "quantize_4bit", "absmax"))
    if compress_statistics:
        codes, scale, offset = ops.quantize_absmax(q.absmax)
        q = _with(q, absmax=codes, absmax_scale=scale, absmax_offset=offset)
    packed = q.packed.view(quant_storage).reshape(-1, 1)
    if out is not None:
        packed = _into(out, packed, "quantize_4bit", "out")
    return packed, QuantState.from_record(q)


def _with(q: QTensor4, **changes: Any) -> QTensor4:
    fields = {name: getattr(q, name) for name in QTensor4.__dataclass_fields__}
    return QTensor4(**{**fields, **changes})


def _into(buffer: torch.Tensor, values: torch.Tensor, op: str, name: str) -> torch.Tensor:
    """Copy ``values`` into a caller's buffer of the same dtype and number of elements."""
    outputs.refuse_gradient(op, buffer, False)
    if buffer.dtype != values.dtype or buffer.numel() != values.numel():
        raise ShapeError(
            f"qbits::{op}: {name} must have {values.numel()} elements of {values.dtype}, "
            f"got {list(buffer.shape)} of {buffer.dtype}"
        )
    return buffer.copy_(values.reshape(buffer.shape))


def quantize_fp4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Return `quantize_4bit` to fp4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Return `quantize_4bit` to nf4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> torch.Tensor:
    """Decode packed bytes; a tensor of shape (1, p) gives the transposed matrix.

    Shape and dtype come from the state, or, with ``absmax`` alone, from ``out``.

    Raises: ValueError where neither a state nor absmax and out are given; ShapeError for lengths that do
        not fit.

    >>> dequantize_4bit(*quantize_4bit(torch.tensor([[1.0, -1.0]]))).tolist()
    [[1.0, -1.0]]
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ArgumentValueError(
                "qbits::dequantize_4bit: quant_state must be given, or absmax and out, got neither"
            )
        size = 64 if blocksize is None else blocksize
        q = QTensor4(flat_bytes(A), absmax.reshape(-1), tuple(out.shape), out.dtype, quant_type, size)
    else:
        q = quant_state.record(A)
    result: torch.Tensor = functional.dequantize_4bit(q, out=out)
    transposed = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return result.t() if transposed and result.dim() == 2 else result


def dequantize_fp4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """Return `dequantize_4bit` of fp4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """Return `dequantize_4bit` of nf4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> torch.Tensor:
    """Multiply one row by a 4-bit weight: ``A @ W.T``.

    Shapes: A, one row [*, K]; result [*, N].
    Raises: ValueError without a state and for a transposed flag that is set; ShapeError for more than one
        row.

    >>> gemv_4bit(torch.ones(1, 2), *quantize_4bit(torch.tensor([[1.0, -1.0]]))[:1], state=quantize_4bit(
    ...     torch.tensor([[1.0, -1.0]]))[1]).tolist()
    [[0.0]]
    """
    if transposed_A is not False or transposed_B is not False:
        raise ArgumentValueError(
            "qbits::gemv_4bit: transposed_A and transposed_B must be False, "
            f"got {transposed_A} and {transposed_B}"
        )
    if state is None:
        raise ArgumentValueError("qbits::gemv_4bit: state must be a QuantState, got None")
    if A.dim() == 0 or A.numel() != A.shape[-1]:
        raise ShapeError(f"qbits::gemv_4bit: A must be one row, got shape {list(A.shape)}")
    with torch.no_grad():
        return matmul_4bit(A, B, state, out=out)


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize to codes of a 256-entry map; ``nested`` quantizes the absmax values with the same block size.

    Given ``absmax`` and ``out`` buffers are filled and used.

    >>> quantize_blockwise(torch.zeros(3))[0].tolist()
    [127, 127, 127]
    """
    q = functional.quantize_blockwise(A, codebook=code, block_size=blocksize)
    codes = q.codes if out is None else _into(out, q.codes, "quantize_blockwise", "out")
    scales = q.absmax if absmax is None else _into(absmax, q.absmax, "quantize_blockwise", "absmax")
    offset = state2 = None
    if nested:
        offset = scales.mean()
        scales, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
    table = q.codebook.clone() if code is None else q.codebook
    state = QuantState(scales, A.shape, table, blocksize, dtype=A.dtype, offset=offset, state2=state2)
    return codes, state


def dequantize_blockwise(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> torch.Tensor:
    """Decode codes of a 256-entry map, in the state's dtype, or in float32 with ``absmax`` alone.

    ``nested`` is read from the state; the argument is accepted and not needed.

    Raises: ValueError where neither a state nor absmax is given; ShapeError for lengths that do not fit.

    >>> dequantize_blockwise(*quantize_blockwise(torch.tensor([0.0, 2.0]))).tolist()
    [0.0, 2.0]
    """
    if quant_state is None:
        if absmax is None:
            raise ArgumentValueError(
                "qbits::dequantize_blockwise: quant_state or absmax must be given, got neither"
            )
        quant_state = QuantState(absmax, A.shape, code, blocksize, dtype=torch.float32)
    scales = quant_state.absmax
    if quant_state.state2 is not None and quant_state.offset is not None:
        scales = dequantize_blockwise(scales, quant_state.state2) + quant_state.offset
    dtype = quant_state.dtype or torch.float32
    table = codebooks.dynamic_map(A.device) if quant_state.code is None else quant_state.code
    q = QTensor8(A, scales, tuple(A.shape), dtype, table, quant_state.blocksize)
    result: torch.Tensor = functional.dequantize_blockwise(q, out=out)
    return result


def quantize(
    A: torch.Tensor, code: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Quantize to codes of a 256-entry map with one absmax for the whole tensor; the state is (absmax, code).

    >>> quantize(torch.tensor([0.0, 3.0]))[1][0].item()
    3.0
    """
    q = functional.quantize(A, codebook=code)
    codes = q.codes if out is None else _into(out, q.codes, "quantize", "out")
    return codes, (q.absmax, q.codebook.clone() if code is None else q.codebook)


def dequantize(
    A: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor] | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode codes that have one absmax, to float32.

    Raises: ValueError where neither a state nor absmax is given.

    >>> dequantize(*quantize(torch.tensor([0.0, 3.0]))).tolist()
    [0.0, 3.0]
    """
    if state is None:
        if absmax is None:
            raise ArgumentValueError("qbits::dequantize: state or absmax must be given, got neither")
        state = (absmax, codebooks.dynamic_map(A.device) if code is None else code)
    q = QTensor8(A, state[0], tuple(A.shape), torch.float32, state[1], None)
    result: torch.Tensor = functional.dequantize(q, out=out)
    return result


def quantize_no_absmax(A: torch.Tensor, code: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Quantize values that are already scaled: the nearest entry of ``code``.

    >>> quantize_no_absmax(torch.tensor([0.0, 1.0]), create_dynamic_map()).tolist()
    [127, 255]
    """
    codes: torch.Tensor = functional.quantize_no_absmax(A, code, out=out)
    return codes


def dequantize_no_absmax(
    A: torch.Tensor, code: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Look codes up, in float32.

    >>> dequantize_no_absmax(torch.tensor([127, 255], dtype=torch.uint8), create_dynamic_map()).tolist()
    [0.0, 1.0]
    """
    values: torch.Tensor = functional.dequantize_no_absmax(A, code, out=out)
    return values
