from collections.abc import Sequence

import numpy as np
import pytest

from lowmem.data import Row
from lowmem.fidelity import parts as parts_module
from lowmem.fidelity.parts import Parts, Vectors
from lowmem.measure import Record

ROWS = [Row(str(n), f"text {n}") for n in range(10)]
TOKENS = [10 + n for n in range(10)]
IDENTITY = {"plan": "int8-torch-cpu-fp32-resident", "texts": "a"}


class Runner:
    """Embeds a text as its number, at a given speed, and may be ended."""

    def __init__(self, speed: float = 0.1, ends_after: int | None = None) -> None:
        self.ran: list[list[str]] = []
        self._speed = speed
        self._left = ends_after

    def __call__(self, rows: Sequence[Row]) -> tuple[Vectors, Record]:
        if self._left == 0:
            raise KeyboardInterrupt
        if self._left is not None:
            self._left -= 1
        self.ran.append([row.id for row in rows])
        tokens = sum(TOKENS[int(row.id)] for row in rows)
        vectors = np.array([[float(row.id), 1] for row in rows], np.float32)
        record = Record(
            len(rows),
            tokens,
            1.0,
            [tokens / self._speed],
            peak_host_bytes=5 * len(rows),
            peak_device_bytes=7,
        )
        return vectors, record


def embed(run: Runner, parts: Parts | None = None, **identity: str) -> tuple[Vectors, Record]:
    return (parts or Parts()).embed({**IDENTITY, **identity}, ROWS, TOKENS, 35, run)


def test_vectors_come_in_the_order_of_the_texts_and_the_longest_run_first() -> None:
    run = Runner()
    vectors, record = embed(run)
    assert vectors[:, 0].tolist() == list(range(10))
    assert [id_ for part in run.ran for id_ in part] == [str(n) for n in reversed(range(10))]
    assert all(sum(TOKENS[int(id_)] for id_ in part) <= 35 for part in run.ran)
    assert (record.texts, record.tokens) == (10, sum(TOKENS))
    assert record.tokens_per_second == pytest.approx(0.1)
    assert (record.peak_host_bytes, record.peak_device_bytes) == (15, 7)


def test_the_speed_of_the_first_part_sizes_the_others() -> None:
    run = Runner(speed=1.0)  # 120 tokens take the time of a part
    embed(run)
    assert len(run.ran[0]) == 1
    assert len(run.ran) == 3


def test_what_was_finished_before_an_end_is_not_run_again() -> None:
    first, second = Runner(ends_after=3), Runner()
    with pytest.raises(KeyboardInterrupt):
        embed(first)
    vectors, record = embed(second)
    once = [id_ for run in (first, second) for part in run.ran for id_ in part]
    assert sorted(once) == sorted(row.id for row in ROWS)
    assert vectors[:, 0].tolist() == list(range(10))
    assert record.tokens == sum(TOKENS)


def test_a_finished_pass_is_read_until_its_report_is_complete() -> None:
    parts = Parts()
    embed(Runner(), parts)
    again = Runner()
    embed(again)
    assert again.ran == []
    parts.forget()
    embed(again)
    assert again.ran != []


def test_a_value_is_made_once_until_the_report_is_complete(cache_directory) -> None:
    parts, made = Parts(), iter(range(9))
    values = [parts.value(IDENTITY, "moved", lambda: {"alone": next(made)}) for _ in range(2)]
    assert values == [{"alone": 0}, {"alone": 0}]
    next((cache_directory / "parts").rglob("moved.json")).write_text("{")
    assert parts.value(IDENTITY, "moved", lambda: next(made)) == 1
    parts.forget()
    assert parts.value(IDENTITY, "moved", lambda: next(made)) == 2


def test_another_plan_or_other_code_meets_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    embed(Runner())
    other = Runner()
    embed(other, plan="int4-torch-cpu-fp32-resident")
    assert other.ran != []
    monkeypatch.setattr(parts_module, "_code_sha256", lambda: "edited")
    edited = Runner()
    embed(edited)
    assert edited.ran != []


@pytest.mark.parametrize("left", [-40, 0])
def test_a_damaged_part_is_made_anew_and_said(
    cache_directory, caplog: pytest.LogCaptureFixture, left: int
) -> None:
    embed(Runner())
    file = next((cache_directory / "parts").rglob("0.npz"))
    file.write_bytes(file.read_bytes()[:left])
    again = Runner()
    vectors, _ = embed(again)
    assert again.ran == [["9"]]
    assert vectors[:, 0].tolist() == list(range(10))
    assert "0.npz is damaged and is made anew" in caplog.text


def test_a_cache_that_cannot_be_written_costs_no_vector(
    cache_directory, caplog: pytest.LogCaptureFixture
) -> None:
    (cache_directory / "parts").write_text("a file where a directory should be")
    vectors, _ = embed(Runner())
    assert vectors[:, 0].tolist() == list(range(10))
    assert "parts cannot be kept in" in caplog.text
