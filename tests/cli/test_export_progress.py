"""What ``export`` tells of its steps where stderr is no terminal."""

import pytest

from lowmem.cli import export as cli


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(cli.time, "monotonic", clock)
    return clock


def test_long_work_tells_how_far_it_is_twice_a_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = cli._Progress()
    for step in range(8):
        progress("calibrating", step, 8)
        clock.now += 20
    assert capsys.readouterr().err.splitlines() == [
        "calibrating: 8 steps",
        "calibrating: 2 of 8, about 2 min left",
        "calibrating: 4 of 8, about 80 s left",
        "calibrating: 6 of 8, about 40 s left",
    ]


def test_short_work_is_named_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    progress = cli._Progress()
    for kind in ("quantizing", "calibrating"):
        for step in range(2):
            progress(kind, step, 2)
            clock.now += 1
        progress(kind, 1, 2)
    progress("hashing", 0, 1)
    assert capsys.readouterr().err == "quantizing: 2 steps\ncalibrating: 2 steps\nhashing: 1 step\n"
