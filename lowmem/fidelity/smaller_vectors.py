"""What smaller output vectors would cost: 8-bit and binary ones, and fewer dimensions.

A vector store may keep any of these instead of float32. Each is compared with the reference's own
float32 vectors, so that the loss is that of the plan and of the output together; the row
``float32`` is the plan's alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lowmem.fidelity import metrics, neighbours
from lowmem.fidelity.directions import Floats, Vectors, has_direction, unit_rows
from lowmem.fidelity.neighbours import Neighbours

_CODES = 127
_TRUNCATED = (2, 4)  # parts of the dimensions


def forms(vectors: Vectors) -> Iterator[tuple[str, Vectors, int, int]]:
    """Each output form of some vectors, one after another.

    ``int8`` rounds to 127 steps of the vector's own largest value; ``binary`` keeps the sign;
    ``first N`` keeps the first dimensions.

    Args:
        vectors: float32 [n, d].

    Returns:
        Name, what stands for the vectors when cosines are taken, float32 [n, d], the dimensions
        kept, and bytes of a vector.
    """
    size = vectors.shape[1]
    yield "float32", vectors, size, 4 * size
    yield "int8", _int8(vectors), size, size
    yield "binary", _binary(vectors), size, -(-size // 8)
    for part in _TRUNCATED:
        kept = size // part
        if kept:
            shortened = vectors.copy()
            shortened[:, kept:] = 0
            yield f"first {kept}", shortened, kept, 4 * kept


def costs(reference: Vectors, before: Neighbours, vectors: Vectors, k: int) -> list[dict[str, Any]]:
    """The ``outputs`` of a report, one row a form.

    Args:
        reference: float32 [n, d].
        before: Its neighbours, at least k of each text.
        vectors: The plan's, float32 [n, d].
        k: Neighbours to compare.
    """
    rows = []
    for name, shown, dimensions, size in forms(vectors):
        now = neighbours.find(shown, k, before.first_rows)
        rows.append(
            {
                "name": name,
                "dimensions": dimensions,
                "vector_bytes": size,
                "overlap": {str(few): neighbours.overlap(before, now, few) for few in (1, k)},
                "spearman": metrics.spearman(reference, shown),
            }
        )
    return rows


def _int8(vectors: Vectors) -> Vectors:
    directions: Floats = unit_rows(vectors)
    largest = np.abs(directions).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / _CODES, 1.0)
    codes: Vectors = np.rint(directions / scales).astype(np.float32)
    return codes


def _binary(vectors: Vectors) -> Vectors:
    signs: Vectors = np.where(vectors > 0, np.float32(1), np.float32(-1))
    signs[~has_direction(vectors)] = 0
    return signs
