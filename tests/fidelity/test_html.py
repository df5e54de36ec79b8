"""The page as a whole, its verdict, and its table."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lowmem.artifact.verdict import FLOORS, Floor
from lowmem.errors import BackendError, InputError
from lowmem.fidelity.html import ReportContext, headline, render
from tests.report_pages import (
    BAD,
    CONTEXT,
    FAIR,
    FOUR,
    GOOD,
    STANDARD,
    TEXTS,
    page_of,
    report,
    words,
)

HOSTILE = "<script>alert('$x$')</script>&\"é\n"


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
        r"ones, is on average at least 0\.985, at its 5th percentile at least 0\.965, and at least "
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


def test_plans_that_failed_to_run_are_named_at_the_top_and_among_what_was_not_tested() -> None:
    failed = [
        {"plan": "bnb-nf4-torch-cpu-fp32", "reason": "no kernel <for it>"},
        {"plan": "int8-onnxruntime-cpu-int8", "reason": "ended by SIGKILL"},
    ]
    page = render(FOUR, {}, [], CONTEXT, failed=failed)
    text = words(page)
    assert "2 of 4 plans keep the embeddings; 2 failed to run." in text
    assert (
        "Failed to run bnb-nf4-torch-cpu-fp32 : no kernel <for it> "
        "int8-onnxruntime-cpu-int8 : ended by SIGKILL"
    ) in text
    untested = text.partition("What was not tested")[2]
    assert "bnb-nf4-torch-cpu-fp32, int8-onnxruntime-cpu-int8: they failed to run." in untested
    assert "<for it>" not in page
    assert "failed to run" not in words(render(FOUR, {}, [], CONTEXT))


@pytest.mark.parametrize(
    ("passing", "plans", "sentence"),
    [
        (1, 1, "The plan keeps the embeddings; 1 failed to run."),
        (3, 3, "All 3 plans keep the embeddings; 1 failed to run."),
    ],
)
def test_the_verdict_says_that_others_failed(passing: int, plans: int, sentence: str) -> None:
    assert headline(passing, plans, 1) == sentence


@pytest.mark.parametrize(
    ("everything", "said"),
    [(TEXTS, "These are 200 texts of mine.jsonl"), (9000, "These are 200 of 9,000 texts of mine")],
)
def test_texts_that_are_a_part_are_called_so(everything: int, said: str) -> None:
    reports = [report("int8-torch-cpu-int8", GOOD)]
    reports[0]["texts"]["all"] = everything
    assert said in words(render(reports, {}, [], replace(CONTEXT, texts="mine.jsonl")))
