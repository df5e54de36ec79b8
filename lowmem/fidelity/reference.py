"""Reference vectors: the stored 16-bit weights, multiplied in float32, layer by layer from disk.

A pass needs the memory of two layers, whatever the model's size. Vectors of the built-in texts are
made at export, or by the first report, and travel with the bundle (``stored_reference.py``); those
of a user's own texts are kept in the user's cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem import cache, data
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.manifest import Bundle, file_sha256
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.data import Row
from lowmem.errors import InputError
from lowmem.fidelity.npy_files import npy_bytes
from lowmem.fidelity.parts import Parts, cache_key
from lowmem.measure import Record

Vectors = NDArray[np.float32]
BATCH_TOKENS = 4096
_WINDOW_TOKENS = 4 * BATCH_TOKENS
_LONGEST_SECONDS = 600


@dataclass(frozen=True)
class Reference:
    """Vectors that others are compared with.

    Attributes:
        name: Which texts: ``probe``, ``quick``, or a file's name.
        rows: The texts.
        tokens: Tokens of each text, ``[texts]``.
        truncated: How many texts were cut to the contract's limit.
        vectors: float32 ``[texts, hidden_size]``, normalised as the contract says.
        sha256: Of the vectors' ``.npy`` bytes.
        given: The file that the vectors were read from, or None where they were computed.
        checked: How many of given vectors were compared with our own.
        all_texts: How many texts there are, where these are only a part of them.
    """

    name: str
    rows: tuple[Row, ...]
    tokens: tuple[int, ...]
    truncated: int
    vectors: Vectors
    sha256: str
    given: str | None = None
    checked: int = 0
    all_texts: int | None = None

    @property
    def texts_sha256(self) -> str:
        """Identity of the texts."""
        return data.sha256(self.rows)

    def part(self, places: Sequence[int]) -> Reference:
        """The same for some of the texts; the whole where that is all of them."""
        if len(places) == len(self.rows):
            return self
        tokens = tuple(self.tokens[place] for place in places)
        # A text that was cut is as long as the limit, and no other is longer.
        truncated = sum(count == max(self.tokens) for count in tokens) if self.truncated else 0
        vectors = self.vectors[list(places)]
        rows = [self.rows[place] for place in places]
        some = _reference(self.name, rows, tokens, truncated, vectors)
        return replace(some, given=self.given, checked=self.checked, all_texts=len(self.rows))


def plan(threads: int) -> Plan:
    """What the reference is: the 16-bit weights in float32, each layer read when it is reached."""
    return Plan(
        "fp16",
        "torch",
        "cpu",
        "fp32",
        "streamed",
        threads=threads,
        batch_tokens=BATCH_TOKENS,
        window_tokens=_WINDOW_TOKENS,
    )


def compute(
    bundle: Bundle,
    name: str,
    rows: Sequence[Row],
    threads: int,
    on_texts: Callable[[int], None] = lambda texts: None,
    parts: Parts | None = None,
) -> Reference:
    """Runs the reference over texts; those over the limit are cut, EOS kept.

    Args:
        bundle: A bundle that holds ``fp16``.
        name: What the texts are called.
        rows: The texts.
        threads: CPU threads.
        on_texts: Told how many texts have been finished.
        parts: Keeps what is finished until the report is complete; None computes all at once.

    Raises:
        InputError: The bundle has no ``fp16``.
    """
    runner = Runner(bundle, plan(threads))
    encoded = runner.tokenizer.encode_rows(rows)
    tokens = tuple(len(text.input_ids) for text in encoded)
    truncated = sum(text.cut_tokens > 0 for text in encoded)
    normalize = runner.contract.normalize_embeddings
    if parts is None:
        vectors = runner.embed(encoded, normalize=normalize, on_texts=on_texts)
    else:

        def run(some: Sequence[Row]) -> tuple[Vectors, Record]:
            texts = runner.tokenizer.encode_rows(some)
            start = time.perf_counter()
            found = runner.embed(texts, normalize=normalize)
            seconds = time.perf_counter() - start
            count = sum(len(text.input_ids) for text in texts)
            return found, Record(len(texts), count, 0.0, [seconds])

        identity = {**_identity(bundle, rows), "plan": "reference", "threads": threads}
        vectors, _ = parts.embed(identity, rows, tokens, _WINDOW_TOKENS, run, on_texts)
    return _reference(name, rows, tokens, truncated, vectors)


def built_in_texts(config: ModelConfig) -> str:
    """``probe``, or ``quick`` where this machine would need over ten minutes for ``probe``."""
    tokens = sum(len(row.text) for row in data.load("probe")) / 3
    seconds = tokens * 2 * config.linear_weights / products_per_second()
    return "probe" if seconds < _LONGEST_SECONDS else "quick"


def wanted_texts(bundle: Bundle) -> str:
    """Which built-in texts a bundle without reference vectors shall have them of.

    Raises:
        InputError: The bundle has no ``fp16``.
    """
    if not has_fp16(bundle):
        raise InputError(
            f"{bundle.path} has no reference vectors, and no fp16 that they could be computed by: "
            "export fp16 as well"
        )
    return built_in_texts(Checkpoint(bundle.directory("fp16")).config)


def of_own_texts(
    bundle: Bundle,
    name: str,
    rows: Sequence[Row],
    threads: int,
    parts: Parts,
    on_texts: Callable[[int], None] = lambda texts: None,
) -> Reference:
    """Reference vectors of the user's texts, from the user's cache if this version put them there.

    Raises:
        InputError: They must be computed, and the bundle has no ``fp16``.
    """
    if not has_fp16(bundle):
        raise InputError(
            f"reference vectors of other texts need the variant fp16, which {bundle.path} lacks: "
            "leave out --texts, or export fp16"
        )
    key = cache_key(_identity(bundle, rows))
    folder = cache.directory() / "references"
    vectors, tokens = folder / f"{key}.npy", f"reference-{key}.json"
    known = cache.read_json(tokens) or {}
    # What is not there, or damaged, is computed again.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if file_sha256(vectors) == known["sha256"]:
            stored = np.load(vectors, allow_pickle=False)
            return _reference(name, rows, tuple(known["tokens"]), known["truncated"], stored)
    reference = compute(bundle, name, rows, threads, on_texts, parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with cache.replacing(vectors) as file:
            file.write(npy_bytes(reference.vectors))
    except OSError:  # a cache that cannot be written only costs the time of the next pass
        return reference
    about = {
        "sha256": reference.sha256,
        "tokens": list(reference.tokens),
        "truncated": reference.truncated,
    }
    cache.write_json(tokens, about)
    return reference


def _reference(
    name: str, rows: Sequence[Row], tokens: tuple[int, ...], truncated: int, vectors: Vectors
) -> Reference:
    digest = hashlib.sha256(npy_bytes(vectors)).hexdigest()
    return Reference(name, tuple(rows), tokens, truncated, vectors, digest)


def _identity(bundle: Bundle, rows: Sequence[Row]) -> dict[str, Any]:
    return {"artifact": bundle.artifact_sha256("fp16"), "texts": data.sha256(rows)}


def has_fp16(bundle: Bundle) -> bool:
    """Whether a bundle holds what reference vectors are computed from."""
    return "fp16" in bundle.manifest.variants


def products_per_second() -> float:
    """Floating-point operations per second of a float32 product on this machine."""
    left, right = np.ones((256, 1024), np.float32), np.ones((1024, 1024), np.float32)
    left @ right
    start = time.perf_counter()
    for _ in range(4):
        left @ right
    return 4 * 2 * left.size * right.shape[1] / (time.perf_counter() - start)
