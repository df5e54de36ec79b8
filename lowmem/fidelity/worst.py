"""The texts that a plan moved most, and what happened to their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowmem.data import Row
from lowmem.fidelity import neighbours
from lowmem.fidelity.directions import Floats
from lowmem.fidelity.neighbours import Neighbours

_EXCERPT_CHARACTERS = 160


def worst(
    cosine: Floats,
    rows: Sequence[Row],
    tokens: Sequence[int],
    before: Neighbours,
    now: Neighbours,
    count: int = 10,
) -> list[dict[str, Any]]:
    """The texts with the least cosine, the least first, equal ones in their order.

    Args:
        cosine: float64 [n].
        rows: The texts, [n].
        tokens: Their lengths, [n].
        before: Neighbours by the reference.
        now: Neighbours by the plan.
        count: How many at most.

    Returns:
        Objects with ``id``, ``cosine``, ``tokens``, ``input_type``, an excerpt as ``text``,
        ``kept`` of ``of`` nearest texts (None where those are all others), and the nearest text by
        the reference and by the plan.
    """
    depth = before.nearest.shape[1]
    kept = neighbours.kept_shares(before, now, depth) * depth
    return [
        {
            "id": rows[place].id,
            "cosine": float(cosine[place]),
            "tokens": tokens[place],
            "input_type": rows[place].input_type,
            "text": excerpt(rows[place].text),
            "kept": round(float(kept[place])) if before.leave_out_some(depth) else None,
            "of": depth,
            "nearest_before": _nearest(before, place, rows),
            "nearest_now": _nearest(now, place, rows),
        }
        for place in np.argsort(cosine, kind="stable")[:count].tolist()
    ]


def excerpt(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    cut = len(line) > _EXCERPT_CHARACTERS
    return f"{line[: _EXCERPT_CHARACTERS - 1]}…" if cut else line


def _nearest(found: Neighbours, place: int, rows: Sequence[Row]) -> dict[str, str] | None:
    if not found.nearest.shape[1]:
        return None
    row = rows[int(found.nearest[place, 0])]
    return {"id": row.id, "text": excerpt(row.text)}
