"""Values of codes with one scale per row."""

from __future__ import annotations

import torch

from qbits import functional

__all__ = ["dequantize_rowwise"]


def dequantize_rowwise(x: torch.Tensor, state_x: torch.Tensor) -> torch.Tensor:
    """Decode rows to float16: ``x * state_x * (1 / 127)`` in float32, rounded once.

    Shapes: x [M, K]; state_x [M]; result [M, K].
    Dtypes: int8 codes; scales float32, or of 16 bits and widened; float16 out.
    Raises: ShapeError; DtypeError.
    Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
        arXiv:2304.13013, section 2.

    >>> dequantize_rowwise(torch.tensor([[127, -127]], dtype=torch.int8), torch.tensor([2.0])).tolist()
    [[2.0, -2.0]]
    """
    result: torch.Tensor = functional.dequantize_rowwise(x, state_x.float(), out_dtype=torch.float16)
    return result
