"""Fidelity on texts of other kinds: ``python benchmarks/open_sets.py BUNDLE --source DIR``.

DIR holds public sets as JSON lines, a folder for each: ``retrieval/NAME`` in BEIR's layout,
``sts/NAME/pairs.jsonl``, ``bitext/NAME/pairs.jsonl``, ``long/NAME/texts.jsonl`` and ``messy``. A
hundred texts of each, from everywhere in it, go through ``lowmem report``; of long ones their
beginning. A run that was ended goes on where it was. The record is
``benchmarks/results/open-sets.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from record import head, measure_missing, resume, write

from lowmem.artifact.manifest import Bundle
from lowmem.cli.report import BELOW_THE_FLOOR

NAME = "open-sets"
TEXTS = 100
LONGEST_CHARACTERS = 1000
KINDS = ("retrieval/*/corpus.jsonl", "*/*/pairs.jsonl", "long/*/texts.jsonl", "messy/texts.jsonl")
PLANS = {"int4": "fp32", "int8": "int8"}


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def texts_of(folder: Path) -> list[str]:
    """All different texts of a set, in its order; of a collection documents and queries."""
    found: dict[str, None] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in read(path):
            if "a" in row:
                found |= {row["a"]: None, row["b"]: None}
            elif "text" in row:
                found[f"{row.get('title', '')} {row['text']}".strip()] = None
    return [text for text in found if text.strip()]


def some(texts: list[str]) -> list[str]:
    """As many as are taken, from everywhere."""
    return [texts[i * len(texts) // TEXTS] for i in range(TEXTS)] if len(texts) > TEXTS else texts


def cut(text: str) -> str:
    """The beginning of a long text, whole words if it has any."""
    if len(text) <= LONGEST_CHARACTERS:
        return text
    beginning = text[:LONGEST_CHARACTERS]
    return beginning.rpartition(" ")[0].strip() or beginning


def report(bundle: Path, folder: Path, directory: Path) -> dict[str, Any]:
    """One set through ``lowmem report``, for each plan."""
    chosen = [cut(text) for text in some(texts_of(folder))]
    texts = directory / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))
    plans = {}
    for variant, compute in PLANS.items():
        result = directory / "report.json"
        plan = ("--variant", variant, "--engine", "torch", "--device", "cpu", "--compute", compute)
        command = [sys.executable, "-m", "lowmem", "report", bundle, "--texts", texts, *plan]
        done = subprocess.run([*command, "--json", result], stdout=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, BELOW_THE_FLOOR):
            raise SystemExit(done.returncode)
        (one,) = json.loads(result.read_text())["reports"]
        plans[one["plan"]] = {key: one["cosine"][key] for key in ("mean", "p5", "min")}
        tokens = one["texts"]["tokens"]
    return {"texts": len(chosen), "tokens": tokens, "plans": plans}


def main() -> None:
    """Reports on what is missing, and writes the record once nothing is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="as make demo leaves it")
    parser.add_argument("--source", type=Path, required=True, help="the folder of the sets")
    arguments = parser.parse_args()
    about = head(NAME, "python benchmarks/open_sets.py build/demo/bundle --source DIR")
    folders = sorted({path.parent for kind in KINDS for path in arguments.source.glob(kind)})
    if not folders:
        parser.error(f"no set in {arguments.source}")
    directory: Path = arguments.bundle.parent / NAME
    directory.mkdir(exist_ok=True)
    kept = directory / "measured.json"
    measured = resume(kept, about, parser.error)
    steps = {
        str(folder.relative_to(arguments.source)): partial(
            report, arguments.bundle, folder, directory
        )
        for folder in folders
    }
    measure_missing(steps, measured, kept)
    model = Bundle(arguments.bundle).manifest.source["name"]
    write({**about, "model": model, "sets": {name: measured["steps"][name] for name in steps}})


if __name__ == "__main__":
    main()
