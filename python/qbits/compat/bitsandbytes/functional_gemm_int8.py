"""bitsandbytes' products of 8-bit codes: its argument names over `qbits.functional.gemm_int8`.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339.
"""

from __future__ import annotations

import torch

from qbits import functional
from qbits.errors import DtypeError, ShapeError

__all__ = ["batched_igemm", "igemm", "int8_linear_matmul", "int8_mm_dequant"]

_INVERSE_127_SQUARED = torch.tensor(1 / 127**2, dtype=torch.float32).item()


def int8_linear_matmul(
    A: torch.Tensor, B: torch.Tensor, out: torch.Tensor | None = None, dtype: torch.dtype = torch.int32
) -> torch.Tensor:
    """Return ``A @ B.T``, exactly.

    Shapes: A [*, K]; B [N, K]; result [*, N].
    Dtypes: int8 in, int32 out.
    Raises: ShapeError, also for K beyond 131071; DtypeError.
    Reference: arXiv:2208.07339, section 2.

    >>> A = torch.tensor([[1, 2]], dtype=torch.int8)
    >>> int8_linear_matmul(A, A).tolist()
    [[5]]
    """
    if dtype != torch.int32:
        raise DtypeError(f"qbits::int8_linear_matmul: dtype must be torch.int32, got {dtype}")
    if A.dim() == 0 or B.dim() != 2:
        got = f"shapes {list(A.shape)} and {list(B.shape)}"
        raise ShapeError(f"qbits::int8_linear_matmul: A and B must have shapes [*, K] and [N, K], got {got}")
    rows = A.reshape(A.shape[:-1].numel(), A.shape[-1])
    sums: torch.Tensor = functional.gemm_int8(rows, B, out_dtype=torch.int32)
    return _into(out, sums.view(*A.shape[:-1], B.shape[0]), "int8_linear_matmul")


def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scale sums of products of codes: ``A * row_stats[:, None] * col_stats / 127**2 + bias``, in float16.

    Shapes: A [*, N]; row_stats, an element for each row; col_stats [N]; bias [N]; result as A.
    Dtypes: int32 in; float32 scales; bias float32, float16 or bfloat16; float16 out.
    Raises: ShapeError, DtypeError.
    Reference: arXiv:2208.07339, section 2.

    >>> int8_mm_dequant(torch.tensor([[127 * 127]], dtype=torch.int32), torch.ones(1), torch.ones(1)).tolist()
    [[1.0]]
    """
    if A.dtype != torch.int32:
        raise DtypeError(f"qbits::int8_mm_dequant: A must be torch.int32, got {A.dtype}")
    N = A.shape[-1] if A.dim() else 0
    lengths = {
        "row_stats": (row_stats, A.numel() // max(N, 1)),
        "col_stats": (col_stats, N),
        "bias": (bias, N),
    }
    for name, (tensor, length) in lengths.items():
        if tensor is not None and tensor.numel() != length and A.numel():
            rule = f"{name} must have {length} elements, got {tensor.numel()}"
            raise ShapeError(f"qbits::int8_mm_dequant: {rule}")
    rows = A.reshape(-1, max(N, 1)).float() * (row_stats.float().reshape(-1, 1) * _INVERSE_127_SQUARED)
    scales = col_stats.float().reshape(-1)
    if bias is None:
        scaled = rows * scales
    else:  # float64 holds the product exactly, so the sum is rounded to float32 as a fused one
        scaled = (rows.double() * scales.double() + bias.double().reshape(-1)).float()
    return _into(out, scaled.to(torch.float16).view(A.shape), "int8_mm_dequant")


def igemm(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> torch.Tensor:
    """Return ``A @ B``, exactly; of three dimensions as `batched_igemm`, or summed over the first two.

    Shapes: A [M, K] or [b, s, K]; B [K, N]; or A [b, M, K] and B [b, K, N]; or A [b, s, M] and B [b, s, N] to
        [M, N]. A transposed operand is given as [.., K, M] or [.., N, K]. Views of any strides.
    Dtypes: int8 in, int32 out.
    Raises: ShapeError, DtypeError.
    Reference: arXiv:2208.07339, section 2.

    >>> A = torch.tensor([[1, 2]], dtype=torch.int8)
    >>> igemm(A, A.t()).tolist(), igemm(A, A, transposed_A=True).tolist()
    ([[5]], [[1, 2], [2, 4]])
    """
    left, right = _turned(A, transposed_A), _turned(B, transposed_B)
    if left.dim() == 3 and right.dim() == 3:
        if left.shape[0] == right.shape[0] and left.shape[2] == right.shape[1]:
            return batched_igemm(A, B, out, transposed_A, transposed_B)
        if left.shape[:2] == right.shape[:2]:
            left, right = left.reshape(-1, left.shape[2]).t(), right.reshape(-1, right.shape[2])
    if left.dim() not in (2, 3) or right.dim() != 2 or left.shape[-1] != right.shape[0]:
        raise _mismatch("igemm", A, B)
    return _into(out, int8_linear_matmul(left, right.t()), "igemm")


def batched_igemm(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> torch.Tensor:
    """Return ``A @ B`` of each pair of matrices, exactly.

    Shapes: A [b, M, K]; B [b, K, N]; result [b, M, N]. Transposed operands are given as [b, K, M], [b, N, K].
    Dtypes: int8 in, int32 out.
    Raises: ShapeError, DtypeError.
    Reference: arXiv:2208.07339, section 2.

    >>> A = torch.ones(2, 1, 3, dtype=torch.int8)
    >>> batched_igemm(A, A, transposed_B=True).tolist()
    [[[3]], [[3]]]
    """
    left, right = _turned(A, transposed_A), _turned(B, transposed_B)
    if (
        left.dim() != 3
        or right.dim() != 3
        or left.shape[0] != right.shape[0]
        or left.shape[2] != right.shape[1]
    ):
        raise _mismatch("batched_igemm", A, B)
    sums = A.new_empty((left.shape[0], left.shape[1], right.shape[2]), dtype=torch.int32)
    for matrix, one, other in zip(sums, left, right, strict=True):
        matrix.copy_(int8_linear_matmul(one, other.t()))
    return _into(out, sums, "batched_igemm")


def _turned(x: torch.Tensor, transposed: bool) -> torch.Tensor:
    return x.transpose(-1, -2) if transposed and x.dim() > 1 else x


def _mismatch(op: str, A: torch.Tensor, B: torch.Tensor) -> ShapeError:
    got = f"shapes {list(A.shape)} and {list(B.shape)}"
    return ShapeError(f"qbits::{op}: A and B must be matrices that can be multiplied, got {got}")


def _into(out: torch.Tensor | None, result: torch.Tensor, op: str) -> torch.Tensor:
    """The result, in ``out`` where it is given."""
    if out is None:
        return result
    if out.shape != result.shape:
        raise ShapeError(f"qbits::{op}: out must have shape {list(result.shape)}, got {list(out.shape)}")
    if out.dtype != result.dtype:
        raise DtypeError(f"qbits::{op}: out must be {result.dtype}, got {out.dtype}")
    return out.copy_(result)
