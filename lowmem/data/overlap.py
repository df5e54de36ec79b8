"""How much texts share with those that steered a quantizer.

A figure on texts that a quantizer was calibrated with flatters it. Two texts share a run of 13
tokens by copying, not by chance; the built-in sets share none with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SHINGLE_TOKENS = 13
_MOST_NAMED = 10


@dataclass(frozen=True)
class Shared:
    """What texts have in common with others.

    Attributes:
        texts: How many of the texts share a run of 13 tokens, or are one of the others whole.
        count: How many texts there are.
        runs: Share of the texts' different runs of 13 tokens that stand in the others, from 0 to
            1; 0 where no text is as long.
        ids: The first ten of the texts that share something.
    """

    texts: int
    count: int
    runs: float
    ids: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The form of a report."""
        return {**asdict(self), "ids": list(self.ids)}


def shared(
    texts: Sequence[tuple[str, str]],
    others: Iterable[str],
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]],
) -> Shared:
    """Compares texts with others by their runs of 13 tokens; shorter texts by the whole.

    Args:
        texts: Id and bare text of each.
        others: Bare texts, such as those of ``load("calibration")``.
        encode: Token ids of texts, without instruction or special tokens.
    """
    known: set[tuple[int, ...]] = set()
    for ids in encode(list(others)):
        known |= _runs(ids)
    runs: set[tuple[int, ...]] = set()
    sharing = []
    for (id_, _), ids in zip(texts, encode([text for _, text in texts]), strict=True):
        own = _runs(ids)
        if own & known:
            sharing.append(id_)
        runs |= {run for run in own if len(run) == SHINGLE_TOKENS}
    found = len(runs & known) / len(runs) if runs else 0.0
    return Shared(len(sharing), len(texts), found, tuple(sharing[:_MOST_NAMED]))


def _runs(ids: Sequence[int]) -> set[tuple[int, ...]]:
    """Every run of 13 ids, or all of a shorter text."""
    last = max(len(ids) - SHINGLE_TOKENS, 0)
    return {tuple(ids[start : start + SHINGLE_TOKENS]) for start in range(last + 1)}
