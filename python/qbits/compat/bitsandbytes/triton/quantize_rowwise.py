"""Codes with one scale per row."""

from __future__ import annotations

import torch

from qbits import functional
from qbits.compat.bitsandbytes.triton.arguments import expect_matrix

__all__ = ["quantize_rowwise"]


def quantize_rowwise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the rows of a matrix to int8.

    ``s = max |x|; codes = rint(x * (127 / s))``, zeros where s is zero or not finite.

    Shapes: x [M, K]; codes [M, K]; scales [M].
    Dtypes: float32, float16 or bfloat16 in; int8 codes, float32 scales.
    Raises: ShapeError unless there are 2 dimensions; DtypeError.
    Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
        arXiv:2304.13013, section 2.

    >>> quantize_rowwise(torch.tensor([[2.0, -1.0]]))[0].tolist()
    [[127, -64]]
    """
    expect_matrix("quantize_rowwise", "x", x)
    q = functional.quantize_rowwise(x)
    return q.values, q.scales
