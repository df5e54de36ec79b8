"""Which way of doing the same is fastest on this card: tried once, and remembered for the card."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping

import torch

from lowmem import cache
from lowmem.errors import BackendError

logger = logging.getLogger(__name__)

_REPEATS = 5


class Tuner:
    """Choices for one kind of kernel on one card, kept in the user's cache."""

    def __init__(self, kind: str, card: str) -> None:
        """Reads what was chosen before.

        Args:
            kind: What is tuned, a word.
            card: The card and whatever else the choice depends on, such as versions.
        """
        digest = hashlib.sha256(card.encode()).hexdigest()[:16]
        self._name = f"tuning-{kind}-{digest}"
        self._chosen: dict[str, str] = dict(cache.read_json(self._name) or {})

    def choose(
        self,
        key: str,
        ways: Mapping[str, Callable[[], object]],
        seconds: Callable[[Callable[[], object]], float],
    ) -> str:
        """The name of the fastest way.

        Args:
            key: What is to be done; its choice is remembered.
            ways: By name; one that cannot be done here raises RuntimeError, and is not chosen.
            seconds: Times a way.

        Raises:
            BackendError: None of them can be done.
            OutOfMemoryError: The device's memory is used up.
        """
        if self._chosen.get(key) not in ways:
            taken: dict[str, float] = {}
            for name, way in ways.items():
                try:
                    taken[name] = seconds(way)
                except torch.OutOfMemoryError:  # of the batch, not of the way
                    raise
                except RuntimeError as error:
                    logger.info(
                        "%s %s cannot be done in the way %s: %s", self._name, key, name, error
                    )
            if not taken:
                raise BackendError(f"no kernel runs on this card for {self._name} {key}")
            best = min(taken, key=taken.__getitem__)
            self._chosen = {**(cache.read_json(self._name) or {}), **self._chosen, key: best}
            cache.write_json(self._name, self._chosen)
        return self._chosen[key]


def device_seconds(way: Callable[[], object]) -> float:
    """The least of a few runs on the current CUDA device; the first one compiles and is not one."""
    way()
    least = float("inf")
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        way()
        end.record()
        end.synchronize()
        least = min(least, begin.elapsed_time(end) / 1000)
    return least
