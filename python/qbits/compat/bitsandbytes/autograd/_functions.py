"""`matmul_4bit` and `MatMul4Bit`: bitsandbytes' spelling of `qbits.functional.linear_4bit`; `matmul` beside.

Reference: Dettmers et al., QLoRA, arXiv:2305.14314, section 3.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from qbits import functional
from qbits.compat.bitsandbytes.autograd.matmul_8bit import MatMul8bitLt, matmul
from qbits.compat.bitsandbytes.autograd.matmul_8bit_state import (
    GlobalOutlierPooler,
    MatmulLtState,
    get_tile_inds,
    undo_layout,
)
from qbits.compat.bitsandbytes.state import QuantState
from qbits.errors import ArgumentValueError, QbitsWarning, ShapeError
from qbits.records import QTensor4

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitLt",
    "MatmulLtState",
    "get_tile_inds",
    "matmul",
    "matmul_4bit",
    "undo_layout",
]


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState | None,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a 4-bit weight: ``A @ W.T + bias`` for a state of shape (N, K) with K the last size of A.

    A state of shape (K, N), as early versions made them, gives ``A @ W + bias`` and a DeprecationWarning; a
    square weight is [N, K]. ``B`` gets no gradient.

    Shapes: A [*, K]; B the packed weight, (p, 1) or (1, p); bias [N]; result [*, N].
    Dtypes: float32, float16, bfloat16; the result has autocast's dtype, else A's.
    Raises: ValueError without a state; ShapeError where no side of the weight has A's last size.

    >>> from qbits.compat.bitsandbytes.functional import quantize_4bit
    >>> matmul_4bit(torch.ones(1, 2), *quantize_4bit(torch.tensor([[1.0, -1.0]]))).tolist()
    [[0.0]]
    """
    if quant_state is None:
        raise ArgumentValueError("qbits::matmul_4bit: quant_state must be a QuantState, got None")
    if quant_state.shape is None or len(quant_state.shape) != 2:
        raise ShapeError(
            f"qbits::matmul_4bit: quant_state.shape must have 2 dimensions, got {quant_state.shape}"
        )
    if B.requires_grad:
        warnings.warn(
            "qbits::matmul_4bit: B must not require a gradient, none flows to a 4-bit weight",
            QbitsWarning,
            stacklevel=2,
        )
    weight = quant_state.record(B)
    rows, columns = quant_state.shape
    last = A.shape[-1] if A.dim() else None
    if last == columns or last != rows:  # linear_4bit refuses a size that fits neither side
        return functional.linear_4bit(A, weight, bias, out=out)  # type: ignore[no-any-return]
    warnings.warn(
        "qbits::matmul_4bit: quant_state.shape must be (out_features, in_features), got the transposed order "
        "of early versions; quantize the weight again",
        DeprecationWarning,
        stacklevel=2,
    )
    return _matmul_transposed(A, weight, out, bias)


def _matmul_transposed(
    A: torch.Tensor, weight: QTensor4, out: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """``A @ W + bias`` for W [K, N]; autograd keeps the packed weight and decodes it for the backward."""
    device_type = A.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else A.dtype
    decode = functional.dequantize_4bit
    # only the weight is saved: it requires no gradient itself, so that A is not needed
    with torch.autograd.graph.saved_tensors_hooks(lambda _: weight, lambda q: decode(q, dtype=dtype)):
        result: torch.Tensor = A.to(dtype) @ decode(weight, dtype=dtype)
    if bias is not None:
        result = (result.float() + bias.float()).to(dtype)
    if out is None:
        return result
    if result.requires_grad:
        raise RuntimeError("qbits::matmul_4bit: out must be None where a gradient is recorded, got a tensor")
    if out.shape != result.shape:
        raise ShapeError(
            f"qbits::matmul_4bit: out must have shape {list(result.shape)}, got {list(out.shape)}"
        )
    return out.copy_(result)


class MatMul4Bit:
    """The product under the name of bitsandbytes' autograd Function; `qbits.autograd.Gemm4bit` records it."""

    @staticmethod
    def apply(
        A: torch.Tensor,
        B: torch.Tensor,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Any:
        """Return `matmul_4bit` of the same arguments in its order."""
        return matmul_4bit(A, B, quant_state, out=out, bias=bias)
