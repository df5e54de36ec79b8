"""Whether a text's vector depends on what it is computed with.

A plan runs a few texts alone, in another order, and among other texts; each vector is compared
with that of the same text in the plan's pass over all texts. An index that was filled in large
batches is asked one query at a time: what differs here is what such a search would lose.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lowmem.data import Row
from lowmem.fidelity.directions import Floats, Vectors, unit_rows
from lowmem.fidelity.sample import stratified
from lowmem.measure import Measuring, Pass

TEXTS = 6
_LONGEST_TOKENS = 256


def invariance(
    measuring: Measuring, rows: Sequence[Row], tokens: Sequence[int], vectors: Vectors
) -> dict[str, float | int] | None:
    """The ``invariance`` of a report: how far a text's vectors lie apart, 1 - cosine at most.

    Args:
        measuring: Runs the plan.
        rows: The texts.
        tokens: Length of each; texts above 256 tokens are left out.
        vectors: The plan's vectors of all of them, float32 [texts, d].

    Returns:
        ``texts``, the number compared, and the greatest 1 - cosine when they are computed
        ``alone``, ``shuffled`` and with ``neighbours``; None where fewer than two texts are short
        enough.

    Raises:
        LowmemError: The plan cannot be run.
    """
    chosen, others = choose(rows, tokens)
    if len(chosen) < 2:
        return None
    own = tuple(range(len(chosen)))
    passes = {
        "alone": Pass(own, batch_size=1),
        "shuffled": Pass(own[::-1]),
        "neighbours": Pass(tuple(range(len(chosen) + len(others)))),
    }
    asked = [rows[place] for place in [*chosen, *others]]
    with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
        file = Path(folder) / "vectors.npy"
        measuring.run(asked, passes=list(passes.values()), vectors=file)
        found: Vectors = np.load(file, allow_pickle=False)
    together = vectors[chosen]
    result: dict[str, float | int] = {"texts": len(chosen)}
    start = 0
    for name, one in passes.items():
        of_pass = found[start : start + len(one.rows)]
        start += len(one.rows)
        by_row = of_pass[np.argsort(one.rows)][: len(chosen)]
        result[name] = float(distances(together, by_row).max())
    return result


def choose(rows: Sequence[Row], tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Positions of six texts to compare, and of up to six others to stand beside them."""
    short = [place for place, count in enumerate(tokens) if count <= _LONGEST_TOKENS]
    some, lengths = [rows[place] for place in short], [tokens[place] for place in short]
    if not short:
        return [], []
    chosen = [short[place] for place in stratified(some, lengths, TEXTS)]
    both = [short[place] for place in stratified(some, lengths, 2 * TEXTS)]
    return chosen, [place for place in both if place not in chosen]


def distances(a: Vectors, b: Vectors) -> Floats:
    """1 - cosine of each pair of rows, ‖a/‖a‖ - b/‖b‖‖² / 2, exact also near 0; float64 [n]."""
    apart = unit_rows(a) - unit_rows(b)
    result: Floats = np.einsum("nd,nd->n", apart, apart) / 2
    return result
