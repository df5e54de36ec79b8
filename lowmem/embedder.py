"""The one public class: texts in, vectors out, by the plan that suits this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.contract import Contract
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.verdict import parse_floor
from lowmem.compute.engine import Runner, unit_length
from lowmem.compute.plan import Plan
from lowmem.errors import InputError
from lowmem.planner.candidates import AUTO, Wishes
from lowmem.planner.choice import choose
from lowmem.progress import Steps, bar, silent

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]


class Embedder:
    """A model that turns texts into vectors.

    Names and shapes follow sentence-transformers. Different on purpose:

    * A text over the contract's limit is an error, unless ``truncate=True``; then it is cut in
      front of its EOS, and a warning says what was cut.
    * ``normalize_embeddings=None`` follows the contract. ``False`` on an ONNX plan, whose graph
      normalises, is an error.
    * ``encode`` without ``prompt`` or ``prompt_name`` applies the document template. A
      ``prompt_name`` is ``query``, ``document`` or a task of the contract; a ``prompt`` replaces
      the template literally, and counts as the instruction that a mean leaves out.
    * ``encode_query`` without a task uses the contract's default task, and raises with the known
      names where there is none.
    * ``similarity`` returns numpy. ``batch_size`` caps the texts of a pass; None leaves it to the
      plan's token budget.

    Attributes:
        plan: What runs, and why it was chosen.
        contract: How texts become ids, and hidden states a vector.
        dimensions: Length of a vector that is not truncated.
    """

    def __init__(self, runner: Runner) -> None:
        """Wraps a loaded plan; ``Embedder.load`` is the way to get one."""
        self._runner = runner

    @classmethod
    def load(
        cls,
        bundle: str | PathLike[str],
        *,
        variant: str = AUTO,
        engine: str = AUTO,
        device: str = AUTO,
        compute: str = AUTO,
        schedule: str = AUTO,
        floor: str = "standard",
        repeated: float = 0.0,
        show_progress_bar: bool = False,
    ) -> Embedder:
        """Chooses a plan for this machine and loads it.

        Args:
            bundle: The directory that ``lowmem export`` wrote.
            variant: Such as ``int8``, or ``auto``.
            engine: ``torch``, ``onnxruntime`` or ``auto``.
            device: ``cpu``, ``cuda`` or ``auto``.
            compute: ``fp32``, ``bf16``, ``fp16``, ``int8`` or ``auto``; on a GPU also
                ``fp16-acc16`` and ``fp8``.
            schedule: ``resident``, ``streamed`` or ``auto``.
            floor: How faithful a plan must be: ``strict``, ``standard``, ``loose``, or
                ``mean=…,p5=…,min=…``.
            repeated: About which part of what will be embedded repeats an earlier text's
                instruction, at least 0 and below 1. There are plans that compute it once: 0.6 is
                right for short queries with one instruction.
            show_progress_bar: Whether to show on stderr how far the timing of plans has come: the
                first load on a machine times each, and those near the fastest twice.

        Raises:
            BundleError: The bundle is missing, damaged, or not what was exported.
            InputError: A name is unknown, nothing matches what was asked for, or ``repeated`` is no
                part.
            CapacityError: No plan fits, or none is faithful enough.
            BackendError: A device or library that was asked for is missing.
        """
        if not 0 <= repeated < 1:
            raise InputError(f"repeated must be at least 0 and below 1, got {repeated}")
        opened = Bundle(Path(bundle))
        with Steps() if show_progress_bar else nullcontext(silent) as progress:
            choice = choose(
                opened,
                wishes=Wishes(variant, engine, device, compute, schedule),
                floor=parse_floor(floor),
                repeated=repeated,
                progress=progress,
            )
        plan = choice.get()
        if choice.warning:
            logger.warning("%s", choice.warning)
        return cls(Runner(opened, plan))

    @property
    def plan(self) -> Plan:
        """What runs; ``plan.reason`` says why."""
        return self._runner.plan

    @property
    def dimensions(self) -> int:
        """Length of a vector that is not truncated."""
        return self._runner.hidden_size

    @property
    def contract(self) -> Contract:
        """The bundle's input contract."""
        return self._runner.contract

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        truncate: bool = False,
    ) -> Vectors:
        """Embeds texts.

        Args:
            sentences: One text, or many.
            prompt_name: ``document`` (the default), ``query``, or a task of the contract.
            prompt: What to put before each text, instead of a template.
            batch_size: Most texts of a pass, or None for the plan's token budget alone.
            show_progress_bar: Whether to show progress on stderr.
            normalize_embeddings: Whether vectors have unit length; None follows the contract.
            truncate_dim: How many leading dimensions to keep; of vectors of unit length what is
                kept is normalised again.
            truncate: Whether to cut texts that are too long, instead of refusing them.

        Returns:
            float32 ``[texts, dimensions]``, or ``[dimensions]`` for one text.

        Raises:
            InputError: A text is empty or too long, or an option cannot be served.
            BackendError: A vector is not finite, this process was forked after the model was
                loaded, or the engine failed.
            CapacityError: A single text does not fit in memory.
        """
        if prompt is not None and prompt_name is not None:
            raise InputError("give prompt or prompt_name, not both")
        if prompt is None:
            prompt = self._named_prompt("document" if prompt_name is None else prompt_name)
        if isinstance(sentences, str):
            texts = [sentences]
        else:
            has_order = isinstance(sentences, Iterable) and not isinstance(
                sentences, Set | Mapping | bytes
            )
            texts = list(sentences) if has_order else []
            if not has_order:
                raise InputError("sentences must be a string or a sequence of strings")
            for place, text in enumerate(texts):
                if not isinstance(text, str):
                    kind = type(text).__name__
                    raise InputError(f"sentences must be strings, and number {place} is {kind}")
        vectors = self.embed(
            texts,
            [prompt] * len(texts),
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            truncate=truncate,
        )
        return vectors[0] if isinstance(sentences, str) else vectors

    def encode_query(
        self, sentences: str | Sequence[str], *, task: str | None = None, **options: Any
    ) -> Vectors:
        """Embeds queries.

        Args:
            sentences: One query, or many.
            task: A task's name in the contract, or an instruction; None is the contract's default.
            options: As for ``encode``; ``prompt`` or ``prompt_name`` stand in place of a task.

        Raises:
            InputError: As ``encode``; also when a task is needed and there is no default.
        """
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt"] = self.contract.prompt("query", task)
        elif task is not None:
            raise InputError("give task, prompt or prompt_name, one of them")
        return self.encode(sentences, **options)

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Vectors:
        """Embeds documents; ``options`` are those of ``encode``."""
        return self.encode(sentences, **options)

    def embed(
        self,
        texts: Sequence[str],
        prompts: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        normalize_embeddings: bool | None = None,
        truncate_dim: int | None = None,
        truncate: bool = False,
        out: Vectors | None = None,
    ) -> Vectors:
        """Embeds texts that each have a prompt of their own.

        Args:
            texts: The texts.
            prompts: What to put before each.
            names: What to call each text in an error, such as its line in a file.
            batch_size: As for ``encode``, like all that follow.
            show_progress_bar: Whether to show progress on stderr.
            normalize_embeddings: Whether vectors have unit length; None follows the contract.
            truncate_dim: How many leading dimensions to keep.
            truncate: Whether to cut texts that are too long.
            out: Where all dimensions of the vectors go, float32 ``[texts, dimensions]``, such as
                a mapped file; a new array by default.

        Returns:
            float32 ``[texts, dimensions]``; ``out``, if it was given and nothing is cut off.

        Raises:
            InputError: A text is empty or too long, or an option cannot be served.
            BackendError: A vector is not finite, this process was forked after the model was
                loaded, or the engine failed.
            CapacityError: A single text does not fit in memory.
        """
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if truncate_dim is not None and not 1 <= truncate_dim <= self.dimensions:
            raise InputError(
                f"truncate_dim must be from 1 to {self.dimensions}, got {truncate_dim}"
            )
        encoded = self._runner.tokenizer.encode(texts, prompts, truncate=truncate, names=names)
        cut = [row for row, text in enumerate(encoded) if text.cut_tokens]
        if cut:
            longest = max(encoded[row].cut_tokens for row in cut)
            logger.warning(
                "texts cut to %d tokens: %d, by up to %d tokens; the first is %s",
                self.contract.max_seq_length,
                len(cut),
                longest,
                names[cut[0]] if names else f"text {cut[0]}",
            )
        normalize = self.contract.normalize_embeddings
        if normalize_embeddings is not None:
            normalize = normalize_embeddings
        with bar("embedding", len(encoded), shown=show_progress_bar) as advance:
            vectors = self._runner.embed(
                encoded,
                normalize=normalize,
                batch_size=batch_size,
                names=names,
                on_texts=advance,
                out=out,
            )
        if truncate_dim is None:
            return vectors
        kept = np.ascontiguousarray(vectors[:, :truncate_dim])
        return unit_length(kept) if normalize else kept

    def similarity(self, first: Vectors, second: Vectors) -> Vectors:
        """Cosine similarity of every pair: ``[n, d]`` and ``[m, d]`` to float32 ``[n, m]``.

        One vector, ``[d]``, counts as ``[1, d]``.

        Raises:
            InputError: The dimensions differ.
        """
        left, right = (
            np.atleast_2d(np.asarray(vectors, np.float32)) for vectors in (first, second)
        )
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
            raise InputError(
                f"similarity needs [n, d] and [m, d], got {left.shape} and {right.shape}"
            )
        scores: Vectors = unit_length(left) @ unit_length(right).T
        return scores

    def _named_prompt(self, name: str) -> str:
        if name in ("query", "document"):
            return self.contract.prompt(name)
        if name not in self.contract.tasks:
            known = ", ".join(["query", "document", *sorted(self.contract.tasks)])
            raise InputError(f"prompt_name must be one of {known}, got {name!r}")
        return self.contract.prompt("query", name)
