"""What a report is made of, with engines that answer by rule."""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from lowmem import data, hardware, schemas
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import VARIANTS
from lowmem.artifact.verdict import FLOORS
from lowmem.cli import app
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.errors import BackendError, CapacityError, LowmemError
from lowmem.fidelity import report as module
from lowmem.fidelity import stored_reference
from lowmem.fidelity.inputs import Inputs
from lowmem.fidelity.npy_files import npy_bytes
from lowmem.fidelity.parts import Parts
from lowmem.fidelity.reference import Reference
from lowmem.fidelity.report import agreement, compare_plans, of_texts_alone
from lowmem.measure import Record

ROWS = tuple(
    Row(str(n), f"text {n}", "query" if n % 3 == 0 else "document", lang="en") for n in range(12)
)
VECTORS = np.random.default_rng(8).standard_normal((12, 16)).astype(np.float32)
PLANS = [Plan(variant, "torch", "cpu", "fp32", "resident") for variant in ("fp16", "int8", "int4")]
NOISE = {"fp16": 0.0, "int8": 0.01, "int4": 0.3}


class Engines:
    """Gives each text its reference vector and a plan's noise; may end or fail at a plan."""

    def __init__(self, ends_at: str = "", fails: Mapping[str, LowmemError] | None = None) -> None:
        self.ran: list[str] = []
        self._ends_at = ends_at
        self._fails = fails or {}

    @contextlib.contextmanager
    def measuring(self, bundle, plan):
        yield SimpleNamespace(run=functools.partial(self._run, bundle, plan.variant))

    def _run(self, bundle, variant, rows, *, vectors):
        if variant == self._ends_at:
            raise KeyboardInterrupt
        if variant in self._fails:
            raise self._fails[variant]
        self.ran.append(variant)
        np.save(vectors, self._vectors(bundle, variant, rows))
        return Record(len(rows), 10 * len(rows), 0.0, [1.0])

    def _vectors(self, bundle, variant, rows):
        places = [int(row.id) for row in rows]
        noise = np.random.default_rng(1).standard_normal((12, 16)).astype(np.float32)
        return (VECTORS + NOISE[variant] * noise)[places]


@contextlib.contextmanager
def silent(what, total):
    yield lambda steps: None


def run_by(engines: Engines, monkeypatch):
    monkeypatch.setattr(module, "Measuring", engines.measuring)
    monkeypatch.setattr(module, "invariance", lambda *_: None)


def compare(tiny_bundle, monkeypatch, engines: Engines, parts: Parts, told=None):
    run_by(engines, monkeypatch)
    texts = Reference("mine.txt", ROWS, (10,) * 12, 0, VECTORS, "a" * 64)
    machine, floor = hardware.probe(), FLOORS["standard"]
    bundle = Bundle(tiny_bundle)
    told = [] if told is None else told
    return compare_plans(
        *(bundle, PLANS, Inputs(texts), floor, machine, parts, silent),
        on_plan=lambda plan, seconds: told.append(plan),
    )


def test_an_ended_report_runs_only_what_was_not_finished(tiny_bundle, monkeypatch):
    ended, again = Engines("int4"), Engines()
    with pytest.raises(KeyboardInterrupt):
        compare(tiny_bundle, monkeypatch, ended, Parts())
    parts = Parts()
    compared, _ = compare(tiny_bundle, monkeypatch, again, parts)
    assert (ended.ran, again.ran) == (["fp16", "int8"], ["int4"])
    assert [one.report["verdict"] for one in compared] == ["pass", "pass", "fail"]
    parts.forget()
    afresh = Engines()
    compare(tiny_bundle, monkeypatch, afresh, Parts())
    assert afresh.ran == ["fp16", "int8", "int4"]


def test_queries_are_asked_for_their_documents_and_plans_for_one_another(tiny_bundle, monkeypatch):
    compared, failed = compare(tiny_bundle, monkeypatch, Engines(), Parts())
    assert failed == []
    exact, near, far = (one.report for one in compared)
    assert exact["search"] == {"queries": 4, "documents": 8, "overlap": {"1": 1.0, "10": None}}
    assert [one["overlap"] for one in exact["buckets"]] == [1.0] * 4
    assert exact["readiness"]["state"] == near["readiness"]["state"] == "ready"
    assert far["readiness"]["state"] == "not ready"
    pairs = {(one["a"], one["b"]): one["mean"] for one in agreement(compared)}
    assert len(pairs) == 3
    ids = [one["plan"] for one in (exact, near, far)]
    assert pairs[ids[0], ids[1]] == pytest.approx(near["cosine"]["mean"])
    assert pairs[ids[0], ids[2]] == pytest.approx(far["cosine"]["mean"])


NO_ROOM = CapacityError("int8 needs 9 GiB:\nclose something")
NO_KERNEL = BackendError("no kernel for int4")


