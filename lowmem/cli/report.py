"""``lowmem report``: what quantization did to the embeddings, plan by plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem import cache, hardware
from lowmem.artifact import strict_json
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import Floor, parse_floor
from lowmem.cli import options
from lowmem.errors import BackendError, InputError
from lowmem.fidelity import html, reference
from lowmem.fidelity.report import Compared, compare_plans, dump, one_of_each, store
from lowmem.hardware import Hardware
from lowmem.measure import package_versions
from lowmem.planner.candidates import Subject, Wishes, candidates
from lowmem.progress import bar
from lowmem.text.files import read_rows

BELOW_THE_FLOOR = 3


def report(
    bundle: options.Bundle,
    texts: Annotated[
        Path | None, typer.Option(help="Your own texts (.txt, .jsonl, .csv, .parquet).")
    ] = None,
    column: Annotated[str, typer.Option(help="Where the text is in that file.")] = "text",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the full report.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page for people.")
    ] = None,
    dump_directory: Annotated[
        Path | None, typer.Option("--dump", metavar="DIR", help="Write texts and all vectors.")
    ] = None,
    variant: options.Variant = "auto",
    engine: options.Engine = "auto",
    device: options.Device = "auto",
    compute: options.Compute = "auto",
    schedule: options.Schedule = "auto",
    floor: options.Floor = "standard",
) -> None:
    """Compare plans with the fp16 reference on real text; exit status 3 below the floor."""
    if html_file is not None:
        html.check_installed()
    opened = Bundle(bundle)
    wanted = parse_floor(floor)
    for file in (json_file, html_file):
        if file is not None and not file.absolute().parent.is_dir():
            raise InputError(f"{file} cannot be written: its directory does not exist")
    machine = hardware.probe()
    subject = Subject.of_bundle(opened)
    wishes = Wishes(variant, engine, device, compute, schedule)
    plans = one_of_each(candidates(subject, machine, wishes))
    compared_with = _reference(opened, texts, column, machine)
    compared = compare_plans(
        opened,
        plans,
        compared_with,
        wanted,
        on_plan=lambda plan: typer.echo(f"comparing {plan.report_id}", err=True),
    )
    if texts is None:
        store(opened, compared, _pages(opened, compared, compared_with, machine, wanted))
    reports = [one.report for one in compared]
    if json_file is not None:
        _write(json_file, strict_json.dumps({"format": 1, "reports": reports}))
    if html_file is not None:
        _write(html_file, _page(opened, compared, compared_with, machine, wanted))
    if dump_directory is not None:
        dump(dump_directory, compared, compared_with)
    typer.echo(table(reports, wanted))
    if any(one["verdict"] == "fail" for one in reports):
        raise typer.Exit(BELOW_THE_FLOOR)


def table(reports: Sequence[dict[str, Any]], floor: Floor) -> str:
    """The reports as text, at most 80 columns wide."""
    texts = reports[0]["texts"]
    lines = [
        f"{texts['count']} texts ({texts['name']}), {texts['tokens']} tokens; floor {floor.name}: "
        f"mean {floor.mean}, p5 {floor.p5}, min {floor.min}",
        "",
        f"{'plan':<30} {'bits':>5} {'tok/s':>6} {'mean':>7} {'p5':>7} {'min':>7} {'top10':>5}",
    ]
    for one in sorted(reports, key=lambda one: (one["verdict"] == "fail", -one["cosine"]["mean"])):
        cosine, overlap = one["cosine"], one["overlap"]["10"]
        lines.append(
            f"{one['plan']:<30} {one['bits_per_weight']['linears']:5.2f} "
            f"{one['tokens_per_second']:6.0f} {cosine['mean']:7.4f} {cosine['p5']:7.4f} "
            f"{cosine['min']:7.4f} {'-' if overlap is None else format(overlap, '5.2f'):>5} "
            f"{one['verdict']}"
        )
    return "\n".join(lines)


def _reference(
    bundle: Bundle, texts: Path | None, column: str, machine: Hardware
) -> reference.Reference:
    if texts is not None:
        rows = read_rows(texts, column=column)
        if not rows:
            raise InputError(f"{texts} holds no text")
        with bar("reference vectors", len(rows)) as advance:
            return reference.of_own_texts(bundle, texts.name, rows, machine.cpu_threads, advance)
    stored = reference.stored(bundle)
    if stored is None:
        raise InputError(
            f"{bundle.path} has no reference vectors: export again with --reference-texts probe"
        )
    return stored


def _pages(
    bundle: Bundle,
    compared: Sequence[Compared],
    compared_with: reference.Reference,
    machine: Hardware,
    floor: Floor,
) -> dict[str, str]:
    """A page for each plan; none where the packages for pages are not installed."""
    try:
        html.check_installed()
    except BackendError:
        return {}
    return {
        str(one.report["plan"]): _page(bundle, [one], compared_with, machine, floor)
        for one in compared
    }


def _page(
    bundle: Bundle,
    compared: Sequence[Compared],
    compared_with: reference.Reference,
    machine: Hardware,
    floor: Floor,
) -> str:
    context = html.ReportContext(
        model=str(bundle.manifest.source["name"]),
        licence=bundle.manifest.licence,
        source_sha256=str(bundle.manifest.source["sha256"]),
        machine=f"{machine.cpu_name}, {machine.cpu_threads} threads",
        texts=compared_with.name,
        versions=package_versions(),
        floor=floor,
    )
    return html.render(
        [one.report for one in compared],
        {str(one.report["plan"]): one.cosines.tolist() for one in compared},
        compared_with.tokens,
        context,
    )


def _write(path: Path, text: str) -> None:
    try:
        with cache.replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
