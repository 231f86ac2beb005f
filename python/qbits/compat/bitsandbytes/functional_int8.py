"""bitsandbytes' int8 quantizers: its argument names and tuples over `qbits.functional`.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339.
"""

from __future__ import annotations

import torch

from qbits import functional
from qbits.errors import ArgumentValueError, ShapeError

__all__ = ["double_quant", "int8_double_quant", "int8_vectorwise_dequant", "int8_vectorwise_quant"]


def int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize every row; return codes, scales, and the columns with outliers, None without a threshold.

    Listing the columns waits for the device; nothing else here does.

    Shapes: A [*, K]; codes as A; scales [number of rows]; columns int64, ascending.
    Dtypes: float32, float16, bfloat16.
    Raises: ShapeError, DtypeError; ValueError for a negative threshold or NaN.
    Reference: arXiv:2208.07339, sections 2 and 3.

    >>> codes, scales, columns = int8_vectorwise_quant(torch.tensor([[1.0, -8.0]]), threshold=6.0)
    >>> codes.tolist(), scales.tolist(), columns.tolist()
    ([[127, 0]], [1.0], [1])
    """
    q = functional.quantize_rowwise(_rows(A, "int8_vectorwise_quant"), threshold=threshold)
    columns = None if q.outlier_mask is None else q.outlier_mask.nonzero().view(-1)
    return q.values.view(A.shape), q.scales, columns


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Decode rows: ``A * stats[row] / 127``.

    Shapes: A [*, K]; stats, an element for each row; result as A.
    Dtypes: int8 codes; float32 scales and result.
    Raises: ShapeError, DtypeError.
    Reference: arXiv:2208.07339, section 2.

    >>> int8_vectorwise_dequant(torch.tensor([[127, 0]], dtype=torch.int8), torch.tensor([2.0])).tolist()
    [[2.0, 0.0]]
    """
    rows, stats = _rows(A, "int8_vectorwise_dequant"), stats.reshape(-1)
    decoded: torch.Tensor = functional.dequantize_rowwise(rows, stats, out_dtype=torch.float32)
    return decoded.view(A.shape)


def int8_double_quant(
    A: torch.Tensor,
    col_stats: torch.Tensor | None = None,
    row_stats: torch.Tensor | None = None,
    out_col: torch.Tensor | None = None,
    out_row: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize every row and, apart from that, every column.

    Return codes by row, codes by column, scales of the rows and of the columns, and the columns with
    outliers. Outliers are codes of 0, and in no scale; codes by row are 0 in all of such a column.

    Shapes: A [*, K]; both codes as A; scales [number of rows] and [K]; columns as `int8_vectorwise_quant`.
    Dtypes: float32, float16, bfloat16.
    Raises: ShapeError, DtypeError; ValueError for a buffer, and for a negative threshold or NaN.
    Reference: arXiv:2208.07339, sections 2 and 3.

    >>> by_row, by_column, *_ = int8_double_quant(torch.tensor([[1.0, 2.0], [4.0, 2.0]]))
    >>> by_row.tolist(), by_column.tolist()
    ([[64, 127], [127, 64]], [[32, 127], [127, 127]])
    """
    buffers = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    for name, buffer in buffers.items():
        if buffer is not None:
            raise ArgumentValueError(f"qbits::int8_double_quant: {name} must be None, got a buffer")
    rows = _rows(A, "int8_double_quant")
    if threshold == 0:
        by_row, transposed = functional.quantize_dual(rows)
        by_column = transposed.values.t().contiguous()
        return by_row.values.view(A.shape), by_column.view(A.shape), by_row.scales, transposed.scales, None
    codes, scales, columns = int8_vectorwise_quant(rows, threshold)
    kept = rows.masked_fill(rows.float().abs() >= threshold, 0)
    by_columns = functional.quantize_columnwise(kept)
    return codes.view(A.shape), by_columns.values.view(A.shape), scales, by_columns.scales, columns


double_quant = int8_double_quant


def _rows(A: torch.Tensor, op: str) -> torch.Tensor:
    """All but the last dimension as one."""
    if A.dim() == 0:
        raise ShapeError(f"qbits::{op}: A must have at least 1 dimension [*, K], got shape []")
    return A.reshape(A.shape[:-1].numel(), A.shape[-1])
