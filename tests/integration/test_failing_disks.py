"""Disks that are full or fail: what was there stays, byte for byte."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.journal import Journal
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import VARIANTS
from lowmem.errors import CapacityError, InputError
from tests.bundles import assert_equal, assert_nothing_in, tree, write_bundle


def test_a_full_disk_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    bundle = tmp_path / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CapacityError, match=r"^the disk is full: .*safetensors needs \d+ byte"):
            write_bundle(checkpoint, bundle, VARIANTS)
    assert_nothing_in(bundle)
    write_bundle(checkpoint, bundle, ["fp16"])
    before = tree(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CapacityError, match="the disk is full"):
            write_bundle(checkpoint, bundle, ["int4"])
    assert_equal(tree(bundle), before)


def test_a_disk_with_too_little_room_is_known_before_the_first_byte(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**26))
    with pytest.raises(CapacityError, match=rf"bytes of disk, {2**26} are free"):
        write_bundle(checkpoint, tmp_path / "bundle", VARIANTS)
    assert_nothing_in(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        (errno.ENOSPC, CapacityError, "the disk is full: {}"),
        (errno.EDQUOT, CapacityError, "the disk is full: {}"),
        (errno.EROFS, InputError, "{} cannot be written: Read-only file system"),
        (errno.EIO, InputError, "{} cannot be written: Input/output error"),
    ],
)
@pytest.mark.parametrize(
    ("place", "call"),
    [
        (os, "mkdir"),
        (os, "fsync"),
        (os, "rename"),
        (Path, "write_bytes"),
        (Journal, "append"),
        (Journal, "create"),
    ],
)
def test_a_disk_that_fails_at_any_call_leaves_the_bundle_and_its_neighbours_as_they_were(
    code: int,
    error: type[Exception],
    text: str,
    place: Any,
    call: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "disk"
    bundle = folder / "bundle"
    write_bundle(checkpoint, bundle, ["int8"])
    (folder / "neighbour").write_text("not ours")
    (bundle / "reports").mkdir()
    (bundle / "reports" / "mine.json").write_text("{}")
    before = tree(folder)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(place, call, fail)
        with pytest.raises(error) as caught:
            write_bundle(checkpoint, bundle, ["fp16", "int4"])
    assert str(caught.value) in (
        text.format(bundle),
        # The copy that takes the place of a link knows which file it was.
        f"the disk is full: {bundle}/.partial/fp16/{_first_shard(checkpoint)} could not be copied",
    )
    assert tree(folder) == before
    write_bundle(checkpoint, bundle, ["fp16", "int4"], copy=True)
    assert Bundle(bundle).verify() == ([], [])


def _first_shard(checkpoint: Path) -> str:
    return sorted(checkpoint.glob("*.safetensors"))[0].name
