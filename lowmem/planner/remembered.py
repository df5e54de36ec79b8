"""What was measured on this machine before, in the user's cache.

A timing belongs to a machine, its driver, the versions of the packages and the artifact. Which plan
to run is never remembered, because free memory changes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

from lowmem import cache, hardware
from lowmem.hardware import Hardware

# Of its threads' time; what a quiet system does besides takes less than a tenth of this.
_DISTURBED_SHARE = 0.1


@dataclass(frozen=True)
class Timing:
    """How fast a plan was seen to be.

    Attributes:
        tokens_per_second: Of the median pass.
        computing_tokens_per_second: Of all passes, had the weights always been there.
        queued_share: Part of its threads' time in which they waited for a core, in the least
            disturbed of its runs.
        seconds: How long it computed in the fastest of them.
        runs: How many processes timed it; speeds are those of the fastest.
    """

    tokens_per_second: float
    computing_tokens_per_second: float
    queued_share: float = 0.0
    seconds: float = 0.0
    runs: int = 1

    @property
    def was_disturbed(self) -> bool:
        """Whether other programs took so much of the CPU that the plan must look too slow."""
        return self.queued_share > _DISTURBED_SHARE

    def or_faster(self, other: Timing) -> Timing:
        """The faster of both: a plan can be slowed down by something else, and never sped up."""
        faster = max(self, other, key=lambda timing: timing.tokens_per_second)
        # An undisturbed run that was no faster shows that nothing had been lost.
        least = min(self.queued_share, other.queued_share)
        return replace(faster, queued_share=least, runs=self.runs + other.runs)


class Timings:
    """Timings and bandwidths by their keys; an entry that is damaged counts as missing."""

    def __init__(self, machine: Hardware) -> None:
        """Reads those of one machine."""
        self._name = f"timings-{hardware.fingerprint(machine)}"
        self._known = cache.read_json(self._name) or {}

    def get(self, key: str) -> Timing | None:
        """A plan's timing."""
        value = self._known.get(key)
        if not isinstance(value, dict) or value.keys() != {one.name for one in fields(Timing)}:
            return None
        if not all(isinstance(number, int | float) for number in value.values()):
            return None
        timing = Timing(**value)
        speeds = (timing.tokens_per_second, timing.computing_tokens_per_second)
        return timing if all(_is_speed(speed) for speed in speeds) else None

    def add(self, key: str, timing: Timing) -> None:
        """Remembers a plan's timing."""
        self._write(key, asdict(timing))

    def bandwidth(self, key: str) -> float | None:
        """Bytes per second."""
        value = self._known.get(key)
        return value if _is_speed(value) else None

    def add_bandwidth(self, key: str, bytes_per_second: float) -> None:
        """Remembers a bandwidth."""
        self._write(key, bytes_per_second)

    def _write(self, key: str, value: object) -> None:
        # Others may have added something meanwhile; what cannot be written is remembered here.
        self._known = {**self._known, **(cache.read_json(self._name) or {}), key: value}
        cache.write_json(self._name, self._known)


def _is_speed(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0
