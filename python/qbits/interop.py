"""Arrays of other frameworks (NumPy, CuPy, JAX, all with DLPack): what the functional calls ask of them."""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["compute_dtype", "contiguous", "dtype_of", "in_kind"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLOATS_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
# the module that holds from_dlpack, by the first part of the array type's module
_FROM_DLPACK = {"numpy": "numpy", "cupy": "cupy", "jax": "jax.dlpack", "jaxlib": "jax.dlpack"}


def _framework(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def contiguous(array: Any) -> Any:
    """Return ``array`` in row-major order, copied only where it is not (JAX arrays always are)."""
    if isinstance(array, torch.Tensor):
        return array.contiguous()
    if _framework(array) in ("numpy", "cupy"):
        return array if array.flags.c_contiguous else array.copy(order="C")
    return array


def dtype_of(array: Any) -> torch.dtype:
    """Return the torch dtype of a float array; `ops` has refused every other dtype before."""
    return array.dtype if isinstance(array, torch.Tensor) else _FLOATS_BY_NAME[str(array.dtype)]


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of a product of ``tensor``: autocast's where it is on, else the tensor's own."""
    dtype, device_type = tensor.dtype, tensor.device.type
    if dtype in FLOATS and device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return dtype


def in_kind(result: Any, like: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Return ``result`` in the framework of ``like``, exchanged by DLPack without a copy, and reshaped.

    A framework that is none of the known ones gets ``result`` itself, which it can read by DLPack.
    """
    if not isinstance(like, torch.Tensor):
        module = _FROM_DLPACK.get(_framework(like))
        if module is None:
            return result
        result = importlib.import_module(module).from_dlpack(result)
    return result if shape is None else result.reshape(shape)
