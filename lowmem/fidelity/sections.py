"""What the tables of a report's page hold, taken from the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.artifact.verdict import Floor
from lowmem.fidelity.readiness import GROUP_TEXTS, STATES, cautions, readiness

Report = Mapping[str, Any]
_TITLES = {"length": "By length, in tokens", "language": "By language"}
_TITLES["input_type"] = "Queries and documents"


def verdicts(reports: Sequence[Report], floor: Floor) -> list[dict[str, Any]]:
    """What the plans are ready for, best first.

    Returns:
        ``state`` and ``words``, the ``plans`` that are told so, each with its ``reasons``, and
        their ``cautions``.
    """
    said: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        found = readiness(report, floor)
        one = said.setdefault(
            (found["state"], found["words"]),
            {"state": found["state"], "words": found["words"], "plans": [], "reports": []},
        )
        one["plans"].append({"plan": report["plan"], "reasons": found["reasons"]})
        one["reports"].append(report)
    for one in said.values():
        one["cautions"] = cautions(one.pop("reports"))
    return sorted(said.values(), key=lambda one: STATES.index(one["state"]))


def group_tables(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """One table for each way to group texts that has at least two groups.

    Returns:
        ``title``, the ``groups`` with name and count, and ``rows`` of a plan and its groups.
    """
    tables = []
    for kind, title in _TITLES.items():
        groups = [one for one in reports[0]["buckets"] if one["kind"] == kind]
        if len(groups) < 2:
            continue
        rows = []
        for report in reports:
            own = {one["name"]: one for one in report["buckets"] if one["kind"] == kind}
            rows.append((report["plan"], [own.get(group["name"]) for group in groups]))
        tables.append({"kind": kind, "title": title, "groups": groups, "rows": rows})
    return tables


def output_names(reports: Sequence[Report]) -> list[Mapping[str, Any]]:
    """The forms of output vectors that were measured, in their order."""
    return list(next((one["outputs"] for one in reports if one.get("outputs")), []))


def matrix(plans: Sequence[str], agreement: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Mean cosine of each plan with each other, in the order of ``plans``; empty without pairs."""
    if not agreement:
        return []
    found = {(one["a"], one["b"]): one["mean"] for one in agreement}
    found |= {(b, a): mean for (a, b), mean in found.items()}
    return [[found.get((row, column)) for column in plans] for row in plans]


def calibrated(reports: Sequence[Report]) -> list[tuple[str, Mapping[str, Any]]]:
    """Variants that were calibrated, each with what is known of the texts."""
    found = {}
    for report in reports:
        about = report.get("calibration")
        if about and about["texts"] != "none":
            found[report["plan"].split("-torch")[0].split("-onnxruntime")[0]] = about
    return list(found.items())


def untested_groups(report: Report) -> list[str]:
    """Groups of texts that are too small for a verdict of their own."""
    return [
        f"{one['name']} ({one['count']})" for one in report["buckets"] if one["count"] < GROUP_TEXTS
    ]
