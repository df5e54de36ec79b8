"""The page for people: a verdict in words, one table, two pictures, and what was not tested.

It stands alone: no script, no font and no picture comes from elsewhere, and everything that comes
from a bundle or a file is escaped. Plans are judged by their figures and the floor given here, as
everywhere; the verdict that is stored in a report is not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from typing import Any

from lowmem.artifact import verdict
from lowmem.artifact.verdict import FIGURES, Floor
from lowmem.errors import InputError, missing_extra
from lowmem.fidelity import figure_text, pictures, sections
from lowmem.fidelity.drawing import Series
from lowmem.fidelity.figure_text import NONE, cosine_text, size_text
from lowmem.fidelity.readiness import SIGN_OFF_TEXTS

_FIGURE_NAMES = {"mean": "mean", "p5": "5th percentile", "min": "worst text"}
_TEMPLATES = ("report.html.j2", "report_sections.html.j2")
_SEARCH_FIGURES = {
    "ndcg@10": "nDCG@10",
    "recall@10": "Recall@10",
    "recall@100": "Recall@100",
    "mrr@10": "MRR@10",
}
_PLAN = re.compile(r"(.+)-(torch|onnxruntime)-(cpu|cuda)-(.+)", re.DOTALL)
_GROUP_TEXTS = 3  # fewer are no group worth naming


@dataclass(frozen=True)
class ReportContext:
    """What a page says besides the reports.

    Attributes:
        model: Name of the model.
        licence: Its licence, or None where the source names none.
        source_sha256: Identity of the checkpoint that was exported.
        machine: What the plans ran on, in words.
        texts: ``quick`` or ``probe`` for the built-in texts, else a file's name.
        versions: Package to version.
        floor: What a plan must reach.
    """

    model: str
    licence: str | None
    source_sha256: str
    machine: str
    texts: str
    versions: Mapping[str, str]
    floor: Floor


@dataclass(frozen=True)
class Row:
    """One plan as the table shows it; ``low`` names the figures that are below the floor."""

    report: Mapping[str, Any]
    variant: str
    engine: str
    device: str
    compute: str
    passes: bool
    low: tuple[str, ...]

    @property
    def plan(self) -> str:
        """The plan's id, without a schedule."""
        return str(self.report["plan"])

    @property
    def speed(self) -> float:
        """Tokens per second, 0 where it was not measured."""
        return float(self.report["tokens_per_second"] or 0.0)

    @property
    def memory_bytes(self) -> int | None:
        """Peak memory of the device that multiplies, or None where it was not measured."""
        key = "peak_device_bytes" if self.device == "cuda" else "peak_host_bytes"
        return self.report.get(key) or None

    @property
    def weakest(self) -> Mapping[str, Any] | None:
        """The group of at least three texts with the least mean, or None where all are alike."""
        whole = self.report["texts"]["count"]
        groups = [one for one in self.report["buckets"] if _GROUP_TEXTS <= one["count"] < whole]
        return min(groups, key=lambda one: one["mean"], default=None)


def render(
    reports: Sequence[Mapping[str, Any]],
    cosines: Mapping[str, Sequence[float]],
    tokens: Sequence[int],
    context: ReportContext,
    *,
    agreement: Sequence[Mapping[str, Any]] = (),
    drift: Mapping[str, Any] | None = None,
    failed: Sequence[Mapping[str, str]] = (),
) -> str:
    """Returns the page, in UTF-8 when encoded; equal arguments give equal text.

    Args:
        reports: One for each plan, as in ``report --json``, all on the same texts.
        cosines: Plan to the cosine of each text, for the pictures; a plan may be left out.
        tokens: Length of each text, special tokens and instruction included.
        context: What else the page says.
        agreement: How far each two plans agree, as in ``report --json``.
        drift: What changed since an earlier report, as in ``report --json``.
        failed: Plans that could not be compared, and why, as in ``report --json``.

    Raises:
        InputError: There is no report.
        BackendError: matplotlib or jinja2 is not installed.
    """
    if not reports:
        raise InputError("a page needs the report of at least one plan, got none")
    check_installed()
    rows = sorted(
        (_row(report, context.floor) for report in reports),
        key=lambda row: (not row.passes, -row.speed, row.plan),
    )
    passing = [row for row in rows if row.passes]
    failing = [row for row in rows if not row.passes]
    texts = reports[0]["texts"]
    page: str = (
        _environment()
        .get_template(_TEMPLATES[0])
        .render(
            context=context,
            texts=texts,
            is_small=texts["count"] < SIGN_OFF_TEXTS,
            longest=max(tokens, default=0),
            languages=sum(one["kind"] == "language" for one in reports[0]["buckets"]),
            headline=headline(len(passing), len(rows), len(failed)),
            criterion=criterion(context.floor, texts["count"]),
            fastest=passing[0] if passing else None,
            smallest=min(passing, key=lambda row: row.report["bytes"]) if passing else None,
            reasons=list(reasons(rows, context.floor)),
            groups=[group for group in (("pass", passing), ("fail", failing)) if group[1]],
            failing=failing,
            failed=failed,
            has_memory=any(row.memory_bytes for row in rows),
            has_retrieval=any(row.report["retrieval"] for row in rows),
            has_sts=any(row.report["sts"] for row in rows),
            artifacts=sorted({(row.variant, row.report["artifact_sha256"]) for row in rows}),
            reference_sha256=reports[0]["reference_sha256"],
            pictures=_pictures(passing, failing, cosines, tokens, context.floor),
            frontier=_frontier(rows, context.floor),
            verdicts=sections.verdicts([row.report for row in rows], context.floor),
            group_tables=sections.group_tables([row.report for row in rows]),
            output_names=sections.output_names([row.report for row in rows]),
            given=reports[0].get("reference_given"),
            checked=reports[0].get("reference_checked", 0),
            matrix=sections.matrix([row.plan for row in rows], agreement),
            calibrated=sections.calibrated([row.report for row in rows]),
            drift=drift,
            untested=sections.untested_groups(reports[0]),
            rows=rows,
            reports=reports,
            search_figures=_SEARCH_FIGURES,
            searched=lambda row: row.report["retrieval"]["figures"],
            paired=lambda row: row.report["sts"],
        )
    )
    return page


