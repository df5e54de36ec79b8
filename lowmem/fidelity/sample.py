"""A part of many texts that stands for the whole, the same each time."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain, islice, zip_longest

import numpy as np

from lowmem.data import Row
from lowmem.errors import InputError
from lowmem.fidelity.metrics import LENGTHS


def stratified(rows: Sequence[Row], tokens: Sequence[int], count: int) -> list[int]:
    """Positions of a part of the texts, in their order.

    Texts are grouped by input type, language and span of lengths, and each group is ordered by
    hashes of its texts. A part has about as much of each group as the whole; but of the first
    texts every other one is the first of a group that has none yet, the largest group first, so
    that many small groups take half of a part at most. The part of a smaller count is a part of
    that of a larger one.

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
    shares: list[tuple[Fraction, int, bytes, int]] = []
    firsts: list[tuple[int, bytes, int]] = []
    for members in groups.values():
        hashes = {place: _hash(rows[place]) for place in members}
        ordered = sorted(members, key=lambda place: (hashes[place], place))
        firsts.append((-len(members), hashes[ordered[0]], ordered[0]))
        for rank, place in enumerate(ordered):
            share = Fraction(2 * rank + 1, 2 * len(members))
            shares.append((share, -len(members), hashes[place], place))
    by_share = [place for *_, place in sorted(shares)]
    covering = [place for *_, place in sorted(firsts)]
    taking_turns = chain.from_iterable(zip_longest(by_share, covering))
    order = dict.fromkeys(place for place in taking_turns if place is not None)
    return sorted(islice(order, count))


def _hash(row: Row) -> bytes:
    return hashlib.sha256(f"{row.id}\n{row.text}".encode()).digest()
