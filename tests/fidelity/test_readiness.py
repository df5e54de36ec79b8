from typing import Any

import pytest

from lowmem.artifact.verdict import FLOORS
from lowmem.fidelity.readiness import cautions, readiness

STANDARD = FLOORS["standard"]


def bucket(kind: str, name: str, mean: float, count: int = 50, low: float = 0.99) -> dict[str, Any]:
    return {"kind": kind, "name": name, "count": count, "mean": mean, "p5": low, "min": low}


def report(mean: float = 0.995, p5: float = 0.99, least: float = 0.97, **changes: Any) -> Any:
    return {
        "cosine": {"mean": mean, "p5": p5, "min": least},
        "nonfinite": 0,
        "buckets": [],
        "texts": {"count": 200},
        **changes,
    }


def judged(difference: float, high: float) -> dict[str, Any]:
    return {
        "reference": 0.7,
        "plan": 0.7 + difference,
        "difference": difference,
        "interval": [difference - 0.01, high],
    }


def test_what_reaches_the_floor_everywhere_is_ready() -> None:
    groups = [bucket("language", "en", 0.99), bucket("language", "de", 0.99)]
    assert readiness(report(buckets=groups), STANDARD) == {
        "state": "ready",
        "words": "ready",
        "ready_for": [],
        "not_for": [],
        "reasons": [],
        "floor": "standard",
        "caution": None,
    }


def test_what_fails_is_not_ready_with_its_first_two_reasons() -> None:
    found = readiness(report(0.8667, 0.8232, 0.7832), STANDARD)
    assert (found["state"], found["words"]) == ("not ready", "not ready")
    assert found["reasons"] == [
        "mean cosine 0.8667, the floor asks 0.985",
        "5th percentile 0.8232, the floor asks 0.965",
    ]


def test_a_language_that_fails_alone_is_named() -> None:
    groups = [
        *(bucket("language", name, 0.995, 60) for name in ("de", "en")),
        bucket("language", "th", 0.95, 12),
        bucket("input_type", "document", 0.99, 132),
    ]
    found = readiness(report(buckets=groups), STANDARD)
    assert found["state"] == "partly"
    assert found["words"] == "ready for texts in “de” and texts in “en”, not for texts in “th”"
    assert found["ready_for"] == ["texts in “de”", "texts in “en”"]
    assert found["not_for"] == ["texts in “th”"]
    assert found["reasons"] == ["texts in “th”: mean cosine 0.9500, the floor asks 0.985"]


def test_a_plan_below_the_floor_may_still_serve_most_texts() -> None:
    groups = [
        bucket("input_type", "document", 0.995, 150),
        bucket("input_type", "query", 0.93, 50, low=0.8),
        bucket("length", "1-16", 0.93, 50),
        bucket("length", "17-64", 0.995, 60),
    ]
    found = readiness(report(0.98, 0.9, 0.8, buckets=groups), STANDARD)
    assert found["words"] == "ready for documents, not for queries and texts of 1-16 tokens"
    assert len(found["reasons"]) == 2


def test_groups_of_fewer_than_ten_texts_decide_nothing() -> None:
    groups = [bucket("language", "en", 0.995, 90), bucket("language", "th", 0.5, 9)]
    assert readiness(report(buckets=groups), STANDARD)["state"] == "ready"


def test_the_percentile_of_a_small_group_is_its_worst_text_and_does_not_count() -> None:
    small, large = (bucket("language", "th", 0.99, count, low=0.95) for count in (19, 20))
    groups = [bucket("language", "en", 0.995, 90)]
    assert readiness(report(buckets=[*groups, small]), STANDARD)["state"] == "ready"
    assert readiness(report(buckets=[*groups, large]), STANDARD)["state"] == "partly"


@pytest.mark.parametrize(
    ("difference", "high", "state"),
    [(-0.03, -0.002, "partly"), (-0.03, 0.001, "ready"), (-0.009, -0.001, "ready")],
)
def test_search_is_lost_where_its_loss_is_large_and_no_chance(
    difference: float, high: float, state: str
) -> None:
    figures = {"ndcg@10": judged(difference, high)}
    retrieval = {"name": "scifact", "queries": 20, "figures": figures}
    found = readiness(report(retrieval=retrieval), STANDARD)
    assert found["state"] == state
    if state == "partly":
        assert found["words"] == "ready, but not for search"
        assert found["reasons"] == ["nDCG@10 on scifact falls from 0.700 to 0.670"]


