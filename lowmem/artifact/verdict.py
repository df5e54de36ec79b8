"""Whether a plan is faithful enough: floors, and what a stored report says of them.

A report is read here without numpy, since every start asks for it. The gate compares the report's
figures with the floor given now and never asks for the verdict that the report was stored with,
which another floor may have set.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem.artifact import strict_json
from lowmem.errors import BundleError, InputError

REPORT_FORMAT = 1
FIGURES = ("mean", "p5", "min")


@dataclass(frozen=True)
class Floor:
    """The least that the cosines of a faithful plan reach, each at most 1.

    Attributes:
        name: ``strict``, ``standard``, ``loose``, or ``custom``.
        mean: Of the mean over all texts.
        p5: Of the 5th percentile.
        min: Of the worst text.
    """

    name: str
    mean: float
    p5: float
    min: float

    def to_json(self) -> dict[str, Any]:
        """The ``floor`` of a report."""
        return asdict(self)


FLOORS: Mapping[str, Floor] = {
    floor.name: floor
    for floor in (
        Floor("strict", mean=0.997, p5=0.995, min=0.98),
        Floor("standard", mean=0.985, p5=0.965, min=0.90),
        Floor("loose", mean=0.95, p5=0.90, min=0.80),
    )
}


def parse_floor(text: str) -> Floor:
    """Reads a floor: a name, or all three numbers as in ``mean=0.99,p5=0.98,min=0.95``.

    Raises:
        InputError: The name is unknown, or the numbers are not one finite number of at most 1 for
            each of mean, p5 and min.
    """
    if text in FLOORS:
        return FLOORS[text]
    figures: dict[str, float] = {}
    for part in text.split(","):
        key, _, number = (piece.strip() for piece in part.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if key not in FIGURES or key in figures or not -math.inf < value <= 1:
            raise _bad_floor(text)
        figures[key] = value
    if len(figures) < len(FIGURES):
        raise _bad_floor(text)
    return Floor("custom", **figures)


def passes(cosine: Mapping[str, float], nonfinite: int, floor: Floor) -> bool:
    """Whether figures reach a floor.

    Args:
        cosine: ``mean``, ``p5`` and ``min`` over the texts; one that is missing, NaN or infinite
            reaches nothing.
        nonfinite: Number of vectors that hold NaN or infinity; one is too many.
        floor: What to reach.
    """
    return nonfinite == 0 and all(
        getattr(floor, key) <= cosine.get(key, math.nan) < math.inf for key in FIGURES
    )


def fidelity(report: Mapping[str, Any] | None, floor: Floor) -> str:
    """What a report says of its plan: ``verified``, ``failing`` or ``unverified``.

    Unverified is a plan without a report, or whose report lacks a figure. A vector that holds NaN
    or infinity fails whatever else the report says, and so does a figure that is one of them.
    """
    if report is None:
        return "unverified"
    nonfinite = report.get("nonfinite")
    if isinstance(nonfinite, int) and nonfinite > 0:
        return "failing"
    if any(_figure_problems(report)):
        return "unverified"
    return "verified" if passes(report["cosine"], report["nonfinite"], floor) else "failing"


def read_report(
    path: Path, *, plan: str, artifact_sha256: str, texts_sha256: Collection[str]
) -> dict[str, Any] | None:
    """Reads the stored report of a plan.

    Args:
        path: The report's JSON file.
        plan: ``<variant>-<engine>-<device>-<compute>``.
        artifact_sha256: Identity of the variant with its contract.
        texts_sha256: Identities of the sets of texts whose report counts.

    Returns:
        The report, with any keys that this version does not know; or None where there is no file,
        or it speaks of another plan, artifact or set of texts.

    Raises:
        BundleError: The file cannot be read, is not JSON, is of another format, or lacks what a
            verdict needs; all such problems are named.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    remedy = "remove it, or let lowmem report write it anew"
    try:
        report = strict_json.read_object(path)
    except BundleError as error:
        raise BundleError(f"{error}: {remedy}") from error
    if problems := [*_binding_problems(report), *_figure_problems(report)]:
        raise BundleError(f"{path} is no fidelity report: {'; '.join(problems)}; {remedy}")
    is_bound = (
        report["plan"] == plan
        and report["artifact_sha256"] == artifact_sha256
        and report["texts"]["sha256"] in texts_sha256
    )
    return report if is_bound else None


def _binding_problems(report: Mapping[str, Any]) -> Iterator[str]:
    if type(report.get("format")) is not int or report["format"] != REPORT_FORMAT:
        yield f"format must be {REPORT_FORMAT}, got {report.get('format')!r}"
    texts = report.get("texts")
    values = {
        "plan": report.get("plan"),
        "artifact_sha256": report.get("artifact_sha256"),
        "texts.sha256": texts.get("sha256") if isinstance(texts, Mapping) else None,
    }
    for key, value in values.items():
        if not isinstance(value, str):
            yield f"{key} must be a string, got {strict_json.type_name(value)}"


def _figure_problems(report: Mapping[str, Any]) -> Iterator[str]:
    cosine = report.get("cosine")
    figures = cosine if isinstance(cosine, Mapping) else {}
    for key in FIGURES:
        value = figures.get(key)
        if not strict_json.is_number(value):
            yield f"cosine.{key} must be a number, got {strict_json.type_name(value)}"
    nonfinite = report.get("nonfinite")
    if type(nonfinite) is not int or nonfinite < 0:
        yield f"nonfinite must be a count, got {nonfinite!r}"


def _bad_floor(text: str) -> InputError:
    return InputError(
        f"a floor is {', '.join(FLOORS)}, or mean=…,p5=…,min=… with three finite numbers of at "
        f"most 1, got {text!r}"
    )
