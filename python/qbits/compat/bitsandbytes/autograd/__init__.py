"""The products under bitsandbytes' module path."""

from qbits.compat.bitsandbytes.autograd._functions import (
    MatMul4Bit,
    MatMul8bitLt,
    MatmulLtState,
    get_tile_inds,
    matmul,
    matmul_4bit,
    undo_layout,
)

__all__ = [
    "MatMul4Bit",
    "MatMul8bitLt",
    "MatmulLtState",
    "get_tile_inds",
    "matmul",
    "matmul_4bit",
    "undo_layout",
]
