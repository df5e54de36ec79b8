"""Which of several forms is fastest on this processor, found by trying and not by its name.

The same call is fast on one processor and a hundredfold slower on the next. A trial takes some
tens of milliseconds; its outcome is kept in the user's cache, by processor, threads and version of
torch, so that all processes of a machine compute alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache as remembered
from pathlib import Path

import torch

from lowmem import cache
from lowmem.compute.heap import give_back_freed_memory
from lowmem.hardware import Hardware, fingerprint
from lowmem.hardware.probing import parse_cpu_features, parse_cpu_name

_ROUNDS = 6
# A form so much slower than the fastest is not tried again; but not for its first call, which may
# have compiled code.
_HOPELESS = 5.0


def fastest(question: str, forms: Mapping[str, Callable[[], object]]) -> str:
    """Name of the form that takes the least time with torch's threads as they are.

    Forms take turns, so that a slower moment of the machine meets all of them, and the least time
    of each counts; the first round prepares them.

    Args:
        question: What is tried; it names the outcome in the cache.
        forms: What to call, by name, at least two; each call some milliseconds long.
    """
    name = f"trials-{_processor(torch.get_num_threads())}"
    key = f"torch {torch.__version__}, {question}"
    known = (cache.read_json(name) or {}).get(key)
    if isinstance(known, str) and known in forms:
        return known
    seconds = dict.fromkeys(forms, float("inf"))
    for turn in range(_ROUNDS):
        least = min(seconds.values())
        for form, call in forms.items():
            if turn > 1 and seconds[form] > _HOPELESS * least:
                continue
            start = time.perf_counter()
            call()
            seconds[form] = min(seconds[form], time.perf_counter() - start)
    winner = min(seconds, key=seconds.__getitem__)
    cache.write_json(name, {**(cache.read_json(name) or {}), key: winner})
    give_back_freed_memory()
    return winner


@remembered
def _processor(threads: int) -> str:
    """16 hex digits for the processor and how much of it is used."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    features = parse_cpu_features(cpuinfo)
    return fingerprint(Hardware(parse_cpu_name(cpuinfo), threads, features, 0, 0))
