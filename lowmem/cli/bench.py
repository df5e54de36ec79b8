"""``lowmem bench``: how fast each plan is here, beside what the machine could do at most.

A plan runs in a process of its own, over the texts that the planner times. Its speed is held
against the fastest product of the same arithmetic, measured in the same run: operations of every
token in every layer, over time, over that rate. A plan that computes less than that (an instruction
once, the last layer for pooled tokens alone) may come out above what its products reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem import data, hardware
from lowmem.artifact import strict_json, verdict
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import Floor, parse_floor
from lowmem.cli import options
from lowmem.compute.plan import Plan
from lowmem.errors import BackendError, CapacityError, LowmemError
from lowmem.hardware import Hardware
from lowmem.measure import Record, measure, measure_ceiling, package_versions
from lowmem.outputs import check_output, write_text
from lowmem.planner.candidates import Subject, Wishes, candidates
from lowmem.planner.choice import stored_report
from lowmem.planner.timing import workload

_REPEATS = 3
_MOST_NAMED = 8


@dataclass(frozen=True)
class Measured:
    """A plan as it ran.

    Attributes:
        plan: What ran.
        record: What the run showed.
        ceiling_fraction: Its arithmetic over time, over the fastest product.
        report: Its stored fidelity report, or None.
    """

    plan: Plan
    record: Record
    ceiling_fraction: float
    report: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """One of ``plans`` in the record."""
        plan, record, report = self.plan, self.record, self.report
        return {
            "id": plan.id,
            "texts": record.texts,
            "tokens_per_second": record.tokens_per_second,
            "texts_per_second": record.texts / record.median_seconds,
            "seconds": record.seconds,
            "load_seconds": record.load_seconds,
            "ceiling_fraction": self.ceiling_fraction,
            "predicted": {"host_bytes": plan.host_bytes, "device_bytes": plan.device_bytes},
            "measured": {
                "host_bytes": record.peak_host_bytes,
                "device_bytes": record.peak_device_bytes,
            },
            "fidelity": plan.fidelity,
            "cosine": None if report is None else report["cosine"],
        }


def bench(
    bundle: options.Bundle,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the record.")
    ] = None,
    variant: options.Variant = "auto",
    engine: options.Engine = "auto",
    device: options.Device = "auto",
    compute: options.Compute = "auto",
    schedule: options.Schedule = "auto",
    floor: options.Floor = "standard",
) -> None:
    """Measure every plan: speed, share of the machine's ceiling, memory, fidelity."""
    opened = Bundle(bundle)
    wanted = parse_floor(floor)
    if json_file is not None:
        check_output(json_file, [bundle])
    machine = hardware.probe()
    subject = Subject.of_bundle(opened)
    wishes = Wishes(variant, engine, device, compute, schedule)
    plans = candidates(subject, machine, wishes)
    running = [plan for plan in plans if plan.dropped is None]
    if not running:
        reasons = "; ".join(f"{plan.id}: {plan.dropped}" for plan in plans[:_MOST_NAMED])
        raise CapacityError(f"no plan can run on this machine: {reasons}")
    ceilings = _ceilings(opened, running)
    measured, failed = _measure(opened, subject, running, ceilings, wanted)
    typer.echo(table(machine, ceilings, measured, failed))
    if json_file is not None:
        record = to_json(opened, machine, subject, ceilings, measured, failed)
        write_text(json_file, strict_json.dumps(record))
    if failed:
        raise BackendError(f"{len(failed)} of {len(running)} plans failed, as the table says")


def to_json(
    bundle: Bundle,
    machine: Hardware,
    subject: Subject,
    ceilings: dict[str, float],
    measured: Sequence[Measured],
    failed: Sequence[Plan],
) -> dict[str, Any]:
    """The documented form; see ``schemas/bench.schema.json``."""
    # Those of a CPU are the first of those of a card.
    devices = {one.plan.device for one in measured} or {"cpu"}
    rows = max((workload(subject.config, device) for device in devices), key=len)
    return {
        "format": 1,
        "machine": machine.to_json(),
        "versions": package_versions(),
        "model": bundle.manifest.source["name"],
        "artifacts": {name: bundle.artifact_sha256(name) for name in subject.formats},
        "texts": {"sha256": data.sha256(rows), "count": len(rows)},
        "ceilings": ceilings,
        "plans": [one.to_json() for one in measured],
        "failed": [{"id": plan.id, "reason": plan.dropped} for plan in failed],
    }


def table(
    machine: Hardware,
    ceilings: dict[str, float],
    measured: Sequence[Measured],
    failed: Sequence[Plan],
) -> str:
    """The measurements as text, at most 80 columns wide but for reasons."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceilings.items())
    lines = [
        machine.words() + "".join(f"; {gpu.name}" for gpu in machine.gpus),
        f"fastest products, 10^9 operations/s: {rates}",
        "",
        f"{'':<33} {'':>6} {'':>7} {'of':>4} {'memory':>17} {'mean':>6}",
        f"{'plan':<33} {'tok/s':>6} {'texts/s':>7} {'max':>4} {'predicted':>9} {'peak':>7} cosine",
    ]
    for one in sorted(measured, key=lambda one: -one.record.tokens_per_second):
        plan, record = one.plan, one.record
        on_gpu = plan.device == "cuda"
        predicted = plan.device_bytes if on_gpu else plan.host_bytes
        peak = record.peak_device_bytes if on_gpu else record.peak_host_bytes
        cosine = "-" if one.report is None else f"{one.report['cosine']['mean']:.4f}"
        lines.append(
            f"{plan.id:<33} {record.tokens_per_second:6.0f} "
            f"{record.texts / record.median_seconds:7.2f} {one.ceiling_fraction:4.2f} "
            f"{_short(predicted):>9} {_short(peak) if peak else '-':>7} {cosine:>6}"
        )
    lines += [f"{plan.id} failed: {plan.dropped}" for plan in failed]
    return "\n".join(lines)


def _ceilings(bundle: Bundle, plans: Sequence[Plan]) -> dict[str, float]:
    """Operations per second of each device and compute of the plans, by ``<device>-<compute>``."""
    firsts = {f"{plan.device}-{plan.compute}": plan for plan in reversed(plans)}
    ceilings = {}
    for name, plan in sorted(firsts.items()):
        typer.echo(f"measuring the fastest product of {name}", err=True)
        ceilings[name] = measure_ceiling(bundle.path, plan)
    return ceilings


def _measure(
    bundle: Bundle,
    subject: Subject,
    plans: Sequence[Plan],
    ceilings: dict[str, float],
    floor: Floor,
) -> tuple[list[Measured], list[Plan]]:
    """The plans that ran, and those that failed, with the error as reason."""
    measured, failed = [], []
    for plan in plans:
        typer.echo(f"measuring {plan.id}", err=True)
        report = stored_report(plan, bundle)
        plan = plan.with_(fidelity=verdict.fidelity(report, floor))
        try:
            rows = workload(subject.config, plan.device)
            record = measure(bundle, plan, rows, repeats=_REPEATS)
        except LowmemError as error:
            failed.append(plan.with_(dropped=str(error)))
            continue
        operations = subject.config.operations(record.tokens, record.token_pairs)
        rate = operations / record.median_seconds
        fraction = rate / ceilings[f"{plan.device}-{plan.compute}"]
        measured.append(Measured(plan, record, fraction, report))
    return measured, failed


def _short(count: float) -> str:
    """Bytes in few columns: ``812M``, ``14.2G``, in MiB and GiB."""
    mib = count / 2**20
    return f"{mib:.0f}M" if mib < 10000 else f"{mib / 1024:.1f}G"
