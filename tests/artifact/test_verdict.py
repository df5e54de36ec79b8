import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.artifact.verdict import FLOORS, Floor, fidelity, parse_floor, passes, read_report
from lowmem.errors import BundleError, InputError

STANDARD = FLOORS["standard"]
AT_THE_FLOOR = {"mean": 0.985, "p5": 0.965, "min": 0.9}
PLAN = "int4-torch-cpu-fp32"
BOUND: dict[str, Any] = {"plan": PLAN, "artifact_sha256": "a" * 64, "texts_sha256": ["b" * 64]}


def report(**changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "plan": PLAN,
        "artifact_sha256": "a" * 64,
        "texts": {"sha256": "b" * 64, "count": 64, "tokens": 3000},
        "cosine": {"mean": 0.99, "median": 0.99, "p5": 0.98, "p1": 0.97, "min": 0.95},
        "nonfinite": 0,
        "verdict": "fail",
        **changes,
    }


def written(folder: Path, content: object) -> Path:
    path = folder / "report.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_floors_are_the_documented_ones() -> None:
    assert {name: (floor.mean, floor.p5, floor.min) for name, floor in FLOORS.items()} == {
        "strict": (0.997, 0.995, 0.98),
        "standard": (0.985, 0.965, 0.90),
        "loose": (0.95, 0.90, 0.80),
    }
    assert all(parse_floor(name).name == name for name in FLOORS)


def test_a_floor_is_read_from_its_three_numbers_in_any_order() -> None:
    expected = Floor("custom", mean=0.99, p5=0.98, min=0.95)
    assert parse_floor("mean=0.99,p5=0.98,min=0.95") == expected
    assert parse_floor(" min = .95, mean=0.99 ,p5=98e-2") == expected
    assert expected.to_json() == {"name": "custom", "mean": 0.99, "p5": 0.98, "min": 0.95}


@pytest.mark.parametrize(
    "text",
    [
        *("", "Strict", "tight", "mean", "0.9", "mean=0.99", "mean=0.99,p5=0.98", "custom"),
        *("mean=0.99,p5=0.98,min=", "mean=0.99,p5=0.98,min=high", "mean=0.99,p5=0.98,min=nan"),
        *("mean=inf,p5=0.98,min=0.95", "mean=0.99,p5=0.98,min=-inf", "mean=1.01,p5=0.98,min=0.9"),
        *("mean=0.99,p5=0.98,p5=0.98", "mean=0.99,p5=0.98,min=0.9,", "mean=0.99,p5=1,min=0,max=1"),
    ],
)
def test_another_floor_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_floor(text)
    assert str(caught.value) == (
        "a floor is strict, standard, loose, or mean=…,p5=…,min=… with three finite numbers of at "
        f"most 1, got {text!r}"
    )


def test_figures_at_the_floor_pass_and_any_below_it_fails() -> None:
    assert passes(AT_THE_FLOOR, 0, STANDARD)
    for key, value in AT_THE_FLOOR.items():
        assert not passes({**AT_THE_FLOOR, key: math.nextafter(value, 0)}, 0, STANDARD)


def test_one_vector_that_is_not_finite_fails() -> None:
    assert not passes({"mean": 1.0, "p5": 1.0, "min": 1.0}, 1, STANDARD)
    assert fidelity(report(nonfinite=1), STANDARD) == "failing"
    assert fidelity({"nonfinite": 2}, STANDARD) == "failing"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["mean", "p5", "min"])
def test_a_figure_that_is_not_finite_fails(key: str, value: float) -> None:
    figures = {**AT_THE_FLOOR, key: value}
    assert not passes(figures, 0, STANDARD)
    assert fidelity(report(cosine=figures), STANDARD) == "failing"


@pytest.mark.parametrize("key", ["mean", "p5", "min"])
def test_a_missing_figure_verifies_nothing(key: str) -> None:
    figures = {name: value for name, value in AT_THE_FLOOR.items() if name != key}
    assert not passes(figures, 0, STANDARD)
    for cosine in (figures, {**figures, key: None}, {**figures, key: True}, {**figures, key: "1"}):
        assert fidelity(report(cosine=cosine), STANDARD) == "unverified"


@pytest.mark.parametrize("missing", ["cosine", "nonfinite"])
def test_a_report_without_figures_verifies_nothing(missing: str) -> None:
    assert fidelity(report(**{missing: None}), STANDARD) == "unverified"
    assert fidelity(None, STANDARD) == "unverified"


