"""Room on disks, and arrays there that are larger than memory should hold."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowmem.errors import CapacityError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk or a quota is full."""
NO_ROOM = (*DISK_FULL, errno.EFBIG)
"""The same, and what it says where a file is over a limit on the size of files."""


def shown_name(path: Path) -> str:
    """The last part of a path for texts and JSON; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path.name).decode(errors="backslashreplace")


def nearest_directory(path: Path) -> Path:
    """The path where it is a directory, or the nearest directory above it."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


def check_room(place: Path, needed_bytes: int, purpose: str, remedy: str | None = None) -> None:
    """Refuses to begin what the disk has no room for in the end.

    Args:
        place: A directory or what is to be one, on the disk that needs the room.
        needed_bytes: How much.
        purpose: What needs it, as an error calls it.
        remedy: What else can be done than making room.

    Raises:
        CapacityError: The disk has not enough room.
        OSError: There is no such disk.
    """
    free_bytes = shutil.disk_usage(nearest_directory(place)).free
    if free_bytes < needed_bytes:
        advice = f"make room, or {remedy}" if remedy else "make room"
        raise CapacityError(
            f"{purpose} needs {needed_bytes} bytes of disk, {free_bytes} are free ({place}): "
            f"{advice}"
        )


def mapped(directory: Path, shape: tuple[int, ...], purpose: str) -> NDArray[np.float32]:
    """An array in a mapped file without a name: page cache, not memory of the process.

    Args:
        directory: On the disk that has the room; all of it is taken at once.
        shape: Of the array, not empty; its content is zeros.
        purpose: What needs it, as an error calls it.

    Raises:
        CapacityError: The disk is full.
        OSError: The directory cannot be written to.
    """
    size = 4 * int(np.prod(shape, dtype=np.int64))
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise CapacityError(
                f"the disk is full: {purpose} needs {size} bytes for a while ({directory})"
            ) from error
        return np.memmap(file, np.float32, "r+", shape=shape)
