"""What ``lowmem report`` prints: a table, verdicts in words, and what was asked for besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowmem.artifact.verdict import Floor
from lowmem.cli import options
from lowmem.fidelity.readiness import STATES, cautions

_MOST_NAMED = 2


def table(reports: Sequence[Mapping[str, Any]], floor: Floor) -> str:
    """The reports as text, at most 80 columns wide."""
    texts = reports[0]["texts"]
    part = f" of {texts['all']}" if texts.get("all", texts["count"]) > texts["count"] else ""
    about = (
        f"{texts['count']}{part} texts ({texts['name']}), {texts['tokens']} tokens; floor "
        f"{floor.name}: mean {floor.mean}, p5 {floor.p5}, min {floor.min}"
    )
    lines = [
        options.wrapped(about, rest=""),
        "",
        f"{'plan':<30} {'bits':>5} {'tok/s':>6} {'mean':>7} {'p5':>7} {'min':>7} {'top10':>5}",
    ]
    ordered = sorted(reports, key=lambda one: (one["verdict"] == "fail", -one["cosine"]["mean"]))
    for one in ordered:
        cosine, overlap = one["cosine"], one["overlap"]["10"]
        lines.append(
            f"{one['plan']:<30} {one['bits_per_weight']['linears']:5.2f} "
            f"{one['tokens_per_second']:6.0f} {cosine['mean']:7.4f} {cosine['p5']:7.4f} "
            f"{cosine['min']:7.4f} {'-' if overlap is None else format(overlap, '5.2f'):>5} "
            f"{one['verdict']}"
        )
    return "\n".join([*lines, *_judged(ordered), "", *verdicts(ordered)])


def verdicts(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each plan's readiness, in words and with its reasons; plans that say the same together."""
    for state in STATES:
        said: dict[str, list[str]] = {}
        for one in reports:
            found = one["readiness"]
            if found["state"] == state:
                why = f": {'; '.join(found['reasons'])}" if found["reasons"] else ""
                said.setdefault(f"{found['words']}{why}", []).append(one["plan"])
        for words, plans in said.items():
            named = ", ".join(plans)
            if len(plans) == len(reports) > _MOST_NAMED:
                named = f"all {len(plans)} plans"
            yield options.wrapped(f"{named}: {words}")
    for caution in cautions(reports):
        yield options.wrapped(f"note: {caution}")
    yield from _calibration(reports)


def _judged(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Search and similarity: reference, plan, difference and its interval."""
    first = reports[0]
    if (searched := first["retrieval"]) is not None:
        yield ""
        yield (
            f"search ({searched['name']}): {searched['queries']} queries, "
            f"{searched['documents']} documents"
        )
        yield f"{'plan':<30} {'ndcg@10':>7} {'16-bit':>7} {'change':>8}  95 % interval"
        for one in reports:
            yield _figure(one["plan"], one["retrieval"]["figures"]["ndcg@10"])
    if (paired := first["sts"]) is not None:
        yield ""
        yield f"similarity ({paired['name']}): {paired['pairs']} pairs"
        yield f"{'plan':<30} {'spearman':>8} {'16-bit':>6} {'change':>8}  95 % interval"
        for one in reports:
            yield _figure(one["plan"], one["sts"]["spearman"])


def _figure(plan: str, figure: Mapping[str, Any]) -> str:
    if figure["interval"] is None:
        return f"{plan:<30} not defined: all cosines are equal"
    low, high = figure["interval"]
    return (
        f"{plan:<30} {figure['plan']:7.4f} {figure['reference']:7.4f} "
        f"{figure['difference']:+8.4f}  {low:+.4f} to {high:+.4f}"
    )


def _calibration(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    said: dict[str, None] = {}
    for one in reports:
        found = one["calibration"]
        if (shared := found["shared"]) is not None:
            said[
                f"{shared['texts']} of {shared['count']} texts share 13 tokens in a row with the "
                "texts that a variant was calibrated with"
                + (": its figures may flatter it" if shared["texts"] else "")
            ] = None
        elif found["texts"] != "none":
            said[
                f"a variant was calibrated with texts that are not known here "
                f"({found['texts'][:16]}): whether these are among them cannot be said"
            ] = None
    for words in said:
        yield options.wrapped(f"note: {words}")
