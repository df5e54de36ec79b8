"""Trials between forms of one computation, on a clock that only the forms move."""

import time
from collections.abc import Callable

import pytest

from lowmem import cache
from lowmem.compute.operations import trials


class Forms:
    """Forms that take so many seconds each and count their calls."""

    def __init__(self, **seconds: float) -> None:
        self.now = 0.0
        self.calls = dict.fromkeys(seconds, 0)
        self.seconds = seconds

    def all(self) -> dict[str, Callable[[], None]]:
        return {name: lambda name=name: self._call(name) for name in self.seconds}

    def _call(self, name: str) -> None:
        self.calls[name] += 1
        self.now += self.seconds[name]


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Forms]:
    def build(**seconds: float) -> Forms:
        made = Forms(**seconds)
        monkeypatch.setattr(time, "perf_counter", lambda: made.now)
        return made

    return build


def test_the_fastest_form_is_found_and_remembered(forms: Callable[..., Forms]) -> None:
    made = forms(slow=2.0, fast=1.0)
    assert trials.fastest("a question", made.all()) == "fast"
    assert made.calls == {"slow": 6, "fast": 6}
    assert trials.fastest("a question", made.all()) == "fast"
    assert made.calls == {"slow": 6, "fast": 6}
    assert trials.fastest("another question", made.all()) == "fast"
    assert made.calls == {"slow": 12, "fast": 12}


def test_a_hopeless_form_is_tried_twice(forms: Callable[..., Forms]) -> None:
    made = forms(slow=100.0, fast=1.0)
    assert trials.fastest("a question", made.all()) == "fast"
    assert made.calls == {"slow": 2, "fast": 6}


def test_a_form_that_compiles_in_its_first_call_is_given_another(
    forms: Callable[..., Forms],
) -> None:
    made = forms(compiled=100.0, ready=2.0)
    calls = made.all()
    compiled = calls["compiled"]

    def call() -> None:
        compiled()
        made.seconds["compiled"] = 1.0

    assert trials.fastest("a question", {**calls, "compiled": call}) == "compiled"


def test_an_outcome_that_is_no_form_is_tried_again(forms: Callable[..., Forms]) -> None:
    made = forms(one=2.0, other=1.0)
    trials.fastest("a question", made.all())
    (name,) = (path.stem for path in cache.directory().glob("trials-*.json"))
    known = cache.read_json(name) or {}
    cache.write_json(name, dict.fromkeys(known, "gone"))
    assert trials.fastest("a question", made.all()) == "other"
