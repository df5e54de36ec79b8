import html
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.artifact.verdict import FLOORS, Floor
from lowmem.errors import BackendError, InputError
from lowmem.fidelity import metrics
from lowmem.fidelity.figure_text import (
    cosine_text,
    signed_text,
    size_text,
    speed_text,
    tiny_text,
)
from lowmem.fidelity.html import ReportContext, headline, render
from lowmem.fidelity.pictures import unbeaten

STANDARD = FLOORS["standard"]
CONTEXT = ReportContext(
    model="Linq-AI-Research/Linq-Embed-Mistral",
    licence="cc-by-nc-4.0",
    source_sha256="e" * 64,
    machine="AMD EPYC 9R14, 8 threads",
    texts="probe",
    versions={"lowmem": "0.1.0", "numpy": "2.3.5"},
    floor=STANDARD,
)
TEXTS = 200
TOKENS = [3 + 7 * index for index in range(TEXTS)]
GOOD, FAIR, BAD = 2e-4, 5e-3, 6e-2  # mean distances from the reference
HOSTILE = "<script>alert('$x$')</script>&\"é\n"


def cosines_of(distance: float) -> list[float]:
    spread = np.random.default_rng(7).gamma(8, 1 / 8, TEXTS)
    return [float(value) for value in 1 - distance * spread]


def worst_text(place: int, cosines: Any) -> dict[str, Any]:
    return {
        "id": f"text-{place}",
        "cosine": float(cosines[place]),
        "tokens": TOKENS[place],
        "input_type": "document",
        "text": f"It was text {place}, and it went on for a while about nothing in particular.",
        "kept": 6,
        "of": 10,
        "nearest_before": {"id": "text-1", "text": "What stood nearest before"},
        "nearest_now": {"id": f"text-{place % 2}", "text": "What stands nearest now"},
    }


def judged(reference: float, difference: float, spread: float = 0.01) -> dict[str, Any]:
    return {
        "reference": reference,
        "plan": reference + difference,
        "difference": difference,
        "interval": [difference - spread, difference + spread],
    }


RETRIEVAL = {
    "name": "cranfield",
    "documents": 200,
    "all_documents": 1398,
    "blank_documents": 2,
    "queries": 25,
    "figures": {
        "ndcg@10": judged(0.42, -0.05),
        "recall@10": judged(0.5, 0.0),
        "recall@100": judged(0.7, 0.0),
        "mrr@10": judged(0.4, -0.02),
    },
}
STS = {"name": "pairs.jsonl", "pairs": 100, "spearman": judged(0.8, -0.004)}


