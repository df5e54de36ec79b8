"""The verdict for people: ready, ready for some uses and not for others, or not ready.

The gate of the planner is the floor alone. What is said here also asks every group of texts that
is large enough, and the searches and similarities that were judged, and gives the reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowmem.artifact import verdict
from lowmem.artifact.verdict import FIGURES, Floor
from lowmem.fidelity.figure_text import cosine_text

_FIGURE_NAMES = {"mean": "mean cosine", "p5": "5th percentile", "min": "worst text"}
STATES = ("ready", "partly", "not ready")
"""What a report says of a plan, the best first."""
GROUP_TEXTS = 10
"""Of fewer texts nothing is said of a group."""
SIGN_OFF_TEXTS = 100
"""Of fewer texts, the 5th percentile rests on fewer than five."""
JUDGED_ITEMS = 20
"""Resampling fewer queries or pairs says too often that chance explains nothing."""
LOSS = 0.01
"""A use is lost where its figure falls by more, and chance does not explain that it falls."""
BATCH_DISTANCE = 1e-4
_QUANTILE_TEXTS = 20  # of fewer, the 5th percentile is the worst text
_MOST_REASONS = 2
_KINDS = ("input_type", "language", "length")


def readiness(report: Mapping[str, Any], floor: Floor) -> dict[str, Any]:
    """The ``readiness`` of a report.

    Args:
        report: A report, which may lack ``retrieval``, ``sts`` and ``invariance``.
        floor: What the texts and every group of at least ten must reach.

    Returns:
        ``state`` (``ready``, ``partly`` or ``not ready``), ``words``, ``ready_for`` and
        ``not_for`` (groups and uses), at most two ``reasons``, the ``floor``'s name, and a
        ``caution`` or None.
    """
    passes = verdict.passes(report["cosine"], report["nonfinite"], floor)
    good, bad = _groups(report, floor)
    lost = list(_lost_uses(report))
    if report["nonfinite"] or not (passes or good):
        good, bad, lost = [], [], []
    reasons = [] if passes else list(_below(report, floor))
    if bad:
        weakest = min(bad, key=lambda group: float(group["mean"]))
        reasons += [f"{group_name(weakest)}: {why}" for why in _group_problems(weakest, floor)][:1]
    reasons += [why for _, why in lost]
    unfit = [*(group_name(group) for group in bad), *(use for use, _ in lost)]
    if passes and not unfit:
        state, words = "ready", "ready"
    elif (passes or good) and unfit:
        state = "partly"
        fit = (
            f"ready for {_listed([group_name(group) for group in good])}" if good else "ready, but"
        )
        words = f"{fit}{',' if good else ''} not for {_listed(unfit)}"
    else:
        state, words = "not ready", "not ready"
    return {
        "state": state,
        "words": words,
        "ready_for": [group_name(group) for group in good] if state == "partly" else [],
        "not_for": unfit if state == "partly" else [],
        "reasons": reasons[:_MOST_REASONS],
        "floor": floor.name,
        "caution": "; ".join(cautions([report])) or None,
    }


def group_name(group: Mapping[str, Any]) -> str:
    """What a group of texts is called in a sentence."""
    name = str(group["name"])
    if group["kind"] == "input_type":
        return {"query": "queries", "document": "documents"}.get(name, name)
    return {"language": f"texts in “{name}”", "length": f"texts of {name} tokens"}.get(
        str(group["kind"]), f"{group['kind']} {name}"
    )


def _groups(
    report: Mapping[str, Any], floor: Floor
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Groups of one kind that reach the floor, and all groups that do not.

    The good ones are of the kind that has both, and whose good groups hold the most texts: it tells
    the user best what the plan is still good for.
    """
    best: list[Mapping[str, Any]] = []
    failing = []
    for kind in _KINDS:
        large = [
            one for one in report["buckets"] if one["kind"] == kind and one["count"] >= GROUP_TEXTS
        ]
        bad = [one for one in large if any(_group_problems(one, floor))]
        good = [one for one in large if one not in bad]
        failing += bad
        if bad and _texts(good) > _texts(best):
            best = good
    return best, failing


def _texts(groups: Sequence[Mapping[str, Any]]) -> int:
    return sum(int(group["count"]) for group in groups)


def _group_problems(group: Mapping[str, Any], floor: Floor) -> Iterator[str]:
    for key in FIGURES:
        if key != "p5" or group["count"] >= _QUANTILE_TEXTS:
            bound = getattr(floor, key)
            if group[key] < bound:
                yield _problem(key, group[key], bound)


def _below(report: Mapping[str, Any], floor: Floor) -> Iterator[str]:
    if broken := report["nonfinite"]:
        yield f"{broken} vector{'s hold' if broken > 1 else ' holds'} NaN or infinity"
    for key in FIGURES:
        value, bound = report["cosine"][key], getattr(floor, key)
        if value < bound:
            yield _problem(key, value, bound)


def _problem(key: str, value: float, bound: float) -> str:
    return f"{_FIGURE_NAMES[key]} {cosine_text(value, bound)}, the floor asks {bound!r}"


def _lost_uses(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    retrieval, sts = report.get("retrieval"), report.get("sts")
    if retrieval and retrieval["queries"] >= JUDGED_ITEMS:
        figure = retrieval["figures"]["ndcg@10"]
        if _is_lost(figure):
            yield "search", _loss(f"nDCG@10 on {retrieval['name']}", figure)
    if sts and sts["pairs"] >= JUDGED_ITEMS and _is_lost(sts["spearman"]):
        yield "similarity scores", _loss(f"Spearman on {sts['name']}", sts["spearman"])


def _is_lost(figure: Mapping[str, Any]) -> bool:
    interval = figure["interval"]
    return bool(interval and figure["difference"] < -LOSS and interval[1] < 0)


def _loss(name: str, figure: Mapping[str, Any]) -> str:
    return f"{name} falls from {figure['reference']:.3f} to {figure['plan']:.3f}"


def cautions(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to keep in mind of some plans, each thing once.

    Args:
        reports: One or more, which may lack ``retrieval``, ``sts`` and ``invariance``.
    """
    said = dict.fromkeys(caution for report in reports for caution in _of_few(report))
    moved = [far for far in map(_moved, reports) if far > BATCH_DISTANCE]
    if moved:
        where = f"in {len(moved)} of {len(reports)} plans " if len(reports) > 1 else ""
        far = f"by up to {max(moved):.1e} of 1 - cosine"
        said[f"{where}a text's vector depends on its batch, {far}"] = None
    return list(said)


def _of_few(report: Mapping[str, Any]) -> Iterator[str]:
    count = report["texts"]["count"]
    if count < SIGN_OFF_TEXTS:
        yield f"a smoke test on {count} texts, not a sign-off"
    for judged, items, one, use in (
        ("retrieval", "queries", "query", "search"),
        ("sts", "pairs", "pair", "similarity"),
    ):
        if (found := report.get(judged)) and found[items] < JUDGED_ITEMS:
            are = f"{one} is" if found[items] == 1 else f"{items} are"
            yield f"{found[items]} {are} too few to judge {use} by"


def _moved(report: Mapping[str, Any]) -> float:
    """How far a text's vectors lie apart, 1 - cosine at most."""
    moved = report.get("invariance") or {}
    return max((moved[key] for key in ("alone", "shuffled", "neighbours") if moved), default=0.0)


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
