"""How fast each plan is on this machine, measured in a process of its own and remembered.

Timings are cached by machine, driver, versions and artifact; which plan to run never is, because
free memory changes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence

from lowmem import cache, hardware
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
from lowmem.progress import Progress, silent

logger = logging.getLogger(__name__)

_FEWEST_CHARACTERS, _MOST_CHARACTERS = 600, 6000
_ASSUMED_FLOPS = 1e11
_PREFILL_SECONDS = 2.0
_CHARACTERS_PER_TOKEN = 4
_TIMEOUT_SECONDS = 600
# A pass on a card takes too little time for one of them to be sure of.
_DEVICE_REPEATS = 3


def time_plans(
    plans: Sequence[Plan],
    bundle: Bundle,
    subject: Subject,
    machine: Hardware,
    progress: Progress = silent,
) -> list[Plan]:
    """Fills in ``tokens_per_second`` of every candidate, from the cache or by a short prefill.

    Streamed plans on a CPU also get the window that hides reading behind the arithmetic, and count
    as fast as they are in full windows, since the few texts that are timed would hide nothing.

    Args:
        plans: Plans; dropped ones are left as they are.
        bundle: The bundle.
        subject: What is planned for; from its shape follows the length of the prefill.
        machine: Where this is.
        progress: Told of each plan before it is timed.

    Returns:
        The plans in the same order; one that fails to run is dropped with the error as reason.

    Raises:
        BundleError: No plan is left, and this is why one of them is not.
    """
    workloads, layers = _workloads(subject.config, plans), subject.config.num_hidden_layers
    timings = _Timings(f"timings-{hardware.fingerprint(machine)}")
    keys = {
        plan.id: _key(plan, bundle, workloads[plan.device], layers)
        for plan in plans
        if plan.dropped is None and plan.tokens_per_second is None
    }
    unknown = [id_ for id_, key in keys.items() if not timings.has(key)]
    timed: list[Plan] = []
    damages: list[BundleError] = []
    for plan in plans:
        if plan.id not in keys:
            timed.append(plan)
            continue
        rows, key = workloads[plan.device], keys[plan.id]
        speed, computing = timings.get(key), timings.get(_computing(key))
        if speed is None or computing is None:
            progress("timing plans", unknown.index(plan.id), len(unknown))
            try:
                repeats = _DEVICE_REPEATS if plan.device == "cuda" else 1
                record = measure(
                    bundle, plan, rows, repeats=repeats, timeout_seconds=_TIMEOUT_SECONDS
                )
            except LowmemError as error:
                logger.warning("%s cannot run: %s", plan.id, error)
                if isinstance(error, BundleError):
                    damages.append(error)
                timed.append(plan.with_(dropped=str(error)))
                continue
            speed, computing = record.tokens_per_second, record.computing_tokens_per_second
            timings.add({key: speed, _computing(key): computing})
        if plan.schedule == "streamed" and plan.device == "cpu":
            bandwidth = _read_bandwidth(plan, bundle, timings)
            plan = window.sized(
                plan,
                subject,
                machine,
                copy_bandwidth=bandwidth,
                tokens_per_second=computing,
            )
            speed = window.tokens_per_second(
                plan, subject, copy_bandwidth=bandwidth, computing=computing
            )
        timed.append(plan.with_(tokens_per_second=speed))
    if damages and all(plan.dropped is not None for plan in timed):
        raise damages[0]
    return timed


def known_speeds(
    plans: Sequence[Plan], bundle: Bundle, config: ModelConfig, machine: Hardware
) -> dict[str, float]:
    """Tokens per second of the plans that were timed before, by plan id; nothing is run."""
    timings = cache.read_json(f"timings-{hardware.fingerprint(machine)}") or {}
    workloads, layers = _workloads(config, plans), config.num_hidden_layers
    keys = {plan.id: _key(plan, bundle, workloads[plan.device], layers) for plan in plans}
    speeds = {id_: timings.get(key) for id_, key in keys.items()}
    return {id_: s for id_, s in speeds.items() if isinstance(s, float) and s > 0}


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


def _workloads(config: ModelConfig, plans: Sequence[Plan]) -> dict[str, list[Row]]:
    """The workload of each device of the plans."""
    return {device: workload(config, device) for device in {plan.device for plan in plans}}


class _Timings:
    """What was measured on this machine, by keys; all of it positive."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known = cache.read_json(name) or {}

    def get(self, key: str) -> float | None:
        value = self._known.get(key)
        return value if isinstance(value, float) and value > 0 else None

    def has(self, key: str) -> bool:
        """Whether a plan was timed, by its key."""
        return self.get(key) is not None and self.get(_computing(key)) is not None

    def add(self, measured: Mapping[str, float]) -> None:
        """Adds to what others may have added meanwhile."""
        self._known = {**(cache.read_json(self._name) or {}), **measured}
        cache.write_json(self._name, self._known)


def _computing(key: str) -> str:
    """The key of a plan's speed had the weights always been there."""
    return f"{key}-computing"


def _read_bandwidth(plan: Plan, bundle: Bundle, timings: _Timings) -> float:
    files = bundle.directory(plan.variant).glob("*.safetensors")
    largest = max(files, key=lambda file: file.stat().st_size)
    # The same artifact may lie on several disks.
    key = f"read-{largest.stat().st_dev}-{bundle.artifact_sha256(plan.variant)}"
    known = timings.get(key)
    if known is None:
        known = window.read_bandwidth(largest)
        timings.add({key: known})
    return known


def _key(plan: Plan, bundle: Bundle, rows: Sequence[Row], layers: int) -> str:
    content = {
        "plan": plan.id,
        "threads": plan.threads,
        "batch_tokens": plan.batch_tokens,
        "window_tokens": plan.window_tokens,
        # In eighths of the stack, so that a little more free memory does not mean a new timing.
        "kept": 8 * plan.kept_layers // layers,
        "drops_cache": plan.drops_cache,
        "artifact": bundle.artifact_sha256(plan.variant),
        "texts": [row.id for row in rows],
        "versions": package_versions(),
    }
    return hashlib.sha256(strict_json.canonical(content)).hexdigest()[:32]
