"""Codes with one scale per column, transposed."""

from __future__ import annotations

import torch

from qbits import functional
from qbits.compat.bitsandbytes.triton.arguments import expect_matrix

__all__ = ["quantize_columnwise_and_transpose"]


def quantize_columnwise_and_transpose(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the columns of a matrix to int8, and transpose.

    ``s = max |x|; codes = rint(x * (127 / s))``, zeros where s is zero or not finite.

    Shapes: x [N, K]; codes [K, N]; scales [K].
    Dtypes: float32, float16 or bfloat16 in; int8 codes, float32 scales.
    Raises: ShapeError unless there are 2 dimensions; DtypeError.
    Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
        arXiv:2304.13013, section 2.

    >>> quantize_columnwise_and_transpose(torch.tensor([[2.0, -1.0]]))[0].tolist()
    [[127], [-127]]
    """
    expect_matrix("quantize_columnwise_and_transpose", "x", x)
    q = functional.quantize_columnwise_and_transpose(x)
    return q.values, q.scales
