import pytest

from lowmem import hardware
from lowmem.artifact.manifest import Bundle
from lowmem.compute.plan import Plan
from lowmem.errors import BackendError, BundleError
from lowmem.measure import Record
from lowmem.planner import timing
from lowmem.planner.candidates import Subject


def test_speeds_that_were_measured_before_are_known_without_running(tiny_bundle, monkeypatch):
    bundle, machine = Bundle(tiny_bundle), hardware.probe()
    subject = Subject.of_bundle(bundle)
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident")
    other = plan.with_(variant="int8")
    assert timing.known_speeds([plan, other], bundle, subject, machine) == {}
    monkeypatch.setattr(timing, "measure", lambda *_, **__: Record(1, 100, 0.0, [2.0]))
    timing.time_plans([plan], bundle, subject, machine)
    steps = []
    third = plan.with_(variant="int4")
    timing.time_plans([plan, third], bundle, subject, machine, lambda *step: steps.append(step))
    assert steps == [("timing plans", 0, 1)]
    monkeypatch.setattr(timing, "measure", None)
    assert timing.known_speeds([plan, other], bundle, subject, machine) == {plan.id: 50.0}


def test_a_damaged_variant_is_dropped_and_told_where_no_other_is_left(tiny_bundle, monkeypatch):
    bundle, machine = Bundle(tiny_bundle), hardware.probe()
    subject = Subject.of_bundle(bundle)
    broken = Plan("fp16", "torch", "cpu", "fp32", "resident")
    damaged, whole = (broken.with_(variant=name) for name in ("int8", "int4"))

    def measure(bundle, plan, *_, **__):
        if plan.variant == "int8":
            raise BundleError("int8/model.safetensors is damaged")
        if plan.variant == "fp16":
            raise BackendError("it was ended by SIGSEGV")
        return Record(1, 100, 0.0, [2.0])

    monkeypatch.setattr(timing, "measure", measure)
    timed = timing.time_plans([broken, damaged, whole], bundle, subject, machine)
    reasons = ["it was ended by SIGSEGV", "int8/model.safetensors is damaged", None]
    assert [plan.dropped for plan in timed] == reasons
    with pytest.raises(BundleError, match=r"^int8/model\.safetensors is damaged$"):
        timing.time_plans([broken, damaged], bundle, subject, machine)
    (alone,) = timing.time_plans([broken], bundle, subject, machine)
    assert alone.dropped == "it was ended by SIGSEGV"


def test_plans_that_one_run_hardly_tells_apart_are_timed_again_once(tiny_bundle, monkeypatch):
    bundle, machine = Bundle(tiny_bundle), hardware.probe()
    subject = Subject.of_bundle(bundle)
    first = Plan("fp16", "torch", "cpu", "fp32", "resident")
    near, slow = (first.with_(variant=name) for name in ("int8", "int4"))
    seconds = {"fp16": [1.0, 1.1], "int8": [1.125, 0.9], "int4": [2.0]}
    monkeypatch.setattr(
        timing,
        "measure",
        lambda _, plan, *__, **___: Record(1, 99, 0.0, [seconds[plan.variant].pop(0)]),
    )
    timed = timing.time_plans([first, near, slow], bundle, subject, machine)
    steps = []
    for _ in range(2):  # what was timed twice is sure
        again = timing.time_rivals_again(
            timed, bundle, subject, machine, lambda *step: steps.append(step)
        )
    assert steps == [("timing the fastest again", 0, 2), ("timing the fastest again", 1, 2)]
    assert not any(seconds.values())
    assert [plan.tokens_per_second for plan in timed] == [99.0, 88.0, 49.5]
    assert [plan.variant for plan in again] == ["fp16", "int8", "int4"]
    known = timing.known_speeds(again, bundle, subject, machine)
    assert known == {first.id: 99.0, near.id: 110.0, slow.id: 49.5}
    assert [
        plan.tokens_per_second
        for plan in timing.time_plans([first, near, slow], bundle, subject, machine)
    ] == list(known.values())


def test_a_long_run_is_sure(tiny_bundle, monkeypatch):
    bundle, machine = Bundle(tiny_bundle), hardware.probe()
    subject = Subject.of_bundle(bundle)
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident")
    pair = [plan, plan.with_(variant="int8")]
    monkeypatch.setattr(timing, "measure", lambda *_, **__: Record(1, 100, 0.0, [6.0, 4.0]))
    timed = timing.time_plans(pair, bundle, subject, machine)
    monkeypatch.setattr(timing, "measure", None)
    assert timing.time_rivals_again(timed, bundle, subject, machine) == timed


def test_one_plan_alone_and_a_rival_that_fails_keep_their_speed(tiny_bundle, monkeypatch):
    bundle, machine = Bundle(tiny_bundle), hardware.probe()
    subject = Subject.of_bundle(bundle)
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident")
    pair = [plan, plan.with_(variant="int8")]
    monkeypatch.setattr(timing, "measure", lambda *_, **__: Record(1, 100, 0.0, [2.0]))
    timed = timing.time_plans(pair, bundle, subject, machine)

    def fails(*_, **__):
        raise BackendError("memory ran out")

    monkeypatch.setattr(timing, "measure", fails)
    assert timing.time_rivals_again(timed[:1], bundle, subject, machine) == timed[:1]
    assert timing.time_rivals_again(timed, bundle, subject, machine) == timed


def test_what_was_timed_on_a_busy_machine_is_told_and_timed_again_when_asked(
    tiny_bundle, monkeypatch, caplog
):
    bundle, machine = Bundle(tiny_bundle), hardware.probe()
    subject = Subject.of_bundle(bundle)
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident", threads=2)
    records = [
        Record(1, 100, 0.0, [2.0], queued_seconds=1.0),  # of 4 seconds of two threads
        Record(1, 100, 0.0, [1.0], queued_seconds=0.1),
    ]
    monkeypatch.setattr(timing, "measure", lambda *_, **__: records.pop(0))
    for _ in range(2):
        (found,) = timing.time_plans([plan], bundle, subject, machine)
        assert found.tokens_per_second == 50
        assert "fp16-torch-cpu-fp32-resident was timed: faster than it looks" in caplog.text
        caplog.clear()
    for _ in range(2):
        (found,) = timing.time_plans([plan], bundle, subject, machine, disturbed_again=True)
        assert found.tokens_per_second == 100
        assert not caplog.text
    assert not records
