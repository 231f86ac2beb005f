"""int8 codes with one scale per row, per column or for a matrix, of any stride and any framework."""

from __future__ import annotations

from typing import Any

import torch

from qbits import ops
from qbits.errors import ArgumentValueError, ShapeError
from qbits.interop import contiguous, in_kind
from qbits.records import QRows8

__all__ = [
    "dequantize_columnwise",
    "dequantize_global",
    "dequantize_rowwise",
    "quantize_columnwise",
    "quantize_columnwise_and_transpose",
    "quantize_dual",
    "quantize_global",
    "quantize_global_transpose",
    "quantize_rowwise",
]


def quantize_rowwise(input: Any, *, threshold: float = 0.0) -> QRows8:
    """Quantize every row by its largest magnitude: ``values = rint(input * (127 / scales[row]))``.

    With a threshold, columns that hold a magnitude of at least that are apart: they are marked in
    ``outlier_mask``, their codes are 0, and scales are taken over the elements below the threshold.

    Shapes: input [M, K]; values [M, K]; scales [M]; outlier_mask [K], None without a threshold.
    Dtypes: float32, float16, bfloat16.
    Raises: ShapeError, DtypeError; ValueError for a negative threshold or NaN.
    Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, sections 2 and 3.

    >>> quantize_rowwise(torch.tensor([[2.0, -1.0], [0.0, 0.0]])).values.tolist()
    [[127, -64], [0, 0]]
    """
    if not threshold >= 0:
        rule = f"qbits::quantize_rowwise: threshold must be at least 0, got {threshold}"
        raise ArgumentValueError(rule)
    if threshold == 0:
        return _record(ops.quantize_rowwise(contiguous(input)), input)
    return _record(ops.quantize_rowwise_outliers(contiguous(input), threshold), input)


def quantize_columnwise(input: Any) -> QRows8:
    """Quantize every column by its largest magnitude: ``values = rint(input * (127 / scales[column]))``.

    Shapes: input [M, K]; values [M, K]; scales [K].
    Dtypes: float32, float16, bfloat16.
    Raises: ShapeError, DtypeError.
    Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.

    >>> quantize_columnwise(torch.tensor([[2.0, -1.0], [1.0, 4.0]])).scales.tolist()
    [2.0, 4.0]
    """
    return _record(ops.quantize_columnwise(contiguous(input)), input)


def quantize_columnwise_and_transpose(input: Any) -> QRows8:
    """Quantize every column and transpose: the values of `quantize_columnwise`, [K, M].

    Shapes: input [M, K]; values [K, M]; scales [K].
    Dtypes: float32, float16, bfloat16.
    Raises: ShapeError, DtypeError.
    Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.

    >>> quantize_columnwise_and_transpose(torch.tensor([[2.0, -4.0], [1.0, 4.0]])).values.tolist()
    [[127, 64], [-127, 127]]
    """
    return _record(ops.quantize_columnwise_and_transpose(contiguous(input)), input)


def quantize_global(input: Any) -> QRows8:
    """Quantize by the largest magnitude of the matrix: ``values = rint(input * (127 / scales[0]))``.

    Shapes: input [M, K]; values [M, K]; scales [1].
    Dtypes: float32, float16, bfloat16.
    Raises: ShapeError, DtypeError.
    Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.

    >>> quantize_global(torch.tensor([[2.0, -1.0], [1.0, 4.0]])).values.tolist()
    [[64, -32], [32, 127]]
    """
    if len(input.shape) != 2:  # the op takes any number of rows
        got = f"shape {list(input.shape)}"
        raise ShapeError(f"qbits::quantize_global: input must have 2 dimensions [M, K], got {got}")
    return _record(ops.quantize_global(contiguous(input)), input)


def quantize_global_transpose(input: Any) -> QRows8:
    """Quantize by the largest magnitude and transpose: the values of `quantize_global`, [K, M].

    Shapes: input [M, K]; values [K, M]; scales [1].
    Dtypes: float32, float16, bfloat16.
    Raises: ShapeError, DtypeError.
    Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.

    >>> quantize_global_transpose(torch.tensor([[2.0, -1.0], [1.0, 4.0]])).values.tolist()
    [[64, 32], [-32, 127]]
    """
    return _record(ops.quantize_global_transpose(contiguous(input)), input)


