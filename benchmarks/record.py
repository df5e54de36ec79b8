"""Turns a demo's report into a record: ``python benchmarks/record.py build/demo demo``.

A record says what was run, where and on which commit; it is committed as it is and never edited.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from lowmem import hardware
from lowmem.artifact.manifest import Bundle

MACHINE_KEYS = ("cpu_name", "cpu_threads", "cpu_features", "gpus")


def main() -> None:
    """Writes ``benchmarks/results/NAME.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="what the demo wrote")
    parser.add_argument("name", help="the record's name")
    arguments = parser.parse_args()
    root = Path(__file__).parent.parent
    git = ["git", "-C", str(root)]
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    clean = not subprocess.check_output([*git, "status", "--porcelain"], text=True).strip()
    if not clean:
        raise SystemExit("a record names a commit: commit or remove your changes first")
    report = json.loads((arguments.directory / "report.json").read_text())
    plan = json.loads((arguments.directory / "plan.json").read_text())
    machine = hardware.probe().to_json()
    record = {
        "name": arguments.name,
        "command": "make demo",
        "commit": commit,
        "machine": {key: machine[key] for key in MACHINE_KEYS},
        "model": Bundle(arguments.directory / "bundle").manifest.source["name"],
        "reports": report["reports"],
        "plan": {key: plan[key] for key in ("chosen", "reason", "plans")},
    }
    path = root / "benchmarks" / "results" / f"{arguments.name}.json"
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
