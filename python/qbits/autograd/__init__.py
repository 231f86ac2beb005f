"""One autograd Function per differentiable op: what is saved, which gradient."""

from qbits.autograd.gemm_4bit import Gemm4bit
from qbits.autograd.standard_linear import StandardLinearFunction
from qbits.autograd.switchback import (
    PreparedSwitchBack,
    SwitchBackGlobal,
    SwitchBackGlobalMemEfficient,
    SwitchBackVectorwise,
    SwitchBackVectorwiseMemEfficient,
)

__all__ = [
    "Gemm4bit",
    "PreparedSwitchBack",
    "StandardLinearFunction",
    "SwitchBackGlobal",
    "SwitchBackGlobalMemEfficient",
    "SwitchBackVectorwise",
    "SwitchBackVectorwiseMemEfficient",
]
