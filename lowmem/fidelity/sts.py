"""Similarity that people judged: how well cosines follow it, by the reference and by a plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowmem import data
from lowmem.artifact import strict_json
from lowmem.data import Row
from lowmem.disk import shown_name
from lowmem.errors import InputError
from lowmem.fidelity.directions import TIE_DECIMALS, Floats, Vectors
from lowmem.fidelity.metrics import cosines
from lowmem.fidelity.statistics import LEVEL, correlation, interval_of_correlations
from lowmem.text.reading import read_records

_FEWEST = 3
_TEXT_KEYS = (("a", "b"), ("sentence1", "sentence2"))


@dataclass(frozen=True)
class Pairs:
    """Pairs of texts with what people said of them.

    Attributes:
        name: The file's name.
        rows: First and second text of each pair in turn, [2 pairs].
        scores: float64 [pairs], the greater the more alike.
    """

    name: str
    rows: tuple[Row, ...]
    scores: Floats

    @property
    def sha256(self) -> str:
        """Identity of texts and scores."""
        content = {"texts": data.sha256(self.rows), "scores": self.scores.tolist()}
        return hashlib.sha256(strict_json.canonical(content)).hexdigest()

    def part(self, pairs: int) -> Pairs:
        """Every so-manieth pair of the pairs sorted by score; all where there are no more."""
        if pairs >= len(self.scores):
            return self
        order = np.argsort(self.scores, kind="stable")
        chosen = np.sort(order[np.linspace(0, len(order) - 1, max(pairs, _FEWEST)).astype(int)])
        rows = tuple(row for pair in chosen for row in self.rows[2 * pair : 2 * pair + 2])
        return replace(self, rows=rows, scores=self.scores[chosen])


def read_pairs(path: Path, task: str | None = None) -> Pairs:
    """Reads pairs from ``.jsonl`` or ``.csv``.

    Each has a ``score`` and the texts ``a`` and ``b``, or ``sentence1`` and ``sentence2``.

    Args:
        path: The file.
        task: An instruction that both texts get, as queries; None embeds them as documents.

    Raises:
        InputError: The file cannot be read, a pair lacks a text or a finite score, there are
            fewer than three pairs, or all scores are equal.
    """
    input_type = "document" if task is None else "query"
    rows: list[Row] = []
    scores: list[float] = []
    for line, fields in read_records(path, "score"):
        texts = next(
            ([fields[key] for key in keys] for keys in _TEXT_KEYS if set(keys) <= set(fields)),
            [],
        )
        score = _score(fields)
        if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError(
                f"line {line} of {path} must have two texts, a and b, or sentence1 and sentence2"
            )
        if score is None:
            raise InputError(f"line {line} of {path} must have a finite number as score")
        for side, text in zip("ab", texts, strict=True):
            rows.append(Row(f"{line}{side}", text, input_type, task))
        scores.append(score)
    if len(scores) < _FEWEST or len(set(scores)) < 2:
        raise InputError(
            f"{path} must hold at least {_FEWEST} pairs with scores that are not all equal, "
            f"got {len(scores)} pairs"
        )
    return Pairs(shown_name(path), tuple(rows), np.array(scores))


def judge(pairs: Pairs, reference: Vectors, vectors: Vectors) -> dict[str, Any]:
    """The ``sts`` of a report: Spearman's correlation of cosines and scores, of both sides.

    Args:
        pairs: The pairs.
        reference: float32 [2 pairs, d], in the order of ``pairs.rows``.
        vectors: Those of the plan, the same shape.
    """
    before, now = (
        cosines(side[0::2], side[1::2]).round(TIE_DECIMALS) for side in (reference, vectors)
    )
    spearman = [correlation(pairs.scores, side) for side in (before, now)]
    interval = interval_of_correlations(pairs.scores, before, now)
    is_known = spearman[0] is not None and spearman[1] is not None and interval is not None
    return {
        "name": pairs.name,
        "sha256": pairs.sha256,
        "pairs": len(pairs.scores),
        "level": LEVEL,
        "spearman": {
            "reference": spearman[0],
            "plan": spearman[1],
            "difference": (spearman[1] or 0.0) - (spearman[0] or 0.0) if is_known else None,
            "interval": list(interval) if is_known and interval else None,
        },
    }


def _score(fields: Mapping[str, Any]) -> float | None:
    value = fields.get("score")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        score = float(value)
    except ValueError:
        return None
    return score if math.isfinite(score) else None
