"""bitsandbytes' names for 4 bits, 8-bit blocks and LLM.int8(), its argument orders and paths, over qbits.

>>> from qbits.compat import bitsandbytes as bnb
>>> bnb.nn.Linear4bit(64, 2, quant_type="nf4").to("cpu").weight.quant_state.blocksize
64
"""

from __future__ import annotations

from typing import NoReturn

from qbits.compat.bitsandbytes import functional, nn
from qbits.compat.bitsandbytes.autograd._functions import (
    MatMul4Bit,
    MatMul8bitLt,
    MatmulLtState,
    matmul,
    matmul_4bit,
)

__all__ = [
    "MatMul4Bit",
    "MatMul8bitLt",
    "MatmulLtState",
    "__version__",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "nn",
    "supported_torch_devices",
]

__version__ = "0.50.0"  # of the interface
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda"}

_ABSENT = {
    "optim": "qbits has no optimizers yet",
    "research": "qbits has no fp8 layers yet",
}


def __getattr__(name: str) -> NoReturn:
    reason = f": {_ABSENT[name]}" if name in _ABSENT else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{reason}")
