"""The SwitchBack layers under bitsandbytes' names, with its argument order, always in int8; no triton needed.

Reference: Wortsman et al., Stable and low-precision training for large-scale vision-language models,
arXiv:2304.13013, section 2.
"""

from __future__ import annotations

from typing import Any

import torch

from qbits.autograd import (
    StandardLinearFunction,
    SwitchBackGlobal,
    SwitchBackGlobalMemEfficient,
    SwitchBackVectorwise,
    SwitchBackVectorwiseMemEfficient,
)
from qbits.nn import StandardLinear
from qbits.nn import switchback as modern
from qbits.nn import switchback_forms as forms

__all__ = [
    "StandardLinear",
    "StandardLinearFunction",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
    "SwitchBackLinearVectorwiseMemEfficient",
]

_switchback_global = SwitchBackGlobal
_switchback_vectorrize = SwitchBackVectorwise  # so spelt there
_switchback_global_mem_efficient = SwitchBackGlobalMemEfficient
_switchback_vectorwise_mem_efficient = SwitchBackVectorwiseMemEfficient  # which ended the process there


class SwitchBackLinear(modern.SwitchBackLinear):
    """`qbits.nn.SwitchBackLinear` with one scale for the weight by default, in int8 for any number of rows.

    Shapes: input [*, K]; output [*, N].
    Dtypes: float32, float16, bfloat16.

    >>> SwitchBackLinear(64, 8, vector_wise_quantization=True)(torch.ones(3, 64)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool | None = None,
        mem_efficient: bool | None = None,
        **options: Any,
    ) -> None:
        if vector_wise_quantization is None and self._fixed_vectorwise is None:
            vector_wise_quantization = False
        super().__init__(
            in_features,
            out_features,
            bias,
            vectorwise=vector_wise_quantization,
            mem_efficient=mem_efficient,
            min_rows=0,
            device=device,
            dtype=dtype,
            **options,
        )


class SwitchBackLinearGlobal(SwitchBackLinear, forms.SwitchBackLinearGlobal):
    """`SwitchBackLinear` with one scale for the weight.

    >>> SwitchBackLinearGlobal(4, 2).vector_wise_quantization
    False
    """


class SwitchBackLinearGlobalMemEfficient(SwitchBackLinear, forms.SwitchBackLinearGlobalMemEfficient):
    """`SwitchBackLinear` with one scale for the weight, which keeps the input as int8 codes.

    >>> SwitchBackLinearGlobalMemEfficient(4, 2).mem_efficient
    True
    """


class SwitchBackLinearVectorwise(SwitchBackLinear, forms.SwitchBackLinearVectorwise):
    """`SwitchBackLinear` with one scale per row of the weight, and per column backward.

    >>> SwitchBackLinearVectorwise(4, 2).vector_wise_quantization
    True
    """


class SwitchBackLinearVectorwiseMemEfficient(SwitchBackLinear, forms.SwitchBackLinearVectorwiseMemEfficient):
    """`SwitchBackLinearVectorwise` that keeps the input as int8 codes; there it ended the process.

    >>> SwitchBackLinearVectorwiseMemEfficient(4, 2).mem_efficient
    True
    """
