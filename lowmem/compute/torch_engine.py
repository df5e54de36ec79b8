"""Plans on torch: any variant, on a CPU or a CUDA device, resident or streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from lowmem.artifact.contract import Contract
from lowmem.artifact.tensors import StoredTensor
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.decoder import DecoderLayer
from lowmem.compute.latent_attention import LatentAttention
from lowmem.compute.layers import Ends, Observer, load_layer, run
from lowmem.compute.operations.linear import to_torch
from lowmem.compute.operations.plain import PlainOperations
from lowmem.errors import BackendError, CapacityError
from lowmem.text.batching import PackedBatch

# torch says only in words that the host's memory, or that of cuBLAS, is used up.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


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
        threads: int | None = None,
    ) -> None:
        """Brings the weights to where the schedule wants them.

        Args:
            checkpoint: The variant's directory, opened.
            contract: The bundle's input contract.
            device: ``cpu`` or ``cuda``.
            compute: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
            schedule: ``resident`` keeps the weights on the device (on a CPU: mapped);
                ``streamed`` reads each layer from disk when its turn comes, and drops it.
            threads: CPU threads of this process's torch, or None to leave them.

        Raises:
            BackendError: There is no such device, or float32 products would not be float32.
            CapacityError: The weights do not fit the device.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise BackendError("a cuda plan needs a CUDA device that torch can use; it finds none")
        if _float32_precision() != "highest":
            raise BackendError(
                "float32 products must be float32, and torch is set otherwise "
                f"({_float32_precision()}): call torch.set_float32_matmul_precision('highest')"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        self.hidden_size = checkpoint.config.hidden_size
        self._config = checkpoint.config
        self._contract = contract
        self._checkpoint = checkpoint
        self._device = device
        self._ops = PlainOperations(compute, checkpoint.config.rms_norm_eps)
        self._resident: list[DecoderLayer] | None = None
        try:
            self._ends = _load_ends(checkpoint, device)
            if schedule == "resident":
                self._resident = [load_layer(layer, device) for layer in checkpoint.layers()]
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"the weights of {checkpoint.directory.name} do not fit the {device} device: "
                "choose a smaller variant, or --schedule streamed"
            ) from error

    def embed(
        self, batches: Sequence[PackedBatch], on_layer: Observer | None = None
    ) -> list[NDArray[np.float32]]:
        """Pooled vectors of each batch, not normalised, float32 ``[texts, hidden_size]``.

        A streamed plan reads every layer once for all batches, whose hidden states it holds. What
        does not fit in memory is split in two and tried again.

        Args:
            batches: The texts.
            on_layer: Sees the hidden states of each batch after each layer. Nothing is split then.

        Raises:
            CapacityError: A single text does not fit.
        """
        with torch.inference_mode():
            if on_layer is not None:
                return self._run(batches, on_layer)
            if self._resident is None:
                return _split_until_it_fits(self._run, batches, self._device)
            return [
                vectors
                for batch in batches
                for vectors in _split_until_it_fits(self._run, [batch], self._device)
            ]

    def _run(
        self, batches: Sequence[PackedBatch], on_layer: Observer | None = None
    ) -> list[NDArray[np.float32]]:
        vectors = run(
            self._ops, self._layers(), batches, self._ends, self._config, self._contract, on_layer
        )
        return [vector.cpu().numpy() for vector in vectors]

    def _layers(self) -> Iterable[DecoderLayer]:
        if self._resident is not None:
            return self._resident
        read = StoredTensor.read
        return (load_layer(layer, self._device) for layer in self._checkpoint.layers(read))


def _load_ends(checkpoint: Checkpoint, device: str) -> Ends:
    ends = Ends(checkpoint.embedding(), to_torch(checkpoint.final_norm(), device))
    shape = checkpoint.config.latent_attention
    if shape is None:
        return ends
    latents = LatentAttention.load(checkpoint.latent_attention(), shape, device)
    return replace(ends, latent_attention=latents)


def _float32_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # so torch answers where the precision was set for one backend alone
        return "one backend's fp32_precision"


def _split_until_it_fits(
    embed: Callable[[Sequence[PackedBatch]], list[NDArray[np.float32]]],
    batches: Sequence[PackedBatch],
    device: str,
) -> list[NDArray[np.float32]]:
    """Runs batches; when memory runs out, in two halves, down to single texts."""
    try:
        return embed(batches)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    if device == "cuda":
        torch.cuda.empty_cache()
    if len(batches) > 1:
        middle = len(batches) // 2
        first = _split_until_it_fits(embed, batches[:middle], device)
        return first + _split_until_it_fits(embed, batches[middle:], device)
    (batch,) = batches
    if batch.texts == 1:
        tokens = batch.without_prefix().tokens
        raise CapacityError(
            f"a text of {tokens} tokens does not fit the memory of the {device} device: choose a "
            "smaller variant, --schedule streamed, or shorter texts"
        )
    halves = [_split_until_it_fits(embed, [half], device)[0] for half in batch.split()]
    return [np.concatenate(halves)]


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )
