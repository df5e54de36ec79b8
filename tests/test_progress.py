"""What is told of long work where stderr is no terminal."""

import sys

import pytest

from lowmem import progress


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_long_work_tells_how_far_it_is_twice_a_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = progress.Steps()
    for step in range(8):
        steps("calibrating", step, 8)
        clock.now += 20
    assert capsys.readouterr().err.splitlines() == [
        "calibrating: 8 steps",
        "calibrating: 2 of 8, about 2 min left",
        "calibrating: 4 of 8, about 80 s left",
        "calibrating: 6 of 8, about 40 s left",
    ]


def test_short_work_is_named_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    steps = progress.Steps()
    for kind in ("quantizing", "calibrating"):
        for step in range(2):
            steps(kind, step, 2)
            clock.now += 1
        steps(kind, 1, 2)
    steps("hashing", 0, 1)
    assert capsys.readouterr().err == "quantizing: 2 steps\ncalibrating: 2 steps\nhashing: 1 step\n"


def test_a_bar_tells_how_far_it_is_twice_a_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.bar("embedding", 100) as advance:
        for _ in range(4):
            clock.now += 20
            advance(25)
    assert capsys.readouterr().err.splitlines() == [
        "embedding: 50 of 100",
        "embedding: 100 of 100",
    ]


def test_a_bar_that_is_not_shown_says_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.bar("embedding", 1, shown=False) as advance:
        clock.now += 100
        advance(1)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_step_is_shown_until_all_are_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.Steps() as steps:
        steps("timing plans", 0, 1)
        assert capsys.readouterr().err == "\r\033[Ktiming plans: 0 of 1"
    assert capsys.readouterr().err == "\r\033[K"
    with progress.Steps():
        pass
    assert capsys.readouterr().err == ""
