"""How fast each plan is on this machine, measured in a process of its own."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

from lowmem.artifact import strict_json
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.manifest import Bundle
from lowmem.compute.plan import Plan
from lowmem.data import Row, load
from lowmem.errors import BundleError, LowmemError
from lowmem.hardware import Hardware
from lowmem.measure import measure, package_versions
from lowmem.planner import window
from lowmem.planner.candidates import Subject
from lowmem.planner.remembered import Timing, Timings
from lowmem.progress import Progress, silent

logger = logging.getLogger(__name__)

_FEWEST_CHARACTERS, _MOST_CHARACTERS = 600, 6000
_ASSUMED_FLOPS = 1e11
_PREFILL_SECONDS = 2.0
# Faster plans than assumed make several passes.
_LEAST_SECONDS = 1.0
# A slow moment of the machine may outlast one second, and rarely four.
_LEAST_SECONDS_AGAIN = 4.0
_CHARACTERS_PER_TOKEN = 4
_TIMEOUT_SECONDS = 600
# A pass on a card takes too little time for one of them to be sure of.
_DEVICE_REPEATS = 3
# One run shows so much of a plan's speed at least, even in a slow moment of the machine.
_RIVALS_SHARE = 0.7
_RIVALS_RUNS = 2
# A run so long has met quick and slow moments of the machine alike.
_SURE_SECONDS = 10.0


def workload(config: ModelConfig, device: str = "cpu") -> list[Row]:
    """Built-in texts of middle length.

    On a CPU about as many as one pass of two seconds takes; on a card all of them, which is what
    it takes to hide how long the weights take to come.
    """
    middle = [row for row in load("workloads") if row.kind == "mid"]
    if device == "cuda":
        return middle
    flops_per_token = 2 * config.linear_weights
    characters = _CHARACTERS_PER_TOKEN * _PREFILL_SECONDS * _ASSUMED_FLOPS / flops_per_token
    wanted = min(max(characters, _FEWEST_CHARACTERS), _MOST_CHARACTERS)
    rows: list[Row] = []
    for row in middle:
        if sum(len(other.text) for other in rows) < wanted:
            rows.append(row)
    return rows


class Stopwatch:
    """Times the plans of one bundle on this machine, and remembers how fast they were."""

    def __init__(
        self, bundle: Bundle, subject: Subject, machine: Hardware, progress: Progress = silent
    ) -> None:
        """Reads what is remembered; runs nothing.

        Args:
            bundle: The bundle.
            subject: What is planned for; from its shape follows the length of the prefill.
            machine: Where this is.
            progress: Told of each plan before it is timed.
        """
        self._bundle, self._subject, self._machine = bundle, subject, machine
        self._progress = progress
        self._timings = Timings(machine)
        self._workloads = {device: workload(subject.config, device) for device in ("cpu", "cuda")}
        self._versions = package_versions()

    def known_speeds(self, plans: Sequence[Plan]) -> dict[str, float]:
        """Tokens per second of the plans that were timed before, by plan id; nothing is run."""
        timings = {plan.id: self._known(plan) for plan in plans}
        return {id_: timing.tokens_per_second for id_, timing in timings.items() if timing}

    def time(self, plans: Sequence[Plan], *, disturbed_again: bool = False) -> list[Plan]:
        """Fills in ``tokens_per_second`` of every candidate, as it is known or by a short prefill.

        Streamed plans on a CPU also get the window that hides reading behind the arithmetic, and
        count as fast as they are in full windows, since the few texts that are timed would hide
        nothing.

        Args:
            plans: Plans; dropped ones, and those that have a speed, are left as they are.
            disturbed_again: Whether plans that were timed while other programs kept the CPU busy
                are timed once more.

        Returns:
            The plans in the same order; one that fails to run is dropped with the error as reason.

        Raises:
            BundleError: No plan is left, and this is why one of them is not.
        """
        wanted = [plan for plan in plans if plan.dropped is None and plan.tokens_per_second is None]
        missing = [
            plan
            for plan in wanted
            if self._known(plan) is None or (disturbed_again and self.was_disturbed(plan))
        ]
        timed: list[Plan] = []
        damages: list[BundleError] = []
        for plan in plans:
            if plan not in wanted:
                timed.append(plan)
                continue
            try:
                if plan in missing:
                    self._progress("timing plans", missing.index(plan), len(missing))
                    self._run(plan)
                timed.append(self._filled_in(plan))
            except LowmemError as error:
                if isinstance(error, BundleError):
                    damages.append(error)
                elif self._known(plan) is not None:
                    logger.warning("%s cannot be timed again: %s", plan.id, error)
                    timed.append(self._filled_in(plan))
                    continue
                logger.warning("%s cannot run: %s", plan.id, error)
                timed.append(plan.with_(dropped=str(error)))
        if damages and all(plan.dropped is not None for plan in timed):
            raise damages[0]
        return timed

    def time_rivals_again(self, plans: Sequence[Plan]) -> list[Plan]:
        """Times resident plans again that, by one short run, may yet be the fastest.

        Args:
            plans: Plans that :meth:`time` timed.

        Returns:
            The plans in the same order, each as fast as the faster of its runs.
        """
        least = _RIVALS_SHARE * max((plan.speed for plan in plans), default=0.0)
        rivals = [plan for plan in plans if plan.schedule == "resident" and plan.speed >= least]
        if len(rivals) < 2:
            return list(plans)
        unsure = [plan for plan in rivals if not self._is_sure(plan)]
        for number, plan in enumerate(unsure):
            self._progress("timing the fastest again", number, len(unsure))
            try:
                self._run(plan, _LEAST_SECONDS_AGAIN)
            except LowmemError as error:  # it has run before, and counts as fast as it was
                logger.warning("%s cannot be timed again: %s", plan.id, error)
        return [self._filled_in(plan) if plan in unsure else plan for plan in plans]

    def was_disturbed(self, plan: Plan) -> bool:
        """Whether other programs kept the CPU busy whenever a plan was timed."""
        timing = self._known(plan)
        return timing is not None and timing.was_disturbed

    def _known(self, plan: Plan) -> Timing | None:
        return self._timings.get(self._key(plan))

    def _is_sure(self, plan: Plan) -> bool:
        """Whether a plan was run twice, or for long."""
        timing = self._known(plan)
        return timing is not None and (
            timing.runs >= _RIVALS_RUNS or timing.seconds >= _SURE_SECONDS
        )

    def _run(self, plan: Plan, least_seconds: float = _LEAST_SECONDS) -> None:
        """Times a plan in a process of its own; the fastest of its runs is remembered.

        Args:
            plan: What is timed.
            least_seconds: How long its passes take together at least, on a CPU.

        Raises:
            LowmemError: It cannot run.
        """
        is_on_card = plan.device == "cuda"
        record = measure(
            self._bundle,
            plan,
            self._workloads[plan.device],
            repeats=_DEVICE_REPEATS if is_on_card else 1,
            least_seconds=0.0 if is_on_card else least_seconds,
            timeout_seconds=_TIMEOUT_SECONDS,
        )
        # What a card computes waits for no core, and a reader beside the arithmetic for its own.
        is_judged = not is_on_card and plan.schedule == "resident"
        seconds = sum(record.seconds)
        timing = Timing(
            record.tokens_per_second,
            record.computing_tokens_per_second,
            record.queued_seconds / (plan.threads * seconds) if is_judged else 0.0,
            seconds,
        )
        known = self._known(plan)
        self._timings.add(self._key(plan), known.or_faster(timing) if known else timing)

    def _filled_in(self, plan: Plan) -> Plan:
        """A plan that was run with its speed, and the window that follows where it is streamed."""
        timing = self._known(plan)
        assert timing is not None, plan.id
        if plan.schedule != "streamed" or plan.device != "cpu":
            return plan.with_(tokens_per_second=timing.tokens_per_second)
        bandwidth, computing = self._read_bandwidth(plan), timing.computing_tokens_per_second
        plan = window.sized(
            plan,
            self._subject,
            self._machine,
            copy_bandwidth=bandwidth,
            tokens_per_second=computing,
        )
        speed = window.tokens_per_second(
            plan, self._subject, copy_bandwidth=bandwidth, computing=computing
        )
        return plan.with_(tokens_per_second=speed)

    def _read_bandwidth(self, plan: Plan) -> float:
        files = self._bundle.directory(plan.variant).glob("*.safetensors")
        largest = max(files, key=lambda file: file.stat().st_size)
        # The same artifact may lie on several disks.
        artifact = self._bundle.artifact_sha256(plan.variant)
        key = f"read-{largest.stat().st_dev}-{artifact}"
        known = self._timings.bandwidth(key)
        if known is None:
            known = window.read_bandwidth(largest)
            self._timings.add_bandwidth(key, known)
        return known

    def _key(self, plan: Plan) -> str:
        layers = self._subject.config.num_hidden_layers
        content = {
            "plan": plan.id,
            "threads": plan.threads,
            "batch_tokens": plan.batch_tokens,
            "window_tokens": plan.window_tokens,
            # In eighths of the stack, so that a little more free memory does not mean a new timing.
            "kept": 8 * plan.kept_layers // layers,
            "drops_cache": plan.drops_cache,
            "artifact": self._bundle.artifact_sha256(plan.variant),
            "texts": [row.id for row in self._workloads[plan.device]],
            "versions": self._versions,
        }
        return hashlib.sha256(strict_json.canonical(content)).hexdigest()[:32]
