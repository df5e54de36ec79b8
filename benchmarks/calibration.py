"""What calibrating a 7B model takes, by one layer of it: ``python benchmarks/calibration.py DIR``.

Writes a random checkpoint of one layer in the true shape into DIR (1 GB), and exports it by the
weights alone and with two amounts of text, each in a process of its own. The two give the time that
a layer takes by itself and for each token, and so an estimate for all layers and texts. The record
is ``benchmarks/results/calibration-7b.json``; the exit status is 1 if a peak is over its ceiling.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from memory import peak_of
from random_checkpoint import SHAPES, ensure_checkpoint
from record import RESULTS, head, measure_missing, resume

from lowmem import data

NAME = "calibration-7b"
CEILING_BYTES = 4 * 2**30
VARIANTS = ("int4", "int8")
# Of the random checkpoint's tokenizer, which makes a token of a byte. Each is several batches.
FEW_TOKENS, MANY_TOKENS = 6144, 12288
BUILTIN_TOKENS = 23_000  # of the built-in texts, by a trained tokenizer


class Layer:
    """The checkpoint of one layer, and what is measured with it."""

    def __init__(self, directory: Path, shape: str) -> None:
        """Writes the checkpoint unless it is there."""
        self.directory = directory
        self.source = directory / "checkpoint"
        config = replace(SHAPES[shape], num_hidden_layers=1)
        ensure_checkpoint(self.source, config, shards=1)

    def steps(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Every export by name; the checkpoint must be there. The first warms the page cache."""
        amounts = (("warm-up", 0), ("none", 0), ("few", FEW_TOKENS), ("many", MANY_TOKENS))
        return {
            f"{variant}-{name}": partial(self.export, variant, tokens)
            for variant in VARIANTS
            for name, tokens in amounts
        }

    def export(self, variant: str, tokens: int) -> dict[str, Any]:
        """One variant, calibrated with so many tokens; with none by the weights alone."""
        bundle = self.directory / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        contract = ("--contract", self.source / "contract.json", "--reference-texts", "none")
        texts, tokens = self.texts(tokens) if tokens else ("none", 0)
        options = ("--variants", variant, "--no-onnx", "--calibration", texts)
        measured = peak_of("export", self.source, bundle, *contract, *options)
        return measured | {"tokens": tokens, "ceiling_peak_host_bytes": CEILING_BYTES}

    def texts(self, tokens: int) -> tuple[str, int]:
        """A file of built-in texts of about so many tokens, and how many they are."""
        path, left = self.directory / "texts.jsonl", tokens
        with path.open("w") as file:
            for row in data.load("calibration"):
                length = len(row.text.encode()) + 2
                if row.task is None and length <= left:
                    file.write(json.dumps({"text": row.text}) + "\n")
                    left -= length
        return str(path), tokens - left


def estimate(steps: dict[str, dict[str, Any]], variant: str, layers: int) -> dict[str, float]:
    """Hours for all layers and all built-in texts, by two exports of one layer.

    Args:
        steps: What was measured.
        variant: Whose.
        layers: How many there are.
    """
    few, many = steps[f"{variant}-few"], steps[f"{variant}-many"]
    each_token = (many["seconds"] - few["seconds"]) / (many["tokens"] - few["tokens"])
    by_itself = few["seconds"] - each_token * few["tokens"] - steps[f"{variant}-none"]["seconds"]
    return {
        "layer_seconds": round(by_itself, 1),
        "layer_seconds_per_1000_tokens": round(1000 * each_token, 2),
        "hours": round(layers * (by_itself + each_token * BUILTIN_TOKENS) / 3600, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what is missing, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b", help="others are trials")
    wanted = parser.parse_args(arguments)
    is_trial = wanted.shape != "7b"
    command = "python benchmarks/calibration.py DIR"
    about = {"commit": "none: a trial"} if is_trial else head(NAME, command)
    directory: Path = wanted.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    os.environ["LOWMEM_CACHE"] = str(directory / "cache")
    kept = directory / "measured.json"
    measured = resume(kept, about, parser.error)
    measure_missing(Layer(directory, wanted.shape).steps(), measured, kept)
    steps, layers = measured["steps"], SHAPES[wanted.shape].num_hidden_layers
    record = {
        **measured,
        "shape": wanted.shape,
        "layers": layers,
        "estimate_tokens": BUILTIN_TOKENS,
        "estimate": {variant: estimate(steps, variant, layers) for variant in VARIANTS},
    }
    path = directory / "record.json" if is_trial else RESULTS / f"{NAME}.json"
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(json.dumps(record["estimate"], indent=1))
    return int(any(step["peak_host_bytes"] > CEILING_BYTES for step in steps.values()))


if __name__ == "__main__":
    raise SystemExit(main())
