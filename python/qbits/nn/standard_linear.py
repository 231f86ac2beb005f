"""The unquantized linear layer that SwitchBack is compared with."""

from __future__ import annotations

import torch
from torch import nn

from qbits import functional

__all__ = ["StandardLinear"]


class StandardLinear(nn.Linear):
    """`nn.Linear` through `functional.standard_linear`: SwitchBack's baseline, with the same rules of dtypes.

    Shapes: input [*, K]; output [*, N].
    Dtypes: float32, float16, bfloat16.

    >>> StandardLinear(4, 2)(torch.ones(3, 4)).shape
    torch.Size([3, 2])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply ``input`` [*, K] by the weight and add the bias."""
        return functional.standard_linear(input, self.weight, self.bias)
