"""The benchmark for CUDA cards, as far as a CPU can show that its parts fit."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lowmem.artifact.weights import Checkpoint

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def scripts(script_named: Callable[[str], ModuleType]) -> ModuleType:
    return script_named("gpu")


def test_the_variants_are_whole_checkpoints(scripts: ModuleType, tmp_path: Path) -> None:
    config = scripts.SHAPES["tiny"]
    scripts.write_variants(tmp_path, config)
    weights = {name: Checkpoint(tmp_path / name) for name in scripts.FORMATS}
    for name, checkpoint in weights.items():
        assert checkpoint.config == config
        assert set(checkpoint.formats.values()) == {scripts.FORMATS[name]}
    exact, coarse = (
        next(weights[name].layers()).linears["mlp.up_proj"] for name in ("fp16", "int4")
    )
    left, right = (one.format.dequantize(one.tensors) for one in (exact, coarse))
    assert np.corrcoef(left.ravel(), right.ravel())[0, 1] > 0.97


def test_an_engine_job_times_every_workload(
    scripts: ModuleType,
    script_named: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = scripts.Bench(tmp_path, "cpu", "tiny")
    scripts.write_variants(tmp_path, bench.config)
    jobs = script_named("gpu_job")
    monkeypatch.setattr(bench, "run", lambda name, job: jobs.run_engine({**job, "free_bytes": 0}))
    plan = bench.plan("int8", "int8", "streamed", batch_tokens=70, window_tokens=140)
    file = tmp_path / "vectors.npy"
    result = bench.engine(plan, {"mixed": bench.mixed}, vectors=file)
    assert result["plan"]["id"] == "int8-torch-cpu-int8-streamed"
    assert scripts.speed(result, "mixed") > 0
    assert np.isfinite(np.load(file)).all()
    assert result["query_seconds"]


def test_a_figure_that_is_missing_does_not_hold_a_bar(scripts: ModuleType) -> None:
    assert scripts.speed({"error": "status 1", "workloads": {}}, "mixed") is None
    assert scripts.ratio(None, 2.0) is None
    assert scripts.bar(None, 0.0)["holds"] is False
    assert scripts.bar(1.5, 1.5)["holds"] is True
    assert scripts.bar(1.4, 1.5)["holds"] is False


@pytest.mark.slow
def test_one_command_writes_all_records(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "gpu.py", tmp_path / "variants", "--device", "cpu"]
    options = ["--shape", "tiny", "--results", tmp_path / "results"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    for name in ("speed", "streaming", "memory"):
        record = json.loads((tmp_path / "results" / f"gpu-{name}.json").read_text())
        assert record["name"] == f"gpu-{name}"
        runs = [*record.get("plans", {}).values(), *record.get("runs", {}).values()]
        assert not [run for run in runs if "error" in run]
    assert record["bars"]
