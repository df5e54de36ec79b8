"""Memory that one layer frees, kept for the next.

By its own rules glibc gives the top of the heap back to the system as soon as some tens of MiB of
it are free, which is several times in each layer, and the system hands it out again page by page,
each of them zeroed: up to a quarter of the time of a pass.

The largest blocks never go to the heap. They are few, and among smaller ones they would leave gaps
that nothing fits: half as much again as a pass needs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_MIB = 2**20
# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 * _MIB
# Blocks of this size go straight back to the system. By itself glibc ends up at 32 MiB.
_MAPPED_BYTES = 12 * _MIB
# Where glibc starts, before it has seen larger blocks freed.
_SMALLEST_MAPPED_BYTES = 128 * 1024


@cache
def keep_freed_memory() -> None:
    """Lets this process keep up to KEPT_BYTES of freed memory; without glibc nothing changes."""
    _mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    _mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def passing_blocks_given_back() -> Iterator[None]:
    """Returns what is freed inside to the system: for many large blocks that come only once.

    The largest blocks go back to it from then on.
    """
    _mallopt(_M_MMAP_THRESHOLD, _SMALLEST_MAPPED_BYTES)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Returns all that is free to the system: for once, after work that does not come again."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _mallopt(parameter: int, value: int) -> None:
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(parameter, value)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library, if this one has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
