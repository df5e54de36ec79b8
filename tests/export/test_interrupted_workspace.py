"""What a killed export leaves: put back, removed or continued, and nothing else touched."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from export.journal import Journal
from export.workspace import Workspace
from lowmem.artifact.manifest import Bundle
from lowmem.errors import BundleError, InputError
from tests.bundles import tree
from tests.workspaces import NEW, OLD, PARTIAL, WORK, add_strangers, fill, put


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


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
