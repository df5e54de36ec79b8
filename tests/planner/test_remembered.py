import pytest

from lowmem import cache, hardware
from lowmem.planner.remembered import Timing, Timings

MACHINE = hardware.probe()
NAME = f"timings-{hardware.fingerprint(MACHINE)}"
TIMING = Timing(100.0, 200.0, 0.05, 3.0, 1)


def test_what_was_measured_is_there_for_the_next_process_and_beside_what_others_add():
    mine, others = Timings(MACHINE), Timings(MACHINE)
    mine.add("a", TIMING)
    others.add("b", TIMING.or_faster(TIMING))
    others.add_bandwidth("read", 1e9)
    found = Timings(MACHINE)
    assert found.get("a") == TIMING
    assert found.get("b") == Timing(100.0, 200.0, 0.05, 3.0, 2)
    assert found.bandwidth("read") == 1e9
    assert found.get("read") is None
    assert found.bandwidth("a") is None
    assert found.get("c") is None


@pytest.mark.parametrize(
    "entry",
    [
        120.0,
        None,
        {"tokens_per_second": 100.0},
        {**vars(TIMING), "more": 1},
        {**vars(TIMING), "runs": "1"},
        {**vars(TIMING), "tokens_per_second": 0.0},
        {**vars(TIMING), "computing_tokens_per_second": -1.0},
    ],
)
def test_a_damaged_entry_counts_as_missing(entry):
    cache.write_json(NAME, {"a": entry})
    assert Timings(MACHINE).get("a") is None


def test_of_two_runs_the_faster_counts():
    faster = Timing(120.0, 130.0, 0.2, 2.0, 1)
    both = Timing(120.0, 130.0, 0.05, 2.0, 2)  # the slower one was disturbed less
    assert TIMING.or_faster(faster) == faster.or_faster(TIMING) == both


def test_a_tenth_of_the_time_without_a_core_is_a_disturbance():
    assert not Timing(1.0, 1.0, 0.1).was_disturbed
    assert Timing(1.0, 1.0, 0.11).was_disturbed