def report(plan: str, distance: float, *, speed: float | None = 100.0, **changes: Any) -> Any:
    cosines = np.array(cosines_of(distance))
    return {
        "format": 1,
        "plan": plan,
        "artifact_sha256": "a" * 64,
        "reference_sha256": "d" * 64,
        "texts": {"name": "probe", "sha256": "c" * 64, "count": TEXTS, "tokens": sum(TOKENS)},
        "cosine": metrics.summary(cosines),
        "buckets": metrics.buckets(
            cosines,
            tokens=TOKENS,
            languages=["en", "de"] * (TEXTS // 2),
            input_types=["document"] * TEXTS,
        ),
        "overlap": {"1": 0.9, "10": 0.85},
        "search": {"queries": 20, "documents": 180, "overlap": {"1": 0.95, "10": 0.91}},
        "spearman": 0.97,
        "invariance": {"texts": 6, "alone": 2e-13, "shuffled": 0.0, "neighbours": 1e-13},
        "outputs": [
            {"name": name, "vector_bytes": size, "overlap": {"1": 0.9, "10": share}}
            for name, size, share in (("float32", 16384, 0.85), ("binary", 512, 0.61))
        ],
        "calibration": {"texts": "none", "shared": None},
        "worst": [worst_text(int(place), cosines) for place in np.argsort(cosines)[:10]],
        "nonfinite": 0,
        "norm_error": 1e-7,
        "bytes": 4 * 2**30,
        "bits_per_weight": {"linears": 4.25, "model": 4.5},
        "tokens_per_second": speed,
        "retrieval": None,
        "sts": None,
        "floor": STANDARD.to_json(),
        "verdict": "pass",
        **changes,
    }


def page_of(
    reports: Sequence[Any], context: ReportContext = CONTEXT, *, drawn: bool = False
) -> str:
    distances = {one["plan"]: one["cosine"]["mean"] for one in reports}
    cosines = {plan: cosines_of(1 - mean) for plan, mean in distances.items()} if drawn else {}
    return render(reports, cosines, TOKENS, context)


def words(page: str) -> str:
    """The page's text on one line, without its head."""
    body = page[page.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


FOUR = [
    report("int8-torch-cpu-int8", FAIR, speed=300.0),
    report("fp16-torch-cpu-bf16", GOOD, speed=100.0, bytes=14 * 2**30),
    report("int4-torch-cpu-fp32", BAD, speed=50.0),
    report("int4-onnxruntime-cpu-int8", BAD, speed=400.0),
]


class Outline(HTMLParser):
    """Tags and attributes, and whether every tag is closed in its turn."""

    VOID = frozenset({"meta", "br", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    page = page_of(FOUR, drawn=True)
    found = outline(page)
    assert not found.seen & {"script", "link", "img", "iframe", "object", "base", "form", "image"}
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset", "action", "data")
        if name.endswith("href"):
            assert value.startswith("#")
    assert "//" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_every_tag_is_closed_and_every_id_stands_once() -> None:
    page = page_of(FOUR, drawn=True)
    assert page.startswith("<!doctype html>\n")
    assert page.count("<svg") == 3
    found = outline(page)
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert set(referred) <= set(ids)


def test_hostile_names_are_escaped() -> None:
    context = ReportContext(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        HOSTILE,
        HOSTILE,
        {HOSTILE: HOSTILE},
        replace(STANDARD, name=HOSTILE),
    )
    hostile = report(
        f"{HOSTILE}-torch-cpu-{HOSTILE}",
        BAD,
        worst=[{"id": HOSTILE, "cosine": 0.5}],
        artifact_sha256=HOSTILE,
        reference_sha256=HOSTILE,
        texts={"sha256": HOSTILE, "count": TEXTS, "tokens": 9},
        buckets=[
            {"kind": HOSTILE, "name": HOSTILE, "count": 5, "mean": 0.5, "p5": 0.4, "min": 0.3}
        ],
    )
    page = page_of(
        [hostile, report(HOSTILE, GOOD), report("_-torch-cpu-_", BAD)], context, drawn=True
    )
    assert "<script" not in page
    assert "alert(&#39;$x$&#39;)" in page
    outline(page)


def test_equal_arguments_give_equal_bytes_without_a_date() -> None:
    page = page_of(FOUR, drawn=True)
    assert page == page_of(FOUR, drawn=True)
    assert not re.search(r"\b20\d\d-\d\d", page)


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    before = matplotlib.rcParams.copy()
    with matplotlib.rc_context({"lines.linewidth": 30, "svg.hashsalt": "other"}):
        page = page_of(FOUR, drawn=True)
    assert page == page_of(FOUR, drawn=True)
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("passing", "plans", "sentence"),
    [
        (1, 1, "The plan keeps the embeddings."),
        (0, 1, "The plan loses too much."),
        (2, 2, "All 2 plans keep the embeddings."),
        (0, 5, "None of 5 plans keeps the embeddings."),
        (1, 5, "1 of 5 plans keeps the embeddings."),
        (5, 12, "5 of 12 plans keep the embeddings."),
    ],
)
def test_the_verdict_is_one_sentence(passing: int, plans: int, sentence: str) -> None:
    assert headline(passing, plans) == sentence


def test_the_verdict_comes_first_and_says_what_to_use_and_what_not() -> None:
    text = words(page_of(FOUR))
    assert re.match(
        r"Linq-AI-Research/Linq-Embed-Mistral, fidelity to its 16-bit weights "
        r"2 of 4 plans keep the embeddings\. Each of 200 texts was embedded by the plan and by the "
        r"16-bit model\. A plan keeps the embeddings if the cosine of the two vectors, 1 for equal "
        r"ones, is on average at least 0\.985, at least 0\.965 for 95 % of the texts, and at least "
        r"0\.9 for every text \(the floor “standard”\)\. "
        r"Fastest that passes int8-torch-cpu-int8 : 300 tokens/s, 4\.00 GiB, mean cosine 0\.995\d; "
        r"weakest group: .* mean 0\.99\d\d \(\d+ texts\) "
        r"Not faithful enough int4 \(2 plans\): mean 0\.9\d\d\d < 0\.985, "
        r"5th percentile 0\.\d{4} < 0\.965, worst text 0\.\d{4} < 0\.9 Ready for what",
        text,
    ), text[:900]


def test_the_smallest_plan_that_passes_is_named_where_it_is_not_the_fastest() -> None:
    small = report("int8-torch-cpu-fp32", GOOD, speed=20.0, bytes=2**30)
    assert "Smallest that passes int8-torch-cpu-fp32 : 20.0 tokens/s, 1.00 GiB" in words(
        page_of([*FOUR, small])
    )
    assert "Smallest that passes" not in words(page_of(FOUR))


def test_where_nothing_passes_the_page_says_so_and_what_to_do() -> None:
    text = words(page_of(FOUR[2:]))
    assert "None of 2 plans keeps the embeddings." in text
    assert "What to do Do not deploy these." in text
    assert "Fastest that passes" not in text


def test_a_plan_that_fails_alone_is_named_with_only_the_figures_that_fail() -> None:
    cosine = {"mean": 0.99, "median": 0.99, "p5": 0.86, "p1": 0.86, "min": 0.9}
    failing = report("int4-torch-cpu-fp32", FAIR, cosine=cosine)
    text = words(page_of([*FOUR[:2], failing]))
    assert (
        "Not faithful enough int4-torch-cpu-fp32 : 5th percentile 0.8600 < 0.965 Ready for" in text
    )
    both = words(page_of([failing, report("int4-torch-cpu-int8", GOOD), *FOUR[2:]]))
    assert "int4 (3 of 4 plans): mean 0.9" in both
    assert re.search(r"5th percentile 0\.8600 to 0\.\d{4} < 0\.965", both)


@pytest.mark.parametrize(("count", "said"), [(1, "1 vector holds"), (3, "3 vectors hold")])
def test_vectors_that_are_not_finite_are_a_reason(count: int, said: str) -> None:
    page = page_of([report("int8-torch-cuda-fp16", GOOD, nonfinite=count)])
    assert f"int8-torch-cuda-fp16 : {said} NaN or infinity" in words(page)
    assert "The plan loses too much." in page


def test_the_figures_and_the_floor_given_decide_and_not_the_stored_verdict() -> None:
    reports = [{**one, "verdict": "fail"} for one in FOUR]
    assert "2 of 4 plans keep" in page_of(reports)
    assert "1 of 4 plans keeps" in page_of(reports, replace(CONTEXT, floor=FLOORS["strict"]))
    custom = Floor("custom", mean=0.5, p5=0.5, min=0.5)
    assert "All 4 plans keep" in page_of(reports, replace(CONTEXT, floor=custom))


def table_rows(page: str) -> list[list[str]]:
    body = page[page.index("<tbody>") : page.index("</table>")]
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>\s*(.*?)\s*</t[hd]>", row, re.DOTALL) for row in rows]


def test_the_table_has_passing_plans_first_and_the_fastest_of_each_first() -> None:
    page = page_of(FOUR)
    rows = table_rows(page)
    assert [row[:4] for row in rows] == [
        ["Pass: 2", ""],
        ["int8", "torch", "cpu", "int8"],
        ["fp16", "torch", "cpu", "bf16"],
        ["Fail: 2", ""],
        ["int4", "onnxruntime", "cpu", "int8"],
        ["int4", "torch", "cpu", "fp32"],
    ]
    assert rows[1][4:7] == ["4.25", "4.00 GiB", "300"]
    assert rows[1][-3:] == ["0.850", "0.970", "pass"]
    assert [row[-1] for row in rows if len(row) > 2] == ["pass", "pass", "fail", "fail"]
    assert page[: page.index("</table>")].count('class="number low"') == 6


def test_names_with_dashes_are_taken_apart_at_the_engine() -> None:
    page = page_of([report("bnb-nf4-torch-cuda-fp16-acc16", GOOD), report("other", GOOD)])
    rows = {tuple(row[:4]) for row in table_rows(page)[1:]}
    assert rows == {("bnb-nf4", "torch", "cuda", "fp16-acc16"), ("other", "–", "–", "–")}


def test_what_was_not_measured_is_a_dash() -> None:
    bare = report("fp16-torch-cpu-fp32", GOOD, speed=None, overlap={"1": None, "10": None})
    row = table_rows(page_of([{**bare, "spearman": None}]))[1]
    assert row[6] == "–"
    assert row[-3:] == ["–", "–", "pass"]


def test_memory_has_a_column_where_it_was_measured() -> None:
    peaks = {"peak_host_bytes": 2**30, "peak_device_bytes": 5 * 2**30}
    page = page_of(
        [
            report("int4-torch-cuda-fp16", GOOD, **peaks),
            report("int4-torch-cpu-fp32", GOOD, **peaks),
        ]
    )
    assert {row[2]: row[6] for row in table_rows(page)[1:]} == {
        "cuda": "5.00 GiB",
        "cpu": "1.00 GiB",
    }
    assert "Memory" in page
    assert "Memory" not in page_of(FOUR)


def test_the_quick_texts_are_called_a_smoke_test() -> None:
    quick = {"sha256": "c" * 64, "count": 64, "tokens": 3904}
    text = words(
        page_of([report("int8-torch-cpu-int8", GOOD, texts=quick)], replace(CONTEXT, texts="quick"))
    )
    assert (
        "A smoke test, not a sign-off: the texts are the small built-in set quick , 64 texts with "
        "3,904 tokens. Run lowmem report BUNDLE --texts FILE with a few hundred texts" in text
    )


def test_few_texts_of_ones_own_are_a_smoke_test_too_and_many_are_not() -> None:
    mine = replace(CONTEXT, texts="mine.txt")
    few = report("int8-torch-cpu-int8", GOOD, texts={"sha256": "", "count": 12, "tokens": 1234})
    assert "A smoke test, not a sign-off: there are only 12 texts with 1,234 tokens." in words(
        page_of([few], mine)
    )
    assert "smoke test" not in page_of(FOUR, mine)


def test_the_page_says_what_was_not_tested() -> None:
    text = words(page_of(FOUR))
    assert (
        "200 built-in texts ( probe ), 139,900 tokens, the longest of 1,396, in 2 languages."
        in text
    )
    assert "no retrieval benchmark was run" in text
    assert "No benchmark with human judgements was run." in text
    assert "Speed was measured on AMD EPYC 9R14, 8 threads." in text
    measured = [{**one, "retrieval": RETRIEVAL, "sts": STS} for one in FOUR]
    text = words(page_of(measured, replace(CONTEXT, texts="mine.txt")))
    assert "200 texts of mine.txt , 139,900 tokens" in text
    assert "no retrieval benchmark" not in text
    assert "human judgements" not in text


def test_the_page_says_what_it_is_bound_to() -> None:
    text = words(page_of(FOUR, replace(CONTEXT, licence=None)))
    for said in (
        "Licence not stated by the source",
        "Floor standard: mean ≥ 0.985, 5th percentile ≥ 0.965, worst ≥ 0.9",
        "Versions lowmem 0.1.0, numpy 2.3.5",
        f"Source {'e' * 64}",
        f"Texts probe {'c' * 64}",
        f"Reference {'d' * 64}",
        f"int4 {'a' * 64}",
    ):
        assert said in text


def test_each_plan_lists_its_worst_texts_and_what_became_of_their_neighbours() -> None:
    page = page_of(FOUR)
    details = re.findall(r"<details>.*?</details>", page, re.DOTALL)
    assert [one.count("<li>") for one in details] == [10, 10, 5, 5]
    assert "<summary>int4-" in details[0]
    assert f"<code>{FOUR[2]['worst'][0]['id']}</code>" in details[0]
    text = words(details[0].join(("<body>", "")))
    assert "Keeps 6 of its 10 nearest." in text
    assert (
        "Its nearest was “ What stood nearest before ”, and is “ What stands nearest now ”." in text
    )
    assert "Its nearest stays: “ What stands nearest now ”." in text


def test_each_verdict_stands_once_with_its_reasons_and_plans() -> None:
    text = words(page_of(FOUR))
    assert re.search(
        r"Ready for what\? Ready int8-torch-cpu-int8, fp16-torch-cpu-bf16 Not ready "
        r"int4-onnxruntime-cpu-int8 mean cosine 0\.9\d+, the floor asks 0\.985; "
        r"5th percentile 0\.\d+, the floor asks 0\.965 int4-torch-cpu-fp32 mean cosine ",
        text,
    ), text


def test_a_verdict_for_some_uses_names_them() -> None:
    page = page_of([{**FOUR[0], "retrieval": RETRIEVAL}])
    text = words(page)
    assert (
        "Ready, but not for search int8-torch-cpu-int8 nDCG@10 on cranfield falls from 0.420 to "
        "0.370" in text
    )
    assert '<li class="fair">' in page


def test_groups_have_a_table_for_each_way_to_group() -> None:
    text = words(page_of(FOUR))
    assert "By length, in tokens Plan 1-16 2 texts 17-64 7 texts" in text
    assert "By language Plan de 100 texts en 100 texts" in text
    assert "Queries and documents" not in text
    assert (
        "Groups of fewer than ten texts have no verdict of their own: 1-16 (2), 17-64 (7)" in text
    )


def test_company_and_outputs_are_shown_as_they_were_measured() -> None:
    text = words(page_of(FOUR[:1]))
    assert "int8-torch-cpu-int8 0.900 0.850 0.950 0.910 0.970 2e-13 0 1e-13" in text
    assert "Plan float32 16,384 B binary 512 B int8-torch-cpu-int8 0.850 0.610" in text


def test_search_and_similarity_have_their_intervals() -> None:
    text = words(page_of([{**FOUR[0], "retrieval": RETRIEVAL, "sts": STS}]))
    assert (
        "25 queries, 200 documents, a part of 1,398, which is easier to search; 2 without text are "
        "left out." in text
    )
    assert "16-bit model 0.420 0.500 0.700 0.400" in text
    assert (
        "int8-torch-cpu-int8 0.370 -0.050 -0.0600 to -0.0400 0.500 0.000 0.700 0.000 0.380 -0.020"
    ) in text
    assert "Spearman 95 % interval 16-bit model 0.800 int8-torch-cpu-int8 0.796 -0.004" in text


def test_plans_are_shown_with_one_another_where_they_were_compared() -> None:
    pair = {"a": FOUR[0]["plan"], "b": FOUR[1]["plan"], "mean": 0.9912, "p5": 0.9, "overlap": 0.8}
    page = render(FOUR[:2], {}, TOKENS, CONTEXT, agreement=[pair])
    assert "1 int8-torch-cpu-int8 · 0.9912 2 fp16-torch-cpu-bf16 0.9912 ·" in words(page)
    assert "Plans with one another" not in page_of(FOUR)


def test_drift_is_shown_where_an_earlier_report_was_given() -> None:
    row = {
        "plan": FOUR[0]["plan"],
        "difference": {"mean": -0.01, "p5": 0.0, "min": 0.002},
        "overlap": None,
        "changed": ["torch 2.12 to 2.13"],
        "worsened": ["mean", "language de"],
    }
    found = {"against": "old.json", "rows": [row], "only_old": ["gone"], "only_new": []}
    text = words(render(FOUR[:1], {}, TOKENS, CONTEXT, drift=found))
    assert "-0.0100 0.0000 +0.0020 – mean, language de torch 2.12 to 2.13" in text
    assert "No longer there: gone." in text
    assert "What changed" not in page_of(FOUR)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (
            {"texts": "calibration", "shared": {"texts": 3, "count": 200}},
            "int8 was calibrated with the built-in calibration texts; 3 of 200 texts of this "
            "report share 13 tokens in a row with them, so its figures may flatter it.",
        ),
        (
            {"texts": "f" * 64, "shared": None},
            "whether the texts of this report are among them cannot be said",
        ),
    ],
)
def test_the_page_says_what_the_texts_share_with_calibration(about: Any, said: str) -> None:
    assert said in words(page_of([{**FOUR[0], "calibration": about}]))
    assert "was calibrated" not in page_of(FOUR)


def test_a_reference_from_elsewhere_is_named() -> None:
    text = words(page_of([{**FOUR[0], "reference_given": "theirs.npy"}]))
    assert "Its vectors were read from theirs.npy ; shape, length and a few texts" in text


def test_older_reports_without_newer_figures_have_a_page() -> None:
    newer = ("search", "invariance", "outputs", "calibration")
    older = [{key: value for key, value in one.items() if key not in newer} for one in FOUR]
    text = words(page_of(older))
    assert "2 of 4 plans keep the embeddings." in text
    assert "Smaller output vectors" not in text


def test_plans_without_cosines_of_each_text_are_not_drawn() -> None:
    assert "<svg" not in page_of(FOUR[:1])
    assert page_of(FOUR).count("<svg") == 1  # sizes are drawn from the reports
    page = render(FOUR, {"int8-torch-cpu-int8": cosines_of(FAIR)}, TOKENS, CONTEXT)
    assert page.count("<svg") == 3
    assert ">fp16-torch-cpu-bf16</text>" not in page
    assert ">int8-torch-cpu-int8</text>" in page


@pytest.mark.parametrize("cosine", [1.0, 0.9999999999, 0.5, 0.0, -1.0])
def test_any_cosine_can_be_drawn(cosine: float) -> None:
    equal = {"mean": cosine, "median": cosine, "p5": cosine, "p1": cosine, "min": cosine}
    page = render(
        [report("int8-torch-cpu-int8", GOOD, cosine=equal)],
        {"int8-torch-cpu-int8": [cosine]},
        [1],
        CONTEXT,
    )
    assert page.count("<svg") == 2
    assert "nan" not in page[page.index("<svg") :]


def test_a_page_on_many_texts_stays_small() -> None:
    count = 20_000
    cosines = list(np.linspace(0.9, 0.9999, count))
    plans = [report(f"int8-torch-{device}-int8", GOOD) for device in ("cpu", "cuda")]
    page = render(
        plans, {one["plan"]: cosines for one in plans}, list(range(1, count + 1)), CONTEXT
    )
    # 3000 dots by length, and the 1000 below the 5th percentile of each of two plans
    assert len(page) < 5000 * 200


@given(st.floats(-1, 1), st.floats(0.5, 1))
def test_a_cosine_below_the_bound_is_shown_below_it(value: float, bound: float) -> None:
    assert (float(cosine_text(value, bound)) < bound) >= (value < bound)


def test_cosines_have_four_decimals_or_as_many_as_tell_them_from_the_bound() -> None:
    assert cosine_text(0.98765) == "0.9877"
    assert cosine_text(0.98499, 0.985) == "0.98499"
    assert cosine_text(0.985, 0.985) == "0.9850"
    assert cosine_text(math.nextafter(0.985, 0), 0.985) == "0.9849999999999999"


def test_sizes_and_speeds_have_three_digits_and_a_unit() -> None:
    assert [size_text(n) for n in (None, 0, 1000, 1536, 5 * 2**20, 14 * 2**30, 700 * 2**30)] == [
        *("–", "0 B", "1000 B", "1.50 KiB", "5.00 MiB", "14.0 GiB", "700 GiB")
    ]
    assert [speed_text(n) for n in (None, 0.5, 12.34, 99.96, 123.4, 12345.6)] == [
        *("–", "0.500", "12.3", "100.0", "123", "12,346")
    ]


def test_changes_have_a_sign_and_what_is_no_change_has_none() -> None:
    assert [signed_text(value, 3) for value in (None, 0.0123, -0.0123, -0.0001, 0.0)] == [
        *("–", "+0.012", "-0.012", "0.000", "0.000")
    ]
    assert [tiny_text(value) for value in (None, 0.0, 2.34e-12)] == ["–", "0", "2e-12"]


def test_the_line_of_the_picture_of_sizes_joins_what_no_smaller_plan_beats() -> None:
    bits, values = [4.0, 8.0, 8.0, 16.0, 4.5], [0.9, 0.95, 0.99, 0.98, 0.8]
    assert unbeaten(bits, values) == [(4.0, 0.9), (8.0, 0.99)]


def test_a_page_needs_a_plan() -> None:
    with pytest.raises(InputError, match="a page needs the report of at least one plan, got none"):
        render([], {}, [], CONTEXT)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    expected = rf"the HTML report needs the package {package}, .* pip install 'lowmem\[report\]'"
    with pytest.raises(BackendError, match=expected):
        page_of(FOUR)


def test_importing_the_page_loads_neither_package() -> None:
    code = (
        "import lowmem.fidelity.html, sys;"
        "sys.exit(bool({'matplotlib', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
