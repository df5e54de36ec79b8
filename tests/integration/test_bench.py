"""``lowmem bench`` on a tiny bundle."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from lowmem import schemas
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import FLOORS
from lowmem.cli import app, bench
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.errors import BackendError, CapacityError, InputError
from lowmem.hardware import Hardware
from lowmem.measure import Record
from lowmem.planner.candidates import Subject
from tests.shapes import SEVEN_B

MACHINE = Hardware("AMD EPYC 9R14", 8, (), 16 * 2**30, 12 * 2**30)


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=True)


def test_it_prints_a_table_and_writes_a_record_by_its_schema(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    done = run(
        tiny_bundle, "--engine", "torch", "--compute", "int8", "--variant", "int8", "--json", file
    )
    assert done.exit_code == 0, done.output
    record = json.loads(file.read_text())
    jsonschema.validate(record, schemas.load("bench"))
    assert record["failed"] == []
    (plan,) = record["plans"]
    assert plan["id"] == "int8-torch-cpu-int8-resident"
    assert len(plan["seconds"]) == 3
    assert plan["measured"]["host_bytes"] > 20 * 2**20
    assert plan["id"] in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert set(record["ceilings"]) == {"cpu-int8"}


def test_a_plan_that_fails_is_named_with_its_reason(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object, **options: object) -> Record:
        raise BackendError("the device is on fire")

    monkeypatch.setattr(bench, "measure", failing)
    monkeypatch.setattr(bench, "measure_ceiling", lambda *arguments: 1e9)
    done = run(tiny_bundle, "--variant", "fp16", "--engine", "torch", "--compute", "fp32")
    assert "fp16-torch-cpu-fp32-resident failed: the device is on fire" in done.stdout
    assert str(done.exception) == "1 of 1 plans failed, as the table says"


def test_a_record_that_cannot_be_written_is_refused_before_anything_runs(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    done = run(tiny_bundle, "--json", tmp_path / "missing" / "bench.json")
    assert isinstance(done.exception, InputError)
    assert "cannot be written: its directory does not exist" in str(done.exception)


def test_a_machine_that_runs_nothing_is_a_capacity_error(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(MACHINE, host_free_bytes=1)
    monkeypatch.setattr("lowmem.hardware.probe", lambda: tiny)
    done = run(tiny_bundle, "--variant", "fp16", "--engine", "torch", "--compute", "fp32")
    assert isinstance(done.exception, CapacityError)
    message = str(done.exception)
    assert "no plan can run on this machine: fp16-torch-cpu-fp32-resident: needs" in message


def test_the_table_is_80_columns_wide_with_the_longest_names_and_figures() -> None:
    plan = Plan(
        "bnb-int8",
        "torch",
        "cuda",
        "int8",
        "resident",
        host_bytes=14 * 2**30,
        device_bytes=14 * 2**30,
    )
    record = Record(1000, 400_000, 1.0, [4.0, 2.0, 3.0], peak_device_bytes=14 * 2**30)
    report = {"cosine": {"mean": 0.99912}}
    measured = [
        bench.Measured(plan, record, 0.87, report),
        bench.Measured(plan.with_(device="cpu"), record, 0.5, None),
    ]
    lines = bench.table(MACHINE, {"cuda-int8": 1.2e15}, measured, []).splitlines()
    assert max(map(len, lines)) <= 80
    assert "133333  333.33 0.87     14.0G   14.0G 0.9991" in lines[-2]
    assert lines[-1].endswith(" -")


def test_a_card_gets_all_texts_and_a_cpu_as_many_as_it_takes_seconds(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def measured(path: Path, plan: Plan, rows: list[Row], repeats: int) -> Record:
        given[plan.device] = rows
        raise BackendError("enough")

    monkeypatch.setattr(bench, "measure", measured)
    bundle = Bundle(tiny_bundle)
    subject = replace(Subject.of_bundle(bundle), config=SEVEN_B)
    plans = [Plan("fp16", "torch", device, "fp32", "resident") for device in ("cpu", "cuda")]
    _, failed = bench._measure(bundle, subject, plans, {}, FLOORS["standard"])
    assert [plan.dropped for plan in failed] == ["enough", "enough"]
    assert len(given["cuda"]) > 5 * len(given["cpu"])
    assert given["cuda"][: len(given["cpu"])] == given["cpu"]
