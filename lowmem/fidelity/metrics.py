"""How far vectors are from the reference: by themselves, and in the order they give to texts.

No result is NaN: a row that holds NaN or infinity has the cosine -1, is counted by
:func:`nonfinite`, and so fails any floor and can be written as JSON.

Letters in shapes: n texts, d dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowmem.errors import InputError
from lowmem.fidelity.directions import Floats, Vectors, blocks, cosine_rows, is_finite, unit_rows
from lowmem.fidelity.statistics import correlation

LENGTHS = (16, 64, 256, 1024, 4096)
LENGTH_NAMES = ("1-16", "17-64", "65-256", "257-1024", "1025-4096", "4097+")
SPEARMAN_TEXTS = 2000

_SEED = 20240229


def cosines(reference: Vectors, vectors: Vectors) -> Floats:
    """Cosine of each text's two vectors, (r · v) / (‖r‖ ‖v‖), within [-1, 1].

    0 where either row is zero, -1 where either holds NaN or infinity. Cost: one pass over both.

    Args:
        reference: float32 [n, d].
        vectors: float32 [n, d].

    Returns:
        float64 [n].

    Raises:
        InputError: The shapes differ, or there is no text.
    """
    _check(reference, vectors)
    result = np.empty(len(reference))
    for rows in blocks(len(reference)):
        r, v = unit_rows(reference[rows]), unit_rows(vectors[rows])
        cosine = np.einsum("nd,nd->n", r, v).clip(-1.0, 1.0)
        both = is_finite(reference[rows]) & is_finite(vectors[rows])
        result[rows] = np.where(both, cosine, -1.0)
    return result


def spearman(reference: Vectors, vectors: Vectors) -> float | None:
    """Spearman's rank correlation of the cosines of all pairs of texts i < j.

    That is Pearson's correlation of the ranks, where cosines that agree to 9 decimals share the
    mean of their ranks. Above 2000 texts a sample of the pairs is taken: those among 2000 texts,
    drawn with a fixed seed. A row that is zero or holds NaN or infinity has the cosine 0 to all
    others. Cost: with m = min(n, 2000), 2 m² d operations, sorting m² / 2 numbers twice, and
    memory for a few arrays of that length.

    Args:
        reference: float32 [n, d].
        vectors: float32 [n, d].

    Returns:
        From -1 to 1, or None where it is not defined: below three texts, or where all pairs of
        one side are equally close.

    Raises:
        InputError: The shapes differ, or there is no text.
    """
    _check(reference, vectors)
    count = len(reference)
    if count > SPEARMAN_TEXTS:
        drawn = np.random.default_rng(_SEED).choice(count, SPEARMAN_TEXTS, replace=False)
        reference, vectors = reference[np.sort(drawn)], vectors[np.sort(drawn)]
    return correlation(_pair_cosines(reference), _pair_cosines(vectors))


def summary(cosine: Floats) -> dict[str, float]:
    """Mean, median, 5th and 1st percentile and least of the cosines.

    Quantiles are numpy's default, linear between the two values around them. Cost: one sort.

    Args:
        cosine: float64 [n], n at least 1.

    Returns:
        ``mean``, ``median``, ``p5``, ``p1``, ``min``.
    """
    median, p5, p1 = (float(value) for value in np.quantile(cosine, [0.5, 0.05, 0.01]))
    return {
        "mean": float(cosine.mean()),
        "median": median,
        "p5": p5,
        "p1": p1,
        "min": float(cosine.min()),
    }


def buckets(
    cosine: Floats,
    *,
    tokens: Sequence[int],
    languages: Sequence[str],
    input_types: Sequence[str],
    kept: Floats | None = None,
) -> list[dict[str, Any]]:
    """The cosines by group of texts: by length, by language, by input type.

    Cost: a few passes over the cosines for each group.

    Args:
        cosine: float64 [n].
        tokens: Length of each text, special tokens and instruction included; [n].
        languages: ISO 639-1 code of each text; one without is in no group of languages; [n].
        input_types: ``query`` or ``document``, [n].
        kept: Share of each text's neighbours that stay, [n], or None where there are none.

    Returns:
        An object for each group that has texts, with ``kind``, ``name``, ``count``, ``mean``,
        ``p5``, ``min`` and, where ``kept`` is given, its mean as ``overlap``: kind ``length`` from
        short to long, then ``language`` and ``input_type``, sorted by name.
    """
    spans = [LENGTH_NAMES[index] for index in np.searchsorted(LENGTHS, np.asarray(tokens))]
    kinds: list[tuple[str, Sequence[str], Sequence[str]]] = [
        ("length", LENGTH_NAMES, spans),
        ("language", sorted(set(languages) - {""}), languages),
        ("input_type", sorted(set(input_types) - {""}), input_types),
    ]
    result = []
    for kind, names, labels in kinds:
        for name in names:
            members = np.array([label == name for label in labels], np.bool_)
            if members.any():
                figures = summary(cosine[members])
                shown = {key: figures[key] for key in ("mean", "p5", "min")}
                if kept is not None:
                    shown["overlap"] = float(kept[members].mean())
                result.append({"kind": kind, "name": name, "count": int(members.sum()), **shown})
    return result


def norm_error(vectors: Vectors) -> float:
    """Greatest distance of a vector's length from 1, max |‖v‖ - 1|.

    Rows with NaN or infinity are left out; 0 where no row remains. Cost: one pass.

    Args:
        vectors: float32 [n, d].
    """
    error = 0.0
    for rows in blocks(len(vectors)):
        block = vectors[rows]
        norms = np.linalg.norm(block[is_finite(block)].astype(np.float64), axis=1)
        error = max(error, float(np.abs(norms - 1.0).max(initial=0.0)))
    return error


def nonfinite(vectors: Vectors) -> int:
    """Number of rows that hold NaN or infinity.

    Cost: one pass.

    Args:
        vectors: float32 [n, d].
    """
    return sum(int((~is_finite(vectors[rows])).sum()) for rows in blocks(len(vectors)))


def _check(reference: Vectors, vectors: Vectors) -> None:
    if reference.ndim != 2 or reference.shape != vectors.shape or not len(reference):
        raise InputError(
            "reference and vectors must have one shape [texts, dimensions] with at least one text, "
            f"got {list(reference.shape)} and {list(vectors.shape)}"
        )


def _pair_cosines(vectors: Vectors) -> Floats:
    """Cosines of the pairs i < j, float64 [n (n - 1) / 2]."""
    parts = []
    for rows in blocks(len(vectors)):
        block = cosine_rows(vectors[rows], vectors)
        is_pair = np.arange(rows.start, rows.stop)[:, None] < np.arange(len(vectors))
        parts.append(block[is_pair])
    return np.concatenate(parts)
