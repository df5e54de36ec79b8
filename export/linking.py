"""Files that get a second place on the disk, and how what was written is brought to it for good."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from lowmem.disk import DISK_FULL
from lowmem.errors import CapacityError

_FICLONE = 0x40049409


def link_or_copy(source: Path, target: Path, *, copy: bool) -> None:
    """Gives a file a second place: by reflink, else by hard link, else by copy; and syncs it.

    Args:
        source: The file; of a link, what it points to.
        target: The new name; must not exist.
        copy: Whether to always write the bytes again.

    Raises:
        CapacityError: The disk is full.
    """
    source = source.resolve()
    try:
        if copy or not (_reflink(source, target) or _hard_link(source, target)):
            shutil.copyfile(source, target)
        _sync_file(target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise CapacityError(f"the disk is full: {target} could not be copied") from error
        raise


def links(source: Path, directory: Path) -> bool:
    """Whether a file can be given a second place in a directory without writing its bytes."""
    return source.resolve().stat().st_dev == directory.stat().st_dev


def sync_tree(directory: Path) -> None:
    """Brings every file of a directory, and the directories themselves, to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            _sync_file(Path(folder) / name)
        sync_directory(Path(folder))


def sync_directory(directory: Path) -> None:
    """Brings the names in a directory to the disk."""
    _sync_file(directory)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reflink(source: Path, target: Path) -> bool:
    with source.open("rb") as read, target.open("xb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except OSError:
            target.unlink()
            return False
    return True


def _hard_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
