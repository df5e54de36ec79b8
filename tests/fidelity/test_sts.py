from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lowmem.errors import InputError
from lowmem.fidelity import sts

LINES = "".join(
    f'{{"a": "one {n}", "b": "two {n}", "score": {score}}}\n' for n, score in enumerate([3, 1, 2.5])
)


def test_pairs_are_read_from_both_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(LINES)
    (tmp_path / "pairs.csv").write_text(
        "sentence1,sentence2,score\none 0,two 0,3\none 1,two 1,1\none 2,two 2,2.5\n"
    )
    for name in ("pairs.jsonl", "pairs.csv"):
        pairs = sts.read_pairs(tmp_path / name)
        words = ("one 0", "two 0", "one 1", "two 1", "one 2", "two 2")
        assert tuple(row.text for row in pairs.rows) == words
        assert {row.input_type for row in pairs.rows} == {"document"}
        assert pairs.scores.tolist() == [3, 1, 2.5]
    asked = sts.read_pairs(tmp_path / "pairs.jsonl", task="same")
    assert {(row.input_type, row.task) for row in asked.rows} == {("query", "same")}


def pairs_of(count: int) -> sts.Pairs:
    generator = np.random.default_rng(4)
    rows = tuple(sts.Row(f"{n}{side}", f"{n} {side}") for n in range(count) for side in "ab")
    return sts.Pairs("pairs.jsonl", rows, generator.integers(0, 6, count).astype(float))


def test_figures_are_those_of_scipy() -> None:
    pairs = pairs_of(60)
    generator = np.random.default_rng(9)
    reference = generator.standard_normal((120, 16)).astype(np.float32)
    reference[1::2] += pairs.scores[:, None].astype(np.float32) * reference[0::2]
    vectors = reference + generator.standard_normal((120, 16)).astype(np.float32)
    found = sts.judge(pairs, reference, vectors)["spearman"]
    for key, side in (("reference", reference), ("plan", vectors)):
        first, second = (
            part / np.linalg.norm(part, axis=1, keepdims=True) for part in (side[::2], side[1::2])
        )
        expected = stats.spearmanr(pairs.scores, (first * second).sum(axis=1)).statistic
        # float32 norms may swap near cosines
        assert found[key] == pytest.approx(expected, abs=1e-3)
    assert found["difference"] == pytest.approx(found["plan"] - found["reference"])
    assert found["interval"][0] < found["difference"] < found["interval"][1]


def test_where_all_cosines_are_equal_nothing_is_claimed() -> None:
    same = np.ones((120, 4), np.float32)
    assert sts.judge(pairs_of(60), same, same)["spearman"] == {
        "reference": None,
        "plan": None,
        "difference": None,
        "interval": None,
    }


def test_a_part_spans_the_scores() -> None:
    pairs = pairs_of(60)
    part = pairs.part(6)
    assert len(part.scores) == 6
    assert set(part.scores) >= {0, 5}
    assert [row.id[:-1] for row in part.rows[::2]] == [row.id[:-1] for row in part.rows[1::2]]
    assert pairs.part(60) is pairs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": "x", "score": 1}\n', "line 1 of .* must have two texts, a and b, or sentence1"),
        ('{"a": "x", "b": " ", "score": 1}\n', "line 1 of .* must have two texts"),
        ('{"a": "x", "b": "y", "score": "high"}\n', "line 1 of .* a finite number as score"),
        ('{"a": "x", "b": "y", "score": true}\n', "line 1 of .* a finite number as score"),
        ('{"a": "x", "b": "y"}\n', "line 1 of .* a finite number as score"),
        ('{"a": "x", "b": "y", "score": 1}\n' * 5, "scores that are not all equal, got 5 pairs"),
        ("", "at least 3 pairs"),
    ],
)
def test_damaged_pairs_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        sts.read_pairs(tmp_path / "pairs.jsonl")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a file of records must end in \.jsonl or \.csv"):
        sts.read_pairs(tmp_path / "pairs.txt")
    with pytest.raises(InputError, match="cannot be read"):
        sts.read_pairs(tmp_path / "pairs.jsonl")
