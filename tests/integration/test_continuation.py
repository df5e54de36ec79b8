"""An export that goes on after a killed one.

A copy of the bundle's directory, made while an export works in it, is what a kill at that moment
would have left.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import pipeline
from lowmem.artifact.variants import recipe_for
from lowmem.errors import CapacityError, InputError
from lowmem.progress import Progress
from tests.bundles import tree, wait_until_recorded, write_bundle
from tests.models import CONTRACT, tiny_checkpoint

GROUPS = 5  # embedding, three layers, final norm
VARIANTS = ("fp16", "int8", "int4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", shards=2, layers=3).path


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an export that nothing interrupted; not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "bundle"
    write(checkpoint, path)
    return path


def write(
    checkpoint: Path, bundle: Path, variants: Sequence[str] = VARIANTS, **options: Any
) -> list[int]:
    """Exports, and returns which groups were written."""
    written = []
    tell: Progress = options.pop("progress", lambda what, done, total: None)

    def progress(what: str, done: int, total: int) -> None:
        if what == "quantizing":
            written.append(done)
        tell(what, done, total)

    write_bundle(checkpoint, bundle, variants, **{"copy": True, "progress": progress} | options)
    return written


def leave(checkpoint: Path, bundle: Path, group: int, **options: Any) -> Path:
    """Makes what an export leaves that is killed when it begins with a group."""
    into = bundle.with_name("never killed")

    def copy(what: str, done: int, total: int) -> None:
        if (what, done) == ("quantizing", group):
            wait_until_recorded(into, group)
            shutil.copytree(into, bundle)

    write(checkpoint, into, progress=copy, **options)
    shutil.rmtree(into)
    return bundle / ".partial"


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_killed_export_is_continued_behind_its_last_finished_group(
    group: int, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    leave(checkpoint, tmp_path / "bundle", group)
    assert write(checkpoint, tmp_path / "bundle") == list(range(group, GROUPS))
    assert tree(tmp_path / "bundle") == tree(whole)


def test_what_a_group_had_begun_to_write_is_written_again(
    checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    partial = leave(checkpoint, tmp_path / "bundle", 2)
    with (partial / "int4" / "model.safetensors").open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(os.urandom(1000))
    (partial / "int4" / "config.json").write_text("{")
    (partial / "int4" / "model.onnx").write_text("half a gra")
    assert write(checkpoint, tmp_path / "bundle") == [2, 3, 4]
    assert tree(tmp_path / "bundle") == tree(whole)


def test_an_export_that_was_killed_twice_is_continued_twice(
    checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    leave(checkpoint, tmp_path / "first", 1)
    into = tmp_path / "first"

    def copy(what: str, done: int, total: int) -> None:
        if (what, done) == ("quantizing", 3):
            wait_until_recorded(into, 3)
            shutil.copytree(into, tmp_path / "second")

    assert write(checkpoint, into, progress=copy) == [1, 2, 3, 4]
    assert write(checkpoint, tmp_path / "second") == [3, 4]
    assert tree(tmp_path / "second") == tree(whole)


def test_shards_that_were_copied_are_not_copied_again(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(checkpoint, tmp_path / "bundle", 0)

    def copy_again(source: Path, target: Path) -> None:
        raise AssertionError(source)

    monkeypatch.setattr(shutil, "copyfile", copy_again)
    write(checkpoint, tmp_path / "bundle")
    assert tree(tmp_path / "bundle") == tree(whole)


def test_a_continued_export_needs_the_disk_for_what_is_missing_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(checkpoint, tmp_path / "bundle", 2)
    asked = []

    class Usage:
        free = 2**40

        def __init__(self, path: Path) -> None:
            asked.append(path)

    def refuse(needed: int) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(Usage, "free", 0)
            with pytest.raises(CapacityError) as caught:
                write(checkpoint, tmp_path / "bundle" if needed else tmp_path / "other")
        return str(caught.value)

    monkeypatch.setattr(shutil, "disk_usage", Usage)
    more, less = (int(refuse(needed).split()[3]) for needed in (0, 1))
    weights = sum(path.stat().st_size for path in (tmp_path / "bundle").rglob("*.safetensors"))
    assert more - less >= weights
    assert write(checkpoint, tmp_path / "bundle") == [2, 3, 4]
    assert asked


def _other_variants(partial: Path) -> dict[str, Any]:
    return {"variants": ("fp16", "int8")}


def _other_contract(partial: Path) -> dict[str, Any]:
    return {"contract": replace(CONTRACT, max_seq_length=64)}


def _links_now(partial: Path) -> dict[str, Any]:
    return {"copy": False}


def _a_changed_byte(partial: Path) -> dict[str, Any]:
    path = partial / "int8" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1  # in the embedding
    path.write_bytes(data)
    return {}


def _a_changed_header(partial: Path) -> dict[str, Any]:
    with (partial / "int8" / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"x")
    return {}


def _a_shorter_file(partial: Path) -> dict[str, Any]:
    path = partial / "int8" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return {}


def _a_missing_file(partial: Path) -> dict[str, Any]:
    (partial / "int4" / "model.safetensors").unlink()
    return {}


def _a_file_with_another_name(partial: Path) -> dict[str, Any]:
    os.link(partial / "int4" / "model.safetensors", partial.parent.parent / "mine")
    return {}


def _a_shorter_shard(partial: Path) -> dict[str, Any]:
    os.truncate(next((partial / "fp16").glob("*.safetensors")), 1000)
    return {}


def _a_link_in_place_of_a_variant(partial: Path) -> dict[str, Any]:
    (partial / "int4").rename(partial.parent.parent / "moved")
    (partial / "int4").symlink_to(partial.parent.parent / "moved", target_is_directory=True)
    return {}


def _a_damaged_line(partial: Path) -> dict[str, Any]:
    path = partial / "finished"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return {}


def _no_list(partial: Path) -> dict[str, Any]:
    (partial / "finished").unlink()
    return {}


def _another_version(partial: Path) -> dict[str, Any]:
    text = (partial / "journal.json").read_text()
    (partial / "journal.json").write_text(text.replace('"format": 2', '"format": 1'))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        _other_variants,
        _other_contract,
        _links_now,
        _a_changed_byte,
        _a_changed_header,
        _a_shorter_file,
        _a_missing_file,
        _a_file_with_another_name,
        _a_shorter_shard,
        _a_link_in_place_of_a_variant,
        _a_damaged_line,
        _no_list,
        _another_version,
    ],
)
def test_an_export_begins_anew_where_anything_is_not_as_it_was(
    change: Callable[[Path], dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    options = change(leave(checkpoint, tmp_path / "bundle", 2))
    outside = {name: file for name, file in tree(tmp_path).items() if not name.startswith("bundle")}
    assert write(checkpoint, tmp_path / "bundle", **options) == list(range(GROUPS))
    write(checkpoint, tmp_path / "expected", **options)
    assert tree(tmp_path / "bundle") == tree(tmp_path / "expected")
    assert {name: tree(tmp_path)[name] for name in outside} == outside


def test_another_source_or_recipe_begins_anew(
    own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(own_checkpoint, tmp_path / "bundle", 2)
    (own_checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")
    shutil.copytree(tmp_path / "bundle", tmp_path / "second")
    assert write(own_checkpoint, tmp_path / "bundle") == list(range(GROUPS))
    (own_checkpoint / "README.md").unlink()
    monkeypatch.setattr(
        pipeline, "recipe_for", lambda *names: recipe_for(*names) | {"scales": "another way"}
    )
    assert write(own_checkpoint, tmp_path / "second") == list(range(GROUPS))


def test_an_export_with_nothing_to_write_removes_what_a_killed_one_left(
    checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(whole, tmp_path / "bundle"))
    shutil.copytree(leave(checkpoint, tmp_path / "other", 2), bundle / ".partial")
    assert write(checkpoint, bundle) == []
    assert tree(bundle) == tree(whole)


def test_a_second_export_during_a_continued_one_is_refused_and_does_no_harm(
    checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    bundle, refused = tmp_path / "bundle", []
    leave(checkpoint, bundle, 2)

    def at_once(what: str, done: int, total: int) -> None:
        with pytest.raises(InputError) as caught:
            write(checkpoint, bundle)
        refused.append(str(caught.value))

    assert write(checkpoint, bundle, progress=at_once) == [2, 3, 4]
    assert set(refused) == {f"another export is writing to {bundle}: let it finish"}
    assert tree(bundle) == tree(whole)
