"""Exports killed in front of a call that changes the disk, and what the next one makes of them."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.artifact.manifest import Bundle, file_sha256
from lowmem.errors import BundleError
from tests.bundles import Tree, assert_equal, edit, tree, write_bundle
from tests.models import CONTRACT

# A process that has not computed yet forks for each export, and the fork ends itself in front of
# one of the calls.
_KILLER = """
import json, os, shutil, sys
from pathlib import Path
from export import pipeline
from export.sources import open_source
from lowmem import cache
from lowmem.artifact.contract import parse_contract
from lowmem.artifact.variants import recipe_for

CALLS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir", "truncate", "posix_fallocate")
CALLS += ("pwrite", "fdatasync")
# So that every run makes the same calls.
cache.remember_sha256 = lambda *arguments, **options: None

def run(bundle, last):
    import torch
    torch.set_num_threads(1)
    made = 0
    def counted(call):
        def wrapper(*arguments, **options):
            nonlocal made
            if 0 <= last <= made:  # a second thread counts too
                os._exit(9)
            made += 1
            return call(*arguments, **options)
        return wrapper
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    if force:
        pipeline.recipe_for = lambda *arguments: recipe_for(*arguments) | {"scales": "other"}
    source = open_source(Path(job["checkpoint"]))
    contract = parse_contract(job["contract"], "contract")
    pipeline.export(source, bundle, contract, variants=variants, onnx=False, force=force)
    return made

def child(name, last):
    bundle = into / name
    if before:
        shutil.copytree(before, bundle)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, str(run(bundle, last)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        made = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if last < 0 else 9), (name, status)
    return made

job = json.load(sys.stdin)
for scenario in job["scenarios"]:
    before, variants, force = (scenario[key] for key in ("before", "variants", "force"))
    into = Path(scenario["into"])
    made = int(child("whole", -1))
    # The last quarter of the calls publishes and cleans up: more of the points lie there.
    late, points = made * 3 // 4, job["points"]
    steps = {round(late * i / 4) for i in range(4)}
    steps |= {round(late + (made - late) * i / (points - 4)) for i in range(points - 4)}
    for step in sorted(steps):
        child(f"killed-at-{step}", step)
"""
_POINTS = 12
FIRST = ["fp16", "int8", "bnb-nf4"]


@pytest.fixture(scope="module")
def killed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories ``first``, ``addition`` and ``replacement``.

    Each holds ``before`` (but for the first), the same bundle after a ``whole`` export, and after
    exports that were ``killed-at-…`` a step.
    """
    path = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(path / "cache"))
        write_bundle(checkpoint, path / "addition" / "before", ["fp16", "int8"])
        replaced = path / "replacement" / "before"
        write_bundle(checkpoint, replaced, ["int8", "int4"])
        # As an older version might have written it.
        with (replaced / "int4" / "config.json").open("a") as file:
            file.write("\n")
        variants = json.loads((replaced / "lowmem.json").read_text())["variants"]
        config = replaced / "int4" / "config.json"
        entry = {"size": config.stat().st_size, "sha256": file_sha256(config)}
        variants["int4"]["files"]["config.json"] = entry
        edit(replaced, variants=variants)
        scenarios = [
            {"into": "first", "before": None, "variants": FIRST, "force": False},
            {"into": "addition", "before": "before", "variants": ["int4"], "force": False},
            {"into": "replacement", "before": "before", "variants": ["int4"], "force": True},
        ]
        for scenario in scenarios:
            into = scenario["into"] = str(path / str(scenario["into"]))
            scenario["before"] = scenario["before"] and f"{into}/before"
        job = {
            "checkpoint": str(checkpoint),
            "contract": CONTRACT.to_json(),
            "points": _POINTS,
            "scenarios": scenarios,
        }
        command = [sys.executable, "-c", _KILLER]
        subprocess.run(command, input=json.dumps(job), text=True, check=True, timeout=300)
    return path


def in_order_of_death(path: Path) -> list[Path]:
    bundles = sorted(path.glob("killed-at-*"), key=lambda path: int(path.name.split("-")[2]))
    assert len(bundles) >= _POINTS - 3
    return bundles


def test_a_killed_first_export_leaves_nothing_that_loads_and_can_be_repeated(
    checkpoint: Path, killed: Path
) -> None:
    expected = tree(killed / "first" / "whole")
    loads = []
    for bundle in in_order_of_death(killed / "first"):
        loads.append((bundle / "lowmem.json").exists())
        if loads[-1]:
            assert Bundle(bundle).verify()[0] == []
        for variant in FIRST:  # a directory with a variant's name holds all of it
            files = tree(bundle / variant)
            assert files in ({}, _below(expected, variant))
        write_bundle(checkpoint, bundle, FIRST)
        assert_equal(tree(bundle), expected)
    assert not loads[0]
    assert loads[-1]
    assert loads == sorted(loads)


def test_a_killed_addition_leaves_the_bundle_as_it_was_and_can_be_repeated(
    checkpoint: Path, killed: Path
) -> None:
    expected = tree(killed / "addition" / "whole")
    for bundle in in_order_of_death(killed / "addition"):
        (bundle / "reports").mkdir()
        (bundle / "reports" / "mine.json").write_text("{}")
        opened = Bundle(bundle)
        assert opened.verify()[0] == []
        assert set(opened.manifest.variants) - {"int4"} == {"fp16", "int8"}
        write_bundle(checkpoint, bundle, ["int4"])
        assert_equal(tree(bundle), expected | {"reports/mine.json": b"{}"})


def test_a_killed_replacement_never_loads_as_half_and_ends_as_either_whole(
    checkpoint: Path, killed: Path
) -> None:
    old, new = tree(killed / "replacement" / "before"), tree(killed / "replacement" / "whole")
    assert old["int4/config.json"] == new["int4/config.json"] + b"\n"
    ends = []
    for bundle in in_order_of_death(killed / "replacement"):
        config = bundle / "int4" / "config.json"
        with contextlib.suppress(BundleError):
            Bundle(bundle).check("int4")
            is_new = "other" in (bundle / "lowmem.json").read_text()
            assert config.read_bytes() == (new if is_new else old)["int4/config.json"]
        write_bundle(checkpoint, bundle, ["int8"])  # any export puts things right
        ends.append(tree(bundle) == new)
        if not ends[-1]:
            assert_equal(tree(bundle), old)
    assert not ends[0]
    assert ends[-1]
    assert ends == sorted(ends)


def _below(files: Tree, directory: str) -> Tree:
    return {
        name.removeprefix(f"{directory}/"): content
        for name, content in files.items()
        if name.startswith(f"{directory}/")
    }
