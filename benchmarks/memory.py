"""Peak memory of export and embed at two billion parameters: ``python benchmarks/memory.py DIR``.

Writes a random checkpoint and a bundle into DIR (about 15 GB), and the record
``benchmarks/results/memory-2b.json``. Peak is the most RssAnon + RssShmem of the process tree.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from random_checkpoint import SHAPES, ensure_checkpoint
from record import head, write

from lowmem import hardware
from lowmem.artifact.manifest import Bundle
from lowmem.hardware.peak import MemoryPeak
from lowmem.planner.candidates import Subject, Wishes, candidates

TEXTS = ["The reef lies off the coast.", "Yeast ferments sugar. " * 170] * 4


def peak_of(*arguments: object, output: Path = Path(os.devnull)) -> dict[str, float | int]:
    """Runs ``lowmem`` and returns its seconds, peak bytes, and bytes read from disks.

    Args:
        arguments: The command line.
        output: Where its standard output goes.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    command = [sys.executable, "-m", "lowmem", *map(str, arguments)]
    start, read_before = time.monotonic(), read_bytes_of_children()
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file)
    with MemoryPeak(process.pid) as peak:
        status = process.wait()
    if status:
        raise subprocess.CalledProcessError(status, command)
    return {
        "seconds": round(time.monotonic() - start, 1),
        "peak_host_bytes": peak.bytes,
        "read_bytes": read_bytes_of_children() - read_before,
    }


def read_bytes_of_children() -> int:
    """Bytes that all children that have ended, and theirs, have read from disks."""
    return 512 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock


def export_peak(directory: Path) -> dict[str, float | int]:
    """Writes the checkpoint, and exports all variants, graphs and the reference, data-free."""
    source, bundle = directory / "checkpoint", directory / "bundle"
    ensure_checkpoint(source, SHAPES["2b"])
    shutil.rmtree(bundle, ignore_errors=True)
    contract = ("--contract", source / "contract.json", "--reference-texts", "quick")
    return peak_of("export", source, bundle, *contract, "--calibration", "none")


def embed_peaks(bundle: Path, folder: Path, **wishes: str) -> dict[str, dict[str, float | int]]:
    """Predicted and measured peak of ``lowmem embed`` with each plan that matches."""
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    found = candidates(Subject.of_bundle(Bundle(bundle)), hardware.probe(), Wishes(**wishes))
    peaks = {}
    for plan in found:
        if plan.dropped is None:
            names = ("variant", "engine", "device", "compute", "schedule")
            options = [word for name in names for word in (f"--{name}", getattr(plan, name))]
            measured = peak_of("embed", bundle, texts, folder / "vectors.npy", *options)
            peaks[plan.id] = {**measured, "predicted_host_bytes": plan.host_bytes}
    return peaks


def main() -> None:
    """Measures, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        **head("memory-2b", "python benchmarks/memory.py DIR"),
        "export": export_peak(directory),
        "embed": embed_peaks(directory / "bundle", directory, variant="int4", device="cpu"),
    }
    sys.stdout.write(write(record).read_text())


if __name__ == "__main__":
    main()
