"""Passes over one short text as a single launch: a CUDA graph for each shape that has come twice.

A query has so little arithmetic that asking for its kernels one by one takes longer than they do.
What a recording reads besides its input lies where it lay, so whoever records keeps all of it:
positions, the layouts of attention, keys and values of the prefix. A recording counts only if its
replays give what the pass itself gives, for its own input and for another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lowmem.compute.out_of_memory import is_out_of_memory
from lowmem.compute.plan import MOST_RECORDED

logger = logging.getLogger(__name__)

_MOST_SEEN = 1024
# Another library call, chosen for another workspace, may round otherwise in 16 bits. What is really
# wrong, such as a tensor that was let go, has nothing in common with what is expected.
_TOLERANCE = 2.0**-5

Compute = Callable[[Tensor], Tensor]
"""Embeddings, float32 ``[tokens, hidden]`` on the device, to vectors ``[texts, hidden]`` there."""
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Runs a function; gives what does the same work again, and where that leaves its result."""


class RecordedPasses:
    """The passes of some shapes, the last used ones."""

    def __init__(self, record: Record, device: str) -> None:
        """Records nothing yet.

        Args:
            record: Records a pass; every call of it may use memory that earlier recordings use.
            device: Where passes compute.
        """
        self._record = record
        self._device = device
        self._works = True
        self._passes: dict[Hashable, _Recording | None] = {}  # None: seen; the last used is last

    def run(
        self, shape: Hashable, hidden: Tensor, prepare: Callable[[], tuple[Compute, bool]]
    ) -> Tensor:
        """The vectors of a batch.

        Args:
            shape: All that a pass depends on, its input left out.
            hidden: Embeddings of the tokens, float32 ``[tokens, hidden]``, on the host.
            prepare: Gives the pass, and whether it may be recorded: whether it does nothing but
                launch kernels. It is not asked where the pass has been recorded.

        Returns:
            float32 ``[texts, hidden]`` on the device, until the next call.
        """
        is_known = shape in self._passes
        known = self._passes.pop(shape, None)
        self._passes[shape] = known
        if known is not None:
            return known.replay(hidden)
        compute, may_be_recorded = prepare()
        vectors = compute(hidden.to(self._device))
        if is_known and may_be_recorded and self._works:
            self._add(shape, compute, hidden, vectors)
        self._let_go()
        return vectors

    def _add(self, shape: Hashable, compute: Compute, hidden: Tensor, vectors: Tensor) -> None:
        """Records a pass that has just been run, unless that does not work here."""
        try:
            recording = _Recording(self._record, compute, hidden.to(self._device))
            other = hidden.flip(0) / 2  # other rows, and where there is but one, another ratio
            is_right = _agree(recording.replay(hidden), vectors) and _agree(
                recording.replay(other), compute(other.to(self._device))
            )
        except (RuntimeError, MemoryError) as error:
            self._works = False
            reason = "memory is short" if is_out_of_memory(error) else str(error)
            logger.info("passes are not recorded, which single queries would gain by: %s", reason)
            return
        if not is_right:
            self._works = False
            self._passes = dict.fromkeys(self._passes)
            logger.warning("a recorded pass gives other vectors on this card: none is used")
            return
        self._passes[shape] = recording

    def _let_go(self) -> None:
        """Drops what was not used for the longest time."""
        recorded = [shape for shape, one in self._passes.items() if one is not None]
        for shape in recorded[:-MOST_RECORDED]:
            del self._passes[shape]
        while len(self._passes) > _MOST_SEEN:
            del self._passes[next(iter(self._passes))]


class _Recording:
    """A pass that has been recorded, with the memory of its input."""

    def __init__(self, record: Record, compute: Compute, hidden: Tensor) -> None:
        """Records a pass, which must have been run before: kernels are compiled and chosen."""
        self._hidden = hidden.clone()
        self._compute = compute  # holds what the kernels read
        self._launch, self._vectors = record(lambda: compute(self._hidden))

    def replay(self, hidden: Tensor) -> Tensor:
        """The vectors of other tokens, where the next replay leaves its own."""
        self._hidden.copy_(hidden)
        self._launch()
        return self._vectors


def cuda_graphs() -> Record:
    """Recordings as CUDA graphs, which share their memory: each is read before another runs."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may have business of their own with the card.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    return record


def _agree(left: Tensor, right: Tensor) -> bool:
    """Whether vectors are as near to each other as roundings leave them; what is NaN never is."""
    distance = torch.linalg.vector_norm((left - right).float())
    return bool(distance <= _TOLERANCE * torch.linalg.vector_norm(right.float()))
