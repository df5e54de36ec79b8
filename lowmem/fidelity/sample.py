"""A part of many texts that stands for the whole, the same each time."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lowmem.data import Row
from lowmem.errors import InputError
from lowmem.fidelity.metrics import LENGTHS


def stratified(rows: Sequence[Row], tokens: Sequence[int], count: int) -> list[int]:
    """Positions of a part of the texts, in their order.

    Texts are grouped by input type, language and span of lengths, and each group is ordered by
    hashes of its texts. A part holds the first of every group if it has room for all groups, the
    largest first, and then about as much of each as the whole does. The part of a smaller count is
    a part of that of a larger one.

    Args:
        rows: The texts.
        tokens: Length of each text.
        count: How many to take, at least 1; where there are no more, all are taken.

    Raises:
        InputError: The count is below 1.
    """
    if count < 1:
        raise InputError(f"a part of the texts must hold at least 1, got {count}")
    groups: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    spans = np.searchsorted(LENGTHS, np.asarray(tokens))
    for place, (row, span) in enumerate(zip(rows, spans, strict=True)):
        groups[row.input_type, row.lang, int(span)].append(place)
    order: list[tuple[Fraction, int, bytes, int]] = []
    for members in groups.values():
        hashes = {place: _hash(rows[place]) for place in members}
        for rank, place in enumerate(sorted(members, key=lambda place: (hashes[place], place))):
            order.append((Fraction(rank, len(members)), -len(members), hashes[place], place))
    return sorted(place for *_, place in sorted(order)[:count])


def _hash(row: Row) -> bytes:
    return hashlib.sha256(f"{row.id}\n{row.text}".encode()).digest()
