"""The most memory that a process and its children held at any time.

Sampling shares the machine with what it watches, so it must cost next to nothing: files of the
processes stay open, and children are looked for now and then.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_SAMPLE_SECONDS = 0.01
_SAMPLES_OF_A_TREE = 20
_STATUS_BYTES = 4096  # all of it, and far more
_HELD = re.compile(rb"^Rss(?:Anon|Shmem):\s*([0-9]+) kB", re.MULTILINE)


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
        self._is_over = False
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._thread.join()

    def _sample(self) -> None:
        statuses: dict[int, int] = {}
        try:
            for sample in itertools.count():
                if self._is_over:
                    return
                if sample % _SAMPLES_OF_A_TREE == 0:
                    _follow(statuses, self._pid)
                self.bytes = max(self.bytes, sum(map(_held_bytes, statuses.values())))
                time.sleep(_SAMPLE_SECONDS)
        finally:
            for file in statuses.values():
                os.close(file)


def _follow(statuses: dict[int, int], root: int) -> None:
    """Brings a table of processes and their open files up to date."""
    there = set(_tree(root))
    for pid in statuses.keys() - there:
        os.close(statuses.pop(pid))
    for pid in there - statuses.keys():
        try:
            statuses[pid] = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # the process has ended
            continue


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))
    except OSError:  # the process has ended
        return


def _held_bytes(status: int) -> int:
    try:
        text = os.pread(status, _STATUS_BYTES, 0)
    except OSError:  # the process has ended
        return 0
    return 1024 * sum(map(int, _HELD.findall(text)))