def quantize_dual(input: Any, *, mode: str = "row") -> tuple[QRows8, QRows8]:
    """Quantize a weight for the forward, and transposed for the backward, from one tensor.

    Mode "row" gives `quantize_rowwise` and `quantize_columnwise_and_transpose`, mode "global"
    `quantize_global` and `quantize_global_transpose`, to the bit.

    Shapes: input [N, K]; values [N, K] and [K, N]; scales [N] and [K], or [1] and the same.
    Dtypes: float32, float16, bfloat16.
    Raises: ShapeError, DtypeError; ValueError for another mode.
    Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.

    >>> [q.scales.tolist() for q in quantize_dual(torch.tensor([[2.0, -1.0], [1.0, 4.0]]))]
    [[2.0, 4.0], [2.0, 4.0]]
    """
    if mode == "row":
        values, scales, transposed, transposed_scales = ops.quantize_dual_rowwise(contiguous(input))
        return _record((values, scales), input), _record((transposed, transposed_scales), input)
    if mode == "global":
        values, transposed, scales = ops.quantize_dual_global(contiguous(input))
        plain = _record((values, scales), input)
        return plain, QRows8(in_kind(transposed, input), plain.scales)
    raise ArgumentValueError(f'qbits::quantize_dual: mode must be one of ["row", "global"], got "{mode}"')


def dequantize_rowwise(values: Any, scales: Any, *, out_dtype: torch.dtype) -> Any:
    """Decode codes of rows: ``values * scales[row] / 127`` in float32, then one rounding to ``out_dtype``.

    Shapes: values [M, K]; scales [M]; result [M, K].
    Dtypes: int8 values; float32 scales; ``out_dtype`` float32, float16 or bfloat16.
    Raises: ShapeError, DtypeError, DeviceError.
    Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2.

    >>> dequantize_rowwise(*quantize_rowwise(torch.tensor([[2.0, 0.0]])).pair, out_dtype=torch.float32)
    tensor([[2., 0.]])
    """
    return in_kind(ops.dequantize_rowwise(contiguous(values), contiguous(scales), out_dtype), values)


def dequantize_columnwise(values: Any, scales: Any, *, out_dtype: torch.dtype) -> Any:
    """Decode codes of columns: ``values * scales[column] / 127``, then one rounding to ``out_dtype``.

    Shapes: values [M, K]; scales [K]; result [M, K].
    Dtypes: int8 values; float32 scales; ``out_dtype`` float32, float16 or bfloat16.
    Raises: ShapeError, DtypeError, DeviceError.
    Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.

    >>> dequantize_columnwise(*quantize_columnwise(torch.tensor([[2.0, 0.0]])).pair, out_dtype=torch.float32)
    tensor([[2., 0.]])
    """
    return in_kind(ops.dequantize_columnwise(contiguous(values), contiguous(scales), out_dtype), values)


def dequantize_global(values: Any, scales: Any, *, out_dtype: torch.dtype) -> Any:
    """Decode codes with one scale: ``values * scales / 127``, then one rounding to ``out_dtype``.

    Shapes: values [*, K]; scales, one element; result as values.
    Dtypes: int8 values; float32 scales; ``out_dtype`` float32, float16 or bfloat16.
    Raises: ShapeError, DtypeError, DeviceError.
    Reference: Wortsman et al., SwitchBack, arXiv:2304.13013, section 2.

    >>> dequantize_global(*quantize_global(torch.tensor([[2.0, 0.0]])).pair, out_dtype=torch.float32)
    tensor([[2., 0.]])
    """
    return in_kind(ops.dequantize_global(contiguous(values), contiguous(scales), out_dtype), values)


def _record(results: tuple[Any, ...], input: Any) -> QRows8:
    return QRows8(*(in_kind(result, input) for result in results))
