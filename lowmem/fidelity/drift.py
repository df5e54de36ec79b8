"""What changed between two reports on the same texts: two exports, drivers or versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem.artifact import strict_json
from lowmem.artifact.verdict import FIGURES, REPORT_FORMAT
from lowmem.errors import BundleError, InputError

COSINE_LOSS = 1e-4
"""A cosine figure is worse if it falls by more; two kinds of CPU differ by about 1e-6."""
OVERLAP_LOSS = 0.01
_BOUND = ("artifact_sha256", "reference_sha256")


def read_reports(path: Path) -> list[dict[str, Any]]:
    """Reads what ``report --json`` wrote, or one file of a bundle's ``reports/``.

    Raises:
        InputError: The file cannot be read, or is no such report.
    """
    try:
        value = strict_json.read_object(path)
    except BundleError as error:
        raise InputError(str(error)) from error
    reports = value.get("reports", [value])
    if not isinstance(reports, list) or not reports or not all(map(_is_report, reports)):
        raise InputError(
            f"{path} must be a report of format {REPORT_FORMAT} (lowmem report --json)"
        )
    return reports


def check_same_texts(path: Path, old: Sequence[Mapping[str, Any]], texts_sha256: str) -> None:
    """Refuses a comparison of figures on different texts.

    Raises:
        InputError: A report speaks of other texts.
    """
    for report in old:
        if report["texts"]["sha256"] != texts_sha256:
            name, count = report["texts"].get("name", "?"), report["texts"]["count"]
            raise InputError(
                f"{path} is about other texts ({name}, {count} texts): figures are compared on the "
                "same texts, with the same --texts and --limit"
            )


def drift(
    name: str, old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The ``drift`` of ``report --json``: new figures less old ones, plan by plan.

    Args:
        name: What the old reports are called.
        old: Old reports.
        new: New reports on the same texts.

    Returns:
        ``against``; ``rows`` of the plans that both have, each with ``plan``, old and new
        ``cosine`` and their ``difference``, that of the ``overlap`` of ten and of
        ``tokens_per_second``, what else ``changed``, and the figures and groups that ``worsened``;
        and the plans that stand on one side only.
    """
    before = {report["plan"]: report for report in old}
    now = {report["plan"]: report for report in new}
    return {
        "against": name,
        "rows": [_row(before[plan], now[plan]) for plan in now if plan in before],
        "only_old": [plan for plan in before if plan not in now],
        "only_new": [plan for plan in now if plan not in before],
    }


def table(found: Mapping[str, Any]) -> str:
    """The drift as text, at most 80 columns wide but for what changed."""
    lines = [
        f"drift against {found['against']}: new less old",
        f"{'plan':<30} {'mean':>8} {'p5':>8} {'min':>8} {'top10':>6} {'speed':>6}",
    ]
    for row in found["rows"]:
        change = row["difference"]
        lines.append(
            f"{row['plan']:<30} {change['mean']:+8.4f} {change['p5']:+8.4f} {change['min']:+8.4f} "
            f"{_signed(row['overlap'], '+6.2f'):>6} {_percent(row['speed']):>6}"
            f"{' worse' if row['worsened'] else ''}"
        )
    for row in found["rows"]:
        if row["worsened"]:
            lines.append(f"  {row['plan']}: worse in {', '.join(row['worsened'])}")
        if row["changed"]:
            lines.append(f"  {row['plan']}: {', '.join(row['changed'])}")
    for key, said in (("only_old", "no longer there"), ("only_new", "new")):
        if found[key]:
            lines.append(f"  {said}: {', '.join(found[key])}")
    return "\n".join(lines)


def _row(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    difference = {key: new["cosine"][key] - old["cosine"][key] for key in FIGURES}
    worsened = [key for key in FIGURES if difference[key] < -COSINE_LOSS]
    overlap = None
    if old["overlap"].get("10") is not None and new["overlap"].get("10") is not None:
        overlap = new["overlap"]["10"] - old["overlap"]["10"]
        worsened += ["top 10"] if overlap < -OVERLAP_LOSS else []
    groups = {(one["kind"], one["name"]): one["mean"] for one in old["buckets"]}
    worsened += [
        f"{one['kind']} {one['name']}"
        for one in new["buckets"]
        if one["mean"] - groups.get((one["kind"], one["name"]), one["mean"]) < -COSINE_LOSS
    ]
    speeds = old["tokens_per_second"], new["tokens_per_second"]
    return {
        "plan": new["plan"],
        "old": {key: old["cosine"][key] for key in FIGURES},
        "new": {key: new["cosine"][key] for key in FIGURES},
        "difference": difference,
        "overlap": overlap,
        "speed": speeds[1] / speeds[0] - 1 if all(speeds) else None,
        "changed": list(_changes(old, new)),
        "worsened": worsened,
    }


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    changes = [
        f"{key.removesuffix('_sha256')} {old[key][:8]} to {new[key][:8]}"
        for key in _BOUND
        if old[key] != new[key]
    ]
    machines = old.get("machine"), new.get("machine")
    if all(machines) and machines[0] != machines[1]:
        changes.append(f"machine {machines[0]} to {machines[1]}")
    before, now = old.get("versions", {}), new.get("versions", {})
    changes += [
        f"{package} {before.get(package, 'none')} to {now.get(package, 'none')}"
        for package in sorted({*before, *now})
        if before.get(package) != now.get(package)
    ]
    return changes


def _is_report(value: object) -> bool:
    if not isinstance(value, dict) or value.get("format") != REPORT_FORMAT:
        return False
    needed = {*_BOUND, "plan", "texts", "cosine", "overlap", "buckets", "tokens_per_second"}
    if not needed <= set(value):
        return False
    texts, cosine, overlap = value["texts"], value["cosine"], value["overlap"]
    speed = value["tokens_per_second"]
    return (
        isinstance(texts, dict)
        and {"sha256", "count"} <= set(texts)
        and isinstance(cosine, dict)
        and all(strict_json.is_number(cosine.get(key)) for key in FIGURES)
        and isinstance(overlap, dict)
        and (overlap.get("10") is None or strict_json.is_number(overlap["10"]))
        and isinstance(value["buckets"], list)
        and all(map(_is_group, value["buckets"]))
        and all(isinstance(value[key], str) for key in ("plan", *_BOUND))
        and (speed is None or strict_json.is_number(speed))
        and isinstance(value.get("versions", {}), dict)
    )


def _is_group(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("kind", "name"))
        and strict_json.is_number(value.get("mean"))
    )


def _signed(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.0f}%"
