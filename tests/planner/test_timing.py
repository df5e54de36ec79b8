"""How fast plans are, and what is run to know it; the runs themselves are stand-ins."""

from pathlib import Path

import pytest

from lowmem import cache, hardware
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import FLOORS
from lowmem.compute.plan import Plan
from lowmem.errors import BackendError, BundleError
from lowmem.hardware import Hardware
from lowmem.measure import Record
from lowmem.planner import timing
from lowmem.planner.candidates import Subject, Wishes
from lowmem.planner.choice import choose
from lowmem.planner.timing import Stopwatch
from lowmem.progress import silent

FP16 = Plan("fp16", "torch", "cpu", "fp32", "resident", threads=2)
INT8, INT4 = FP16.with_(variant="int8"), FP16.with_(variant="int4")
HOST = Hardware("Some CPU", 2, ("avx2",), 2**34, 2**34)
TWO_PLANS = Wishes("int8", "torch", "cpu", schedule="resident")  # fp32 and int8 on such a CPU
FLOOR = FLOORS["standard"]


@pytest.fixture
def stopwatch(tiny_bundle):
    """Makes one, as each process does."""
    bundle = Bundle(tiny_bundle)

    def make(progress=silent):
        return Stopwatch(bundle, Subject.of_bundle(bundle), hardware.probe(), progress)

    return make


@pytest.fixture
def runs(monkeypatch):
    """What runs of each variant give, one after another: a record, or an error that is raised."""
    results = {}

    def measure(bundle, plan, rows, **_):
        result = results[plan.variant].pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(timing, "measure", measure)
    return results


def took(*seconds, queued=0.0):
    return Record(1, 99, 0.0, list(seconds), queued_seconds=queued)


def speeds(plans):
    return [plan.tokens_per_second for plan in plans]


def test_speeds_that_were_measured_before_are_known_without_running(stopwatch, runs):
    assert stopwatch().known_speeds([FP16, INT8]) == {}
    runs |= {"fp16": [took(2.0)], "int4": [took(2.0)]}
    stopwatch().time([FP16])
    steps = []
    stopwatch(lambda *step: steps.append(step)).time([FP16, INT4])
    assert steps == [("timing plans", 0, 1)]
    assert stopwatch().known_speeds([FP16, INT8]) == {FP16.id: 49.5}


def test_a_damaged_variant_is_dropped_and_told_where_no_other_is_left(stopwatch, runs):
    crash, damage = BackendError("it was ended by SIGSEGV"), BundleError("weights are damaged")
    runs |= {"fp16": [crash] * 3, "int8": [damage] * 2, "int4": [took(2.0)]}
    timed = stopwatch().time([FP16, INT8, INT4])
    reasons = ["it was ended by SIGSEGV", "weights are damaged", None]
    assert [plan.dropped for plan in timed] == reasons
    with pytest.raises(BundleError, match=r"^weights are damaged$"):
        stopwatch().time([FP16, INT8])
    (alone,) = stopwatch().time([FP16])
    assert alone.dropped == "it was ended by SIGSEGV"


@pytest.mark.parametrize("has_cache", [True, False])
def test_plans_that_one_run_hardly_tells_apart_are_timed_again_once(
    stopwatch, runs, has_cache, tmp_path, monkeypatch
):
    if not has_cache:
        (tmp_path / "file").touch()
        monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "file" / "none"))
    runs |= {"fp16": [took(1.0), took(1.1)], "int8": [took(1.125), took(0.9)], "int4": [took(2.0)]}
    steps = []
    this = stopwatch(lambda *step: steps.append(step))
    timed = this.time([FP16, INT8, INT4])
    assert speeds(timed) == [99.0, 88.0, 49.5]
    steps.clear()
    again = this.time_rivals_again(timed)
    assert speeds(again) == [99.0, 110.0, 49.5]
    assert [plan.variant for plan in again] == ["fp16", "int8", "int4"]
    assert steps == [("timing the fastest again", 0, 2), ("timing the fastest again", 1, 2)]
    assert speeds(this.time_rivals_again(again)) == speeds(again)
    if has_cache:
        assert speeds(stopwatch().time([FP16, INT8, INT4])) == speeds(again)
    assert not any(runs.values())


