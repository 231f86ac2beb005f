"""`MatmulLtState`, `GlobalOutlierPooler`, the tiled layouts: what bitsandbytes keeps around its int8 product.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch

from qbits.errors import ArgumentValueError
from qbits.nn.outlier import OutlierPool
from qbits.nn.tiles_8bit import tile_indices, undo_layout

__all__ = ["GlobalOutlierPooler", "MatmulLtState", "get_tile_inds", "undo_layout"]

_DEPRECATED = frozenset({"CxB", "CxBt", "formatB", "_tile_indices"})


class GlobalOutlierPooler(OutlierPool):
    """The one pool of a process; `get_instance` gives it. Nothing uses it unless a state names it.

    >>> GlobalOutlierPooler.get_instance() is GlobalOutlierPooler.get_instance()
    True
    """

    _instance: GlobalOutlierPooler | None = None

    def __init__(self) -> None:
        raise RuntimeError(
            "qbits::GlobalOutlierPooler: instance must come from get_instance(), got a constructor call"
        )

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        """Return the pool, made empty at the first call."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    @property
    def outliers(self) -> set[int]:
        """The columns as a set; reading it waits for the device."""
        return set(self.get_current_outlier_idx().tolist())


class MatmulLtState:
    """What `matmul` reads of its caller, and what it tells: every field is the instance's own.

    Read: ``threshold``, ``has_fp16_weights``, ``CB``, ``SCB``, ``use_pool`` and ``outlier_pool``. Told after
    a forward: ``CB`` and ``SCB`` where the weight was quantized, and ``idx``. A backward looks at no field.

    >>> MatmulLtState().threshold, MatmulLtState().has_fp16_weights
    (0.0, True)
    """

    def __init__(
        self,
        force_no_igemmlt: bool = False,
        CB: torch.Tensor | None = None,
        SB: torch.Tensor | None = None,
        SCB: torch.Tensor | None = None,
        SBt: torch.Tensor | None = None,
        CBt: torch.Tensor | None = None,
        subB: torch.Tensor | None = None,
        outlier_pool: OutlierPool | None = None,
        idx: torch.Tensor | None = None,
    ) -> None:
        self.force_no_igemmlt = force_no_igemmlt
        self.CB, self.SCB = CB, SCB
        self.SB, self.SBt, self.CBt, self.subB = SB, SBt, CBt, subB
        self.outlier_pool = outlier_pool
        self.idx = idx
        self.threshold = 0.0
        self.has_fp16_weights = True
        self.is_training = True
        self.use_pool = False
        self.memory_efficient_backward = False
        self.has_accumulated_gradients = False

    @property
    def idx(self) -> torch.Tensor | None:
        """The outlier columns of the last forward, int64, ascending; reading it waits for the device."""
        mask = self.__dict__.get("idx")
        return mask if mask is None or mask.dtype != torch.bool else mask.nonzero().view(-1)

    @idx.setter
    def idx(self, value: torch.Tensor | None) -> None:
        self.__dict__["idx"] = value  # indices, or the mask that a forward has found

    @property
    def pool(self) -> OutlierPool | None:
        """The pool that a product uses: the state must name one and ask for it."""
        return self.outlier_pool if self.use_pool else None

    @property
    def tile_indices(self) -> NoReturn:
        """Not there: weights lie in rows."""
        raise ArgumentValueError("qbits::MatmulLtState: formatB must be a tiled layout, got row")

    def reset_grads(self) -> None:
        """Forget the quantized weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None

    def __getattr__(self, name: str) -> Any:
        if name in _DEPRECATED:
            warnings.warn(f"MatmulLtState.{name} is always None", FutureWarning, stacklevel=2)
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def get_tile_inds(format: str, device: torch.device | str) -> torch.Tensor:
    """Return the tile map of an old layout, for `undo_layout`.

    >>> get_tile_inds("col_turing", "cpu").shape
    torch.Size([8, 32])
    """
    return tile_indices(format, device)
