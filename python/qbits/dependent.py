"""Dependent launches: products that fetch their weight while the work before them still runs.

Reference: NVIDIA, CUDA Programming Guide, programmatic dependent launch and synchronization.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from qbits import _core
from qbits.errors import ArgumentTypeError, ArgumentValueError
from qbits.nn.linear_4bit import Linear4bit

__all__ = ["dependent_launch"]


class dependent_launch:
    """A context in which the 4-bit layers of ``model`` may read their weights before earlier work has ended.

    A kernel of such a layer starts as soon as the one before it makes room, streams its weight from memory,
    and only then waits for its input. The results are the same bits. This needs a GPU of compute capability
    9.0; elsewhere, and for what `torch.compile` traces, nothing changes.

    Entering orders all earlier work before the layers: it waits for the devices of the weights, or, during a
    capture into a CUDA graph, puts one small kernel into the graph. Inside, the weights must stay as they
    are. A layer whose weight was written through torch since the entry refuses to run, and so does the exit;
    writes that torch does not count (``tensor.data``, other frameworks, other threads' streams) must not
    happen. A weight that is replaced by another tensor, or was made in inference mode, is simply not
    overlapped. A graph that was captured inside keeps its overlap when it is replayed; work that is enqueued
    after the context, or after a replay, is ordered as ever.

    The context holds for the thread that entered it, and contexts may be nested.

    Args:
        model: A module; its `qbits.nn.Linear4bit` layers, quantized and on CUDA devices, take part.

    Raises: ArgumentTypeError for anything but a module; ArgumentValueError where a weight was written inside.

    >>> with dependent_launch(nn.Sequential(nn.Linear(2, 2))):
    ...     pass
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            rule = f"model must be a torch.nn.Module, got {type(model).__name__}"
            raise ArgumentTypeError(f"qbits::dependent_launch: {rule}")
        self._model: nn.Module = model
        self._names: list[dict[int, str]] = []  # one for each time that it was entered

    def __enter__(self) -> dependent_launch:
        weights, names, devices = [], {}, set()
        for name, layer in self._model.named_modules():
            if not isinstance(layer, Linear4bit) or not layer.is_quantized:
                continue
            tensors = tuple(pytree.tree_leaves(layer.record()))  # in the order of the op's arguments
            if all(tensor.is_cuda and not tensor.is_inference() for tensor in tensors):
                weights.append(tensors)
                names[tensors[0].data_ptr()] = name
                devices.add(tensors[0].device)
        for device in devices:
            _order_earlier_work(device)
        _core.enter_dependent_launch(weights)
        self._names.append(names)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        names = self._names.pop()
        written = sorted(names.get(address, "?") for address in _core.leave_dependent_launch())
        if written and error is None:
            rule = f"weights must stay as they are inside, got writes to {', '.join(written)}"
            raise ArgumentValueError(f"qbits::dependent_launch: {rule}")


def _order_earlier_work(device: torch.device) -> None:
    """What was enqueued before is done, or, in a graph, stands before a kernel that waits for all of it."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            torch.zeros(1, device=device)
        else:
            torch.cuda.synchronize()
