"""What stands on the page besides its verdict and its table."""

import re
from dataclasses import replace
from typing import Any

import pytest

from lowmem.fidelity.html import render
from tests.report_pages import CONTEXT, FOUR, RETRIEVAL, STS, TOKENS, page_of, words


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
    given = {**FOUR[0], "reference_given": "theirs.npy"}
    read = (
        "Its vectors were read from theirs.npy ; shape and length were checked, and the vectors of"
    )
    assert f"{read} 8 texts compared" in words(page_of([{**given, "reference_checked": 8}]))
    assert f"{read} no texts compared" in words(page_of([given]))


def test_older_reports_without_newer_figures_have_a_page() -> None:
    newer = ("search", "invariance", "outputs", "calibration")
    older = [{key: value for key, value in one.items() if key not in newer} for one in FOUR]
    text = words(page_of(older))
    assert "2 of 4 plans keep the embeddings." in text
    assert "Smaller output vectors" not in text
