"""Streaming from disk against holding the weights: ``python benchmarks/streaming.py DIR``.

At two billion parameters, on a CPU. DIR is that of ``memory.py``, or becomes it. The streamed plan
keeps no layer and finds none in the page cache: it drops each behind itself, and what the process
read from disks is in the record ``benchmarks/results/streaming-2b.json``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memory import export_peak, read_bytes_of_children
from record import head, write
from seven_billion import texts

from lowmem import hardware
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.plan import Plan
from lowmem.measure import measure
from lowmem.planner.memory import stored_bytes

BATCH_TOKENS = 4096
ROUNDS = 2


def compare(bundle: Path) -> dict[str, Any]:
    """Both schedules of ``fp16`` in the fastest arithmetic that is native here.

    They take turns, so that a slower moment of the machine meets both.
    """
    machine = hardware.probe()
    compute = "bf16" if machine.has_native_bf16 else "fp32"
    plan = Plan(
        "fp16",
        "torch",
        "cpu",
        compute,
        "resident",
        threads=machine.cpu_threads,
        batch_tokens=BATCH_TOKENS,
        window_tokens=2 * BATCH_TOKENS,  # the texts make a full batch and a small one
    )
    other = plan.with_(schedule="streamed", drops_cache=True)
    passes = [(_speed(bundle, plan), _speed(bundle, other)) for _ in range(ROUNDS)]
    resident, streamed = (_together(one) for one in zip(*passes, strict=True))
    checkpoint = Checkpoint(Bundle(bundle).directory("fp16"))
    return {
        "resident": resident,
        "streamed": streamed,
        "streamed_bytes": stored_bytes(checkpoint.config, checkpoint.formats),
        "ratio": min(resident["seconds"]) / min(streamed["seconds"]),
    }


def _speed(bundle: Path, plan: Plan) -> dict[str, Any]:
    os.sync()
    for stored in Checkpoint(Bundle(bundle).directory(plan.variant)).tensors.values():
        if plan.schedule == "streamed":
            stored.drop_cached()
        else:
            stored.read()  # held in the page cache, as by a process that goes on
    before = read_bytes_of_children()
    record = measure(Bundle(bundle), plan, texts(), warm_up=False)
    return {
        "plan": plan.id,
        "window_tokens": plan.window_tokens,
        "tokens": record.tokens,
        "seconds": record.seconds,
        "waited_seconds": record.waited_seconds,
        "read_bytes": read_bytes_of_children() - before,
        "peak_host_bytes": record.peak_host_bytes,
    }


def _together(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One plan's passes in one: their seconds in a row, sums, and the larger peak."""
    return {
        **rounds[0],
        "seconds": [second for one in rounds for second in one["seconds"]],
        "waited_seconds": sum(one["waited_seconds"] for one in rounds),
        "read_bytes": sum(one["read_bytes"] for one in rounds),
        "peak_host_bytes": max(one["peak_host_bytes"] for one in rounds),
    }


def main() -> None:
    """Measures, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    about = head("streaming-2b", "python benchmarks/streaming.py DIR")
    if not (directory / "bundle").exists():
        directory.mkdir(parents=True, exist_ok=True)
        export_peak(directory)
    print(write({**about, **compare(directory / "bundle")}).read_text())


if __name__ == "__main__":
    main()
