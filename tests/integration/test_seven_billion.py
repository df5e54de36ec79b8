"""The 7B run's logic, at a tiny shape."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lowmem.artifact.tensors import read_directory

ROOT = Path(__file__).parents[2]
MEASURED = {
    "peak_host_bytes": 100,
    "ceiling_peak_host_bytes": 100,
    "seconds": 9.5,
    "ceiling_seconds": 10,
    "predicted_peak_host_bytes": 100,
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("seven_billion")


@pytest.fixture
def three_steps(script, monkeypatch):
    """Only the steps that a tiny run needs for a record."""
    every = script.Site.steps

    def some(site):
        return {name: every(site)[name] for name in ("checkpoint", "export", "reference")}

    monkeypatch.setattr(script.Site, "steps", some)


def test_a_run_in_two_parts_ends_with_the_record(script, three_steps, tmp_path, capsys):
    arguments = [str(tmp_path), "--shape", "tiny"]
    assert script.main([*arguments, "--only", "checkpoint,export"]) == 0
    assert "not measured yet: reference\n" in capsys.readouterr().out
    exported = json.loads((tmp_path / "measured.json").read_text())["steps"]["export"]
    assert 50 * 2**20 < exported["peak_host_bytes"] < exported["ceiling_peak_host_bytes"]
    slack = exported["ceiling_disk_bytes"] - exported["disk_bytes"]
    assert 0 < slack < 2**20, "linked weights are no outputs"

    script.main(arguments)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["steps"]["export"] == exported
    assert record["steps"]["checkpoint"]["shards"] == 3
    reference = record["steps"]["reference"]
    assert reference["plan"] == "fp16-torch-cpu-fp32-streamed"
    assert reference["tokens"] > 4000
    assert reference["cosine"]["min"] == pytest.approx(1, abs=1e-6)
    assert set(record["artifact_sha256"]) == {"fp16", "int8", "int4", "bnb-int8", "bnb-nf4"}


def test_measurements_of_another_commit_are_refused(script, tmp_path, capsys):
    kept = tmp_path / "measured.json"
    kept.write_text('{"commit": "0123", "steps": {}}')
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), "--shape", "tiny"])
    assert f"{kept} is of commit 0123: remove it to measure anew" in capsys.readouterr().err


def test_steps_of_another_commit_that_are_kept_name_it(script, tmp_path):
    kept = tmp_path / "measured.json"
    old = {"export": {"seconds": 1}, "plan": {"seconds": 2, "commit": "4567"}}
    kept.write_text(json.dumps({"commit": "0123", "steps": old}))
    measured = script.resume(kept, {"commit": "89ab"}, pytest.fail, of_any_commit=True)
    assert measured["commit"] == "89ab"
    assert measured["steps"] == {"export": {"seconds": 1, "commit": "0123"}, "plan": old["plan"]}


@pytest.mark.parametrize("features", [("avx2",), ("avx2", "avx512_vnni", "avx512_bf16")], ids=str)
def test_the_plans_are_those_whose_memory_differs(script, tmp_path, monkeypatch, features):
    machine = replace(script.hardware.probe(), cpu_features=features)
    monkeypatch.setattr(script.hardware, "probe", lambda: machine)
    site = script.Site(tmp_path, "tiny")
    site.checkpoint()
    plans = {plan.report_id: plan for plan in site.plans()}
    assert {plan.device for plan in plans.values()} == {"cpu"}
    streamed = {name for name, plan in plans.items() if plan.schedule == "streamed"}
    assert streamed == ({"fp16-torch-cpu-bf16"} if machine.has_native_bf16 else set())
    resident = plans.keys() - streamed
    assert {name.split("-")[0] for name in resident} == {"int8", "int4"}
    assert "int8-onnxruntime-cpu-int8" in resident
    assert ("int8-torch-cpu-int8" in resident) == machine.has_vnni


def test_what_keeps_its_ceilings_and_predictions_is_not_broken(script):
    assert script.broken({"one": MEASURED, "two": {"seconds": 1e9}}) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"ceiling_peak_host_bytes": 99}, "peak_host_bytes must be at most 99, got 100"),
        ({"seconds": 10.5}, "seconds must be at most 10, got 10.5"),
        ({"predicted_peak_host_bytes": 94}, "predicted 94 bytes, got 100 (-6%)"),
        ({"predicted_peak_host_bytes": 116}, "predicted 116 bytes, got 100 (+16%)"),
    ],
    ids=lambda value: str(value),
)
def test_a_broken_ceiling_or_prediction_is_named_with_its_step(script, changes, line):
    steps = {"good": MEASURED, "bad": MEASURED | changes}
    assert script.broken(steps) == [f"bad: {line}"]


def test_random_weights_have_the_spread_of_trained_ones_and_outlier_channels(script, tmp_path):
    site = script.Site(tmp_path, "tiny")
    site.checkpoint()
    name = "layers.1.mlp.up_proj.weight"
    weight = read_directory(site.source)[name].read().float32()
    channels = np.sqrt(np.square(weight).mean(axis=0) * weight.shape[1])
    usual = np.sort(channels)[:-8]
    assert usual.mean() == pytest.approx(1, abs=0.05)
    assert (channels > 6).sum() in range(6, 9)  # the same channel may be drawn twice
