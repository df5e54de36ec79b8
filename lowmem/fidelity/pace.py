"""How long a report will take, said before it starts and again after each plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowmem.compute.plan import Plan
from lowmem.progress import duration_text

_START_SECONDS = 15.0  # of the process that each plan runs in, where it is slow to start


class Pace:
    """What is left of a report."""

    def __init__(
        self,
        plans: Sequence[Plan],
        tokens: int,
        reference_tokens: int,
        speeds: Mapping[str, float],
        cpu_speed: float,
    ) -> None:
        """Expects speeds that were measured before; of others on a CPU that of float32 products.

        Args:
            plans: What will run.
            tokens: Tokens that each of them embeds.
            reference_tokens: Tokens that the reference still has to embed.
            speeds: Plan id to tokens per second, as far as known.
            cpu_speed: Tokens per second of float32 products on this CPU.
        """
        self._reference_seconds = reference_tokens / cpu_speed
        self._expected = {
            plan.id: _START_SECONDS + tokens / speed
            for plan in plans
            if (speed := speeds.get(plan.id, cpu_speed if plan.device == "cpu" else None))
        }
        self._all = [plan.id for plan in plans]
        self._taken = self._foreseen = 0.0

    def finished(self, plan: Plan, seconds: float) -> None:
        """Takes in how long a plan took; what is left is corrected by the same factor."""
        self.ended(plan)
        if plan.id in self._expected:
            self._taken += seconds
            self._foreseen += self._expected[plan.id]

    def ended(self, plan: Plan) -> None:
        """Leaves out a plan that is over, if by failing; the reference was complete before it."""
        self._all.remove(plan.id)
        self._reference_seconds = 0.0

    def left(self) -> str:
        """The time left, in words."""
        factor = self._taken / self._foreseen if self._foreseen else 1.0
        known = [self._expected[id_] for id_ in self._all if id_ in self._expected]
        seconds = self._reference_seconds + factor * sum(known)
        unknown = len(self._all) - len(known)
        more = f" and {unknown} plan{'s' if unknown > 1 else ''} not timed yet" if unknown else ""
        return f"about {duration_text(seconds)}{more}"
