"""Whether the kernels can be used."""

from __future__ import annotations

__all__ = ["is_triton_available"]


def is_triton_available() -> bool:
    """Answer True: the kernels of this package do not need triton.

    >>> is_triton_available()
    True
    """
    return True
