"""Rank correlation, and how much of a difference chance could explain.

Intervals are percentiles of a paired bootstrap (Efron, 1979): the same resampled items count for
both sides, so that what makes an item hard for both does not widen the interval. The seed is
fixed: equal figures give equal intervals.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lowmem.fidelity.directions import Floats

LEVEL = 0.95
RESAMPLES = 10_000
CORRELATION_RESAMPLES = 1_000
_SEED = 20240229
_BLOCK_ITEMS = 2_000_000


def interval_of_mean(differences: Floats) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, from 10 000 resamples.

    Args:
        differences: Plan less reference of each item, float64 [n], n at least 1.
    """
    means = [differences[rows].mean(axis=1) for rows in _resamples(len(differences), RESAMPLES)]
    return _percentiles(np.concatenate(means))


def interval_of_correlations(
    truth: Floats, reference: Floats, plan: Floats
) -> tuple[float, float] | None:
    """95 % interval of Spearman(truth, plan) - Spearman(truth, reference), from 1 000 resamples.

    Args:
        truth: What people said, float64 [n].
        reference: Scores of the reference, float64 [n].
        plan: Scores of the plan, float64 [n].

    Returns:
        The interval, or None where a correlation is undefined in every resample.
    """
    found = []
    for block in _resamples(len(truth), CORRELATION_RESAMPLES):
        for rows in block:
            before = correlation(truth[rows], reference[rows])
            now = correlation(truth[rows], plan[rows])
            if before is not None and now is not None:
                found.append(now - before)
    return _percentiles(np.array(found)) if found else None


def correlation(a: Floats, b: Floats) -> float | None:
    """Spearman's: Pearson's correlation of ranks, where equal values share the mean of theirs.

    Returns:
        From -1 to 1, or None where all values of one side are equal.
    """
    left, right = centred_ranks(a), centred_ranks(b)
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(np.clip(left @ right / scale, -1.0, 1.0)) if scale > 0 else None


def centred_ranks(values: Floats) -> Floats:
    """Ranks less their mean; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: Floats = (last - (counts - 1) / 2 - (len(values) + 1) / 2)[inverse]
    return ranks


def _resamples(count: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Indices drawn with replacement, int64 [some, count], in blocks that fit a cache."""
    generator = np.random.default_rng(_SEED)
    rows = max(1, _BLOCK_ITEMS // count)
    for start in range(0, resamples, rows):
        yield generator.integers(0, count, (min(rows, resamples - start), count))


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
