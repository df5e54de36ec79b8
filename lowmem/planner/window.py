"""How many tokens go through a streamed layer while the next one comes in.

The copy of a layer hides where its arithmetic takes as long, so of the whole stack

    tokens / (tokens per second) >= streamed bytes / (bytes per second)

More tokens than that only cost memory for their hidden states.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

from lowmem.compute.plan import Plan
from lowmem.hardware import Hardware
from lowmem.planner import memory
from lowmem.planner.candidates import HOST_MARGIN_BYTES, Subject, with_memory

# A disk or a bus is not always as fast as it was while it was measured.
MARGIN = 1.5
_SAMPLE_BYTES = 2**28
_BLOCK_BYTES = 2**23


def sized(
    plan: Plan,
    subject: Subject,
    machine: Hardware,
    *,
    copy_bandwidth: float,
    tokens_per_second: float,
) -> Plan:
    """A streamed plan with the least window that hides its copies, as far as memory holds it.

    Args:
        plan: The plan, with the layers that it keeps.
        subject: What is planned for.
        machine: Where it runs.
        copy_bandwidth: Of weights to where they are multiplied, in bytes per second.
        tokens_per_second: Of the plan's arithmetic, had the weights always been there.

    Returns:
        The plan in whole batches, with the memory for them and the reason in words.
    """
    streamed = streamed_bytes(plan, subject)
    hiding_tokens = streamed / copy_bandwidth * tokens_per_second
    needed = max(1, math.ceil(MARGIN * hiding_tokens / plan.batch_tokens))
    least = _predicted(plan, 1, subject, machine)
    if plan.device == "cuda":
        left = machine.gpus[0].free_bytes - least.device_bytes
    else:
        left = machine.host_free_bytes - HOST_MARGIN_BYTES - least.host_bytes
    more = _predicted(plan, 2, subject, machine)
    batch_bytes = more.host_bytes + more.device_bytes - least.host_bytes - least.device_bytes
    most = 1 + max(0, left) // batch_bytes
    batches = min(needed, most)
    tokens = batches * plan.batch_tokens
    reason = (
        f"{streamed / 2**30:.1f} GiB at {copy_bandwidth / 1e9:.2f} GB/s hide behind "
        f"{hiding_tokens:.0f} tokens at {tokens_per_second:.0f} tokens/s"
    )
    if tokens < hiding_tokens:
        reason += f", and memory holds {tokens}"
    return _predicted(plan, batches, subject, machine).with_(reason=reason)


def streamed_bytes(plan: Plan, subject: Subject) -> float:
    """What a pass through all layers reads."""
    config, formats = subject.config, subject.formats[plan.variant]
    return memory.stored_bytes(config, formats) * (1 - plan.kept_layers / config.num_hidden_layers)


def tokens_per_second(
    plan: Plan, subject: Subject, *, copy_bandwidth: float, computing: float
) -> float:
    """How fast a streamed plan is in full windows: as fast as the slower of copy and arithmetic.

    Args:
        plan: The plan, with its window.
        subject: What is planned for.
        copy_bandwidth: Of weights to where they are multiplied, in bytes per second.
        computing: Tokens per second of its arithmetic, had the weights always been there.
    """
    copying = streamed_bytes(plan, subject) / copy_bandwidth
    return plan.window_tokens / max(plan.window_tokens / computing, copying)


def read_bandwidth(path: Path) -> float:
    """Bytes per second of a short read from the disk, the page cache left out.

    Args:
        path: The file, from the middle of which is read.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        begin, wanted = max(0, size - _SAMPLE_BYTES) // 2, min(size, _SAMPLE_BYTES)
        os.posix_fadvise(file.fileno(), begin, wanted, os.POSIX_FADV_DONTNEED)
        file.seek(begin)
        block = bytearray(_BLOCK_BYTES)
        done, start = 0, time.perf_counter()
        while done < wanted and (got := file.readinto(block)):
            done += got
        return done / (time.perf_counter() - start)


def _predicted(plan: Plan, batches: int, subject: Subject, machine: Hardware) -> Plan:
    """The plan with a window of so many batches, and its memory."""
    return with_memory(plan.with_(window_tokens=batches * plan.batch_tokens), subject, machine)
