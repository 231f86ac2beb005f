"""The refusal of what is no record."""

from __future__ import annotations

from typing import Any

import torch

from qbits.errors import ArgumentTypeError, NotQuantizedError

__all__ = ["expect"]


def expect(q: Any, record: type, op: str, maker: str) -> None:
    """Raise unless ``q`` is a record; a float tensor in its place is a weight that was not quantized yet."""
    if isinstance(q, record):
        return
    rule = f"qbits::{op}: weight must be a {record.__name__}, which {maker}() makes, got {type(q).__name__}"
    raise NotQuantizedError(rule) if isinstance(q, torch.Tensor) else ArgumentTypeError(rule)
