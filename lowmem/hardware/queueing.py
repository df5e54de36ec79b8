"""How long this process was kept from computing by whatever else uses the CPU."""

from __future__ import annotations

import contextlib
from pathlib import Path

_TASKS = "/proc/self/task"
_NANOSECONDS = 1e9


def queued_seconds() -> float:
    """Seconds that threads were ready to run and had no core, of all threads there are, summed.

    The second number of ``/proc/self/task/TID/schedstat``; see "Scheduler Statistics" in the Linux
    kernel's documentation. 0 where the system does not count it.
    """
    queued = 0
    for file in Path(_TASKS).glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            queued += int(file.read_text().split()[1])
    return queued / _NANOSECONDS