def test_the_floor_given_now_decides_and_not_the_stored_verdict() -> None:
    assert fidelity(report(verdict="fail"), STANDARD) == "verified"
    assert fidelity(report(verdict="pass"), FLOORS["strict"]) == "failing"


FIGURES = st.fixed_dictionaries({key: st.floats() for key in ("mean", "p5", "min")})


@given(FIGURES, st.integers(0, 3))
def test_only_finite_figures_that_reach_the_floor_are_verified(
    figures: dict[str, float], nonfinite: int
) -> None:
    reached = all(
        math.isfinite(figures[key]) and figures[key] >= AT_THE_FLOOR[key] for key in AT_THE_FLOOR
    )
    got = fidelity(report(cosine=figures, nonfinite=nonfinite), STANDARD)
    assert got == ("verified" if reached and nonfinite == 0 else "failing")


def test_a_stored_report_is_read_with_keys_this_version_does_not_know(tmp_path: Path) -> None:
    stored = report(energy_joules=12.5)
    assert read_report(written(tmp_path, stored), **BOUND) == stored


def test_a_report_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_report(tmp_path / "report.json", **BOUND) is None
    assert read_report(tmp_path / "reports" / "report.json", **BOUND) is None


@pytest.mark.parametrize(
    "other",
    [
        {"plan": "int4-torch-cpu-int8"},
        {"artifact_sha256": "c" * 64},
        {"texts": {"sha256": "c" * 64, "count": 64, "tokens": 3000}},
    ],
)
def test_a_report_on_something_else_is_none(tmp_path: Path, other: dict[str, Any]) -> None:
    assert read_report(written(tmp_path, report(**other)), **BOUND) is None


def test_a_report_on_one_of_several_sets_of_texts_counts(tmp_path: Path) -> None:
    path = written(tmp_path, report())
    assert read_report(path, **{**BOUND, "texts_sha256": ["c" * 64, "b" * 64]}) is not None
    assert read_report(path, **{**BOUND, "texts_sha256": []}) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ('{"format": 1, "format": 1}', "repeats the key 'format'"),
        (json.dumps(report()).replace("0.99", "NaN"), "holds NaN, which is not JSON"),
        ("[]", "must hold a JSON object, got an array"),
        (report(format=2), "format must be 1, got 2"),
        (report(format=True), "format must be 1, got True"),
        (report(plan=None), "plan must be a string, got null"),
        (report(artifact_sha256=5), "artifact_sha256 must be a string, got a number"),
        (report(texts=[]), r"texts\.sha256 must be a string, got null"),
        (report(cosine={"mean": "0.99", "p5": 1}), r"cosine\.mean must be a number, got a string"),
        (report(cosine={"mean": 1, "p5": 1}), r"cosine\.min must be a number, got null"),
        (report(nonfinite=-1), "nonfinite must be a count, got -1"),
        (report(nonfinite=0.5), "nonfinite must be a count, got 0.5"),
    ],
)
def test_a_damaged_report_is_an_error_that_names_the_file(
    tmp_path: Path, content: object, reason: str
) -> None:
    said = rf"report\.json.*{reason}.*remove it, or let lowmem report write it anew"
    with pytest.raises(BundleError, match=said):
        read_report(written(tmp_path, content), **BOUND)


def test_all_that_is_wrong_with_a_report_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        read_report(written(tmp_path, {"format": 1}), **BOUND)
    for key in ("plan", "artifact_sha256", "texts.sha256", "cosine.mean", "cosine.p5", "nonfinite"):
        assert f"{key} must be" in str(caught.value)


def test_what_cannot_be_looked_at_is_an_error_and_not_a_missing_report(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("a file where a directory should be")
    with pytest.raises(BundleError, match="cannot be read: Not a directory"):
        read_report(tmp_path / "reports" / "report.json", **BOUND)


def test_a_verdict_needs_no_numpy() -> None:
    # the package itself opens with the Embedder, so its own __init__ is left out
    code = (
        "import sys, types; package = types.ModuleType('lowmem');"
        f"package.__path__ = [{str(Path(__file__).parents[2] / 'lowmem')!r}];"
        "sys.modules['lowmem'] = package; import lowmem.artifact.verdict;"
        "sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