def test_a_slow_moment_in_its_only_run_keeps_no_plan_from_being_timed_again(stopwatch, runs):
    runs |= {"fp16": [took(1.0), took(1.1)], "int8": [took(1.375), took(0.9)], "int4": [took(1.5)]}
    timed = stopwatch().time([FP16, INT8, INT4])
    assert speeds(timed) == [99.0, 72.0, 66.0]
    assert speeds(stopwatch().time_rivals_again(timed)) == [99.0, 110.0, 66.0]
    assert not any(runs.values())


def test_the_second_run_is_the_longer(stopwatch, monkeypatch):
    asked = []

    def measure(bundle, plan, rows, *, least_seconds, **_):
        asked.append(least_seconds)
        return took(1.0)

    monkeypatch.setattr(timing, "measure", measure)
    this = stopwatch()
    this.time_rivals_again(this.time([FP16, INT8]))
    assert asked == [1.0, 1.0, 4.0, 4.0]


def test_the_choice_is_by_both_runs(tiny_bundle, runs):
    runs |= {"int8": [took(1.0), took(1.1), took(1.125), took(0.9)]}  # fp32 first, then int8
    found = choose(Bundle(tiny_bundle), wishes=TWO_PLANS, floor=FLOOR, machine=HOST)
    one, other = (plan for plan in found.plans if plan.tokens_per_second)
    assert {one.tokens_per_second, other.tokens_per_second} == {99.0, 110.0}
    assert found.get().tokens_per_second == 110.0


def test_a_long_run_is_sure(stopwatch, runs):
    runs |= {"fp16": [took(6.0, 4.0)], "int8": [took(6.0, 4.0)]}
    timed = stopwatch().time([FP16, INT8])
    assert stopwatch().time_rivals_again(timed) == timed


def test_one_plan_alone_and_a_rival_that_fails_keep_their_speed(stopwatch, runs):
    failure = BackendError("memory ran out")
    runs |= {"fp16": [took(2.0), failure], "int8": [took(2.0), failure]}
    timed = stopwatch().time([FP16, INT8])
    assert stopwatch().time_rivals_again(timed[:1]) == timed[:1]
    assert stopwatch().time_rivals_again(timed) == timed
    assert not any(runs.values())


def test_what_was_timed_on_a_busy_machine_is_timed_again_when_asked(stopwatch, runs):
    busy = took(2.0, queued=1.0)  # of 4 seconds of two threads
    runs |= {"fp16": [busy, BackendError("memory ran out"), took(1.0, queued=0.1)]}
    for _ in range(2):
        assert speeds(stopwatch().time([FP16])) == [49.5]
        assert stopwatch().was_disturbed(FP16)
    assert speeds(stopwatch().time([FP16], disturbed_again=True)) == [49.5]  # it did run once
    for _ in range(2):
        assert speeds(stopwatch().time([FP16], disturbed_again=True)) == [99.0]
        assert not stopwatch().was_disturbed(FP16)
    assert not any(runs.values())


def test_a_streamed_plan_whose_reader_needs_a_core_is_not_taken_for_disturbed(stopwatch, runs):
    streamed = FP16.with_(schedule="streamed")
    runs |= {"fp16": [took(2.0, queued=1.0)]}
    stopwatch().time([streamed])
    assert not stopwatch().was_disturbed(streamed)


def test_a_choice_among_plans_that_were_disturbed_says_so(tiny_bundle, runs, caplog):
    busy = took(20.0, queued=30.0)
    runs |= {"int8": [busy, busy]}
    bundle = Bundle(tiny_bundle)
    for _ in range(2):  # from the cache, too
        caplog.clear()
        choose(bundle, wishes=TWO_PLANS, floor=FLOOR, machine=HOST)
        [message] = [record.getMessage() for record in caplog.records]
        assert message.startswith("other programs kept the CPU busy while lowmem timed int8-torch")
        assert message.endswith("may be faster: the next lowmem plan times that again")
    caplog.clear()
    runs |= {"int8": [took(10.0), took(10.0)]}
    choose(bundle, wishes=TWO_PLANS, floor=FLOOR, machine=HOST, time_all=True)
    assert not caplog.records


def test_a_cache_that_is_removed_meanwhile_loses_nothing_of_this_process(stopwatch, runs):
    runs |= {"fp16": [took(2.0)], "int8": [took(1.0)]}
    this = stopwatch()
    this.time([FP16])
    for file in Path(cache.directory()).iterdir():
        file.unlink()
    assert speeds(this.time([FP16, INT8])) == [49.5, 99.0]
