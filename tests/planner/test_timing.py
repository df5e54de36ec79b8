from lowmem import hardware
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.plan import Plan
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
    timing.time_plans([plan], bundle, Subject.of_bundle(bundle), machine)
    monkeypatch.setattr(timing, "measure", None)
    assert timing.known_speeds([plan, other], bundle, config, machine) == {plan.id: 50.0}
