import pytest

from lowmem import hardware
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.plan import Plan
from lowmem.errors import BackendError, BundleError
from lowmem.measure import Record
from lowmem.planner import timing
from lowmem.planner.candidates import Subject


def test_speeds_that_were_measured_before_are_known_without_running(tiny_bundle, monkeypatch):
    bundle, machine = Bundle(tiny_bundle), hardware.probe()
    config = Checkpoint(bundle.directory("fp16")).config
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident")
    other = plan.with_(variant="int8")
    assert timing.known_speeds([plan, other], bundle, config, machine) == {}
    monkeypatch.setattr(timing, "measure", lambda *_, **__: Record(1, 100, 0.0, [2.0]))
    subject = Subject.of_bundle(bundle)
    timing.time_plans([plan], bundle, subject, machine)
    steps = []
    third = plan.with_(variant="int4")
    timing.time_plans([plan, third], bundle, subject, machine, lambda *step: steps.append(step))
    assert steps == [("timing plans", 0, 1)]
    monkeypatch.setattr(timing, "measure", None)
    assert timing.known_speeds([plan, other], bundle, config, machine) == {plan.id: 50.0}


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
