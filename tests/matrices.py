"""Matrices for the int8 tests: every kind of value in rows and columns, and columns of outliers."""

from __future__ import annotations

import numpy as np
from reference import Floats

# of float32, 2^-119 being the smallest scale; of 16-bit types they round to what there is
CORNERS = np.array(
    [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 2.0**-126, 2.0**-119, 2.0**-120, 65504.0, 3.4e38],
    np.float32,
)


def corner_matrix() -> Floats:
    """Rows with each of CORNERS at three places, among ones, zeros and tiny values; and a row of ties."""
    rows = []
    for value in CORNERS:
        for place in (0, 9, 39):
            for rest in (1.0, -0.25, 0.0, 1e-41, 2.0**-120):
                row = np.full(40, rest, np.float32)
                row[place] = value
                rows.append(row)
    # ties: RN(x * RN(127 / 127)) lies in the middle between two codes
    rows += [np.concatenate([[127.0], np.arange(39) - 19.5]).astype(np.float32)]
    return np.stack(rows)


def with_outliers(random: np.random.Generator, rows: int, columns: int, num: int) -> Floats:
    """Normal numbers, but 6 to 60 in `num` columns of a quarter of the rows, at least one."""
    x = np.clip(random.standard_normal((rows, columns)), -5, 5).astype(np.float32)
    for column in random.choice(columns, min(num, columns), replace=False):
        hit = random.random(rows) < 0.25
        hit[random.integers(rows)] = True
        x[hit, column] = random.uniform(6, 60, hit.sum()) * random.choice([-1, 1], hit.sum())
    return x
