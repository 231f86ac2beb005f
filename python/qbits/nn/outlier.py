"""`OutlierPool`: the outlier columns that several layers have met, for models too small to repeat them.

Reference: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 3.2.
"""

from __future__ import annotations

import torch

__all__ = ["OutlierPool"]


class OutlierPool:
    """The union of the outlier columns of all layers of one width.

    A layer that is given a pool treats the pool's columns as outliers, too, and adds those that it meets. The
    first width that comes is the pool's; layers of another one, such as the second of a feed-forward block,
    take no part. The pool is a mask on the layers' device: nothing waits for the device but
    `get_current_outlier_idx`.

    >>> pool = OutlierPool()
    >>> pool.add_outliers(torch.tensor([5, 2]), 8)
    >>> pool.get_current_outlier_idx().tolist()
    [2, 5]
    """

    model_dim: int | None
    _mask: torch.Tensor | None

    def __init__(self) -> None:
        self.initialize()

    def initialize(self) -> None:
        """Empty the pool; the next width that comes is its own."""
        self.model_dim = None
        self._mask = None

    def mask(self, feature_dim: int, device: torch.device) -> torch.Tensor | None:
        """Return the pool's columns as a mask [feature_dim], or None where it has none for this width."""
        if self._mask is None or feature_dim != self.model_dim:
            return None
        return self._mask.to(device)

    def add_mask(self, mask: torch.Tensor) -> None:
        """Add the columns that ``mask`` [feature_dim] marks."""
        if self.model_dim is None:
            self.model_dim = mask.shape[0]
        if mask.shape[0] == self.model_dim:
            self._mask = mask if self._mask is None else self._mask.to(mask.device) | mask

    def add_outliers(self, outlier_idx: torch.Tensor, feature_dim: int) -> None:
        """Add columns given by their indices, of layers with ``feature_dim`` inputs."""
        mask = torch.zeros(feature_dim, dtype=torch.bool, device=outlier_idx.device)
        mask[outlier_idx.long()] = True
        self.add_mask(mask)

    def get_current_outlier_idx(self) -> torch.Tensor:
        """Return the columns of the pool, int64, ascending."""
        if self._mask is None:
            return torch.empty(0, dtype=torch.int64)
        return self._mask.nonzero().view(-1)
