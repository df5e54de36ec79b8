"""Which texts are nearest to which, and how many of them stay when vectors change.

Nearest is by cosine; of equally near texts (cosines that agree to 9 decimals) the first in order
counts as nearer, in reference and vectors alike.

Letters in shapes: n texts, q queries, d dimensions, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem.errors import InputError
from lowmem.fidelity.directions import Floats, Vectors, blocks, cosine_rows, has_direction

Indices = NDArray[np.int64]
NOTHING = -1
"""In place of a document that a search does not find."""
_BEYOND = 3.0  # further than the opposite direction


@dataclass(frozen=True)
class Neighbours:
    """The nearest other texts of each text.

    Attributes:
        nearest: int64 [n, k], the nearest first; k is the number of others where there are no more.
        has_direction: bool [n]; a text without one comes last for all others.
        first_rows: int64 [n], where each text stands first. Only there it is a neighbour, and of
            others alone: however vectors change, equal texts stay nearest to one another.
    """

    nearest: Indices
    has_direction: NDArray[np.bool_]
    first_rows: Indices

    def leave_out_some(self, k: int) -> bool:
        """Whether a text has others than its k nearest: else no vectors could change those."""
        return len(np.unique(self.first_rows)) - 1 > k


def find(vectors: Vectors, k: int, first_rows: Indices | None = None) -> Neighbours:
    """The k nearest other texts of each text. Cost: 2 n² d operations, a few arrays [512, n].

    Args:
        vectors: float32 [n, d].
        k: How many neighbours, at least 1.
        first_rows: Where each text stands first, int64 [n]; None where no text stands twice.

    Raises:
        InputError: k is below 1.
    """
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    if first_rows is not None:
        kept = np.unique(first_rows)
        distinct = find(vectors[kept], k)
        nearest = kept[distinct.nearest[np.searchsorted(kept, first_rows)]]
        return Neighbours(nearest, has_direction(vectors), first_rows)
    count, k = len(vectors), min(k, len(vectors) - 1)
    is_known = has_direction(vectors)
    found = np.empty((count, max(k, 0)), np.int64)
    for rows in blocks(count) if k > 0 else ():
        distance = 1.0 - cosine_rows(vectors[rows], vectors)
        distance[:, ~is_known] = _BEYOND
        distance[np.arange(len(distance)), np.arange(rows.start, rows.stop)] = np.inf
        found[rows] = _nearest(distance, k)
    return Neighbours(found, is_known, np.arange(count))


def search(queries: Vectors, documents: Vectors, k: int) -> Indices:
    """The documents that a search would show. Cost: 2 q n d operations, a few arrays [512, n].

    Args:
        queries: float32 [q, d].
        documents: float32 [n, d].
        k: How many, at least 1.

    Returns:
        int64 [q, min(k, n)], the nearest first; a query without a direction finds -1.
    """
    is_known = has_direction(documents)
    k = min(k, len(documents))
    found = np.empty((len(queries), k), np.int64)
    for rows in blocks(len(queries)):
        distance = 1.0 - cosine_rows(queries[rows], documents)
        distance[:, ~is_known] = _BEYOND
        found[rows] = _nearest(distance, k)
    found[~has_direction(queries)] = NOTHING
    return found


def kept_shares(before: Neighbours, now: Neighbours, k: int) -> Floats:
    """Of each text, the share of its k nearest that are still among its k nearest.

    A text that has no direction before or now has kept none.

    Args:
        before: Of the reference.
        now: Of other vectors of the same texts.
        k: At most what was found; where there are no k others it is n - 1.

    Returns:
        float64 [n], from 0 to 1; 0 for a single text.
    """
    shares = shares_in_common(before.nearest[:, :k], now.nearest[:, :k])
    shares[~(before.has_direction & now.has_direction)] = 0.0
    return shares


def shares_in_common(before: Indices, now: Indices) -> Floats:
    """Share of each row's indices that stand in the same row of the other, float64 [n].

    Args:
        before: int64 [n, k], no index twice in a row, but for -1.
        now: int64 [n, k], the same.
    """
    if before.shape[1] == 0:
        return np.zeros(len(before))
    common = (before[:, :, None] == now[:, None, :]).any(axis=2) & (before != NOTHING)
    shares: Floats = common.mean(axis=1)
    return shares


def overlap(before: Neighbours, now: Neighbours, k: int) -> float | None:
    """Mean of :func:`kept_shares`, or None where every other text is among the k nearest."""
    return float(kept_shares(before, now, k).mean()) if before.leave_out_some(k) else None


def overlap_of_searches(before: Indices, now: Indices, documents: int) -> dict[str, float | None]:
    """Mean share of the first and of the first ten documents that are still found there.

    Args:
        before: Documents that each query finds, the nearest first, int64 [queries, depth].
        now: The same of a plan.
        documents: How many there are: None is given where all of them are among the first.
    """
    return {
        str(k): None
        if documents <= k
        else float(shares_in_common(before[:, :k], now[:, :k]).mean())
        for k in (1, 10)
    }


def _nearest(distance: Floats, k: int) -> Indices:
    """Columns of the k least of each row, the least first, equal ones in their order."""
    limit = np.partition(distance, k - 1, axis=1)[:, k - 1 : k]
    nearer, tied = distance < limit, distance == limit
    wanted = k - nearer.sum(axis=1, keepdims=True)
    chosen = nearer | (tied & (tied.cumsum(axis=1) <= wanted))
    columns = np.nonzero(chosen)[1].reshape(len(distance), k)
    order = np.argsort(np.take_along_axis(distance, columns, axis=1), axis=1, kind="stable")
    ordered: Indices = np.take_along_axis(columns, order, axis=1)
    return ordered
