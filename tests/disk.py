"""What this process has read from disks, for tests of the page cache."""

import os
from pathlib import Path

import pytest


def read_bytes() -> int:
    """Bytes that this process has read from disks, and not from the page cache."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"])


def cached_file(directory: Path, size: int) -> Path:
    """A file that is on a disk and, whole, in the page cache; skips where there is no disk."""
    file = directory / "cached"
    file.write_bytes(os.urandom(size))
    os.sync()
    before = read_bytes()
    with file.open("rb", buffering=0) as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        opened.read()
    if read_bytes() - before < size:
        pytest.skip(f"needs a directory on a disk, and {directory} keeps its files in memory")
    return file
