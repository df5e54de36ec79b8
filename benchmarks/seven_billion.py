"""A 7B model on a CPU, inside its ceilings: ``python benchmarks/seven_billion.py [DIR]``.

Writes a random checkpoint of the true shape, exports and plans it, and embeds with the reference,
with every 8-bit and 4-bit plan and with a streamed one, each in a process of its own. What
DIR/measured.json already holds is not measured again, so that a run can be taken in parts; with
``--keep`` also where another commit has measured it, which the record says of each step. Once
nothing is missing, the record ``benchmarks/results/seven-billion.json`` is written. The exit status
is 1 if a ceiling is broken. DIR takes 45 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from memory import peak_of, read_bytes_of_children
from random_checkpoint import SHAPES, ensure_checkpoint
from record import RESULTS, ROOT, head, measure_missing, resume

from lowmem import data, hardware
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import VARIANTS
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.fidelity import reference
from lowmem.measure import measure
from lowmem.planner import memory
from lowmem.planner.candidates import Subject, Wishes, candidates, with_memory

NAME = "seven-billion"
MIB, GIB = 2**20, 2**30
EXPORT_BYTES, STREAMED_BYTES, RESIDENT_BYTES = int(2.5 * GIB), 3 * GIB, 2 * GIB
INT4_EXPORT_SECONDS = 600
INT8_EXPORT_TIMES_PLAIN = 2
PREDICTED_OVER, PREDICTED_UNDER = 0.15, 0.05
SHARDS = 3
# With the random checkpoint's tokenizer a byte is a token: one text fills a batch, as far as a
# ceiling is concerned, and all together keep two cores busy for some minutes at 7B.
LONGEST_TEXT, SHORT_TEXTS, SHORTEST, SHORT = 4000, 8, 20, 60
_PLAIN = """
import hashlib, os, sys
*sources, target, size = sys.argv[1:]
digest = hashlib.sha256()
for source in sources:
    with open(source, "rb", buffering=0) as file:
        while block := file.read(2**20):
            digest.update(block)
block, left = os.urandom(2**20), int(size)
with open(target, "wb", buffering=0) as file:
    while left:
        left -= file.write(block[:left])
    os.fsync(file.fileno())
