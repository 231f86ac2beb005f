"""Products of matrices of 8-bit codes, of any stride and any framework."""

from __future__ import annotations

import math
from typing import Any

import torch

from qbits import ops
from qbits.interop import contiguous, in_kind

__all__ = ["gemm_int8"]


def gemm_int8(
    input: Any,
    weight: Any,
    input_scales: Any = None,
    weight_scales: Any = None,
    bias: Any = None,
    *,
    out_dtype: torch.dtype,
) -> Any:
    """Multiply 8-bit codes: ``(input @ weight.T) * input_scales[:, None] * weight_scales / 127**2 + bias``.

    The sum is exact. Scales are largest magnitudes, as the quantizers return them; they and the bias are
    applied in float32, and the result is rounded once. Without scales the result is the sum itself.

    Shapes: input [M, K]; weight [N, K]; input_scales [M]; weight_scales [N], or one element; bias [N];
        result [M, N].
    Dtypes: int8 codes; float32 scales; bias float32, float16 or bfloat16; ``out_dtype`` one of these, or
        int32 (without scales and bias, K up to 131071).
    Raises: ShapeError, DtypeError, DeviceError; ValueError for scales or a bias beside int32.
    Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 2.

    >>> codes = torch.ones(1, 2, dtype=torch.int8)
    >>> gemm_int8(codes, codes, out_dtype=torch.int32)
    tensor([[2]], dtype=torch.int32)
    """
    one_scale = None
    if weight_scales is not None and math.prod(weight_scales.shape) == 1 and len(weight) != 1:
        weight_scales, one_scale = None, weight_scales
    optional = [None if t is None else contiguous(t) for t in (input_scales, weight_scales, one_scale, bias)]
    result = ops.gemm_int8(contiguous(input), contiguous(weight), out_dtype, *optional)
    return in_kind(result, input)
