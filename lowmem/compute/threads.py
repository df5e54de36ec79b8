"""Threads that compute beside each other, and the helpers that OpenMP keeps for each of them.

A thread in which torch divides its work has helpers of its own, who wait at the ready for the next
operation. Once a process has more of them than cores, OpenMP lets them sleep between any two
operations, and waking them costs more than a small operation does: a pass in 8 bits takes half as
long again, whichever thread it is in.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch

# <omp.h>
_OMP_PAUSE_SOFT = 1


@contextmanager
def helpers_let_go() -> Iterator[None]:
    """Ends this thread's helpers behind what is done inside: the next caller may be in another.

    To start again takes each of them 30 microseconds. Where torch's OpenMP cannot end them, they
    stay.
    """
    try:
        yield
    finally:
        if (pause := _openmp_pause()) is not None:
            pause(_OMP_PAUSE_SOFT)


@cache
def _openmp_pause() -> Callable[[int], int] | None:
    """``omp_pause_resource_all`` of the OpenMP that torch computes with, and of no other."""
    return getattr(ctypes.CDLL(torch._C.__file__), "omp_pause_resource_all", None)


def lone_threads(count: int) -> ThreadPoolExecutor:
    """Starts threads in which torch divides no work; the caller's may, as before.

    Args:
        count: How many, at least 1.

    Raises:
        RuntimeError: The system starts no more threads.
    """
    all_started = threading.Barrier(count + 1)

    def compute_alone() -> None:
        # A thread's first question takes the process's number over, whatever was set for the thread
        # before; and what is set here becomes the process's number in turn.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_started.wait()

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=compute_alone)
    try:
        for _ in range(count):
            pool.submit(int)  # none is idle before all have started, so each starts a thread
        all_started.wait()
    except BaseException:
        all_started.abort()  # the system gave too few threads, and those that it gave would wait
        raise
    finally:
        torch.set_num_threads(threads)
    return pool