"""

Measured = dict[str, Any]
"""Of a step: what was measured, and under ``ceiling_…`` and ``predicted_…`` what it must keep."""


@dataclass(frozen=True)
class Site:
    """Where everything is written, and for which shape."""

    directory: Path
    shape: str

    @property
    def source(self) -> Path:
        """The checkpoint."""
        return self.directory / "checkpoint"

    @property
    def bundle(self) -> Path:
        """The bundle with all variants."""
        return self.directory / "bundle"

    def shards(self) -> list[Path]:
        """The checkpoint's weights, in order."""
        return sorted(self.source.glob("*.safetensors"))

    def source_bytes(self) -> int:
        """What those take."""
        return sum(shard.stat().st_size for shard in self.shards())

    def vectors(self, step: str) -> Path:
        """What a step embedded."""
        return self.directory / f"{step}.npy"

    def steps(self) -> dict[str, Callable[[], Measured]]:
        """All steps by name, in order; the checkpoint must be there."""
        threads = hardware.probe().cpu_threads
        return {
            "checkpoint": self.checkpoint,
            "export": self.export,
            "export-int4": partial(self.export_alone, "int4"),
            "export-int8": self.export_int8,
            "plan": self.plan,
            "reference": partial(self.embed, "reference", reference.plan(threads)),
            **{plan.id: partial(self.embed, plan.id, plan) for plan in self.plans()},
        }

    def subject(self) -> Subject:
        """What is planned for; the bundle need not be there yet."""
        return Subject.of_checkpoint(self.source)

    def plans(self) -> list[Plan]:
        """The resident plans of 8 and 4 bits on this CPU, and the fastest of fp16, streamed.

        Left out is what takes hours and shows nothing new: 8-bit compute on torch without 8-bit
        instructions, which is float32 with rounded rows; float16 beside bfloat16, which is faster
        and holds as much; and fp16 in float32, which the reference is.
        """
        machine = hardware.probe()
        resident = candidates(self.subject(), machine, Wishes(device="cpu", schedule="resident"))
        plans = [
            plan
            for plan in resident
            if plan.variant in ("int8", "int4")
            and (machine.has_vnni or plan.engine != "torch" or plan.compute != "int8")
            and (plan.compute != "fp16" or not machine.has_native_bf16)
        ]
        if machine.has_native_bf16:
            wishes = Wishes("fp16", device="cpu", compute="bf16", schedule="streamed")
            plans += candidates(self.subject(), machine, wishes)
        return [plan for plan in plans if plan.dropped is None]

    def checkpoint(self) -> Measured:
        """The source, which is written unless it is there."""
        ensure_checkpoint(self.source, SHAPES[self.shape], SHARDS)
        return {"shards": len(self.shards()), "bytes": self.source_bytes()}

    def export(self) -> Measured:
        """All variants and graphs into the bundle, which must take no more disk than they do."""
        shutil.rmtree(self.bundle, ignore_errors=True)
        measured = self._export(self.bundle, *VARIANTS)
        variants = Bundle(self.bundle).manifest.variants.values()
        linked = self.source_bytes()  # by fp16
        outputs = sum(variant.stored_bytes for variant in variants) - linked
        measured |= {"disk_bytes": _own_bytes(self.bundle), "ceiling_disk_bytes": outputs + MIB}
        return measured | {"ceiling_peak_host_bytes": EXPORT_BYTES}

    def export_alone(self, variant: str) -> Measured:
        """One variant into a bundle of its own, which goes again."""
        bundle = self.directory / f"only-{variant}"
        shutil.rmtree(bundle, ignore_errors=True)
        measured = self._export(bundle, variant)
        measured["stored_bytes"] = Bundle(bundle).variant(variant).stored_bytes
        shutil.rmtree(bundle)
        measured["ceiling_peak_host_bytes"] = EXPORT_BYTES
        return measured | ({"ceiling_seconds": INT4_EXPORT_SECONDS} if variant == "int4" else {})

    def export_int8(self) -> Measured:
        """``int8``, against a plain script that reads, hashes, writes and syncs as many bytes."""
        measured = self.export_alone("int8")
        self._drop_page_cache()
        target = self.directory / "plain"
        command = [
            sys.executable,
            "-c",
            _PLAIN,
            *self.shards(),
            target,
            str(measured["stored_bytes"]),
        ]
        start = time.monotonic()
        subprocess.run(command, check=True)
        plain = time.monotonic() - start
        target.unlink()
        measured["plain_seconds"] = round(plain, 1)
        return measured | {"ceiling_seconds": round(INT8_EXPORT_TIMES_PLAIN * plain, 1)}

    def plan(self) -> Measured:
        """Every plan of ``int4`` on this CPU, timed; to time those of all variants takes hours."""
        output = self.directory / "plan.json"
        options = ("--variant", "int4", "--device", "cpu", "--json")
        measured = peak_of("plan", self.bundle, *options, output=output)
        found = json.loads(output.read_text())
        shown = ("id", "state", "reason", "predicted", "window_tokens", "tokens_per_second")
        plans = [{key: plan[key] for key in shown} for plan in found["plans"]]
        return measured | {"chosen": found["chosen"], "reason": found["reason"], "plans": plans}

    def embed(self, step: str, plan: Plan) -> Measured:
        """The texts through one plan, against what the planner predicts for it."""
        if plan.schedule == "streamed":
            self._drop_page_cache()
        subject = self.subject()
        ceiling = STREAMED_BYTES if plan.schedule == "streamed" else RESIDENT_BYTES
        if plan.engine == "onnxruntime":
            ceiling += memory.packed_bytes(plan, subject.config, subject.formats[plan.variant])
        before = read_bytes_of_children()
        vectors = self.vectors(step)
        record = measure(Bundle(self.bundle), plan, texts(), warm_up=False, vectors=vectors)
        # A window that the texts do not fill holds the batches that there are.
        batches = -(-record.tokens // plan.batch_tokens)
        window = min(plan.window_tokens, batches * plan.batch_tokens)
        predicted = with_memory(plan.with_(window_tokens=window), subject, hardware.probe())
        return {
            "plan": plan.id,
            "batch_tokens": plan.batch_tokens,
            "window_tokens": plan.window_tokens,
            "kept_layers": plan.kept_layers,
            "texts": record.texts,
            "tokens": record.tokens,
            "load_seconds": round(record.load_seconds, 1),
            "seconds": round(record.seconds[0], 1),
            "tokens_per_second": round(record.tokens_per_second, 2),
            "read_bytes": read_bytes_of_children() - before,
            "peak_host_bytes": record.peak_host_bytes,
            "predicted_peak_host_bytes": predicted.host_bytes,
            "ceiling_peak_host_bytes": ceiling,
        }

    def _export(self, bundle: Path, *variants: str) -> Measured:
        self._drop_page_cache()
        options = ("--variants", ",".join(variants), "--contract", self.source / "contract.json")
        data_free = ("--calibration", "none", "--reference-texts", "none")
        return peak_of("export", self.source, bundle, *options, *data_free)

    def _drop_page_cache(self) -> None:
        """Lets the weights of the source, which are those of ``fp16``, go from the page cache."""
        os.sync()
        for shard in self.shards():
            with shard.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def texts() -> list[Row]:
    """One text of nearly the length limit, and some short ones; of built-in rows in ASCII."""
    rows = [row for row in data.load("workloads") if row.text.isascii()]
    short = [row for row in rows if SHORTEST <= len(row.text) <= SHORT][:SHORT_TEXTS]
    long = " ".join(row.text for row in rows)[:LONGEST_TEXT]
    return [Row("long", long), *(Row(row.id, row.text) for row in short)]


def broken(steps: Mapping[str, Measured]) -> list[str]:
    """One line for every ceiling and every prediction that does not hold."""
    lines = []
    for name, step in steps.items():
        for key, ceiling in step.items():
            what = key.removeprefix("ceiling_")
            if what != key and step[what] > ceiling:
                lines.append(f"{name}: {what} must be at most {ceiling}, got {step[what]}")
        predicted, peak = step.get("predicted_peak_host_bytes"), step.get("peak_host_bytes")
        if predicted is None or peak is None:
            continue
        if not (1 - PREDICTED_UNDER) * peak <= predicted <= (1 + PREDICTED_OVER) * peak:
            share = predicted / peak - 1
            lines.append(f"{name}: predicted {predicted} bytes, got {peak} ({share:+.0%})")
    return lines


def _own_bytes(folder: Path) -> int:
    """What a folder's files take on the disk, but for those that have another name, too."""
    statuses = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(512 * status.st_blocks for status in statuses if status.st_nlink == 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is wanted and missing, and writes the record once nothing is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "build" / NAME)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b", help="others are trials")
    parser.add_argument("--only", default="", help="how the names of steps begin, with commas")
    parser.add_argument("--keep", action="store_true", help="what other commits have measured")
    wanted = parser.parse_args(arguments)
    is_trial = wanted.shape != "7b"
    about = {"commit": "none: a trial"} if is_trial else head(NAME, "make bench-7b")
    site = Site(wanted.directory.absolute(), wanted.shape)
    site.directory.mkdir(parents=True, exist_ok=True)
    os.environ["LOWMEM_CACHE"] = str(site.directory / "cache")
    kept = site.directory / "measured.json"
    measured = resume(kept, about, parser.error, of_any_commit=wanted.keep)

    site.checkpoint()
    steps, known = site.steps(), measured["steps"]
    begins = tuple(wanted.only.split(","))
    chosen = {name: step for name, step in steps.items() if name.startswith(begins)}
    measure_missing(chosen, measured, kept)
    problems = broken(known)
    print("\n".join(problems))
    missing = steps.keys() - known.keys()
    if missing:
        print(f"not measured yet: {', '.join(sorted(missing))}")
    else:
        path = site.directory / "record.json" if is_trial else RESULTS / f"{NAME}.json"
        path.write_text(json.dumps(record(site, measured), indent=1, sort_keys=True) + "\n")
    return int(bool(problems))


def record(site: Site, measured: Mapping[str, Any]) -> dict[str, Any]:
    """All that was measured, with what was embedded compared with the reference."""
    steps, reference_vectors = dict(measured["steps"]), np.load(site.vectors("reference"))
    for name, step in steps.items():
        if "plan" in step:
            products = np.load(site.vectors(name)).astype(np.float64) * reference_vectors
            cosines = products.sum(axis=1)
            steps[name] = step | {"cosine": {"mean": cosines.mean(), "min": cosines.min()}}
    bundle = Bundle(site.bundle)
    return {
        **measured,
        "shape": site.shape,
        "artifact_sha256": {
            name: bundle.artifact_sha256(name) for name in bundle.manifest.variants
        },
        "texts_sha256": data.sha256(texts()),
        "steps": steps,
        "broken": broken(steps),
    }


if __name__ == "__main__":
    raise SystemExit(main())
