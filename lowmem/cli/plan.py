"""``lowmem plan``: what could run here, what each plan needs, and which one would be chosen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem import hardware, hub
from lowmem.artifact.manifest import MANIFEST, Bundle
from lowmem.artifact.tensors import some_names
from lowmem.artifact.verdict import parse_floor
from lowmem.cli import options
from lowmem.compute.plan import Plan
from lowmem.errors import InputError
from lowmem.planner import cards
from lowmem.planner.candidates import Subject, Wishes
from lowmem.planner.choice import Choice, choose, foresee
from lowmem.progress import Steps


def plan(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE|SOURCE",
            help="A bundle, a checkpoint's directory, or a hub id ORG/NAME[@REVISION].",
        ),
    ],
    card: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help='Another card, as "RTX 3060 12GB", or a JSON description of another machine; '
            "speeds are estimates then.",
        ),
    ] = None,
    as_json: options.Json = False,
    variant: options.Variant = "auto",
    engine: options.Engine = "auto",
    device: options.Device = "auto",
    compute: options.Compute = "auto",
    schedule: options.Schedule = "auto",
    floor: options.Floor = "standard",
) -> None:
    """Show every plan: memory, speed, fidelity, why dropped, which is chosen."""
    wishes = Wishes(variant, engine, device, compute, schedule)
    least = parse_floor(floor)
    machine = hardware.probe()
    if card is not None:
        machine = cards.describe(card, machine)
    directory = _directory(subject)
    bundle = Bundle(directory) if (directory / MANIFEST).exists() else None
    if bundle is None or card is not None:
        found = Subject.of_bundle(bundle) if bundle else Subject.of_checkpoint(directory)
        choice = foresee(found, machine=machine, wishes=wishes, floor=least, bundle=bundle)
    else:
        with Steps() as progress:
            choice = choose(
                bundle,
                wishes=wishes,
                floor=least,
                machine=machine,
                time_all=True,
                progress=progress,
            )
    if as_json:
        typer.echo(json.dumps(to_json(choice), indent=2))
        return
    typer.echo(table(choice))


def to_json(choice: Choice) -> dict[str, Any]:
    """The documented form; see ``schemas/plan.schema.json``."""
    chosen = None if choice.chosen is None else choice.chosen.id
    return {
        "format": 1,
        "machine": choice.machine.to_json(),
        "chosen": chosen,
        "reason": choice.reason,
        "warning": choice.warning,
        "plans": [(choice.get() if plan.id == chosen else plan).to_json() for plan in choice.plans],
    }


def table(choice: Choice) -> str:
    """The plans as text, at most 80 columns wide but for reasons."""
    machine = choice.machine
    lines = [
        f"{machine.words()}, {options.size_text(machine.host_free_bytes)} free",
        *(
            f"{gpu.name}, {options.size_text(gpu.free_bytes)} of "
            f"{options.size_text(gpu.total_bytes)} free{' (described)' if gpu.rates else ''}"
            for gpu in machine.gpus
        ),
        "",
        "  variant  engine      device compute    schedule    memory tokens/s fidelity",
    ]
    running = [plan for plan in choice.plans if plan.dropped is None]
    lines += [_row(plan, choice) for plan in running]
    if any(plan.device == "cpu" for plan in running):
        lines.append("  memory on a CPU is the process's own: mapped weights are page cache")
    if any(plan.estimated_tokens_per_second for plan in running):
        lines.append("  ~ is an estimate from the card's rates: nothing was measured")
    lines += [
        options.wrapped(f"{plan.id}: windows of {plan.window_tokens} tokens; {plan.reason}", "  ")
        for plan in running
        if plan.schedule == "streamed" and plan.reason
    ]
    dropped = [plan for plan in choice.plans if plan.dropped is not None]
    if dropped:
        lines += ["", "dropped"]
        reasons: dict[str, list[str]] = {}
        for plan in dropped:
            reasons.setdefault(plan.dropped or "", []).append(plan.id)
        for reason, ids in reasons.items():
            lines.append(f"  {reason}:\n    {some_names(ids, 2)}")
    chosen = choice.chosen.id if choice.chosen else "none"
    lines += ["", f"chosen: {chosen}", options.wrapped(choice.reason, "  ")]
    if choice.warning:
        lines.append(options.wrapped(f"warning: {choice.warning}", "  "))
    return "\n".join(lines)


def _row(plan: Plan, choice: Choice) -> str:
    mark = ">" if choice.chosen is not None and plan.id == choice.chosen.id else " "
    mark_estimate = "" if plan.tokens_per_second else "~"
    speed = f"{mark_estimate}{plan.speed:.0f}" if plan.speed else "-"
    memory = options.size_text(plan.device_bytes if plan.device == "cuda" else plan.host_bytes)
    return (
        f"{mark} {plan.variant:<8} {plan.engine:<11} {plan.device:<6} {plan.compute:<10} "
        f"{plan.schedule:<8} {memory:>9} {speed:>8} {plan.fidelity}"
    )


def _directory(subject: str) -> Path:
    """Where the subject lies; of a model on the hub its ``config.json`` alone is brought."""
    if os.path.isdir(subject):
        return Path(subject)
    model = None if os.path.exists(subject) else hub.parse_id(subject)
    if model is None:
        export_first = ": export it first" if os.path.isfile(subject) else ""
        raise InputError(
            f"plan takes a bundle, a model directory or a hub id ORG/NAME, and {subject!r} is none"
            f"{export_first}"
        )
    return hub.fetch(model, "config.json").parent
