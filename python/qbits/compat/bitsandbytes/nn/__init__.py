"""The modules under bitsandbytes' names."""

from qbits.compat.bitsandbytes.nn.modules import (
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
)
from qbits.compat.bitsandbytes.nn.triton_based_modules import (
    StandardLinear,
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearGlobalMemEfficient,
    SwitchBackLinearVectorwise,
    SwitchBackLinearVectorwiseMemEfficient,
)

__all__ = [
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
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
