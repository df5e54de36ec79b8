"""Keys and values of shared prefixes, kept from pass to pass.

The instruction before a query is the same for thousands of queries, and BOS for all texts: what
their tokens leave in each layer depends on nothing behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from lowmem.compute.decoder import PrefixStates


class PrefixCache:
    """The prefixes that were used last, up to so many tokens in all."""

    def __init__(self, most_tokens: int) -> None:
        """Starts empty.

        Args:
            most_tokens: Tokens of all prefixes together; the one that was not used for the longest
                time goes first, and one that is longer by itself is not kept.
        """
        self._most_tokens = most_tokens
        self._known: dict[bytes, tuple[PrefixStates, ...]] = {}  # the last used is last

    def get(self, ids: bytes) -> tuple[PrefixStates, ...] | None:
        """What each layer keeps of a prefix, or None where it is not known.

        Args:
            ids: The prefix's token ids, int64 as bytes.
        """
        states = self._known.pop(ids, None)
        if states is not None:
            self._known[ids] = states
        return states

    def fitting(self, prefixes: Sequence[bytes]) -> list[bytes]:
        """The first of some prefixes, as many as can be kept together.

        Args:
            prefixes: The token ids of each, int64 as bytes.
        """
        ends = accumulate(len(ids) // np.dtype(np.int64).itemsize for ids in prefixes)
        return [ids for ids, end in zip(prefixes, ends, strict=True) if end <= self._most_tokens]

    def keep(self, ids: bytes, states: Sequence[PrefixStates]) -> None:
        """Remembers what every layer keeps of a prefix."""
        tokens = len(states[0].key)
        if tokens > self._most_tokens:
            return
        self._known.pop(ids, None)
        held = sum(len(each[0].key) for each in self._known.values())
        for oldest in list(self._known):
            if held + tokens <= self._most_tokens:
                break
            held -= len(self._known.pop(oldest)[0].key)
        self._known[ids] = tuple(states)
