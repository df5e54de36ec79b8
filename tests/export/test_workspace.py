import errno
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from export.workspace import Workspace
from lowmem import cache
from lowmem.artifact.manifest import Bundle, Manifest
from lowmem.errors import CapacityError, InputError
from tests.bundles import tree
from tests.workspaces import (
    CONTRACT,
    NEW,
    OLD,
    PARTIAL,
    SOURCE,
    WORK,
    add_strangers,
    fill,
    put,
    variant_of,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def test_a_published_bundle_holds_its_variants_and_nothing_else(path: Path) -> None:
    put(path, {"int4": NEW, "fp16": OLD})
    assert sorted(tree(path)) == [
        "fp16/1_Pooling/config.json",
        "fp16/model.safetensors",
        "int4/1_Pooling/config.json",
        "int4/model.safetensors",
        "lowmem.json",
    ]
    assert Bundle(path).verify() == ([], [])


def test_a_kill_at_any_replacement_leaves_no_temporary_file_in_the_bundle(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, there = os.replace, []

    def spy(source: Path, target: Path) -> None:
        there.append(set(os.listdir(path)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    put(path, {"int4": NEW})
    assert len(there) >= 3  # journal, manifest, and the manifest's move
    assert set().union(*there) == {PARTIAL, "int4"}


def test_an_empty_directory_becomes_a_bundle(path: Path) -> None:
    path.mkdir()
    put(path, {"int4": NEW})
    Bundle(path).check("int4")


def test_another_variant_is_added_beside_all_that_is_there(path: Path) -> None:
    put(path, {"fp16": OLD})
    before = add_strangers(path)
    put(path, {"int4": NEW})
    after = tree(path)
    assert {name for name in after if not name.startswith("int4/")} == before.keys()
    assert all(after[name] == before[name] for name in before.keys() - {"lowmem.json"})


def test_a_replaced_variant_is_gone_once_the_new_one_is_named(path: Path) -> None:
    put(path, {"int4": OLD})
    (path / "int4" / "of another version").write_text("")
    put(path, {"int4": NEW})
    assert (path / "int4" / "model.safetensors").read_bytes() == NEW
    assert Bundle(path).verify() == ([], [])
    assert not (path / PARTIAL).exists()


def test_a_directory_of_something_else_is_refused(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("")
    with pytest.raises(InputError) as caught:
        Workspace(path)
    assert str(caught.value) == f"{path} is not empty and is no bundle: choose another directory"
    assert list(tree(path)) == ["thesis.tex"]


def test_a_directory_with_work_of_its_own_under_our_name_is_refused(path: Path) -> None:
    (path / PARTIAL).mkdir(parents=True)
    (path / PARTIAL / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="is not empty and is no bundle"):
        Workspace(path)
    assert list(tree(path)) == [f"{PARTIAL}/thesis.tex"]


def test_a_file_is_refused(path: Path) -> None:
    path.write_text("")
    with pytest.raises(InputError) as caught:
        Workspace(path)
    assert str(caught.value) == f"a bundle is a directory, got the file {path}"


def test_a_directory_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bundle = tmp_path / "file" / "bundle"
    with pytest.raises(InputError) as caught:
        Workspace(bundle).begin(["int4"], 0, WORK)
    assert str(caught.value) == f"{bundle} cannot be written: Not a directory"


def test_too_little_disk_is_known_before_the_first_byte(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, {"fp16": OLD})
    before = tree(path)
    free = 2**26 + 999
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with Workspace(path) as workspace, pytest.raises(CapacityError) as caught:
        workspace.begin(["int4"], 1000, WORK)
    assert str(caught.value) == (
        f"the export needs {2**26 + 1000} bytes of disk, {free} are free ({path}): make room"
    )
    assert tree(path) == before
    assert not (path / PARTIAL).exists()
    with Workspace(path) as workspace:
        workspace.begin(["int4"], 999, WORK)


def test_something_under_a_variants_name_that_the_manifest_does_not_know_is_not_touched(
    path: Path,
) -> None:
    put(path, {"fp16": OLD})
    (path / "int4").mkdir()
    (path / "int4" / "thesis.tex").write_text("mine")
    before = tree(path)
    with Workspace(path) as workspace, pytest.raises(InputError) as caught:
        workspace.begin(["int4"], 0, WORK)
    assert str(caught.value) == (
        f"{path / 'int4'} is there and is no variant of the bundle: move it to another place"
    )
    assert tree(path) == before


def test_two_exports_into_one_bundle_do_not_meet(path: Path) -> None:
    put(path, {"fp16": OLD})
    with Workspace(path) as first:
        for begin in (lambda: None, lambda: first.begin(["int4"], 0, WORK)):
            begin()
            with pytest.raises(InputError) as caught:
                Workspace(path)
            assert str(caught.value) == f"another export is writing to {path}: let it finish"
        assert (first.partial / "journal.json").exists()
    put(path, {"int4": NEW})
    Bundle(path).check("fp16")


def test_two_exports_that_make_one_bundle_do_not_meet(path: Path) -> None:
    with Workspace(path) as late:
        with Workspace(path) as first:
            first.begin(["int4"], 0, WORK)
            fill(first.partial / "int4", NEW)
            with pytest.raises(InputError) as caught:
                Workspace(path)
            assert str(caught.value) == f"another export is writing to {path}: let it finish"
            variant = variant_of(first.partial / "int4")
            first.publish(["int4"], Manifest(SOURCE, None, CONTRACT, {"int4": variant}))
        with pytest.raises(InputError) as caught:
            late.begin(["int8"], 0, WORK)
        assert str(caught.value) == f"another export is writing to {path}: let it finish"
    assert Bundle(path).verify() == ([], [])


def test_an_abandoned_export_leaves_the_bundle_as_it_was(path: Path) -> None:
    put(path, {"fp16": OLD})
    before = add_strangers(path)

    def export() -> None:
        with Workspace(path) as workspace:
            workspace.begin(["int4", "fp16"], 0, WORK)
            fill(workspace.partial / "int4", NEW)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export()
    assert tree(path) == before
    assert not (path / PARTIAL).exists()


def test_an_export_that_fails_while_publishing_puts_back_what_it_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, {"int4": OLD})
    before = add_strangers(path)

    def full(target: Path) -> AbstractContextManager[BinaryIO]:
        assert (path / "int4" / "model.safetensors").read_bytes() == NEW
        raise OSError(errno.ENOSPC, "No space left on device")

    def export() -> None:
        with Workspace(path) as workspace:
            manifest = workspace.manifest()
            assert manifest is not None
            workspace.begin(["int4", "int8"], 0, WORK)
            fill(workspace.partial / "int4", NEW)
            fill(workspace.partial / "int8", NEW)
            monkeypatch.setattr(cache, "replacing", full)
            workspace.publish(["int4", "int8"], manifest)

    with pytest.raises(CapacityError) as caught:
        export()
    assert str(caught.value) == f"the disk is full: {path}"
    assert tree(path) == before
