"""The 4-bit product under bitsandbytes' module path."""

from qbits.compat.bitsandbytes.autograd._functions import MatMul4Bit, matmul_4bit

__all__ = ["MatMul4Bit", "matmul_4bit"]
