"""The most memory that a process and its children held at any time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

_SAMPLE_SECONDS = 0.005


class MemoryPeak:
    """Samples RssAnon + RssShmem of a process and its children, as a context manager.

    Mapped files are page cache and do not count.

    Attributes:
        bytes: The largest sum seen so far.
    """

    def __init__(self, pid: int) -> None:
        """Takes a process id; sampling begins on entry."""
        self.bytes = 0
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            total = sum(_anonymous_bytes(pid) for pid in _tree(self._pid))
            self.bytes = max(self.bytes, total)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))
    except OSError:  # the process has ended
        return


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # the process has ended
        return 0
    kilobytes = 0
    for line in status.splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            kilobytes += int(line.split()[1])
    return kilobytes * 1024