def check_installed() -> None:
    """Refuses a page that could not be made, before anything is measured for it.

    Raises:
        BackendError: matplotlib or jinja2 is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise missing_extra(package, "report", "the HTML report")


def headline(passing: int, plans: int, failed: int = 0) -> str:
    """The verdict in one sentence: of the plans that ran, and how many others did not."""
    others = f"; {failed} failed to run." if failed else "."
    if plans == 1:
        return f"The plan {'keeps the embeddings' if passing else 'loses too much'}{others}"
    if passing == plans:
        return f"All {plans} plans keep the embeddings{others}"
    if passing == 0:
        return f"None of {plans} plans keeps the embeddings{others}"
    return (
        f"{passing} of {plans} plans {'keeps' if passing == 1 else 'keep'} the embeddings{others}"
    )


def criterion(floor: Floor, texts: int) -> str:
    """What the headline means, in words."""
    return (
        f"Each of {texts} texts was embedded by the plan and by the 16-bit model. A plan keeps the "
        "embeddings if the cosine of the two vectors, 1 for equal ones, is on average at least "
        f"{floor.mean!r}, at its 5th percentile at least {floor.p5!r}, and at least {floor.min!r} "
        f"for every text (the floor “{floor.name}”)."
    )


def reasons(rows: Sequence[Row], floor: Floor) -> Iterator[tuple[str, str]]:
    """What fails and why: variant, or plan where it is the only one, and its figures."""
    for variant in dict.fromkeys(row.variant for row in rows if not row.passes):
        members = [row for row in rows if row.variant == variant]
        failing = [row for row in members if not row.passes]
        name, count = variant, f" ({len(failing)} of {len(members)} plans)"
        if len(failing) == 1:
            name, count = failing[0].plan, ""
        elif len(failing) == len(members):
            count = f" ({len(members)} plans)"
        why = [
            _below(_FIGURE_NAMES[key], [row.report["cosine"][key] for row in low], bound)
            for key in FIGURES
            if (low := [row for row in failing if key in row.low])
            for bound in [getattr(floor, key)]
        ]
        if broken := sum(row.report["nonfinite"] for row in failing):
            why.append(f"{broken} vector{'s hold' if broken > 1 else ' holds'} NaN or infinity")
        yield name, f"{count}: {', '.join(why)}"


def _below(name: str, values: Sequence[float], bound: float) -> str:
    least, most = cosine_text(min(values), bound), cosine_text(max(values), bound)
    span = least if least == most else f"{least} to {most}"
    return f"{name} {span} <\N{NO-BREAK SPACE}{bound!r}"


def _row(report: Mapping[str, Any], floor: Floor) -> Row:
    match = _PLAN.fullmatch(report["plan"])
    variant, engine, device, compute = (
        match.groups() if match else (report["plan"], NONE, NONE, NONE)
    )
    return Row(
        report,
        variant,
        engine,
        device,
        compute,
        passes=verdict.passes(report["cosine"], report["nonfinite"], floor),
        low=tuple(key for key in FIGURES if report["cosine"][key] < getattr(floor, key)),
    )


def _pictures(
    passing: Sequence[Row],
    failing: Sequence[Row],
    cosines: Mapping[str, Sequence[float]],
    tokens: Sequence[int],
    floor: Floor,
) -> tuple[str, str] | None:
    groups = []
    for title, rows in (("pass", passing), ("fail", failing)):
        members = [
            Series(row.plan, row.variant, row.compute, cosines[row.plan])
            for row in rows
            if len(cosines.get(row.plan, ()))
        ]
        if members:
            groups.append((title, members))
    if not groups:
        return None
    everything = [series for _, members in groups for series in members]
    return (
        pictures.distributions(groups, floor),
        pictures.by_length(everything, tokens, floor),
    )


def _frontier(rows: Sequence[Row], floor: Floor) -> str | None:
    """Size against fidelity, of two plans or more."""
    if len(rows) < 2:
        return None
    points = [
        pictures.Point(
            row.plan,
            row.variant,
            row.compute,
            row.report["bits_per_weight"]["linears"],
            size_text(row.report["bytes"]),
            row.report["cosine"]["mean"],
            row.report["cosine"]["p5"],
        )
        for row in rows
    ]
    return pictures.frontier(points, floor)


def _environment() -> Any:
    import jinja2

    folder = resources.files("lowmem.fidelity")
    sources = {name: folder.joinpath(name).read_text(encoding="utf-8") for name in _TEMPLATES}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(sources),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= figure_text.FILTERS
    return environment
