"""Arrays on the disk that are larger than memory should hold, and gone with the process."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lowmem.errors import CapacityError


def mapped(directory: Path, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor in a mapped file without a name: page cache, not memory of the process.

    Args:
        directory: On the disk that has the room.
        shape: Of the tensor; its content is zeros.

    Raises:
        CapacityError: The disk is full.
    """
    size = 4 * int(torch.Size(shape).numel())
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise CapacityError(
                f"the disk is full: calibration needs {size} bytes for a while ({directory})"
            ) from error
        memory = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)
