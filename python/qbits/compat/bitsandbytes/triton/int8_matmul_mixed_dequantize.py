"""The int8 product with one scale for the weight."""

from __future__ import annotations

import torch

from qbits.compat.bitsandbytes.triton.arguments import expect_matrix, multiply

__all__ = ["int8_matmul_mixed_dequantize"]


def int8_matmul_mixed_dequantize(
    a: torch.Tensor,
    b: torch.Tensor,
    state_x: torch.Tensor,
    state_w: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    out_dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """Multiply int8 codes: ``(a @ b) * state_x[:, None] * state_w / 127**2 + bias``, rounded once.

    The sum is exact; scales and bias are applied in float32.

    Shapes: a [M, K]; b [K, N], of any strides; state_x [M]; state_w, one element; bias [N] or None;
        result [M, N].
    Dtypes: int8 codes; scales float32, or of 16 bits and widened; bias and ``out_dtype`` any float.
    Raises: ShapeError; DtypeError; DeviceError.
    Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
        arXiv:2304.13013, section 2.

    >>> codes, one = torch.full((1, 2), 127, dtype=torch.int8), torch.ones(1)
    >>> int8_matmul_mixed_dequantize(codes, codes.t(), one, one, None).tolist()
    [[2.0]]
    """
    expect_matrix("int8_matmul_mixed_dequantize", "b", b)
    return multiply("int8_matmul_mixed_dequantize", a, b, state_x, state_w, 1, bias, out_dtype)