def test_a_plan_that_fails_leaves_the_others_and_is_told(tiny_bundle, monkeypatch):
    engines, told = Engines(fails={"int8": NO_ROOM}), []
    compared, failed = compare(tiny_bundle, monkeypatch, engines, Parts(), told)
    assert engines.ran == ["fp16", "int4"]
    assert [one.report["plan"] for one in compared] == [PLANS[0].report_id, PLANS[2].report_id]
    assert failed == [PLANS[1].with_(dropped="int8 needs 9 GiB: close something")]
    assert told == [PLANS[0], failed[0], PLANS[2]]


def test_where_all_plans_fail_the_first_error_is_raised(tiny_bundle, monkeypatch):
    fails = {"fp16": NO_KERNEL, "int8": NO_ROOM, "int4": NO_KERNEL}
    with pytest.raises(BackendError) as caught:
        compare(tiny_bundle, monkeypatch, Engines(fails=fails), Parts())
    assert caught.value is NO_KERNEL


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy with reference vectors of the quick texts."""
    copy = Bundle(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    rows = data.load("quick")
    vectors = np.random.default_rng(8).standard_normal((len(rows), 16)).astype(np.float32)
    digest = hashlib.sha256(npy_bytes(vectors)).hexdigest()
    stored_reference.write(copy, Reference("quick", rows, (10,) * len(rows), 0, vectors, digest))
    return copy.path


class ExactEngines(Engines):
    """Gives each text of a bundle its reference vector; may fail at a plan."""

    def _vectors(self, bundle, variant, rows):
        known = stored_reference.read(bundle)
        by_id = {row.id: vector for row, vector in zip(known.rows, known.vectors, strict=True)}
        return np.stack([by_id[row.id] for row in rows])


def lowmem_report(bundle, monkeypatch, engines, *arguments):
    run_by(engines, monkeypatch)
    options = ("report", bundle, "--engine", "torch", "--compute", "fp32", *arguments)
    return CliRunner().invoke(app, [str(option) for option in options])


def test_reports_are_written_though_a_plan_fails(bundle, tmp_path, monkeypatch):
    files = tmp_path / "report.json", tmp_path / "report.html"
    arguments = ("--json", files[0], "--html", files[1])
    fails = {"int8": NO_ROOM, "bnb-nf4": NO_KERNEL}
    done = lowmem_report(bundle, monkeypatch, ExactEngines(fails=fails), *arguments)
    assert isinstance(done.exception, BackendError)
    value = json.loads(files[0].read_text())
    lost = {one["plan"]: one["reason"] for one in value["failed"]}
    assert lost == {
        "int8-torch-cpu-fp32": "int8 needs 9 GiB: close something",
        "bnb-nf4-torch-cpu-fp32": "no kernel for int4",
    }
    assert str(done.exception) == f"2 of 5 plans failed: {', '.join(lost)}"
    for plan, reason in lost.items():
        assert f"{plan} failed: {reason}\n" in done.stderr
    kept = {f"{name}-torch-cpu-fp32.json" for name in ("fp16", "int4", "bnb-int8")}
    assert {path.name for path in (bundle / "reports").glob("*.json")} == kept
    assert {f"{one['plan']}.json" for one in value["reports"]} == kept
    schema = schemas.load("report")
    assert value.keys() == schema["properties"].keys()
    assert list(Draft202012Validator(schema).iter_errors(value)) == []
    assert "int4-torch-cpu-fp32" in files[1].read_text()
    assert "int4-torch-cpu-fp32" in done.stdout


def test_the_same_report_again_runs_only_the_plans_that_failed(bundle, monkeypatch):
    lowmem_report(bundle, monkeypatch, ExactEngines(fails={"int8": NO_ROOM}))
    again = ExactEngines()
    done = lowmem_report(bundle, monkeypatch, again)
    assert (done.exit_code, again.ran) == (0, ["int8"])


def test_a_report_of_which_nothing_ran_is_one_error(bundle, monkeypatch):
    fails = dict.fromkeys(VARIANTS, NO_ROOM)
    done = lowmem_report(bundle, monkeypatch, ExactEngines(fails=fails))
    assert done.exception is NO_ROOM
    assert not (bundle / "reports").exists()


def test_what_overflows_in_a_collection_fails_no_plan_of_the_bundle(tiny_bundle, monkeypatch):
    (one, *_), _ = compare(tiny_bundle, monkeypatch, Engines(), Parts())
    floor = FLOORS["standard"]
    with_collection = {**one.report, "nonfinite": 1, "verdict": "fail", "retrieval": {}}
    own = of_texts_alone(replace(one, report=with_collection), floor).report
    assert (own["nonfinite"], own["verdict"], own["retrieval"]) == (0, "pass", None)
    broken = one.vectors.copy()
    broken[3, 2] = np.inf
    own = of_texts_alone(replace(one, report=with_collection, vectors=broken), floor).report
    assert (own["nonfinite"], own["verdict"]) == (1, "fail")
