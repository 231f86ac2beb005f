"""One autograd Function per differentiable op: what is saved, which gradient."""

from qbits.autograd.gemm_4bit import Gemm4bit
from qbits.autograd.standard_linear import StandardLinearFunction

__all__ = ["Gemm4bit", "StandardLinearFunction"]
