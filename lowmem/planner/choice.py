"""The plan to run: the fastest that is faithful, and in words why."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem import data, hardware
from lowmem.artifact import verdict
from lowmem.artifact.contract import Contract
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.tensors import some_names
from lowmem.artifact.verdict import Floor
from lowmem.compute.engine import shortest_prefix
from lowmem.compute.plan import Plan
from lowmem.errors import CapacityError
from lowmem.hardware import Hardware
from lowmem.planner import estimate, window
from lowmem.planner.candidates import AUTO, Subject, Wishes, candidates, with_streamed_twins
from lowmem.planner.timing import Stopwatch
from lowmem.progress import Progress, silent

logger = logging.getLogger(__name__)

BUILT_IN_TEXTS = ("probe", "quick")
# Timings do not tell plans apart that reach more than so much of the fastest's speed.
_ALIKE_SHARE = 0.85
# Mean cosines that are equal in so many digits do not tell plans apart.
_MEAN_DIGITS = 3
# Shorter instructions are computed with every text.
_SHORTEST_INSTRUCTION = 32


@dataclass(frozen=True)
class Choice:
    """What was found, and what was chosen.

    Attributes:
        machine: What the plans were made for.
        plans: Every plan within the wishes, candidates first, the fastest first.
        chosen: One of them, or None if none may be chosen.
        reason: Why, in words.
        warning: One line that the caller should see, or None.
    """

    machine: Hardware
    plans: tuple[Plan, ...]
    chosen: Plan | None
    reason: str
    warning: str | None = None

    def get(self) -> Plan:
        """The chosen plan.

        Raises:
            CapacityError: There is none.
        """
        if self.chosen is None:
            raise CapacityError(self.reason)
        return replace(self.chosen, reason=self.reason)


def choose(
    bundle: Bundle,
    *,
    wishes: Wishes,
    floor: Floor,
    machine: Hardware | None = None,
    repeated: float = 0.0,
    time_all: bool = False,
    progress: Progress = silent,
) -> Choice:
    """Plans a bundle on a machine.

    Verified plans come first; then ``fp16`` in fp32 or native bf16; then any unverified plan; a
    failing one only where its variant was asked for by name. The fastest of them runs, or one that
    timing can hardly tell from it: such a plan that keeps prefixes, and then the most faithful.

    Args:
        bundle: The bundle.
        wishes: What is fixed by name.
        floor: What counts as faithful enough.
        machine: Where to run; probed by default.
        repeated: Part of what will be embedded that repeats an earlier text's instruction, at
            least 0 and below 1: there are plans that compute it once.
        time_all: Whether to time every candidate, and not only those the choice is among.
        progress: Told of each plan before it is timed.

    Raises:
        InputError: A name in the wishes is unknown, or nothing matches them.
        BackendError: A device was asked for that the machine has not.
    """
    machine = machine or hardware.probe()
    subject = Subject.of_bundle(bundle)
    found = candidates(subject, machine, wishes)
    # Plans that differ in schedule alone share a report.
    of_report = {plan.report_id: plan for plan in found}
    reports = {id_: stored_report(plan, bundle) for id_, plan in of_report.items()}
    plans = [
        plan.with_(fidelity=verdict.fidelity(reports[plan.report_id], floor)) for plan in found
    ]
    stopwatch = Stopwatch(bundle, subject, machine, progress)
    if time_all:
        timed = stopwatch.time(plans, disturbed_again=True)
        plans = stopwatch.time(with_streamed_twins(timed))
    while True:
        tier, kind = _best_tier(plans, wishes)
        # A streamed plan is timed even if it is alone, since its window follows from that.
        if len(tier) < 2 and not any(plan.schedule == "streamed" for plan in tier):
            break
        timed = stopwatch.time(tier)
        known = {plan.id: plan for plan in timed}
        plans = with_streamed_twins([known.get(plan.id, plan) for plan in plans])
        if all(plan.dropped is None for plan in timed):
            tier = stopwatch.time_rivals_again(timed)
            known = {plan.id: plan for plan in tier}
            plans = [known.get(plan.id, plan) for plan in plans]
            break
    if not tier:
        return Choice(machine, _ordered(plans), None, _nothing_left(plans, bundle))
    _warn_of_disturbed(stopwatch, tier)
    means = {id_: report["cosine"]["mean"] for id_, report in reports.items() if report}
    chosen = _best_of(tier, bundle.contract, means, repeated)
    fastest = max(tier, key=lambda plan: plan.speed)
    reason, warning = _explain(chosen, kind, len(tier), floor)
    if chosen is not fastest:
        why = "is faster by less than timings differ, and less faithful"
        if chosen.speed <= _most_unlike(tier):
            why = f"would compute again the {repeated:.0%} that are repeated instructions"
        elif shortest_prefix(fastest, bundle.contract) is None:
            why = "is faster by less than timings differ, and keeps no instruction"
        reason += f"; {fastest.id} ({_speed_text(fastest)}) {why}"
    return Choice(machine, _ordered(plans), chosen, reason, warning)


def _warn_of_disturbed(stopwatch: Stopwatch, tier: Sequence[Plan]) -> None:
    """Says which of the plans that the choice is among may be faster than it is known."""
    if disturbed := [plan.id for plan in tier if stopwatch.was_disturbed(plan)]:
        logger.warning(
            "other programs kept the CPU busy while lowmem timed %s, which may be faster: the next "
            "lowmem plan times that again",
            some_names(disturbed, 2),
        )


def repeated_share(texts: Sequence[str], prompts: Sequence[str]) -> float:
    """Part of what is embedded that repeats an earlier text's instruction, about, by characters.

    Args:
        texts: The texts.
        prompts: What stands before each.
    """
    long = [prompt for prompt in prompts if len(prompt) >= _SHORTEST_INSTRUCTION]
    repeated = sum(map(len, long)) - sum(map(len, set(long)))
    return repeated / max(1, sum(map(len, prompts)) + sum(map(len, texts)))


def foresee(
    subject: Subject, *, machine: Hardware, wishes: Wishes, floor: Floor, bundle: Bundle | None
) -> Choice:
    """Plans for a machine that is not here, or for a model that is not exported.

    The rules are those of :func:`choose`, with estimated speed in the place of measured. A plan
    without an estimate is chosen only if it is alone.

    Args:
        subject: What the bundle offers, or what the checkpoint would.
        machine: Where it would run.
        wishes: What is fixed by name.
        floor: What counts as faithful enough.
        bundle: The bundle, whose reports count on any machine; None before there is one.

    Raises:
        InputError: A name in the wishes is unknown, or nothing matches them.
        BackendError: A device was asked for that the machine has not.
    """
    plans = []
    for plan in candidates(subject, machine, wishes):
        fidelity = fidelity_of(plan, bundle, floor) if bundle else plan.fidelity
        speed = None
        if plan.device == "cuda" and plan.dropped is None:
            plan = _with_window(plan, subject, machine)
            formats = subject.formats[plan.variant]
            speed = estimate.tokens_per_second(plan, subject.config, formats, machine.gpus[0])
        plans.append(plan.with_(fidelity=fidelity, estimated_tokens_per_second=speed))
    tier, kind = _best_tier(plans, wishes)
    if not tier:
        return Choice(machine, _ordered(plans), None, _nothing_left(plans, bundle))
    known = [plan for plan in tier if plan.speed] or tier
    chosen = max(known, key=lambda plan: plan.speed)
    untimed = "nothing was timed: the machine is described" if bundle else "nothing is exported yet"
    if len(known) > 1 and not chosen.speed:
        reason = (
            f"{untimed}; {len(known)} {kind} plans are to be timed there, and have no estimate"
            f"{_would_be_chosen(plans, chosen)}"
        )
        return Choice(machine, _ordered(plans), None, reason)
    reason, warning = _explain(chosen, kind, len(known), floor)
    if len(known) < len(tier):
        reason += f", and {len(tier) - len(known)} such plans have no estimate"
    reason += _would_be_chosen(plans, chosen)
    return Choice(machine, _ordered(plans), chosen, f"{untimed}; {reason}", warning)


def _would_be_chosen(plans: Sequence[Plan], chosen: Plan) -> str:
    """Names the plan that has no report and would be faster, if there is one."""
    unjudged = [plan for plan in plans if plan.dropped is None and plan.fidelity == "unverified"]
    fastest = max(unjudged, key=lambda plan: plan.speed, default=chosen)
    if fastest.speed <= chosen.speed:
        return ""
    return f"; {fastest.id}, {_speed_text(fastest)}, would be chosen if its report passed"


def _with_window(plan: Plan, subject: Subject, machine: Hardware) -> Plan:
    """A streamed plan with the window that the rates of a described card call for."""
    gpu, formats = machine.gpus[0], subject.formats[plan.variant]
    resident = plan.with_(schedule="resident", window_tokens=plan.batch_tokens)
    speed = estimate.tokens_per_second(resident, subject.config, formats, gpu)
    if plan.schedule == "resident" or speed is None or gpu.copy_bandwidth is None:
        return plan
    return window.sized(
        plan, subject, machine, copy_bandwidth=gpu.copy_bandwidth, tokens_per_second=speed
    )


def fidelity_of(plan: Plan, bundle: Bundle, floor: Floor) -> str:
    """``verified``, ``failing`` or ``unverified``, from the report in the bundle.

    Raises:
        BundleError: The report's file is damaged.
    """
    return verdict.fidelity(stored_report(plan, bundle), floor)


def stored_report(plan: Plan, bundle: Bundle) -> dict[str, Any] | None:
    """The plan's report in the bundle, or None where there is none of these very files.

    Raises:
        BundleError: The report's file is damaged.
    """
    return verdict.read_report(
        bundle.path / "reports" / f"{plan.report_id}.json",
        plan=plan.report_id,
        artifact_sha256=bundle.artifact_sha256(plan.variant),
        texts_sha256=[data.sha256(data.load(name)) for name in BUILT_IN_TEXTS],
    )


def _best_tier(plans: Sequence[Plan], wishes: Wishes) -> tuple[list[Plan], str]:
    """The plans that the choice is among, and what they are."""
    running = [plan for plan in plans if plan.dropped is None]
    verified = [plan for plan in running if plan.fidelity == "verified"]
    if verified:
        return verified, "verified"
    unverified = [plan for plan in running if plan.fidelity == "unverified"]
    trusted = [
        plan for plan in unverified if plan.variant == "fp16" and plan.compute in ("fp32", "bf16")
    ]
    if trusted:
        return trusted, "trusted"
    if unverified:
        return unverified, "unverified"
    return (running, "failing") if wishes.variant != AUTO else ([], "none")


def _best_of(
    tier: Sequence[Plan], contract: Contract, means: Mapping[str, float], repeated: float = 0.0
) -> Plan:
    """The fastest, or of those that timing can hardly tell from it the best.

    That is one that keeps prefixes, and then the most faithful, by the mean cosines that are known
    of report ids: what is chosen shall not turn on a moment's noise, least of all to the worse.

    What is timed has no instruction in common, so what a plan saves there is not in its speed: of
    texts with a repeated part it computes the rest alone. That part never changes the variant:
    queries are to be compared with documents, which repeat nothing.
    """
    savers = [plan for plan in tier if shortest_prefix(plan, contract) is not None]
    slower = _most_unlike(tier)
    alike = [plan for plan in tier if plan.speed > slower] or list(tier)

    def merit(plan: Plan) -> tuple[bool, float, float]:
        return plan in savers, round(means.get(plan.report_id, 0.0), _MEAN_DIGITS), plan.speed

    chosen = max(alike, key=merit)
    if chosen in savers or not repeated:
        return chosen
    of_variant = [plan for plan in savers if plan.variant == chosen.variant]
    saver = max(of_variant, key=lambda plan: plan.speed, default=chosen)
    return saver if saver.speed >= (1 - repeated) * slower else chosen


def _most_unlike(tier: Sequence[Plan]) -> float:
    """Most tokens a second of a plan that is surely slower than the fastest."""
    return _ALIKE_SHARE * max(plan.speed for plan in tier)


def _explain(chosen: Plan, kind: str, rivals: int, floor: Floor) -> tuple[str, str | None]:
    speed = _speed_text(chosen)
    among = f"the fastest of {rivals}" if rivals > 1 else "the only one"
    bounds = f"floor {floor.name}: mean {floor.mean}, p5 {floor.p5}, min {floor.min}"
    if kind == "verified":
        return f"{among} whose report passes the {bounds}; {speed}", None
    if kind == "trusted":
        reason = (
            f"no plan is verified; {among} over the 16-bit weights, in {chosen.compute}; {speed}"
        )
        warning = None if chosen.compute == "fp32" else f"{chosen.id} has no fidelity report"
        return reason, warning
    if kind == "unverified":
        return (
            f"no plan is verified; {among} without a report; {speed}",
            f"{chosen.id} has no fidelity report: what quantization did to its vectors is unknown",
        )
    return (
        f"asked for by name, though its report fails the {bounds}; {speed}",
        f"{chosen.id} fails the {bounds}",
    )


def _speed_text(plan: Plan) -> str:
    if plan.tokens_per_second:
        return f"{plan.tokens_per_second:.0f} tokens/s"
    return f"an estimated {plan.speed:.0f} tokens/s" if plan.speed else "untimed"


def _nothing_left(plans: Sequence[Plan], bundle: Bundle | None) -> str:
    failing = [plan.id for plan in plans if plan.dropped is None]
    if failing and bundle:
        return (
            f"every plan that runs here fails the floor ({', '.join(failing)}): ask for one by "
            f"--variant, give another --floor, or export fp16 ({bundle.path})"
        )
    reasons = "; ".join(f"{plan.id}: {plan.dropped}" for plan in plans[:8])
    return f"no plan can run on this machine: {reasons}"


def _ordered(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    return tuple(
        sorted(
            plans,
            key=lambda plan: (plan.dropped is not None, -plan.speed, plan.id),
        )
    )
