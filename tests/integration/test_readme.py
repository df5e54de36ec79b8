"""What the README shows is what happens."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lowmem.artifact.contract import parse_contract
from tests.models import tiny_checkpoint

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(language: str, heading: str) -> str:
    """The first code block of a language under a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with everything that the README's commands name."""
    path = tmp_path_factory.mktemp("readme")
    checkpoint = tiny_checkpoint(path / "MODEL")
    (path / "contract.json").write_text(json.dumps(checkpoint.contract.to_json()))
    (path / "texts.jsonl").write_text('{"text": "the quick brown fox"}\n{"text": "a"}\n')
    (path / "questions.txt").write_text("what is it?\n")
    return path


def run(folder, words, allowed=(0,)):
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in allowed, done.stderr
    return done


FEWER = {  # variants and plans, each of which is a process
    "export": ("--variants", "fp16,int8"),
    "report": ("--variant", "int8", "--engine", "torch"),
}


def test_shell_and_python_examples_run(folder):
    for line in block("sh", "From the shell").splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "lowmem"
        fewer = FEWER.get(words[0], ())
        words += [] if set(fewer) & set(words) else fewer
        # A tiny random model may well fall below the floor.
        allowed = (0, 3) if words[0] == "report" else (0,)
        run(folder, [sys.executable, "-m", "lowmem", *words], allowed)
    assert (folder / "vectors.npy").exists()
    assert (folder / "q.parquet").exists()
    done = run(folder, [sys.executable, "-c", block("python", "From Python")])
    assert "[[" in done.stdout
    assert "fp16-torch-cpu" in done.stdout or "resident" in done.stdout


def test_the_contract_that_is_shown_is_one():
    parse_contract(json.loads(block("json", "The input contract")), "README.md")


def test_every_path_in_the_tree_exists():
    directories: list[str] = []
    for line in block("", "The tree").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        directories[depth:] = [name]
        assert (ROOT / "".join(directories)).exists(), name


def test_tables_are_those_of_the_records():
    run(ROOT, [sys.executable, "benchmarks/tables.py", "--check"])


@pytest.mark.slow
def test_the_wheel_alone_exports_and_plans(tmp_path):
    source = tmp_path / "source"  # setuptools leaves files beside what it builds
    for name in ("lowmem", "export"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*pip, tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lowmem-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    checkpoint = tiny_checkpoint(tmp_path / "MODEL")
    (tmp_path / "contract.json").write_text(json.dumps(checkpoint.contract.to_json()))
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'installed')!r}]; import lowmem; "
        f"assert lowmem.__file__.startswith({str(tmp_path)!r}); "
        "from lowmem.cli import main; main()"
    )
    for words in (
        (
            *("export", "MODEL", "bundle", "--contract", "contract.json"),
            *("--reference-texts", "quick", "--calibration", "none"),
        ),
        ("report", "bundle", "--variant", "fp16", "--engine", "torch", "--html", "report.html"),
        ("plan", "bundle", "--variant", "fp16", "--json"),
    ):
        subprocess.run(
            [sys.executable, "-c", script, *words], cwd=tmp_path, check=True, capture_output=True
        )
