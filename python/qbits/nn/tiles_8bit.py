"""The tiled int8 layouts that old versions of bitsandbytes wrote, and the way back to rows.

In a tiled layout of a matrix [R, C] the tiles lie column by column of tiles; within one an element lies where
the format's closed formula says: "col32" keeps 32 columns of a row together, "col_turing" and "col_ampere"
have the orders that the int8 tensor cores of those GPUs read.

Reference: NVIDIA, cuBLAS documentation, cublasLtOrder_t (COL32, COL4_4R2_8C, COL32_2R_4R4).
"""

from __future__ import annotations

import torch

from qbits.errors import ArgumentValueError, CheckpointFormatError, ShapeError

__all__ = ["FORMATS", "from_tiles", "tile_indices", "undo_layout"]

FORMATS = ("row", "col32", "col_turing", "col_ampere")  # in the order of their numbers in files

_TILE_COLUMNS = 32
_TILE_ROWS = {"col32": 1, "col_turing": 8, "col_ampere": 32}


def tile_indices(format: str, device: torch.device | str | None = None) -> torch.Tensor:
    """Return which element of a tile, counted row by row, lies at each place of its memory.

    Shapes: result int64, (1, 32) for "col32", (8, 32) for "col_turing", (32, 32) for "col_ampere".
    Raises: ValueError for another format.

    >>> tile_indices("col_turing")[0, :9].tolist()
    [0, 1, 2, 3, 64, 65, 66, 67, 128]
    """
    if format not in _TILE_ROWS:
        raise ArgumentValueError(
            f"qbits::get_tile_inds: format must be one of {list(_TILE_ROWS)}, got {format!r}"
        )
    num_rows = _TILE_ROWS[format]
    r = torch.arange(num_rows, device=device)[:, None]
    c = torch.arange(_TILE_COLUMNS, device=device)
    if format == "col_turing":
        place = r % 2 * 128 + c // 4 * 16 + r // 2 * 4 + c % 4
    elif format == "col_ampere":
        place = (r % 8 // 2 * 8 + r // 8 * 2 + r % 2) * 32 + c
    else:
        place = c[None]
    indices = torch.empty(num_rows * _TILE_COLUMNS, dtype=torch.int64, device=device)
    indices[place.reshape(-1)] = torch.arange(indices.numel(), device=device)
    return indices.view(num_rows, _TILE_COLUMNS)


def undo_layout(permuted: torch.Tensor, tile_indices: torch.Tensor) -> torch.Tensor:
    """Return the matrix in row order, given the elements of one in the layout of `tile_indices`.

    Shapes: permuted [R, C], multiples of the tile's sides; result the same.
    Raises: ShapeError for other shapes.
    """
    rows, columns = tile_indices.shape
    if permuted.dim() != 2 or permuted.shape[0] % rows or permuted.shape[1] % columns:
        raise ShapeError(
            f"qbits::undo_layout: permuted must be a matrix of whole tiles of {rows} x {columns}, "
            f"got shape {list(permuted.shape)}"
        )
    R, C = permuted.shape
    tiles = permuted.reshape(C // columns, R // rows, -1)
    ordered = torch.empty_like(tiles)
    ordered[..., tile_indices.reshape(-1)] = tiles
    return ordered.view(C // columns, R // rows, rows, columns).permute(1, 2, 0, 3).reshape(R, C)


def from_tiles(key: str, weight: torch.Tensor, format: str, num_rows: int, row: int | None) -> torch.Tensor:
    """Return the weight [num_rows, row] that ``weight`` holds in a tiled layout, padded to whole tiles.

    Args:
        key: The weight's name, for messages.
        weight: The bytes, in the padded shape that the layout has.
        format: "col32", "col_turing" or "col_ampere".
        num_rows: N, without padding.
        row: K; None is all columns that there are.

    Raises: CheckpointFormatError for a stored shape that the layout does not have.
    """
    due = [_ceil(num_rows, _TILE_ROWS[format]), _ceil(row if row is not None else weight.shape[-1], 32)]
    if list(weight.shape) != due:
        raise CheckpointFormatError(
            f"qbits::load: {key} must have shape {due} in the layout {format}, got {list(weight.shape)}"
        )
    return undo_layout(weight, tile_indices(format, weight.device))[:num_rows, :row].contiguous()


def _ceil(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
