"""Bundles that tests export, and the files in them, compared byte by byte."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.pipeline import export
from export.sources import open_source
from lowmem.artifact import strict_json
from lowmem.artifact.contract import Contract
from lowmem.artifact.manifest import Manifest
from tests.models import CONTRACT

Tree = dict[str, bytes]


def write_bundle(
    checkpoint: Path,
    bundle: Path,
    variants: Sequence[str],
    *,
    contract: Contract = CONTRACT,
    **options: Any,
) -> Manifest:
    """Exports variants, without graphs unless these are asked for."""
    source = open_source(checkpoint)
    return export(source, bundle, contract, **{"variants": variants, "onnx": False} | options)


def wait_until_recorded(bundle: Path, groups: int) -> None:
    """Waits until a running export has recorded so many groups, which it does beside its work."""
    partial = bundle / ".partial"
    steps = len(list(partial.glob("fp16/*.safetensors"))) + groups
    deadline = time.monotonic() + 60
    while steps and (partial / "finished").read_bytes().count(b"\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def edit(bundle: Path, **changes: Any) -> None:
    """Changes keys of a bundle's manifest; a value of None removes the key."""
    manifest = json.loads((bundle / "lowmem.json").read_text())
    for key, value in changes.items():
        if value is None:
            del manifest[key]
        else:
            manifest[key] = value
    (bundle / "lowmem.json").write_text(strict_json.dumps(manifest))


def tree(path: Path) -> Tree:
    """What each file of a directory holds."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def assert_equal(found: Tree, expected: Tree) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def assert_nothing_in(path: Path) -> None:
    assert not path.exists() or list(path.iterdir()) == []
