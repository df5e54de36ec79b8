"""How long other processes kept the threads of this one from a core."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TASKS = "/proc/self/task"
_STAT = "/proc/stat"
_NANOSECONDS = 1e9
# Of the columns of /proc/stat: user, nice, system, irq and softirq. A guest's time is in the first.
_BUSY_COLUMNS = (1, 2, 3, 6, 7)


class Queueing:
    """Counts from when it is made."""

    def __init__(self) -> None:
        """Starts to count."""
        self._queued, self._others = _queued_seconds(), _others_seconds()

    def seconds(self) -> float:
        """Seconds that threads were ready to run while other processes had their core, summed.

        Threads of one process also wait for each other, as where one spins until the next product
        begins and another computes: others kept them waiting for no longer than they ran.

        Returns:
            0 where the system does not count it.
        """
        queued = _queued_seconds() - self._queued  # less where threads have ended
        return max(0.0, min(queued, _others_seconds() - self._others))


def _queued_seconds() -> float:
    """Seconds that threads were ready to run and had no core, of all threads there are, summed.

    The second number of ``/proc/self/task/TID/schedstat``; see "Scheduler Statistics" in the Linux
    kernel's documentation.
    """
    queued = 0
    for file in Path(_TASKS).glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            queued += int(file.read_text().split()[1])
    return queued / _NANOSECONDS


def _others_seconds() -> float:
    """Seconds that cores which this process may use ran others, since the system started.

    Of ``/proc/stat``, less this process's own; see proc(5).
    """
    names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    with contextlib.suppress(OSError):
        for line in Path(_STAT).read_text().splitlines():
            columns = line.split()
            if columns and columns[0] in names:
                ticks += sum(int(columns[column]) for column in _BUSY_COLUMNS)
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system
