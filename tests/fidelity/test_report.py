"""What a report is made of, with engines that answer by rule."""

import contextlib

import numpy as np
import pytest

from lowmem import hardware
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import FLOORS
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.fidelity import report as module
from lowmem.fidelity.inputs import Inputs
from lowmem.fidelity.parts import Parts
from lowmem.fidelity.reference import Reference
from lowmem.fidelity.report import agreement, compare_plans
from lowmem.measure import Record

ROWS = tuple(
    Row(str(n), f"text {n}", "query" if n % 3 == 0 else "document", lang="en") for n in range(12)
)
VECTORS = np.random.default_rng(8).standard_normal((12, 16)).astype(np.float32)
PLANS = [Plan(variant, "torch", "cpu", "fp32", "resident") for variant in ("fp16", "int8", "int4")]
NOISE = {"fp16": 0.0, "int8": 0.01, "int4": 0.3}


class Engines:
    """Gives each text its reference vector and a plan's noise; may be ended at a plan."""

    def __init__(self, ends_at: str = "") -> None:
        self.ran: list[str] = []
        self._ends_at = ends_at

    def measure(self, bundle, plan, rows, *, vectors):
        if plan.variant == self._ends_at:
            raise KeyboardInterrupt
        self.ran.append(plan.variant)
        places = [int(row.id) for row in rows]
        noise = np.random.default_rng(1).standard_normal((12, 16)).astype(np.float32)
        np.save(vectors, (VECTORS + NOISE[plan.variant] * noise)[places])
        return Record(len(rows), 10 * len(rows), 0.0, [1.0])


@contextlib.contextmanager
def silent(what, total):
    yield lambda steps: None


def compare(tiny_bundle, monkeypatch, engines: Engines, parts: Parts):
    monkeypatch.setattr(module, "measure", engines.measure)
    monkeypatch.setattr(module, "invariance", lambda *_: None)
    texts = Reference("mine.txt", ROWS, (10,) * 12, 0, VECTORS, "a" * 64)
    machine, floor = hardware.probe(), FLOORS["standard"]
    bundle = Bundle(tiny_bundle)
    return compare_plans(bundle, PLANS, Inputs(texts), floor, machine, parts, silent)


def test_an_ended_report_runs_only_what_was_not_finished(tiny_bundle, monkeypatch):
    ended, again = Engines("int4"), Engines()
    with pytest.raises(KeyboardInterrupt):
        compare(tiny_bundle, monkeypatch, ended, Parts())
    parts = Parts()
    compared = compare(tiny_bundle, monkeypatch, again, parts)
    assert (ended.ran, again.ran) == (["fp16", "int8"], ["int4"])
    assert [one.report["verdict"] for one in compared] == ["pass", "pass", "fail"]
    parts.forget()
    afresh = Engines()
    compare(tiny_bundle, monkeypatch, afresh, Parts())
    assert afresh.ran == ["fp16", "int8", "int4"]


def test_queries_are_asked_for_their_documents_and_plans_for_one_another(tiny_bundle, monkeypatch):
    compared = compare(tiny_bundle, monkeypatch, Engines(), Parts())
    exact, near, far = (one.report for one in compared)
    assert exact["search"] == {"queries": 4, "documents": 8, "overlap": {"1": 1.0, "10": 1.0}}
    assert [one["overlap"] for one in exact["buckets"]] == [1.0] * 4
    assert exact["readiness"]["state"] == near["readiness"]["state"] == "ready"
    assert far["readiness"]["state"] == "not ready"
    pairs = {(one["a"], one["b"]): one["mean"] for one in agreement(compared)}
    assert len(pairs) == 3
    ids = [one["plan"] for one in (exact, near, far)]
    assert pairs[ids[0], ids[1]] == pytest.approx(near["cosine"]["mean"])
    assert pairs[ids[0], ids[2]] == pytest.approx(far["cosine"]["mean"])
