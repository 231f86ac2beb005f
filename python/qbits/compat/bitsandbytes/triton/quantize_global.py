"""Codes with one scale for all."""

from __future__ import annotations

import torch

from qbits import functional
from qbits.compat.bitsandbytes.triton.arguments import expect_matrix

__all__ = ["quantize_global", "quantize_global_transpose"]


def quantize_global(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to int8 with one scale.

    ``s = max |x|; codes = rint(x * (127 / s))``, zeros where s is zero or not finite.

    Shapes: x [M, K]; codes [M, K]; scales [1].
    Dtypes: float32, float16 or bfloat16 in; int8 codes, float32 scales.
    Raises: ShapeError unless there are 2 dimensions; DtypeError.
    Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
        arXiv:2304.13013, section 2.

    >>> quantize_global(torch.tensor([[2.0, -1.0]]))[0].tolist()
    [[127, -64]]
    """
    expect_matrix("quantize_global", "x", x)
    q = functional.quantize_global(x)
    return q.values, q.scales


def quantize_global_transpose(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix to int8 with one scale, and transpose.

    ``s = max |input|; codes = rint(input * (127 / s))``, zeros where s is zero or not finite.

    Shapes: input [N, K]; codes [K, N]; scales [1].
    Dtypes: float32, float16 or bfloat16 in; int8 codes, float32 scales.
    Raises: ShapeError unless there are 2 dimensions; DtypeError.
    Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
        arXiv:2304.13013, section 2.

    >>> quantize_global_transpose(torch.tensor([[2.0, -1.0]]))[0].tolist()
    [[127], [-64]]
    """
    expect_matrix("quantize_global_transpose", "input", input)
    q = functional.quantize_global_transpose(input)
    return q.values, q.scales
