"""One autograd Function per differentiable op: what is saved, which gradient."""

from qbits.autograd.gemm_4bit import Gemm4bit

__all__ = ["Gemm4bit"]
