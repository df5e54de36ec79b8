import json
from pathlib import Path
from typing import Any

import pytest

from lowmem.errors import InputError
from lowmem.fidelity import drift


def report(plan: str = "int8-torch-cpu-int8", **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "plan": plan,
        "artifact_sha256": "a" * 64,
        "reference_sha256": "b" * 64,
        "texts": {"name": "quick", "sha256": "c" * 64, "count": 64, "tokens": 3904},
        "cosine": {"mean": 0.99, "p5": 0.98, "min": 0.95},
        "overlap": {"1": 0.9, "10": 0.9},
        "buckets": [{"kind": "language", "name": "en", "count": 64, "mean": 0.99}],
        "tokens_per_second": 100.0,
        "machine": "a",
        "versions": {"torch": "2.12", "numpy": "2.3"},
        **changes,
    }


def test_equal_reports_have_no_drift() -> None:
    found = drift.drift("old.json", [report()], [report()])
    [row] = found["rows"]
    assert row["difference"] == {"mean": 0, "p5": 0, "min": 0}
    assert (row["overlap"], row["speed"]) == (0, 0)
    assert row["changed"] == row["worsened"] == found["only_old"] == found["only_new"] == []


def test_what_fell_and_what_changed_is_named() -> None:
    new = report(
        artifact_sha256="d" * 64,
        cosine={"mean": 0.98, "p5": 0.98005, "min": 0.94995},
        overlap={"1": 0.9, "10": 0.88},
        buckets=[{"kind": "language", "name": "en", "count": 64, "mean": 0.98}],
        tokens_per_second=150.0,
        machine="b",
        versions={"torch": "2.13", "triton": "3"},
    )
    [row] = drift.drift("old.json", [report()], [new])["rows"]
    # the minimum fell by 5e-5, less than what counts
    assert row["worsened"] == ["mean", "top 10", "language en"]
    assert row["difference"]["mean"] == pytest.approx(-0.01)
    assert row["speed"] == pytest.approx(0.5)
    assert row["changed"] == [
        "artifact aaaaaaaa to dddddddd",
        "machine a to b",
        "numpy 2.3 to none",
        "torch 2.12 to 2.13",
        "triton none to 3",
    ]


def test_plans_of_one_side_are_listed_and_what_was_not_measured_is_none() -> None:
    old = [report("x"), report("y", tokens_per_second=None, overlap={"1": None, "10": None})]
    new = [report("y"), report("z")]
    found = drift.drift("old.json", old, new)
    assert [row["plan"] for row in found["rows"]] == ["y"]
    assert (found["only_old"], found["only_new"]) == (["x"], ["z"])
    assert found["rows"][0]["speed"] is None
    assert found["rows"][0]["overlap"] is None


def test_the_table_is_at_most_80_columns_wide() -> None:
    new = report("bnb-int8-onnxruntime-cuda-int8", cosine={"mean": -0.5, "p5": -0.5, "min": -1})
    old = [report("bnb-int8-onnxruntime-cuda-int8"), report("gone")]
    text = drift.table(drift.drift("old.json", old, [new]))
    lines = text.splitlines()
    assert lines[0] == "drift against old.json: new less old"
    assert (
        lines[2] == "bnb-int8-onnxruntime-cuda-int8  -1.4900  -1.4800  -1.9500  +0.00    +0% worse"
    )
    assert "worse in mean, p5, min" in lines[3]
    assert lines[-1] == "  no longer there: gone"
    assert max(map(len, lines)) <= 80


def test_both_kinds_of_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    for value in ({"format": 1, "reports": [report()]}, report()):
        file.write_text(json.dumps(value))
        assert drift.read_reports(file) == [report()]


@pytest.mark.parametrize(
    "value",
    [
        {"format": 1, "reports": []},
        {"format": 1, "reports": [{"format": 2}]},
        {"format": 1, "reports": [{**report(), "cosine": {"mean": "high"}}]},
        {"format": 1, "plans": []},
        {**report(), "format": 2},
        {**report(), "texts": []},
        {**report(), "overlap": None},
        {**report(), "buckets": [1]},
        {**report(), "artifact_sha256": 5},
        {**report(), "versions": None},
        {**report(), "tokens_per_second": "fast"},
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "old.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"old\.json must be a report of format 1"):
        drift.read_reports(tmp_path / "old.json")


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{")
    with pytest.raises(InputError, match=r"old\.json"):
        drift.read_reports(tmp_path / "old.json")


def test_reports_on_other_texts_are_refused() -> None:
    drift.check_same_texts(Path("old.json"), [report()], "c" * 64)
    with pytest.raises(InputError, match=r"about other texts \(quick, 64 texts\): .* same --texts"):
        drift.check_same_texts(Path("old.json"), [report()], "d" * 64)
