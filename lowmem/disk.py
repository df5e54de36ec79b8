"""Arrays on the disk that are larger than memory should hold, and gone with the process."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowmem.errors import CapacityError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk or a quota is full."""
NO_ROOM = (*DISK_FULL, errno.EFBIG)
"""The same, and what it says where a file is over a limit on the size of files."""


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
