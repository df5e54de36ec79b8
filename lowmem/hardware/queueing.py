"""How long the threads of this process have waited for a core."""

from __future__ import annotations

import contextlib
from pathlib import Path

_TASKS = "/proc/self/task"
_NANOSECONDS = 1e9


def queued_seconds() -> float:
    """Seconds that threads were ready to run and had no core, of all threads there are, summed.

    Where a process has no more threads at work than there are cores, others had them.

    The second number of ``/proc/self/task/TID/schedstat``; see "Scheduler Statistics" in the Linux
    kernel's documentation. 0 where the system does not count it.
    """
    queued = 0
    for file in Path(_TASKS).glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            queued += int(file.read_text().split()[1])
    return queued / _NANOSECONDS
