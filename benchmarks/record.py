"""Turns a demo's report into a record: ``python benchmarks/record.py build/demo demo``.

A record says what was run, where and on which commit; it is committed as it is and never edited.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lowmem import hardware
from lowmem.artifact.manifest import Bundle
from lowmem.measure import package_versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO_COMMIT = "commit.txt"
"""Where a demo says what it was made of, in its directory; empty for no commit."""
MACHINE_KEYS = ("cpu_name", "cpu_threads", "cpu_features", "gpus")


def commit() -> str | None:
    """The commit that is checked out; None where files differ from it, or there is no git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        return None if git("status", "--porcelain") else git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None


def head(name: str, command: str) -> dict[str, Any]:
    """What every record begins with.

    Raises:
        SystemExit: Not everything is committed.
    """
    found = commit()
    if found is None:
        raise SystemExit("a record names a commit: commit or remove your changes first")
    machine = hardware.probe().to_json()
    return {
        "name": name,
        "command": command,
        "commit": found,
        "machine": {key: machine[key] for key in MACHINE_KEYS},
        "versions": package_versions(),
    }


def resume(
    kept: Path,
    about: dict[str, Any],
    refuse: Callable[[str], NoReturn],
    *,
    of_any_commit: bool = False,
) -> dict[str, Any]:
    """What an earlier part of a run has measured, or the start of one: ``about`` and ``steps``.

    Args:
        kept: Where it lies.
        about: What the record begins with.
        refuse: Told, and does not return, where another commit has measured it.
        of_any_commit: Whether that is taken all the same: each such step then names its commit.
    """
    measured: dict[str, Any] = (
        json.loads(kept.read_text()) if kept.exists() else {**about, "steps": {}}
    )
    if measured["commit"] == about["commit"]:
        return measured
    if not of_any_commit:
        refuse(f"{kept} is of commit {measured['commit']}: remove it to measure anew")
    steps = {
        name: {"commit": measured["commit"], **step} for name, step in measured["steps"].items()
    }
    return {**about, "steps": steps}


def measure_missing(
    steps: Mapping[str, Callable[[], dict[str, Any]]], measured: dict[str, Any], kept: Path
) -> None:
    """Takes the steps that are not measured yet, in order, and keeps each as soon as it is there.

    Args:
        steps: Name to what measures it.
        measured: What ``resume`` gave; it is filled in.
        kept: Where it is kept.
    """
    for name, step in steps.items():
        if name not in measured["steps"]:
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            measured["steps"][name] = step()
            kept.write_text(json.dumps(measured, indent=1))
            print(json.dumps(measured["steps"][name]), flush=True)


def write(record: dict[str, Any]) -> Path:
    """Writes a record that ``head`` began to ``benchmarks/results/NAME.json``."""
    path = RESULTS / f"{record['name']}.json"
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return path


def main() -> None:
    """Writes the record of a demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="what the demo wrote")
    parser.add_argument("name", help="the record's name")
    arguments = parser.parse_args()
    about = head(arguments.name, "make demo")
    if (arguments.directory / DEMO_COMMIT).read_text() != about["commit"]:
        raise SystemExit("the demo was made of another commit, or of changed files: make it again")
    report = json.loads((arguments.directory / "report.json").read_text())
    plan = json.loads((arguments.directory / "plan.json").read_text())
    record = {
        **about,
        "model": Bundle(arguments.directory / "bundle").manifest.source["name"],
        "reports": report["reports"],
        "plan": {key: plan[key] for key in ("chosen", "reason", "plans")},
    }
    write(record)


if __name__ == "__main__":
    main()
