"""The code tables as torch tensors: 256-entry maps by rule, 16-entry tables by name; `_core` has the numbers.

Sources: Dettmers, 8-Bit Approximations, arXiv:1511.04561 (dynamic map); Dettmers et al., QLoRA,
arXiv:2305.14314 (nf4); Yoshida, NF4 Isn't Information Theoretically Optimal, arXiv:2306.06965 (af4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from qbits import _core, interop
from qbits.errors import ShapeError

__all__ = [
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "get_4bit_type",
]

_NAMES_4BIT = ("nf4", "fp4", "int4", "af4")
_DLPACK_CPU = 1
# version counter of each map at its check: on a GPU the check waits for the device, so it is made once
_CHECKED: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()


def _tensor(data: bytes) -> torch.Tensor:
    """Float32 tensor of its own memory, from little-endian bytes."""
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """Return the dynamic map: seven decades of bin centres, both signs if ``signed``, and 0 and 1.

    Shapes: [256] float32, ascending.
    Raises: ValueError for bit counts that do not fit.
    Reference: arXiv:1511.04561, section 2; arXiv:2110.02861, section 1.2.

    >>> create_dynamic_map()[127].item()
    0.0
    """
    return _tensor(_core.create_dynamic_map(signed, max_exponent_bits, total_bits))


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """Return evenly spaced values over [-1, 1] (signed) or [0, 1], padded with zeros in the middle to 256.

    Shapes: [256] float32, ascending.
    Raises: ValueError for a ``total_bits`` that does not fit.

    >>> create_linear_map()[[0, 127, 255]].tolist()
    [-1.0, 0.0, 1.0]
    """
    return _tensor(_core.create_linear_map(signed, total_bits, add_zero))


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> torch.Tensor:
    """Return the values of a small float format, over the largest; not OCP fp8 (no NaN, no Inf).

    Shapes: [256] float32, ascending.
    Raises: ValueError unless exponent_bits + precision_bits = total_bits - signed.

    >>> round(create_fp8_map(True, 4, 3)[254].item() * 480, 4)
    448.0
    """
    return _tensor(_core.create_fp8_map(signed, exponent_bits, precision_bits, total_bits))


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """Return normal quantiles over the largest: 7 negative, 8 (or 7) positive, zeros between.

    Shapes: [256] float32, ascending.
    Raises: ValueError for an ``offset`` other than 0.9677083, whose quantiles are kept as constants.
    Reference: arXiv:2305.14314, appendix E.

    >>> create_normal_map().unique().numel()
    16
    """
    return _tensor(_core.create_normal_map(offset, use_extra_value))


def get_4bit_type(
    typename: str, device: torch.device | str | None = None, block_size: int = 64
) -> torch.Tensor:
    """Return the 16 values of a 4-bit type, in the order of its codes.

    Shapes: [16] float32 on ``device``, the current default device if None.
    Raises: NotImplementedError for an unknown type, and for af4 at a block size other than 64.

    >>> get_4bit_type("nf4")[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    if typename not in _NAMES_4BIT:
        raise NotImplementedError(
            f"qbits::get_4bit_type: typename must be one of {list(_NAMES_4BIT)}, got {typename!r}"
        )
    if typename == "af4" and block_size != 64:
        raise NotImplementedError(
            f"qbits::get_4bit_type: block_size must be 64 for af4, whose values fit that, got {block_size}"
        )
    table = _tensor(_core.codebook_4bit(typename))
    return table.to(torch.get_default_device() if device is None else device)


_DYNAMIC_MAP = create_dynamic_map()


@functools.cache
def _dynamic_map_on(device: torch.device) -> torch.Tensor:
    return _DYNAMIC_MAP.to(device)


def dynamic_map(device: torch.device) -> torch.Tensor:
    """Return the signed dynamic map on ``device``, one shared copy each: callers only read it."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return _DYNAMIC_MAP.to(device)  # a traced tensor must not enter the cache
    return _dynamic_map_on(device)


def table_for(array: Any, codebook: Any, op: str) -> Any:
    """Return the map that `ops` may read beside ``array``: on its device, contiguous, known to ascend.

    None is the signed dynamic map. A tensor is checked once; each later use costs a lookup and no
    synchronization.
    """
    if isinstance(array, torch.Tensor):
        if codebook is None:
            return dynamic_map(array.device)
        _check_ascending(codebook, op)
        return codebook.to(array.device).contiguous()
    if codebook is None:
        device_type, index = array.__dlpack_device__()
        device = torch.device("cpu") if int(device_type) == _DLPACK_CPU else torch.device("cuda", index)
        return interop.in_kind(dynamic_map(device).clone(), array)
    _check_ascending(codebook, op)
    return interop.contiguous(codebook)


def _check_ascending(codebook: Any, op: str) -> None:
    """Raise unless ``codebook`` has 256 ascending entries; equal neighbours are legal, as maps are padded."""
    if tuple(codebook.shape) != (256,):
        raise ShapeError(f"qbits::{op}: codebook must have shape [256], got {list(codebook.shape)}")
    if isinstance(codebook, torch.Tensor):
        if torch.compiler.is_compiling() or codebook.is_meta:
            return
        version = None if codebook.is_inference() else codebook._version
        if version is not None and _CHECKED.get(codebook) == version:
            return
        _refuse_descent(codebook, op)
        if version is not None:
            _CHECKED[codebook] = version
    else:
        _refuse_descent(codebook, op)


def _refuse_descent(codebook: Any, op: str) -> None:
    if not bool((codebook[1:] >= codebook[:-1]).all() & (abs(codebook) < math.inf).all()):
        raise ShapeError(f"qbits::{op}: codebook must hold 256 finite values in ascending order, got others")
