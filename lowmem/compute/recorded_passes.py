"""Passes over one short text as a single launch: a CUDA graph for each shape that has come twice.

A query has so little arithmetic that asking for its kernels one by one takes longer than they do.
What a recording reads besides its input must lie where it lay. Positions and the layouts of
attention stay with it; keys and values of prefixes are the engine's, and a recording ends when they
do. It counts only if its replays give what the pass itself gives, for its own input and another.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lowmem.compute.out_of_memory import is_out_of_memory
from lowmem.compute.plan import MOST_RECORDED

logger = logging.getLogger(__name__)

# A recording gives way to another when it has not been used in so many passes: of more shapes than
# can be recorded, some stay so, and none is recorded again and again.
_LONG_UNUSED = 1024
# Another library call, chosen for another workspace, may round otherwise in 16 bits. Vectors that
# are really wrong have nothing in common with those expected.
_TOLERANCE = 2.0**-5

# Only one recording may be under way in a process, and memory must not be given back meanwhile.
recording_lock = threading.Lock()

Compute = Callable[[Tensor], Tensor]
"""Embeddings, float32 ``[tokens, hidden]`` on the device, to vectors ``[texts, hidden]`` there."""
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Gives what does a function's work, and where that leaves its result; the function is called."""
Prepare = Callable[[], tuple[Compute, Sequence[object] | None]]
"""Gives a pass, and what it reads that is not its own; None if it does more than launch kernels."""


class RecordedPasses:
    """The passes of the shapes that come most."""

    def __init__(self, record: Record) -> None:
        """Records nothing yet.

        Args:
            record: Records a pass; every call of it may use memory that earlier recordings use.
        """
        self._record = record
        self._works = True
        self._passes = 0
        self._seen: dict[Hashable, int] = {}  # and in which pass; the last is last
        self._recorded: dict[Hashable, _Recording] = {}  # in the same order

    def run(self, shape: Hashable, hidden: Tensor, prepare: Prepare) -> Tensor:
        """The vectors of a batch.

        Args:
            shape: All that a pass depends on, its input left out.
            hidden: Embeddings of the tokens, float32 ``[tokens, hidden]``, on the device.
            prepare: Not asked where the pass has been recorded.

        Returns:
            float32 ``[texts, hidden]`` on the device, until the next call.
        """
        self._passes += 1
        is_new = self._seen.pop(shape, None) is None
        self._seen[shape] = self._passes
        while self._seen[oldest := next(iter(self._seen))] < self._passes - _LONG_UNUSED:
            del self._seen[oldest]
        recording = self._recorded.pop(shape, None)
        if recording is not None and recording.is_whole:
            self._recorded[shape] = recording
            return recording.replay(hidden)
        compute, read = prepare()
        vectors = compute(hidden)
        if not is_new and read is not None and self._works and self._has_room():
            self._add(shape, compute, read, hidden, vectors)
        return vectors

    def clear(self) -> None:
        """Lets all recordings go, and their memory."""
        self._recorded.clear()

    def _has_room(self) -> bool:
        """Whether one more pass may be recorded, which ends those of no use any more."""
        for shape, recording in list(self._recorded.items()):
            if not recording.is_whole:
                del self._recorded[shape]
        if len(self._recorded) == MOST_RECORDED:
            oldest = next(iter(self._recorded))
            if oldest not in self._seen:
                del self._recorded[oldest]
        return len(self._recorded) < MOST_RECORDED

    def _add(
        self,
        shape: Hashable,
        compute: Compute,
        read: Sequence[object],
        hidden: Tensor,
        vectors: Tensor,
    ) -> None:
        """Records a pass that has just been run, unless that does not work here."""
        other = hidden.flip(0, 1)  # other tokens, which no text has
        try:
            expected = compute(other)
            recording = _Recording(self._record, compute, read, hidden)
            is_right = _agree(recording.replay(other), expected) and _agree(
                recording.replay(hidden), vectors
            )
        except (RuntimeError, MemoryError) as error:
            self._works = False
            reason = "memory is short" if is_out_of_memory(error) else str(error)
            logger.info("passes are not recorded, which single queries would gain by: %s", reason)
            return
        if not is_right:
            self._works = False
            self.clear()
            logger.warning("a recorded pass gives other vectors on this card: none is used")
            return
        self._recorded[shape] = recording


class _Recording:
    """A pass that has been recorded, with the memory of its input."""

    def __init__(
        self, record: Record, compute: Compute, read: Sequence[object], hidden: Tensor
    ) -> None:
        """Records a pass, which must have been run before: kernels are compiled and chosen."""
        self._hidden = hidden.clone()
        self._compute = compute  # which holds what the kernels read and is its own
        self._read = [weakref.ref(one) for one in read]
        self._launch, self._vectors = record(lambda: compute(self._hidden))

    @property
    def is_whole(self) -> bool:
        """Whether all that it reads is there."""
        return all(one() is not None for one in self._read)

    def replay(self, hidden: Tensor) -> Tensor:
        """The vectors of other tokens, where the next replay of any leaves its own."""
        self._hidden.copy_(hidden)
        self._launch()
        return self._vectors


def cuda_graphs() -> Record:
    """Recordings as CUDA graphs, which share their memory: each is read before another runs."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()
    graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        nonlocal pool
        if not graphs:
            # Before 2.12 torch takes no graph into a pool again that all have left, but whose
            # memory cuBLAS still has.
            pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may have business of their own with the card.
        capture = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
        with (
            recording_lock,
            torch.cuda.stream(torch.cuda.current_stream()),  # back to it, whatever fails
            # What torch keeps of its first graph serves graphs of other modes, too.
            torch.inference_mode(False),
            capture,
            torch.inference_mode(),
        ):
            result = run()
        graphs.add(graph)
        return graph.replay, result

    return record


def _agree(left: Tensor, right: Tensor) -> bool:
    """Whether vectors are as near to each other as roundings leave them, or both not finite."""
    left, right = (torch.nan_to_num(one.float()) for one in (left, right))
    distance = torch.linalg.vector_norm(left - right)
    return bool(distance <= _TOLERANCE * torch.linalg.vector_norm(right))
