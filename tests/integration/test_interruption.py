"""Exports that are interrupted, or killed by SIGKILL at random moments and then repeated."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.random_checkpoint import CONTRACT as RANDOM_CONTRACT
from benchmarks.random_checkpoint import SHAPES, write_checkpoint
from lowmem.artifact.contract import Contract
from lowmem.artifact.variants import VARIANTS
from tests.bundles import assert_nothing_in, write_bundle
from tests.models import CONTRACT, tiny_checkpoint

# A process that has imported everything and computed nothing forks for each export. Each fork says
# which step it begins, and is killed at a random moment in or behind one of them.
_KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
from export import pipeline
from export.sources import open_source
from lowmem.artifact.contract import parse_contract
from lowmem.artifact.manifest import MANIFEST, Bundle, file_sha256

job = json.load(sys.stdin)
moments = random.Random(job["seed"])
checkpoint, into, variants = Path(job["checkpoint"]), Path(job["into"]), job["variants"]
contract = parse_contract(job["contract"], "contract")

def start(bundle, seen):
    seen.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    import torch
    torch.set_num_threads(job["threads"])
    log = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    def progress(what, done, total):
        os.write(log, f"{what}\\t{done}\\n".encode())
    source, options = open_source(checkpoint), {"onnx": False, "copy": True, "progress": progress}
    pipeline.export(source, bundle, contract, variants=variants, **options)
    os._exit(0)

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def kill(pid, after, delay):
    ended = None
    while ended is None and len(steps(seen)) < after:
        time.sleep(0.001)
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)

def digests(bundle):
    return {
        file.relative_to(bundle).as_posix(): file_sha256(file)
        for file in bundle.rglob("*")
        if file.is_file()
    }

def steps(seen):
    return [line.split("\\t") for line in seen.read_text().splitlines()] if seen.exists() else []

def quantized(seen):
    return [int(done) for what, done in steps(seen) if what == "quantizing"]

def check(bundle):
    if (bundle / MANIFEST).exists():
        assert Bundle(bundle).verify()[0] == []
        return "published"
    for variant in variants:  # moved into place whole, or not at all
        files = digests(bundle / variant)
        assert files in ({}, below(expected, variant)), (variant, files)
    return "no bundle"

def below(files, directory):
    prefix = directory + "/"
    return {name[len(prefix):]: sha for name, sha in files.items() if name.startswith(prefix)}

whole, seen = into / "whole", into / "seen"
durations = []
for _ in range(job["rehearsals"]):
    shutil.rmtree(whole, ignore_errors=True)
    began = time.monotonic()
    assert end(start(whole, seen)) == 0
    durations.append(time.monotonic() - began)
expected, groups, all_steps = digests(whole), quantized(seen), len(steps(seen))

runs = []
for number in range(job["kills"]):
    bundle = into / f"killed-{number}"
    pid = start(bundle, seen)
    first, last = job["window"]
    part = (number + moments.random()) / job["kills"]
    after = int((first + part * (last - first)) * (all_steps + 2))
    kill(pid, after, moments.random() * min(durations) / all_steps)
    status = end(pid)
    last = steps(seen)[-1][0] if steps(seen) else "starting"
    state = check(bundle)
    assert end(start(bundle, seen)) == 0
    assert digests(bundle) == expected, number
    kept = len(groups) - len(quantized(seen))
    runs.append({"was_killed": status == -9, "last": last, "state": state, "kept": kept})
    shutil.rmtree(bundle)
json.dump({"groups": len(groups), "runs": runs}, sys.stdout)
"""


@dataclass(frozen=True)
class Run:
    """A killed export, and the one after it.

    Attributes:
        was_killed: Whether it had not ended before.
        last: What it was at.
        state: ``published`` or ``no bundle``.
        kept: How many groups the next export did not write again.
    """

    was_killed: bool
    last: str
    state: str
    kept: int


def kill_at_random(
    checkpoint: Path,
    contract: Contract,
    into: Path,
    *,
    variants: Sequence[str],
    kills: int,
    window: tuple[float, float],
    rehearsals: int = 2,
    threads: int = 1,
    seconds: float = 300,
) -> tuple[int, list[Run]]:
    """Kills exports at random moments, spread over a part of their steps, and repeats each.

    Returns:
        How many groups an export has, and the runs; every repeated bundle was the same as one that
        was never interrupted, and none loaded as half in between.
    """
    job = {
        "seed": 0,
        "checkpoint": str(checkpoint),
        "contract": contract.to_json(),
        "into": str(into),
        "variants": variants,
        "kills": kills,
        "window": window,
        "rehearsals": rehearsals,
        "threads": threads,
    }
    into.mkdir()
    shown = subprocess.run(
        [sys.executable, "-c", _KILLER],
        input=json.dumps(job),
        text=True,
        stdout=subprocess.PIPE,
        check=True,
        timeout=seconds,
    )
    result = json.loads(shown.stdout)
    return result["groups"], [Run(**run) for run in result["runs"]]


def test_an_interrupted_export_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "quantizing" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(checkpoint, tmp_path / "bundle", VARIANTS, progress=interrupt)
    assert_nothing_in(tmp_path / "bundle")


def test_fifty_exports_killed_at_random_moments_all_end_in_the_same_bundle(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", shards=2, layers=4).path
    before = {path.name for path in tmp_path.iterdir()}
    groups, runs = kill_at_random(
        checkpoint,
        CONTRACT,
        tmp_path / "runs",
        variants=("fp16", "int8", "int4"),
        kills=50,
        window=(0.0, 1.0),
    )
    assert groups == 6
    killed = [run for run in runs if run.was_killed]
    assert len(killed) >= 20
    assert {"quantizing", "graphs, checks and hashes"} <= {run.last for run in killed}
    assert {run.state for run in runs} == {"no bundle", "published"}
    # Some began anew, some went on in the middle, some had only to be published.
    kept = {run.kept for run in killed if run.state == "no bundle"}
    assert 0 in kept
    assert groups in kept
    assert kept - {0, groups}
    assert {path.name for path in tmp_path.iterdir()} == before | {"runs"}


@pytest.mark.slow
def test_three_exports_of_two_billion_parameters_go_on_where_they_were_killed(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path / "source", SHAPES["2b"])
    groups, runs = kill_at_random(
        tmp_path / "source",
        RANDOM_CONTRACT,
        tmp_path / "runs",
        variants=("fp16", "int8", "int4"),
        kills=3,
        window=(0.4, 0.8),
        rehearsals=1,
        threads=2,
        seconds=7200,
    )
    assert groups == 38
    assert [run.was_killed for run in runs] == [True] * 3
    assert min(run.kept for run in runs) > 0
