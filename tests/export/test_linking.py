"""Files that get a second place on the disk."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from export import linking
from export.linking import link_or_copy, links
from lowmem.errors import CapacityError

CONTENT = b"the weights"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file on a disk that cannot share blocks between files."""
    monkeypatch.setattr(linking, "_reflink", lambda source, target: False)
    path = tmp_path / "source.safetensors"
    path.write_bytes(CONTENT)
    return path


def test_a_link_shares_the_inode(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    link_or_copy(source, target, copy=False)
    assert target.stat().st_ino == source.stat().st_ino
    assert links(source, tmp_path)


def test_a_copy_does_not_share_the_inode(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    link_or_copy(source, target, copy=True)
    assert target.stat().st_ino != source.stat().st_ino
    assert target.read_bytes() == CONTENT


def test_of_a_symbolic_link_the_file_behind_it_is_linked(source: Path, tmp_path: Path) -> None:
    """As in the hub's cache, where snapshots are links to blobs."""
    snapshot = tmp_path / "snapshots" / "model.safetensors"
    snapshot.parent.mkdir()
    snapshot.symlink_to(Path("..") / source.name)
    target = tmp_path / "target"
    link_or_copy(snapshot, target, copy=False)
    assert not target.is_symlink()
    assert target.stat().st_ino == source.stat().st_ino


def test_where_blocks_can_be_shared_the_bytes_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    link_or_copy(tmp_path / "source", tmp_path / "target", copy=False)
    assert (tmp_path / "target").read_bytes() == CONTENT


def test_a_file_of_another_disk_is_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_disk(*arguments: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    target = tmp_path / "target"
    link_or_copy(source, target, copy=False)
    assert target.stat().st_ino != source.stat().st_ino
    assert target.read_bytes() == CONTENT


def test_a_copy_to_a_full_disk_is_a_capacity_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CapacityError) as caught:
        link_or_copy(source, tmp_path / "target", copy=True)
    assert str(caught.value) == f"the disk is full: {tmp_path / 'target'} could not be copied"
