"""`matmul` and `MatMul8bitLt`: bitsandbytes' spelling of `qbits.functional.matmul_int8`.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits import functional, ops, outputs
from qbits.compat.bitsandbytes.autograd.matmul_8bit_state import MatmulLtState
from qbits.errors import NotQuantizedError
from qbits.schemes import check_threshold

__all__ = ["MatMul8bitLt", "matmul"]


def matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply in int8: ``A @ B.T + bias``, for a float weight that trains or one that is frozen.

    A float ``B`` trains unless the state says ``has_fp16_weights=False``: then the state's ``CB`` and ``SCB``
    stand for it, or it is quantized in this call. An int8 ``B`` has its scales in the state's ``SCB`` or its
    own. A ``threshold`` above 0 holds for this call only; else the state's does.

    Shapes: A [*, K]; B [N, K]; bias [N]; result [*, N].
    Dtypes: float32, float16, bfloat16; the result has autocast's dtype, else A's.
    Raises: NotQuantizedError for an int8 ``B`` without scales; RuntimeError for ``out`` where a gradient is
        recorded; ShapeError, DtypeError.

    >>> matmul(torch.tensor([[127.0, -2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).round().tolist()
    [[127.0, -2.0]]
    """
    given = state
    state = MatmulLtState() if given is None else given
    threshold = threshold if threshold else state.threshold
    check_threshold("matmul", threshold)
    weight, scales, quantized = _operands(B, state, keep=given is not None)
    if out is not None:
        tensors = (A, bias, *(() if scales is not None else (weight,)))
        outputs.refuse_gradient("matmul", out, _is_recorded(*tensors))
    output, mask = functional.multiply_int8(
        A, weight, scales, bias, threshold, pool=state.pool, quantized=quantized
    )
    if given is not None and not torch.compiler.is_compiling():
        given.idx = mask
    if out is None:
        return output
    inputs = [A, B, bias, weight, scales]
    shape, dtype = tuple(output.shape), output.dtype
    outputs.fill("matmul", lambda _: output, out, A, shape, dtype, inputs, direct=False)
    return out


def _operands(
    B: torch.Tensor, state: MatmulLtState, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return codes and scales of a frozen weight; or a float one, None, and its codes and scales if kept."""
    if B.dtype == torch.int8:
        scales = state.SCB if state.SCB is not None else getattr(B, "SCB", None)
        if scales is None:
            raise NotQuantizedError("qbits::matmul: B must have its scales in state.SCB or B.SCB, got none")
        return B, scales, None
    if not state.has_fp16_weights and state.CB is not None and state.SCB is not None:
        return state.CB, state.SCB, None
    if state.has_fp16_weights and not keep:
        return B, None, None
    values, scales = ops.quantize_rowwise(B.detach().contiguous())
    if not torch.compiler.is_compiling():
        state.CB, state.SCB = values, scales
    if state.has_fp16_weights:
        return B, None, (values, scales)
    return values, scales, None


def _is_recorded(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class MatMul8bitLt:
    """The product under the name of bitsandbytes' autograd Function; `qbits.autograd` records it."""

    @staticmethod
    def apply(
        A: torch.Tensor,
        B: torch.Tensor,
        out: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Any:
        """Return `matmul` of the same arguments in its order."""
        return matmul(A, B, out=out, state=state, bias=bias)
