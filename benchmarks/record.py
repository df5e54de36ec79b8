"""Turns a demo's report into a record: ``python benchmarks/record.py build/demo demo``.

A record says what was run, where and on which commit; it is committed as it is and never edited.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from lowmem import hardware
from lowmem.artifact.manifest import Bundle
from lowmem.measure import package_versions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MACHINE_KEYS = ("cpu_name", "cpu_threads", "cpu_features", "gpus")


def head(name: str, command: str) -> dict[str, Any]:
    """What every record begins with.

    Raises:
        SystemExit: Not everything is committed.
    """
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    if subprocess.check_output([*git, "status", "--porcelain"], text=True).strip():
        raise SystemExit("a record names a commit: commit or remove your changes first")
    machine = hardware.probe().to_json()
    return {
        "name": name,
        "command": command,
        "commit": commit,
        "machine": {key: machine[key] for key in MACHINE_KEYS},
        "versions": package_versions(),
    }


def main() -> None:
    """Writes ``benchmarks/results/NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="what the demo wrote")
    parser.add_argument("name", help="the record's name")
    arguments = parser.parse_args()
    about = head(arguments.name, "make demo")
    report = json.loads((arguments.directory / "report.json").read_text())
    plan = json.loads((arguments.directory / "plan.json").read_text())
    record = {
        **about,
        "model": Bundle(arguments.directory / "bundle").manifest.source["name"],
        "reports": report["reports"],
        "plan": {key: plan[key] for key in ("chosen", "reason", "plans")},
    }
    path = RESULTS / f"{arguments.name}.json"
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
