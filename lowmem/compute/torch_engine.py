"""Plans on torch: any variant, on a CPU or a CUDA device, resident or streamed."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.contract import Contract
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.decoder import Operations, PrefixStates
from lowmem.compute.heap import keep_freed_memory
from lowmem.compute.latent_attention import LatentAttention
from lowmem.compute.layers import Ends, Observer, Step, embed, prefixes_of, run
from lowmem.compute.operations import int8
from lowmem.compute.operations.cuda import cuda_operations
from lowmem.compute.operations.linear import to_torch
from lowmem.compute.operations.plain import PlainOperations
from lowmem.compute.operations.products import check_float32, keeps_code, rows_computed
from lowmem.compute.out_of_memory import is_out_of_memory
from lowmem.compute.plan import RECORDED_TOKENS, rounds_every_mlp
from lowmem.compute.prefixes import PrefixCache
from lowmem.compute.recorded_passes import (
    Compute,
    RecordedPasses,
    cuda_graphs,
    recording_lock,
)
from lowmem.compute.streaming import LayerStream
from lowmem.compute.threads import helpers_let_go
from lowmem.errors import BackendError, CapacityError
from lowmem.text.batching import PREFIX_TOKENS, PackedBatch

logger = logging.getLogger(__name__)


class TorchEngine:
    """One variant, ready to embed.

    Attributes:
        hidden_size: Length of a vector.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        contract: Contract,
        *,
        device: str = "cpu",
        compute: str = "fp32",
        schedule: str = "resident",
        kept_layers: int = 0,
        drops_cache: bool = False,
        rounds_prefixes: bool = False,
        threads: int | None = None,
    ) -> None:
        """Brings the weights to where the schedule wants them.

        Args:
            checkpoint: The variant's directory, opened.
            contract: The bundle's input contract.
            device: ``cpu`` or ``cuda``.
            compute: One of those that ``COMPUTES_OF_DEVICE`` has for the device.
            schedule: ``resident`` keeps the weights on the device (on a CPU: mapped);
                ``streamed`` reads layers from disk while others compute.
            kept_layers: How many layers a streamed plan keeps all the same.
            drops_cache: Whether what is streamed is let go from the page cache behind it.
            rounds_prefixes: Whether 8-bit compute rounds shared prefixes as it rounds texts.
            threads: CPU threads of this process's torch, or None to leave them.

        Raises:
            BackendError: There is no such device, it has not this arithmetic, or float32 products
                would not be float32.
            CapacityError: The weights do not fit the device.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("a cuda plan needs a CUDA device that torch can use; it finds none")
        check_float32()
        if threads is not None:
            torch.set_num_threads(threads)
        self.hidden_size = checkpoint.config.hidden_size
        self._config = checkpoint.config
        self._contract = contract
        self._device = device
        # Of a card's operations little is divided on the host, and a query waits for all of it.
        self._helpers = helpers_let_go if device == "cpu" else contextlib.nullcontext
        # Triton launches on whichever card is a thread's current one.
        self._card = torch.cuda.current_device() if device == "cuda" else None
        self._is_resident = schedule == "resident"
        self._prefixes = PrefixCache(PREFIX_TOKENS)
        self._rounds_prefixes = rounds_prefixes
        self._one_pass = threading.Lock()
        self._times_out_of_memory = 0
        self._most_tokens: int | None = None
        if self._is_resident:
            kept_layers = checkpoint.config.num_hidden_layers
        is_full = False
        try:
            with self._helpers():
                self._ops = _operations(checkpoint.config, device, compute)
                self._fills_batches = device == "cpu" and _fills_batches(self._ops, checkpoint)
                self._ends = _load_ends(checkpoint, device)
                self._layers = LayerStream(checkpoint, device, kept_layers, drops_cache=drops_cache)
                self._recorded = _records(device, schedule, contract)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            is_full = True
        if is_full:  # out here, where no traceback holds the weights that did fit
            raise CapacityError(
                f"the weights of {checkpoint.directory.name} do not fit the {device} device: "
                "choose a smaller variant, or --schedule streamed"
            )

    @property
    def waited_seconds(self) -> float:
        """How long arithmetic has stood still because a layer was not there yet, in all passes."""
        return self._layers.waited_seconds

    def embed(
        self, batches: Sequence[PackedBatch], on_layer: Observer | None = None
    ) -> list[NDArray[np.float32]]:
        """Pooled vectors of each batch, not normalised, float32 ``[texts, hidden_size]``.

        A streamed plan reads every layer once for all batches, whose hidden states it holds. What
        does not fit in memory is split in two and tried again. Threads take turns at it.

        Args:
            batches: The texts.
            on_layer: Sees the hidden states of each batch after each layer. Nothing is split then.

        Raises:
            CapacityError: A single text does not fit.
            BackendError: Float32 products would not be float32.
        """
        check_float32()
        no_autocast = torch.autocast(self._device, enabled=False)
        card = contextlib.nullcontext() if self._card is None else torch.cuda.device(self._card)
        with self._one_pass, self._helpers(), card, torch.inference_mode(), no_autocast:
            if on_layer is not None:
                return self._run(batches, on_layer)
            parts = [[batch] for batch in batches] if self._is_resident else [batches]
            return [vectors for part in parts for vectors in self._run_within_memory(part)]

    def _run_within_memory(self, batches: Sequence[PackedBatch]) -> list[NDArray[np.float32]]:
        """Runs batches; where that is too much at once, in two halves, down to single texts."""
        tokens = sum(batch.tokens for batch in batches)
        texts = sum(batch.texts for batch in batches)
        if texts == 1 or self._most_tokens is None or tokens <= self._most_tokens:
            try:
                return self._run(batches)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._ran_out(tokens, counts=texts > 1)
        if texts == 1:
            whole = batches[0].without_prefixes().tokens
            raise CapacityError(
                f"a text of {whole} tokens does not fit the memory of the {self._device} device: "
                "choose a smaller variant, --schedule streamed, or shorter texts"
            )
        if len(batches) > 1:
            middle = len(batches) // 2
            first = self._run_within_memory(batches[:middle])
            return first + self._run_within_memory(batches[middle:])
        halves = [self._run_within_memory([half])[0] for half in batches[0].split()]
        return [np.concatenate(halves)]

    def _ran_out(self, tokens: int, *, counts: bool = True) -> None:
        """Once may be another process's doing; from the second time on passes are smaller.

        What is too much for a text alone says nothing of passes over many.
        """
        if self._recorded is not None:
            self._recorded.clear()
        if self._device == "cuda":
            with recording_lock:
                torch.cuda.empty_cache()
        if not counts:
            return
        self._times_out_of_memory += 1
        if self._times_out_of_memory > 1:
            self._most_tokens = min(tokens // 2, self._most_tokens or tokens)
            logger.warning(
                "memory of the %s device ran out again: a pass has at most %d tokens from now on",
                self._device,
                self._most_tokens,
            )

    def _run(
        self, batches: Sequence[PackedBatch], on_layer: Observer | None = None
    ) -> list[NDArray[np.float32]]:
        if on_layer is None and self._recorded is not None and _is_recorded(batches):
            return [self._run_recorded(batches[0], self._recorded)]
        given = batches
        if self._fills_batches and on_layer is None:
            batches = [batch.filled(rows_computed(batch.tokens)) for batch in batches]
        steps = [self._step(batch) for batch in batches]
        hidden = deque(
            embed(batch.input_ids, self._ends.embedding, self._device) for batch in batches
        )
        vectors = self._compute(steps, hidden, on_layer)
        return [
            vector[: batch.texts].cpu().numpy()
            for batch, vector in zip(given, vectors, strict=True)
        ]

    def _run_recorded(self, batch: PackedBatch, recorded: RecordedPasses) -> NDArray[np.float32]:
        for prefix in prefixes_of(batch):
            self._prefixes.get(prefix)  # in use, even where nothing asks for it again
        hidden = embed(batch.input_ids, self._ends.embedding, self._device)
        return recorded.run(_shape(batch), hidden, lambda: self._pass_over(batch)).cpu().numpy()

    def _step(self, batch: PackedBatch) -> Step:
        return Step.of(batch, self._config, self._contract, self._device)

    def _compute(
        self,
        steps: Sequence[Step],
        hidden: deque[Tensor],
        on_layer: Observer | None = None,
    ) -> list[Tensor]:
        with contextlib.closing(iter(self._layers)) as layers:
            return run(
                self._ops,
                layers,
                steps,
                hidden,
                self._ends,
                self._config,
                self._contract,
                on_layer,
                self._prefixes,
                rounds_prefixes=self._rounds_prefixes,
            )

    def _pass_over(self, batch: PackedBatch) -> tuple[Compute, Sequence[PrefixStates] | None]:
        """The pass over a batch, and the states of its prefixes if all are known."""
        step = self._step(batch)
        known = [self._prefixes.get(prefix) for prefix in step.prefixes]
        read = [states for layers in known if layers is not None for states in layers]

        def compute(hidden: Tensor) -> Tensor:
            (vectors,) = self._compute([step], deque([hidden]))
            return vectors

        return compute, None if any(layers is None for layers in known) else read


def _records(device: str, schedule: str, contract: Contract) -> RecordedPasses | None:
    """Recorded passes where they can be: means are taken of tokens that the host counts."""
    if device != "cuda" or schedule != "resident" or contract.pooling != "lasttoken":
        return None
    return RecordedPasses(cuda_graphs())


def _is_recorded(batches: Sequence[PackedBatch]) -> bool:
    return len(batches) == 1 and batches[0].texts == 1 and batches[0].tokens <= RECORDED_TOKENS


def _shape(batch: PackedBatch) -> Hashable:
    """All that the pass over a batch depends on, its ids left out."""
    prefixes = [(section.prefix.tobytes(), section.texts) for section in batch.sections]
    return batch.cu_seqlens.tobytes(), batch.position_ids.tobytes(), tuple(prefixes)


def _fills_batches(ops: Operations, checkpoint: Checkpoint) -> bool:
    """Whether products of any number of tokens would each leave something behind."""
    if not isinstance(ops, PlainOperations):
        return False
    if isinstance(ops, int8.Int8Operations) and rounds_every_mlp(checkpoint.formats):
        return False
    return keeps_code(ops.dtype, checkpoint.config.largest_linear)


def _operations(config: ModelConfig, device: str, compute: str) -> Operations:
    """The fastest form of the operations; which one does not change the plan."""
    if device == "cuda":
        return cuda_operations(compute, config.rms_norm_eps, config.head_dim)
    keep_freed_memory()
    if compute == "int8" and int8.is_exact_and_faster(torch.get_num_threads()):
        return int8.Int8Operations(config.rms_norm_eps)
    return PlainOperations(compute, config.rms_norm_eps)


def _load_ends(checkpoint: Checkpoint, device: str) -> Ends:
    ends = Ends(to_torch(checkpoint.embedding()), to_torch(checkpoint.final_norm(), device))
    shape = checkpoint.config.latent_attention
    if shape is None:
        return ends
    latents = LatentAttention.load(checkpoint.latent_attention(), shape, device)
    return replace(ends, latent_attention=latents)
