"""``lowmem check``: the scores that a model's card prints, through a plan of the bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lowmem.artifact.manifest import Bundle
from lowmem.artifact.models import known_models
from lowmem.artifact.verdict import parse_floor
from lowmem.cli import options
from lowmem.errors import BundleError, InputError
from lowmem.fidelity.known_answers import (
    Comparison,
    KnownAnswers,
    built_in,
    compare,
    read_answers,
)


def check(
    bundle: options.Bundle,
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="A known model, or a JSON file; by default the model that export recorded.",
        ),
    ] = None,
    variant: options.Variant = "auto",
    engine: options.Engine = "auto",
    device: options.Device = "auto",
    compute: options.Compute = "auto",
    schedule: options.Schedule = "auto",
    floor: options.Floor = "standard",
) -> None:
    """Compare a plan's scores with those that the model's card prints."""
    opened = Bundle(bundle)
    wanted = parse_floor(floor)
    name, known = _answers(opened, answers)
    if known.scores is None:
        typer.echo(f"the card of {name} prints no scores, nothing is compared: {known.source}")
        return

    from lowmem.embedder import Embedder

    model = Embedder.load(
        bundle,
        variant=variant,
        engine=engine,
        device=device,
        compute=compute,
        schedule=schedule,
        floor=floor,
    )
    typer.echo(options.wrapped(f"plan {model.plan.id}: {model.plan.reason}"), err=True)
    compared = compare(model, known, wanted)
    typer.echo(table(name, known, compared))
    if not compared.agrees:
        query, document = compared.worst
        raise BundleError(
            f"{model.plan.id} does not give the scores of {name}: query {query + 1} and document "
            f"{document + 1} must score {compared.printed[query, document]:.3f} within "
            f"{compared.tolerance.value:.3g}, got {compared.found[query, document]:.3f}; the "
            f"contract, the weights or the arithmetic are not the model's ({bundle})"
        )


def table(name: str, answers: KnownAnswers, compared: Comparison) -> str:
    """The scores as text, one pair of texts a line."""
    lines = [
        f"{name}, 100 x cosine: {answers.source}",
        f"tolerance {compared.tolerance.value:.3g} ({compared.tolerance.reason})",
        "",
        f"{'query':>5} {'document':>9} {'printed':>9} {'found':>9} {'difference':>11}",
    ]
    for query, row in enumerate(compared.printed):
        for document, printed in enumerate(row):
            found = compared.found[query, document]
            is_close = abs(found - printed) <= compared.tolerance.value
            lines.append(
                f"{query + 1:>5} {document + 1:>9} {printed:9.3f} {found:9.3f} "
                f"{found - printed:+11.4f} {'ok' if is_close else 'differs'}"
            )
    return "\n".join(lines)


def _answers(bundle: Bundle, wanted: str | None) -> tuple[str, KnownAnswers]:
    """Name of the model and its answers: those asked for, else of the model that was exported."""
    known = built_in()
    name = bundle.manifest.source.get("model") if wanted is None else wanted
    if name in known:
        return name, known[name]
    if wanted is None:
        alike = [
            model.name
            for model in known_models().values()
            if model.contract.bounded(bundle.contract.max_seq_length) == bundle.contract
        ]
        fits = (
            f"its contract is that of {', '.join(alike)}" if alike else "its contract is no model's"
        )
        raise InputError(
            f"{bundle.path} does not say which known model it holds, and {fits}: give --answers "
            f"NAME (of {', '.join(known)}), or --answers FILE"
        )
    if not os.path.isfile(wanted):  # Path.is_file raises where a name is too long
        raise InputError(
            f"--answers takes a JSON file or one of {', '.join(known)}, and {wanted!r} is neither"
        )
    return Path(wanted).name, read_answers(Path(wanted))
