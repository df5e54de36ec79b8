"""What is chosen is the fastest that runs, and is remembered for the card."""

from collections.abc import Callable

import pytest
import torch

from lowmem import cache
from lowmem.compute.kernels.tuning import Tuner
from lowmem.errors import BackendError

SECONDS = {"slow": 3.0, "fast": 1.0, "middling": 2.0}


def ways(tried: list[str], *broken: str) -> dict[str, Callable[[], object]]:
    def way(name: str) -> Callable[[], object]:
        def run() -> str:
            tried.append(name)
            if name in broken:
                raise RuntimeError("out of resource: shared memory")
            return name

        return run

    return {name: way(name) for name in SECONDS}


def seconds(way: Callable[[], object]) -> float:
    return SECONDS[str(way())]


def test_the_fastest_that_runs_is_chosen() -> None:
    assert Tuner("int8", "card").choose("a", ways([]), seconds) == "fast"
    assert Tuner("int8", "other").choose("a", ways([], "fast"), seconds) == "middling"


def test_a_choice_is_remembered_for_its_card_and_key() -> None:
    Tuner("int8", "card").choose("a", ways([]), seconds)
    tried: list[str] = []
    assert Tuner("int8", "card").choose("a", ways(tried), seconds) == "fast"
    assert not tried
    Tuner("int8", "card").choose("b", ways(tried), seconds)
    assert len(tried) == 3
    Tuner("int8", "new driver").choose("a", ways(tried), seconds)
    assert len(tried) == 6


def test_a_remembered_way_that_is_gone_is_chosen_anew() -> None:
    tuner = Tuner("int8", "card")
    cache.write_json(tuner._name, {"a": "of an older version"})
    assert Tuner("int8", "card").choose("a", ways([]), seconds) == "fast"


def test_where_no_way_runs_there_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"no kernel runs on this card for tuning-int8-\w+ a"):
        Tuner("int8", "card").choose("a", ways([], *SECONDS), seconds)


def test_memory_that_runs_out_is_not_taken_for_a_way_that_cannot_be_done() -> None:
    def shortage() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Tuner("int8", "card").choose("a", {"slow": shortage}, seconds)
    assert cache.read_json(Tuner("int8", "card")._name) is None
