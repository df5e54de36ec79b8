"""A plan becomes an engine, and texts become vectors through it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lowmem import cache
from lowmem.artifact import stock_files
from lowmem.artifact.contract import Contract
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import ROUNDED
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.plan import Plan
from lowmem.errors import BackendError, BundleError, InputError
from lowmem.text.batching import Batch, EncodedText, PackedBatch, arrange, duplicates
from lowmem.text.tokenizer import Tokenizer

Vectors = NDArray[np.float32]
_WINDOW_BATCHES = 8
_MOST_NAMED = 10
# A prefix this short costs more to copy before every text than it saves.
_SHORTEST_PREFIX = 8


class Engine(Protocol):
    """What runs a plan."""

    @property
    def waited_seconds(self) -> float:
        """How long arithmetic has stood still because weights were not there yet."""

    def embed(self, batches: Sequence[PackedBatch]) -> list[Vectors]:
        """Pooled vectors of each batch, float32 ``[texts, hidden_size]``."""


class Runner:
    """A loaded plan: tokenizer, engine and contract together.

    Attributes:
        plan: What runs.
        contract: The bundle's input contract.
        tokenizer: Text to ids.
        hidden_size: Length of a vector.
        normalizes: Whether the engine itself gives unit vectors.
    """

    def __init__(self, bundle: Bundle, plan: Plan) -> None:
        """Checks the variant's files and loads them.

        Raises:
            BundleError: A file is not the one that was exported.
            BackendError: The engine, its library or its device is missing.
            CapacityError: The weights do not fit.
            InputError: The variant has no graph for this compute.
        """
        directory = bundle.directory(plan.variant)
        before = _statuses(directory)
        bundle.check(plan.variant)
        checkpoint = Checkpoint(directory)
        stock_files.check(directory, checkpoint.config, bundle.contract)
        self.plan = plan
        self.contract = bundle.contract
        self.tokenizer = Tokenizer(
            directory / "tokenizer.json", bundle.contract, checkpoint.config.vocab_size
        )
        self.hidden_size = checkpoint.config.hidden_size
        self.normalizes = plan.engine == "onnxruntime" and bundle.contract.normalize_embeddings
        self._rounds_prefixes = rounds_prefixes(plan, bundle.variant(plan.variant).recipe)
        self._engine = _open_engine(bundle, checkpoint, plan)
        self._process = os.getpid()
        # Engines open files by name, some of them several times.
        if _statuses(directory) != before:
            raise BundleError(f"{directory} changed while it was opened: open it again")

    def embed(
        self,
        texts: Sequence[EncodedText],
        *,
        normalize: bool,
        batch_size: int | None = None,
        names: Sequence[str] | None = None,
        must_be_finite: bool = True,
        on_texts: Callable[[int], None] = lambda texts: None,
        out: Vectors | None = None,
    ) -> Vectors:
        """Vectors of tokenized texts.

        Args:
            texts: The texts; equal ones are computed once.
            normalize: Whether vectors get unit length.
            batch_size: Most texts of a pass, or None for the token budget alone.
            names: What to call each text in an error.
            must_be_finite: Whether NaN or infinity is an error, as it is for every caller but one
                that counts such vectors.
            on_texts: Told how many of the texts have just been finished.
            out: Where the vectors go, float32 ``[texts, hidden_size]``; a new array by default.

        Returns:
            ``out``, in the order given.

        Raises:
            BackendError: A vector is not finite, this process was forked after the plan was opened,
                float32 products would not be float32, or ONNX Runtime failed.
            CapacityError: A single text does not fit in memory.
            InputError: Unnormalised vectors of a graph that normalises, or ``out`` is of another
                shape or type.
        """
        if os.getpid() != self._process:
            raise BackendError(
                "an engine's threads do not survive a fork: load the model in each process, or "
                'start processes with multiprocessing.get_context("spawn")'
            )
        if not normalize and self.normalizes:
            raise InputError(
                f"the plan {self.plan.id} normalises inside its graph: normalize_embeddings=False "
                "needs a torch plan"
            )
        shape = (len(texts), self.hidden_size)
        vectors = np.empty(shape, np.float32) if out is None else out
        if vectors.shape != shape or vectors.dtype != np.float32:
            raise InputError(
                f"out must be float32 {list(shape)}, got {vectors.dtype} {list(vectors.shape)}"
            )
        first_rows = duplicates(texts)
        copies = np.bincount(first_rows, minlength=len(texts))
        is_broken = np.zeros(len(texts), np.bool_)
        batches = arrange(
            texts,
            np.unique(first_rows),
            self.plan.batch_tokens,
            batch_size=batch_size,
            shortest_prefix=shortest_prefix(self.plan, self.contract, self._rounds_prefixes),
        )
        is_scaled = normalize and not self.normalizes
        for window in self._windows(batches):
            packed = [batch.pack(texts, self.contract.pooling) for batch in window]
            for batch, embedded in zip(packed, self._engine.embed(packed), strict=True):
                is_broken[batch.rows] = ~np.isfinite(embedded).all(axis=1)
                vectors[batch.rows] = unit_length(embedded) if is_scaled else embedded
            if must_be_finite and is_broken.any():
                raise self._not_finite(np.flatnonzero(is_broken[first_rows]), names)
            on_texts(sum(int(copies[batch.rows].sum()) for batch in packed))
        for row in np.flatnonzero(first_rows != np.arange(len(texts))):
            vectors[row] = vectors[first_rows[row]]
        return vectors

    def _not_finite(self, rows: NDArray[np.int64], names: Sequence[str] | None) -> BackendError:
        """The error for such vectors, as many as have been computed."""
        more = f" and {len(rows) - _MOST_NAMED} more" if len(rows) > _MOST_NAMED else ""
        first = rows[:_MOST_NAMED].tolist()
        named = ", ".join(names[row] if names else str(row) for row in first)
        return BackendError(
            f"the plan {self.plan.id} gave vectors that are not finite, for "
            f"{'' if names else 'texts '}{named}{more}: choose another compute"
        )

    @property
    def waited_seconds(self) -> float:
        """How long arithmetic has stood still because weights were not there yet."""
        return self._engine.waited_seconds

    @property
    def peak_device_bytes(self) -> int:
        """Most CUDA memory that torch has held; 0 on a CPU, and where onnxruntime keeps it."""
        if self.plan.device != "cuda" or self.plan.engine != "torch":
            return 0
        import torch

        return int(torch.cuda.max_memory_reserved())

    def _windows(self, batches: Sequence[Batch]) -> list[list[Batch]]:
        """Batches that the engine gets at once: as many as share a reading of the weights."""
        if self.plan.schedule != "streamed":
            begins = range(0, len(batches), _WINDOW_BATCHES)
            return [list(batches[begin : begin + _WINDOW_BATCHES]) for begin in begins]
        windows: list[list[Batch]] = []
        tokens, held = 0, set[bytes]()
        for batch in batches:
            # A prefix's states are held as a text's are, and its keys and values besides.
            prefixes = {one.prefix.tobytes(): 2 * len(one.prefix) for one in batch.sections}
            tokens += batch.tokens + sum(prefixes[ids] for ids in prefixes.keys() - held)
            if tokens > self.plan.window_tokens or not windows:
                windows.append([])
                tokens, held = batch.tokens + sum(prefixes.values()), set()
            windows[-1].append(batch)
            held |= prefixes.keys()
        return windows


def unit_length(vectors: Vectors) -> Vectors:
    """Divides each row by its Euclidean length, taken in float64; a zero row stays zero."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    unit: Vectors = vectors / np.where(lengths > 0, lengths, 1.0).astype(np.float32)[:, None]
    return unit


