import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest

from export.journal import Journal
from export.workspace import Workspace
from lowmem import cache
from lowmem.artifact.contract import Contract
from lowmem.artifact.manifest import Bundle, FileEntry, Manifest, Variant, file_sha256
from lowmem.errors import BundleError, CapacityError, InputError
from tests.bundles import tree

CONTRACT = Contract(
    query_template="{text}",
    document_template="{text}",
    bos_token_id=1,
    eos_token_id=2,
    is_causal=True,
    pooling="lasttoken",
    max_seq_length=64,
    normalize_embeddings=True,
)
SOURCE = {"name": "tiny", "sha256": "0" * 64}
PARTIAL = ".partial"
WORK = "digest of the work"
OLD, NEW = b"the old weights", b"the new weights, and more"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def fill(directory: Path, content: bytes) -> None:
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(content)
    (directory / "1_Pooling" / "config.json").write_text("{}")


def variant_of(directory: Path) -> Variant:
    files = {
        file.relative_to(directory).as_posix(): FileEntry(file.stat().st_size, file_sha256(file))
        for file in directory.rglob("*")
        if file.is_file()
    }
    return Variant(directory.name, {}, {"linears": 16, "model": 16}, {}, {}, files)


def put(path: Path, contents: Mapping[str, bytes]) -> Manifest:
    """Writes variants as an export does."""
    with Workspace(path) as workspace:
        old = workspace.manifest()
        workspace.begin(contents, 0, WORK)
        for name, content in contents.items():
            fill(workspace.partial / name, content)
        written = {name: variant_of(workspace.partial / name) for name in contents}
        variants = {**(old.variants if old else {}), **written}
        manifest = Manifest(SOURCE, None, CONTRACT, variants)
        workspace.publish(list(contents), manifest)
    return manifest


def open_and_clear(path: Path) -> None:
    """Does what an export does that has nothing to write."""
    with Workspace(path) as workspace:
        workspace.clear()


def leave_journal(path: Path, *variants: Any) -> Path:
    """What an export that is killed leaves besides its variants."""
    partial = path / PARTIAL
    partial.mkdir(parents=True)
    (partial / "journal.json").write_text(json.dumps({"format": 1, "variants": variants}))
    return partial


