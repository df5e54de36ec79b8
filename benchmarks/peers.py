"""lowmem beside sentence-transformers and llama.cpp on this CPU: ``benchmarks/peers.py BUNDLE``.

Every engine stays in a process of its own, and they take turns at each workload: seven rounds, of
which medians are compared, since a shared machine is faster at one moment than at the next. What is
timed is the whole way from text to vector, tokenization included. All engines get the same texts,
and must make the same token ids of them.

* ``sentence-transformers``: float32, batches of 16, its own sorting, over the bundle's ``fp16/``;
* ``fp32``: the plan of that variant on torch in float32;
* ``auto``: what the planner chooses for the workload at the floor ``strict``;
* ``llama.cpp F16`` and ``llama.cpp Q8_0``, where llama-cpp-python is installed: what its quantizer
  makes of the demo's GGUF file, given the token ids, since its own tokenizer makes others.

Workloads are those of ``lowmem/data/workloads.jsonl``; ``mixed`` is some of each, or the texts of
``--corpus`` (a ``.jsonl`` with ``text``). Writes the record ``benchmarks/results/peers-cpu.json``,
or ``peers-cpu-vnni.json`` on a CPU with 8-bit instructions, which runs other plans; with
``--quick`` it takes less text, three rounds, and writes nothing.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
from engines import PEER, Engine, Vectors, llama_files, tokenizer_of

from lowmem import data, hardware
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import FLOORS
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.hardware import Hardware
from lowmem.measure import measure_ceiling, package_versions
from lowmem.planner.candidates import Wishes
from lowmem.planner.choice import choose, repeated_share
from lowmem.text.reading import read_rows

KINDS = ("short", "mid", "long", "instructed")
ROUNDS, QUICK_ROUNDS = 7, 3
TOKENS, QUICK_TOKENS = 6000, 800
CORPUS_TEXTS = 2000
# A corpus takes minutes, in which the moments of a machine even out.
LONG_RUN_TOKENS = 20_000


def record_name(machine: Hardware) -> str:
    """The record of a kind of CPU."""
    return "peers-cpu-vnni" if machine.has_vnni else "peers-cpu"


def workloads(bundle: Bundle, corpus: Path | None, most_tokens: int) -> dict[str, list[Row]]:
    """The rows of each workload, none with more tokens than given, but for a corpus."""
    tokenizer = tokenizer_of(bundle)

    def within(rows: Sequence[Row]) -> list[Row]:
        taken, tokens = [], 0
        for row, text in zip(rows, tokenizer.encode_rows(rows), strict=True):
            if tokens + len(text.input_ids) <= most_tokens:
                taken.append(row)
                tokens += len(text.input_ids)
        return taken

    rows = list(data.load("workloads"))
    chosen = {kind: within([row for row in rows if row.kind == kind]) for kind in KINDS}
    if corpus is not None:
        return {**chosen, "mixed": read_rows(corpus)[:CORPUS_TEXTS]}
    random.Random(0).shuffle(rows)
    return {**chosen, "mixed": within(rows)}


def prompts_of(bundle: Bundle, rows: Sequence[Row]) -> list[str]:
    """What stands before each text."""
    return [bundle.contract.prompt(row.input_type, row.task) for row in rows]


def planned(bundle: Bundle, rows: Sequence[Row]) -> Plan:
    """What the planner chooses for a workload."""
    repeated = repeated_share([row.text for row in rows], prompts_of(bundle, rows))
    wishes, floor = Wishes(device="cpu"), FLOORS["strict"]
    return choose(bundle, wishes=wishes, floor=floor, repeated=repeated).get()


def compare(
    bundle: Bundle, engines: Sequence[Engine], rows: Sequence[Row], rounds: int
) -> dict[str, Any]:
    """All engines in turn over one workload.

    Raises:
        SystemExit: They tokenize differently.
    """
    prompts = prompts_of(bundle, rows)
    ids = [engine.ids(rows, prompts) for engine in engines]
    for engine, other in zip(engines, ids, strict=True):
        if other != ids[0]:
            raise SystemExit(f"{engine.name} makes other token ids than {engines[0].name}")
    lengths = [len(text) for text in ids[0]]
    tokens, pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    if tokens > LONG_RUN_TOKENS:
        rounds = 1
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    vectors = {}
    for _ in range(rounds):
        for engine in engines:
            took, vectors[engine.name] = engine.run(rows, prompts)
            seconds[engine.name].append(took)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    operations = Checkpoint(bundle.directory("fp16")).config.operations(tokens, pairs)
    return {
        "texts": len(rows),
        "texts_sha256": data.sha256(rows),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / median for name, median in medians.items()},
        "ratio": {name: medians[PEER] / median for name, median in medians.items()},
        "operations_per_second": {name: operations / median for name, median in medians.items()},
        "cosine_to_peer": {name: cosines(vectors[PEER], got) for name, got in vectors.items()},
    }


def cosines(expected: Vectors, got: Vectors) -> dict[str, float]:
    """Mean and least cosine, row by row, in float64."""
    left, right = expected.astype(np.float64), got.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosine = (left * right).sum(axis=1) / lengths
    return {"mean": float(cosine.mean()), "min": float(cosine.min())}


def table(compared: dict[str, dict[str, Any]]) -> str:
    """The comparison for people."""
    lines = [
        f"{'workload':<11} {'tokens':>7} {'engine':<22} {'tok/s':>6} {'ratio':>5} {'of max':>6}"
    ]
    for kind, one in compared.items():
        for name, ratio in one["ratio"].items():
            share = one["operations_per_second"][name] / one["ceilings"][name]
            lines.append(
                f"{kind:<11} {one['tokens']:>7} {name:<22} "
                f"{one['tokens_per_second'][name]:6.0f} {ratio:5.2f} {share:6.2f}  "
                f"1 - cos {1 - one['cosine_to_peer'][name]['mean']:.1e}"
            )
    return "\n".join(lines)


def main() -> None:
    """Runs everything, prints the table and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="a bundle with fp16 and reports")
    parser.add_argument(
        "--corpus", type=Path, help="a .jsonl of which 2000 texts are the mixed ones"
    )
    parser.add_argument(
        "--quick", action="store_true", help="less text and fewer rounds, no record"
    )
    arguments = parser.parse_args()
    about = None if arguments.quick else record.head(record_name(hardware.probe()), "make bench")
    bundle = Bundle(arguments.bundle)
    rounds, tokens = (QUICK_ROUNDS, QUICK_TOKENS) if arguments.quick else (ROUNDS, TOKENS)
    found = workloads(bundle, arguments.corpus, tokens)
    wishes = Wishes("fp16", "torch", "cpu", "fp32", "resident")
    fp32 = choose(bundle, wishes=wishes, floor=FLOORS["strict"]).get()
    chosen = {kind: planned(bundle, rows) for kind, rows in found.items()}
    # Workloads share plans: one process and one ceiling for each.
    plans = {plan.id: plan for plan in chosen.values()}
    rates = {
        name: measure_ceiling(bundle.path, plan) for name, plan in {**plans, fp32.id: fp32}.items()
    }
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        files = llama_files(Path(folder))
        peer = Engine(PEER, None, bundle.path, Path(folder))
        exact = Engine("fp32", fp32, bundle.path, Path(folder))
        autos = {
            name: Engine("auto", plan, bundle.path, Path(folder)) for name, plan in plans.items()
        }
        others = [
            Engine(name, None, bundle.path, Path(folder), file) for name, file in files.items()
        ]
        compared = {}
        for kind, rows in found.items():
            print(f"{kind}: {len(rows)} texts", file=sys.stderr, flush=True)
            plan = chosen[kind]
            taking_turns = [peer, exact, autos[plan.id], *others]
            compared[kind] = {
                **compare(bundle, taking_turns, rows, rounds),
                "auto": {"plan": plan.id, "reason": plan.reason},
                "ceilings": {one.name: rates[fp32.id] for one in taking_turns}
                | {"auto": rates[plan.id]},
            }
        engines = {PEER: peer, "fp32": exact, **autos, **{one.name: one for one in others}}
        for engine in engines.values():
            engine.close()
    print(table(compared))
    if about is not None:
        from importlib.metadata import version

        peers = [PEER, "transformers", *(["llama-cpp-python"] if files else [])]
        versions = {name: version(name) for name in peers}
        record.write(
            {
                **about,
                "versions": {**package_versions(), **versions},
                "model": bundle.manifest.source["name"],
                "artifact_sha256": {
                    plan.variant: bundle.artifact_sha256(plan.variant)
                    for plan in (fp32, *plans.values())
                },
                "fp32": fp32.id,
                "peak_host_bytes": {name: engine.peak_bytes for name, engine in engines.items()},
                "workloads": compared,
            },
        )


if __name__ == "__main__":
    main()
