"""Every bar for a CUDA card, in one command: ``python benchmarks/gpu.py DIRECTORY``.

Writes random variants of the true 7B shape into DIRECTORY (25 GB), runs each plan and the peer in a
process of its own, and writes ``gpu-speed.json``, ``gpu-streaming.json`` and ``gpu-memory.json``
into ``benchmarks/results``. Needs torch, Triton and transformers, and nothing from a network. With
``--device cpu --shape tiny`` it shows in seconds that its parts fit, and nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import SHAPES
from random_variants import FORMATS, write_variants

from lowmem import hardware
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.weights import module_shapes
from lowmem.compute.plan import COMPUTES_OF_DEVICE, Plan
from lowmem.planner import memory

ROOT = Path(__file__).parent.parent
GIB = 2**30
PACKAGES = ("torch", "triton", "transformers", "numpy")
PLANS = {  # name to (variant, compute); the first is what the others are compared with
    "bf16": ("fp16", "bf16"),
    "int8": ("int8", "int8"),
    "int4": ("int4", "bf16"),
    "fp8": ("fp16", "fp8"),
    "fp16-acc16": ("fp16", "fp16-acc16"),
}
CEILINGS = {"streamed": ("fp16", "streamed", 3.5), "int4": ("int4", "resident", 6.0)}


class Bench:
    """Runs jobs for one shape on one device, and keeps what they said."""

    def __init__(self, directory: Path, device: str, shape: str) -> None:
        """Takes where the variants lie, ``cuda`` or ``cpu``, and ``7b`` or ``tiny``."""
        self.directory = directory
        self.device = device
        self.config: ModelConfig = SHAPES[shape]
        self.is_tiny = shape == "tiny"
        self.machine = hardware.probe()
        random = np.random.default_rng(0)
        count = 8 if self.is_tiny else 128
        self.uniform = [64 if self.is_tiny else 512] * count
        mixed = np.exp(random.normal(5.3, 0.9, 2 * count)).clip(8, 128 if self.is_tiny else 4096)
        self.mixed = [int(length) for length in mixed]
        self.repeats = 1 if self.is_tiny else 3

    def plan(self, variant: str, compute: str, schedule: str, **changes: Any) -> Plan:
        """A plan with the memory that the planner predicts for it."""
        if compute not in COMPUTES_OF_DEVICE[self.device]:
            compute = "fp32"
        plan = Plan(variant, "torch", self.device, compute, schedule, self.machine.cpu_threads)
        plan = plan.with_(**changes)
        formats = dict.fromkeys(module_shapes(self.config), FORMATS[variant])
        host, device = memory.predict(plan, self.config, formats, self.machine)
        return plan.with_(host_bytes=host, device_bytes=device)

    def engine(
        self,
        plan: Plan,
        workloads: dict[str, list[int]],
        *,
        vectors: Path | None = None,
        ceiling_bytes: int = 0,
        repeats: int | None = None,
    ) -> dict[str, Any]:
        """Runs a plan; what it said, with the plan's prediction beside it."""
        job = {
            "kind": "engine",
            "directory": str(self.directory / plan.variant),
            "plan": asdict(plan),
            "workloads": workloads,
            "repeats": repeats or self.repeats,
            "ceiling_bytes": ceiling_bytes if self.device == "cuda" else 0,
            "vectors": vectors and {"path": str(vectors), "lengths": self.uniform[:8]},
        }
        result = self.run(plan.id, job)
        return {"plan": plan.to_json(), **result}

    def run(self, name: str, job: dict[str, Any]) -> dict[str, Any]:
        """Runs a job in a child; one that fails is a result with its error."""
        gpus = hardware.probe().gpus
        job |= {"device": self.device, "free_bytes": gpus[0].free_bytes if gpus else 0}
        start = time.monotonic()
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(json.dumps(job))
            file.flush()
            command = [sys.executable, str(ROOT / "benchmarks" / "gpu_job.py"), file.name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        seconds = time.monotonic() - start
        print(f"{name}: {seconds:.0f} s, status {done.returncode}", file=sys.stderr)
        if done.returncode:
            return {"error": f"status {done.returncode}", "workloads": {}}
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return said


def speed(result: dict[str, Any], workload: str) -> float | None:
    """Tokens per second of the median pass, or None where the job failed."""
    timed = result["workloads"].get(workload)
    return timed and timed["tokens"] / float(np.median(timed["seconds"]))


def ratio(left: float | None, right: float | None) -> float | None:
    """left / right where both were measured."""
    return left / right if left and right else None


def bar(value: float | None, at_least: float) -> dict[str, Any]:
    """A figure, what is asked of it, and whether it holds."""
    return {"value": value, "at_least": at_least, "holds": value is not None and value >= at_least}


def measure_speed(bench: Bench) -> dict[str, Any]:
    """Products, plans and the peer on texts of one length and of mixed lengths."""
    size, products = (128, 2) if bench.is_tiny else (8192, 10)
    job = {"kind": "peak", "size": size, "products": products, "repeats": bench.repeats}
    peak = bench.run("matrix product", job)["operations_per_second"]
    workloads = {"uniform": bench.uniform, "mixed": bench.mixed}
    plans, cosines = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "fp32.npy"
        bench.engine(bench.plan("fp16", "fp32", "resident"), {}, vectors=exact)
        for name, (variant, compute) in PLANS.items():
            file = Path(folder) / f"{name}.npy"
            plan = bench.plan(variant, compute, "resident", batch_tokens=8192, window_tokens=65536)
            plans[name] = bench.engine(plan, workloads, vectors=file)
            if file.exists() and exact.exists():
                cosines[name] = cosine(np.load(file), np.load(exact))
    job = {"kind": "peer", "directory": str(bench.directory / "fp16"), "workloads": workloads}
    peer = bench.run("transformers", job | {"batch_size": 16, "repeats": bench.repeats})
    own = speed(plans["bf16"], "uniform")
    per_token = 2 * bench.config.linear_weights
    per_token += 2 * bench.config.num_hidden_layers * bench.config.query_size * bench.uniform[0]
    bars = {
        "bf16, share of the product's peak": bar(ratio(own and own * per_token, peak), 0.65),
        "bf16, times transformers on mixed lengths": bar(
            ratio(speed(plans["bf16"], "mixed"), speed(peer, "mixed")), 1.4
        ),
        "int8, times bf16": bar(ratio(speed(plans["int8"], "uniform"), own), 1.5),
        "int4 at 8192 tokens a pass, times bf16": bar(
            ratio(speed(plans["int4"], "uniform"), own), 0.93
        ),
    }
    figures = {name: speed(result, "uniform") for name, result in plans.items()}
    return {
        "bars": bars,
        "peak_operations_per_second": peak,
        "tokens_per_second": figures,
        "cosine_to_fp32_of_the_16_bit_weights": cosines,
        "plans": plans,
        "peer": peer,
        "workloads": workloads,
    }


def measure_streaming(bench: Bench) -> dict[str, Any]:
    """The same weights from host memory, against resident, with windows of growing size."""
    batch = 4096
    resident = bench.engine(
        bench.plan("fp16", "bf16", "resident", batch_tokens=batch, window_tokens=65536),
        {"uniform": 2 * bench.uniform},
    )
    ratios, runs = {}, {}
    for window in (4 * batch, 16 * batch, 32 * batch):
        plan = bench.plan("fp16", "bf16", "streamed", batch_tokens=batch, window_tokens=window)
        # A pass reads the weights up to eight times: one is timed.
        runs[window] = bench.engine(plan, {"uniform": 2 * bench.uniform}, repeats=1)
        ratios[window] = ratio(speed(runs[window], "uniform"), speed(resident, "uniform"))
    best = max((one for one in ratios.values() if one is not None), default=None)
    return {
        "bars": {"streamed, times resident": bar(best, 0.9)},
        "by_window_tokens": ratios,
        "resident": resident,
        "streamed": runs,
    }


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Ceilings under an imposed limit at texts of 4096 tokens, and predicted beside measured."""
    longest = [128 if bench.is_tiny else 4096] * 4
    runs, bars = {}, {}
    for name, (variant, schedule, ceiling) in CEILINGS.items():
        window = 4 * 4096 if schedule == "streamed" else 4096
        plan = bench.plan(variant, "bf16", schedule, batch_tokens=4096, window_tokens=window)
        limit = int(ceiling * GIB)
        runs[name] = bench.engine(plan, {"longest": longest}, ceiling_bytes=limit)
        measured = runs[name].get("device_bytes")
        bars[f"{name}, GiB under its ceiling"] = bar(
            None if measured is None else ceiling - measured / GIB, 0.0
        )
        near = ratio(measured, plan.device_bytes)
        bars[f"{name}, nearness of the prediction"] = bar(near and 1 - abs(1 - near), 0.9)
    return {"bars": bars, "runs": runs}


def cosine(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Of vectors of the same texts."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    each = (left * right).sum(1) / lengths
    return {"mean": float(each.mean()), "min": float(each.min())}


def versions() -> dict[str, str]:
    """Of what took part."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """What was checked out, or ``unknown`` in a copy without its history."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Measures, and writes the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    start = time.monotonic()
    bench = Bench(arguments.directory, arguments.device, arguments.shape)
    write_variants(arguments.directory, bench.config)
    print(f"variants: {time.monotonic() - start:.0f} s", file=sys.stderr)
    parts = {"speed": measure_speed, "streaming": measure_streaming, "memory": measure_memory}
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        record = {
            "name": f"gpu-{name}",
            "command": f"python benchmarks/gpu.py DIR --shape {arguments.shape}",
            "commit": commit(),
            "machine": {
                "cpu_name": bench.machine.cpu_name,
                "cpu_threads": bench.machine.cpu_threads,
                "gpus": [gpu.to_json() for gpu in bench.machine.gpus],
            },
            "versions": versions(),
            **part(bench),
        }
        path = arguments.results / f"gpu-{name}.json"
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        for what, found in record["bars"].items():
            print(f"{what}: {found['value']} (at least {found['at_least']})")
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
