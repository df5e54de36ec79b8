"""The pictures of the page."""

import sys

import matplotlib
import numpy as np
import pytest

from lowmem.fidelity.html import render
from lowmem.fidelity.pictures import unbeaten
from tests.report_pages import CONTEXT, FAIR, FOUR, GOOD, TOKENS, cosines_of, page_of, report


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    before = matplotlib.rcParams.copy()
    with matplotlib.rc_context({"lines.linewidth": 30, "svg.hashsalt": "other"}):
        page = page_of(FOUR, drawn=True)
    assert page == page_of(FOUR, drawn=True)
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


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


def test_the_line_of_the_picture_of_sizes_joins_what_no_smaller_plan_beats() -> None:
    bits, values = [4.0, 8.0, 8.0, 16.0, 4.5], [0.9, 0.95, 0.99, 0.98, 0.8]
    assert unbeaten(bits, values) == [(4.0, 0.9), (8.0, 0.99)]