def shortest_prefix(plan: Plan, contract: Contract, rounds_prefixes: bool = False) -> int | None:
    """Fewest tokens of a prefix that a plan computes apart, or None where it computes none apart.

    A prefix may see no later token and not be pooled. Where activations are rounded every prefix
    counts, since its own are kept exact and BOS carries the largest of all; but not where codes
    were fitted to rounded prefixes.
    """
    if plan.engine != "torch" or not contract.is_causal or contract.pooling != "lasttoken":
        return None
    rounds_texts_alone = plan.compute in ("int8", "fp8") and not rounds_prefixes
    return 1 if rounds_texts_alone else _SHORTEST_PREFIX


def rounds_prefixes(plan: Plan, recipe: Mapping[str, Any]) -> bool:
    """Whether 8-bit compute rounds a shared prefix like any other token.

    It does where the variant's codes were fitted to inputs that were all rounded: an exact prefix
    is not what they expect, and moves vectors further from the reference than a rounded one.
    """
    return plan.compute == "int8" and recipe.get("activations") == ROUNDED


def _statuses(directory: Path) -> dict[str, str]:
    """Name to identity of the files of a variant, as they are now; empty where there is none."""
    return {
        file.name: cache.identity(file.stat()) for file in directory.glob("*") if file.is_file()
    }


def _open_engine(bundle: Bundle, checkpoint: Checkpoint, plan: Plan) -> Engine:
    if plan.engine == "torch":
        from lowmem.compute.torch_engine import TorchEngine

        return TorchEngine(
            checkpoint,
            bundle.contract,
            device=plan.device,
            compute=plan.compute,
            schedule=plan.schedule,
            kept_layers=plan.kept_layers,
            drops_cache=plan.drops_cache,
            rounds_prefixes=rounds_prefixes(plan, bundle.variant(plan.variant).recipe),
            threads=plan.threads,
        )
    from lowmem.compute import onnx_selftest
    from lowmem.compute.onnx_engine import OnnxEngine

    graphs = bundle.variant(plan.variant).graphs
    graph = next((file for file, compute in graphs.items() if compute == plan.compute), None)
    if graph is None:
        raise InputError(
            f"{plan.variant} has no graph for compute {plan.compute}: it has {graphs} "
            f"({bundle.path})"
        )
    is_rounded = plan.compute == "int8" and plan.device == "cpu"
    if is_rounded and not onnx_selftest.is_exact(checkpoint.formats.values(), plan.threads):
        raise BackendError(
            f"8-bit products of onnxruntime are not exact on this CPU: {plan.id} would give wrong "
            "vectors; choose another engine or compute"
        )
    return OnnxEngine(
        checkpoint.directory, graph, bundle.contract, plan.device, threads=plan.threads
    )