def test_similarity_is_lost_in_the_same_way_and_never_by_what_is_not_defined() -> None:
    lost = {"name": "pairs.csv", "pairs": 20, "spearman": judged(-0.05, -0.02)}
    assert readiness(report(sts=lost), STANDARD)["not_for"] == ["similarity scores"]
    unknown = {"reference": None, "plan": None, "difference": None, "interval": None}
    sts = {"name": "pairs.csv", "pairs": 20, "spearman": unknown}
    assert readiness(report(sts=sts), STANDARD)["state"] == "ready"


def test_few_queries_and_pairs_say_nothing_of_a_use() -> None:
    lost = judged(-0.3, -0.3)
    few = {
        "retrieval": {"name": "mine", "queries": 1, "figures": {"ndcg@10": lost}},
        "sts": {"name": "pairs.csv", "pairs": 19, "spearman": lost},
    }
    found = readiness(report(**few), STANDARD)
    assert found["state"] == "ready"
    assert found["caution"] == (
        "1 query is too few to judge search by; 19 pairs are too few to judge similarity by"
    )


@pytest.mark.parametrize(("count", "said"), [(1, "1 vector holds"), (2, "2 vectors hold")])
def test_a_vector_that_is_not_finite_leaves_nothing_ready(count: int, said: str) -> None:
    groups = [bucket("language", "en", 0.995), bucket("language", "de", 0.5)]
    found = readiness(report(nonfinite=count, buckets=groups), STANDARD)
    assert found["state"] == "not ready"
    assert found["reasons"][0] == f"{said} NaN or infinity"


def test_few_texts_and_vectors_that_depend_on_their_batch_are_cautions() -> None:
    few = readiness(report(texts={"count": 64}), STANDARD)
    assert few["caution"] == "a smoke test on 64 texts, not a sign-off"
    moved = {"texts": 6, "alone": 3e-3, "shuffled": 0.0, "neighbours": 1e-9}
    assert readiness(report(invariance=moved), STANDARD)["caution"] == (
        "a text's vector depends on its batch, by up to 3.0e-03 of 1 - cosine"
    )
    both = readiness(report(texts={"count": 64}, invariance=moved), STANDARD)["caution"]
    assert both.startswith("a smoke test on 64 texts, not a sign-off; a text's vector depends on")
    still = {"texts": 6, "alone": 1e-9, "shuffled": 0.0, "neighbours": 1e-9}
    assert readiness(report(invariance=still), STANDARD)["caution"] is None


def test_cautions_of_several_plans_are_said_once() -> None:
    batches = [
        {"texts": 6, "alone": far, "shuffled": 0.0, "neighbours": 0.0} for far in (0.0, 3e-3, 2e-4)
    ]
    reports = [report(texts={"count": 64}, invariance=moved) for moved in batches]
    assert cautions(reports) == [
        "a smoke test on 64 texts, not a sign-off",
        "in 2 of 3 plans a text's vector depends on its batch, by up to 3.0e-03 of 1 - cosine",
    ]


def test_a_group_that_fails_is_named_though_no_other_of_its_kind_is_large() -> None:
    groups = [bucket("input_type", "document", 0.99, 300), bucket("language", "de", 0.93, 12)]
    found = readiness(report(buckets=groups), STANDARD)
    assert found["state"] == "partly"
    assert found["words"] == "ready, but not for texts in “de”"
    assert found["reasons"] == ["texts in “de”: mean cosine 0.9300, the floor asks 0.985"]


def test_groups_of_every_kind_that_fail_are_named() -> None:
    groups = [
        bucket("input_type", "document", 0.99, 288),
        bucket("input_type", "query", 0.95, 12),
        bucket("language", "de", 0.93, 12),
        bucket("language", "en", 0.99, 280),
    ]
    found = readiness(report(buckets=groups), STANDARD)
    assert found["words"] == "ready for documents, not for queries and texts in “de”"
