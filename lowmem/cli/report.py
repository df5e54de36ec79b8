"""``lowmem report``: what quantization did to the embeddings, plan by plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem import hardware
from lowmem.artifact import strict_json, verdict
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import Floor, parse_floor
from lowmem.cli import options
from lowmem.cli.report_tables import table
from lowmem.compute.heap import give_back_freed_memory
from lowmem.compute.plan import Plan
from lowmem.disk import shown_name
from lowmem.errors import BackendError, InputError
from lowmem.fidelity import drift, html, reference, retrieval, sts
from lowmem.fidelity.inputs import Inputs, Wanted, want
from lowmem.fidelity.pace import Pace
from lowmem.fidelity.parts import Parts
from lowmem.fidelity.report import (
    Compared,
    agreement,
    compare_plans,
    of_texts_alone,
    one_of_each,
)
from lowmem.fidelity.store import check_dump, dump, store
from lowmem.hardware import Hardware
from lowmem.measure import package_versions
from lowmem.outputs import check_output, write_text
from lowmem.planner.candidates import Subject, Wishes, candidates
from lowmem.planner.timing import Stopwatch
from lowmem.progress import bar
from lowmem.text.reading import read_rows

BELOW_THE_FLOOR = 3


def report(
    bundle: options.Bundle,
    texts: Annotated[
        Path | None, typer.Option(help="Your own texts (.txt, .jsonl, .csv, .parquet).")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Where the text is in that file, by default in text.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Take N texts that stand for all, the same always."),
    ] = None,
    retrieval_directory: Annotated[
        Path | None,
        typer.Option("--retrieval", metavar="DIR", help="A judged collection in BEIR's layout."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Instruction of that collection's queries, text or name.")
    ] = None,
    sts_file: Annotated[
        Path | None,
        typer.Option("--sts", metavar="FILE", help="Pairs with scores (.jsonl, .csv)."),
    ] = None,
    sts_task: Annotated[
        str | None, typer.Option(help="Instruction of both texts of those pairs; none by default.")
    ] = None,
    reference_file: Annotated[
        Path | None,
        typer.Option(
            "--reference", metavar="FILE", help="Another 16-bit run of the texts, as .npy."
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="OLD.json", help="An earlier --json: show what changed since."),
    ] = None,
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
    least = parse_floor(floor)
    given = [texts, sts_file, reference_file, compare, bundle, retrieval_directory]
    if dump_directory is not None:
        check_dump(dump_directory, given)
    if json_file is not None:
        check_output(json_file, [*given, html_file, dump_directory])
    if html_file is not None:
        check_output(html_file, [*given, json_file, dump_directory])
    for option, needed, name in (
        (task, retrieval_directory, "--task is the instruction of --retrieval"),
        (sts_task, sts_file, "--sts-task is the instruction of --sts"),
        (column, texts, "--column is where the text is in --texts"),
    ):
        if option is not None and needed is None:
            raise InputError(f"{name}, which was not given")
    old = drift.read_reports(compare) if compare is not None else None
    wanted = want(
        opened,
        texts=None
        if texts is None
        else (shown_name(texts), read_rows(texts, column=column or "text")),
        given_file=reference_file,
        limit=limit,
        collection=None
        if retrieval_directory is None
        else retrieval.read_collection(retrieval_directory, task),
        pairs=None if sts_file is None else sts.read_pairs(sts_file, sts_task),
    )
    if compare is not None and old is not None:
        drift.check_same_texts(compare, old, wanted.texts_sha256)
    machine = hardware.probe()
    subject = Subject.of_bundle(opened)
    wishes = Wishes(variant, engine, device, compute, schedule)
    plans = one_of_each(candidates(subject, machine, wishes))
    parts = Parts()
    inputs, compared, failed = _compare(opened, subject, plans, wanted, least, machine, parts)
    is_built_in = texts is None and reference_file is None and inputs.texts.all_texts is None
    if is_built_in:
        own = [of_texts_alone(one, least) for one in compared]
        store(opened, own, _pages(opened, own, inputs, least))
    reports = [one.report for one in compared]
    result: dict[str, Any] = {
        "format": verdict.REPORT_FORMAT,
        "reports": reports,
        "agreement": agreement(compared),
        "drift": None
        if compare is None or not old
        else drift.drift(shown_name(compare), old, reports),
        "failed": [{"plan": plan.report_id, "reason": plan.dropped} for plan in failed],
    }
    if json_file is not None:
        write_text(json_file, strict_json.dumps(result))
    if html_file is not None:
        write_text(html_file, _page(opened, compared, inputs, least, result))
    if dump_directory is not None:
        dump(dump_directory, compared, inputs.texts)
    if not failed:
        parts.forget()
    typer.echo(table(reports, least))
    if result["drift"] is not None:
        typer.echo(f"\n{drift.table(result['drift'])}")
    if failed:
        names = ", ".join(plan.report_id for plan in failed)
        raise BackendError(f"{len(failed)} of {len(plans)} plans failed: {names}")
    if any(one["verdict"] == "fail" for one in reports):
        raise typer.Exit(BELOW_THE_FLOOR)


def _compare(
    bundle: Bundle,
    subject: Subject,
    plans: Sequence[Plan],
    wanted: Wanted,
    floor: Floor,
    machine: Hardware,
    parts: Parts,
) -> tuple[Inputs, list[Compared], list[Plan]]:
    """Embeds everything, with the time that is left and the plans that fail on stderr."""
    config = subject.config
    cpu_speed = reference.products_per_second() / (2 * config.linear_weights)
    speeds = Stopwatch(bundle, subject, machine).known_speeds(plans)
    tokens, own = wanted.plan_tokens, wanted.reference_tokens
    pace = Pace(plans, tokens, own, speeds, cpu_speed)
    count = f"{len(plans)} plan{'s' if len(plans) > 1 else ''}"
    typer.echo(f"{count}, {tokens} tokens each: {pace.left()}", err=True)
    if wanted.truncated:
        most = bundle.contract.max_seq_length
        typer.echo(
            f"{wanted.truncated} of {len(wanted.rows)} texts are cut to the {most} tokens that the "
            "model takes",
            err=True,
        )
    inputs = wanted.embedded(machine.cpu_threads, parts, bar)
    give_back_freed_memory()  # the reference's: plans run in processes of their own

    def on_plan(plan: Plan, seconds: float) -> None:
        if plan.dropped is not None:
            pace.ended(plan)
            typer.echo(f"{plan.report_id} failed: {plan.dropped}", err=True)
            return
        pace.finished(plan, seconds)
        left = f", {pace.left()} left" if plan is not plans[-1] else ""
        typer.echo(f"compared {plan.report_id} in {seconds:.0f} s{left}", err=True)

    return inputs, *compare_plans(bundle, plans, inputs, floor, machine, parts, bar, on_plan)


def _pages(
    bundle: Bundle,
    compared: Sequence[Compared],
    inputs: Inputs,
    floor: Floor,
) -> dict[str, str]:
    """A page for each plan; none where the packages for pages are not installed."""
    try:
        html.check_installed()
    except BackendError:
        return {}
    return {str(one.report["plan"]): _page(bundle, [one], inputs, floor, {}) for one in compared}


def _page(
    bundle: Bundle,
    compared: Sequence[Compared],
    inputs: Inputs,
    floor: Floor,
    result: dict[str, Any],
) -> str:
    context = html.ReportContext(
        model=str(bundle.manifest.source["name"]),
        licence=bundle.manifest.licence,
        source_sha256=str(bundle.manifest.source["sha256"]),
        machine="; ".join(dict.fromkeys(str(one.report["machine"]) for one in compared)),
        texts=inputs.texts.name,
        versions=package_versions(),
        floor=floor,
    )
    return html.render(
        [one.report for one in compared],
        {str(one.report["plan"]): one.cosines.tolist() for one in compared},
        inputs.texts.tokens,
        context,
        agreement=result.get("agreement", ()),
        drift=result.get("drift"),
        failed=result.get("failed", ()),
    )
