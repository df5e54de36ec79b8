"""Directions of vectors and the cosines between them, a block at a time.

Everything is computed in float64 from float32 rows, so that no copy of all vectors is made. A row
that is zero or holds NaN or infinity has no direction: it counts as zero.

Letters in shapes: n texts, d dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Floats = NDArray[np.float64]

_BLOCK_ROWS = 512
# Equal vectors can have cosines that differ in the last bits, by where in a product they stand.
# float32 coordinates fix a cosine to about 8 decimals, so 9 lose nothing; and with more of them a
# cosine lies more often so near to half a unit that its last bits decide how it is rounded.
TIE_DECIMALS = 9


def blocks(count: int) -> Iterator[slice]:
    """Slices of at most 512 that cover ``count`` rows."""
    for start in range(0, count, _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, count))


def is_finite(block: Vectors) -> NDArray[np.bool_]:
    """Whether a row holds neither NaN nor infinity, bool [n]."""
    result: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(block), axis=1)
    return result


def has_direction(vectors: Vectors) -> NDArray[np.bool_]:
    """Whether a row is finite and not zero, bool [n]."""
    result = np.empty(len(vectors), np.bool_)
    for rows in blocks(len(vectors)):
        result[rows] = is_finite(vectors[rows]) & (vectors[rows] != 0).any(axis=1)
    return result


def unit_rows(block: Vectors) -> Floats:
    """Rows of unit length, float64; zero for a row without direction."""
    rows = block.astype(np.float64)
    rows[~is_finite(block)] = 0.0
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    np.divide(rows, norms, out=rows, where=norms > 0)
    return rows


def cosine_rows(some: Vectors, vectors: Vectors) -> Floats:
    """Cosines of a block of rows to all vectors, rounded so that ties are ties.

    Args:
        some: float32 [rows, d], few enough for an array [rows, n].
        vectors: float32 [n, d].

    Returns:
        float64 [rows, n], rounded to 9 decimals; 0 where either has no direction.
    """
    block = unit_rows(some)
    parts = [block @ unit_rows(vectors[columns]).T for columns in blocks(len(vectors))]
    return np.concatenate(parts, axis=1).round(TIE_DECIMALS)
