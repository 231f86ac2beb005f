"""The 4-bit and the SwitchBack modules under bitsandbytes' names."""

from qbits.compat.bitsandbytes.nn.modules import Linear4bit, LinearFP4, LinearNF4, Params4bit
from qbits.compat.bitsandbytes.nn.triton_based_modules import (
    StandardLinear,
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearGlobalMemEfficient,
    SwitchBackLinearVectorwise,
    SwitchBackLinearVectorwiseMemEfficient,
)

__all__ = [
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StandardLinear",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
    "SwitchBackLinearVectorwiseMemEfficient",
]