def add_strangers(path: Path) -> dict[str, bytes]:
    for name in ("reference/probe.npy", "reports/fp16.json", "notes.txt", "mine/int4/a", ".hidden"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(f"what is in {name}")
    return tree(path)


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


@pytest.mark.parametrize("content", [(), (".lowmem-0123456789abcdef.tmp",)])
def test_an_export_that_was_killed_at_its_first_step_can_be_repeated(
    content: tuple[str, ...], path: Path
) -> None:
    (path / PARTIAL).mkdir(parents=True)
    for name in content:
        (path / PARTIAL / name).write_text("")
    put(path, {"int4": NEW})
    assert Bundle(path).verify() == ([], [])


def test_half_written_variants_are_removed_and_nothing_else(path: Path) -> None:
    put(path, {"fp16": OLD})
    before = add_strangers(path)
    fill(leave_journal(path, "int4", "int8") / "int4", NEW[:5])
    open_and_clear(path)
    assert tree(path) == before
    assert not (path / PARTIAL).exists()


def test_variants_that_no_manifest_names_yet_are_removed(path: Path) -> None:
    """Killed between the moves of a first export, or of another one."""
    put(path, {"fp16": OLD})
    before = add_strangers(path)
    fill(leave_journal(path, "int4", "int8") / "int8", NEW)
    fill(path / "int4", NEW)
    open_and_clear(path)
    assert tree(path) == before


def test_a_first_export_that_was_killed_before_its_manifest_leaves_nothing(path: Path) -> None:
    leave_journal(path, "int4")
    fill(path / "int4", NEW)
    with pytest.raises(BundleError, match="is no bundle: it has no"):
        Bundle(path)
    open_and_clear(path)
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("new_is_in_place", [False, True])
def test_a_variant_that_was_being_replaced_goes_back(new_is_in_place: bool, path: Path) -> None:
    put(path, {"int4": OLD, "fp16": OLD})
    before = add_strangers(path)
    partial = leave_journal(path, "int4")
    (path / "int4").rename(partial / "replaced-int4")
    fill(path / "int4" if new_is_in_place else partial / "int4", NEW)
    open_and_clear(path)
    assert tree(path) == before
    assert Bundle(path).verify()[0] == []


def test_a_variant_that_was_replaced_stays_once_the_manifest_names_it(path: Path) -> None:
    put(path, {"int4": NEW})
    before = add_strangers(path)
    fill(leave_journal(path, "int4") / "replaced-int4", OLD)
    open_and_clear(path)
    assert tree(path) == before


def test_a_journal_goes_last(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while clearing: what is left must still be known as ours."""
    partial = leave_journal(path, "int4")
    for number in range(3):
        fill(partial / f"leftover-{number}", NEW)

    def killed(directory: Path, ignore_errors: bool = False) -> None:
        if directory.parent == partial:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            open_and_clear(path)
    assert (partial / "journal.json").exists()
    open_and_clear(path)
    assert list(path.iterdir()) == []


@pytest.mark.parametrize(
    "variants",
    [["../outside"], ["/outside"], ["."], ["a/b"], [""], ["reference"], ["reports"], [5], "int4"],
)
def test_a_journal_that_names_anything_else_than_variants_is_refused(
    variants: Any, path: Path
) -> None:
    put(path, {"int4": OLD})
    before = add_strangers(path)
    journal = leave_journal(path) / "journal.json"
    journal.write_text(json.dumps({"format": 1, "variants": variants}))
    outside = path.parent / "outside"
    outside.mkdir()
    with pytest.raises(BundleError) as caught:
        Workspace(path)
    assert str(caught.value) == (
        f"variants must be a list of plain names, got {variants!r} ({journal})"
    )
    journal.unlink()
    assert tree(path) == before
    assert outside.exists()


def test_a_link_in_place_of_the_workspace_is_refused(path: Path, tmp_path: Path) -> None:
    put(path, {"int4": OLD})
    outside = leave_journal(tmp_path / "outside")
    (path / PARTIAL).symlink_to(outside, target_is_directory=True)
    with pytest.raises(InputError) as caught:
        Workspace(path)
    assert str(caught.value) == f"{path / PARTIAL} must be a directory, got a link: remove it"
    assert (outside / "journal.json").exists()


def test_links_in_the_workspace_are_not_followed(path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    fill(outside, OLD)
    partial = leave_journal(path, "int4")
    (partial / "int8").symlink_to(outside, target_is_directory=True)
    (partial / "file").symlink_to(outside / "model.safetensors")
    open_and_clear(path)
    assert not partial.exists()
    assert (outside / "model.safetensors").read_bytes() == OLD


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


def kill_after_steps(path: Path, *files: str) -> Path:
    """Leaves two variants under work, with a finished step that wrote some of their files."""
    partial = path / PARTIAL
    partial.mkdir(parents=True)
    journal = Journal(partial)
    journal.create(["int4", "int8"], WORK)
    for variant in ("int4", "int8"):
        fill(partial / variant, NEW)
    journal.append("a step", {file: {} for file in files})
    return partial


def test_files_of_finished_steps_are_kept_and_all_others_go(path: Path) -> None:
    kept = "int4/model.safetensors"
    partial = kill_after_steps(path, kept)
    (partial / "stray").write_text("")
    with Workspace(path) as workspace:
        assert workspace.finished("other work") == {}
        assert workspace.finished(WORK) == {"a step": {kept: {}}}
        workspace.begin(["int4", "int8"], 0, WORK, [kept])
        assert set(tree(partial)) == {kept, "finished", "journal.json"}
        workspace.record("another", {kept: {"a": 1}})
        assert workspace.finished(WORK) == {"a step": {kept: {}}, "another": {kept: {"a": 1}}}


@pytest.mark.parametrize("moved", [("int4",), ("int4", "int8")])
def test_variants_that_were_moved_but_not_named_are_there_to_be_continued(
    moved: tuple[str, ...], path: Path
) -> None:
    put(path, {"fp16": OLD, "int4": OLD})
    kept = ["int4/model.safetensors", "int8/model.safetensors"]
    partial = kill_after_steps(path, *kept)
    before = tree(path)
    (path / "int4").rename(partial / "replaced-int4")
    for variant in moved:
        (partial / variant).rename(path / variant)
    with Workspace(path) as workspace:
        assert tree(path) == before
        assert workspace.finished(WORK) == {"a step": {file: {} for file in kept}}


def test_a_directory_that_was_put_where_a_variant_will_go_is_not_touched(path: Path) -> None:
    put(path, {"fp16": OLD})
    kill_after_steps(path, "int4/model.safetensors")
    (path / "int4").mkdir()
    (path / "int4" / "thesis.tex").write_text("mine")
    before = tree(path)
    with Workspace(path) as workspace, pytest.raises(InputError, match="move it to another place"):
        workspace.begin(["int4", "int8"], 0, WORK, ["int4/model.safetensors"])
    assert tree(path) == before


def test_a_damaged_manifest_is_an_error_and_nothing_is_removed(path: Path) -> None:
    put(path, {"int4": OLD})
    (path / "lowmem.json").write_text("{")
    fill(leave_journal(path, "int4") / "int4", NEW)
    before = tree(path)
    with pytest.raises(BundleError, match=r"lowmem\.json is not JSON"):
        Workspace(path)
    assert tree(path) == before
