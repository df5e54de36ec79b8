"""What a report is made on: texts, a judged collection and judged pairs, with their references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem import data
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.data import Row
from lowmem.errors import InputError
from lowmem.fidelity import given, reference, stored_reference
from lowmem.fidelity.directions import Vectors
from lowmem.fidelity.parts import Parts
from lowmem.fidelity.reference import Reference
from lowmem.fidelity.retrieval import Collection
from lowmem.fidelity.sample import stratified
from lowmem.fidelity.sts import Pairs
from lowmem.text.tokenizer import Tokenizer

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Inputs:
    """What every plan embeds.

    Attributes:
        texts: What the cosines are about.
        collection: Documents, queries and judgements, with the reference of ``collection.rows``.
        pairs: Judged pairs, with the reference of ``pairs.rows``.
    """

    texts: Reference
    collection: tuple[Collection, Reference] | None = None
    pairs: tuple[Pairs, Reference] | None = None

    @property
    def references(self) -> list[Reference]:
        """All references, that of the texts first."""
        return [self.texts, *(one[1] for one in (self.collection, self.pairs) if one)]


@dataclass(frozen=True)
class Wanted:
    """What was asked for, read and checked, before anything is computed.

    Attributes:
        bundle: The bundle.
        name: ``probe`` or ``quick`` for the built-in texts, else a file's name.
        rows: The texts.
        tokens: Length of each.
        truncated: How many are cut to the contract's limit.
        is_built_in: Whether the texts are built-in ones.
        stored: The bundle's own reference of the built-in texts, or None where there is none, and
            for others.
        given: Vectors that someone else computed, of all texts, and their file, or None.
        places: Which of the texts are taken.
        collection: As in :class:`Inputs`.
        pairs: As in :class:`Inputs`.
    """

    bundle: Bundle
    name: str
    rows: tuple[Row, ...]
    tokens: tuple[int, ...]
    truncated: int
    is_built_in: bool
    stored: Reference | None
    given: tuple[Path, Vectors] | None
    places: tuple[int, ...]
    collection: Collection | None
    pairs: Pairs | None

    @property
    def texts(self) -> tuple[Row, ...]:
        """The texts that are taken."""
        return tuple(self.rows[place] for place in self.places)

    @property
    def texts_sha256(self) -> str:
        """Identity of the texts that are taken."""
        return data.sha256(self.texts)

    @property
    def plan_tokens(self) -> int:
        """About how many tokens each plan embeds; judged texts are counted by characters."""
        judged = [*(self.collection.rows if self.collection else ())]
        judged += self.pairs.rows if self.pairs else ()
        characters = sum(len(row.text) for row in judged)
        return sum(self.tokens[place] for place in self.places) + characters // 4

    @property
    def reference_tokens(self) -> int:
        """About how many tokens the reference embeds, if the cache holds none."""
        taken = sum(self.tokens[place] for place in self.places)
        judged = self.plan_tokens - taken
        if self.stored or self.given:
            return judged
        return judged + (sum(self.tokens) if self.is_built_in else taken)

    def embedded(self, threads: int, parts: Parts, progress: Progress) -> Inputs:
        """Computes what is missing of the references; that of built-in texts goes into the bundle.

        Args:
            threads: CPU threads.
            parts: Keeps finished parts.
            progress: Opens a progress bar for a work and its number of texts.

        Raises:
            InputError: The bundle has no fp16, or given vectors are of other texts.
        """

        def of(name: str, rows: Sequence[Row]) -> Reference:
            with progress(f"reference vectors of {name}", len(rows)) as advance:
                return reference.of_own_texts(self.bundle, name, rows, threads, parts, advance)

        return Inputs(
            self._texts(threads, of),
            (self.collection, of(self.collection.name, self.collection.rows))
            if self.collection
            else None,
            (self.pairs, of(self.pairs.name, self.pairs.rows)) if self.pairs else None,
        )

    def _texts(self, threads: int, of: Callable[[str, Sequence[Row]], Reference]) -> Reference:
        if self.given is None:
            if self.stored is not None:
                return self.stored.part(self.places)
            if self.is_built_in:
                made = of(self.name, self.rows)
                stored_reference.keep(self.bundle, made)
                return made.part(self.places)
            own_texts = of(self.name, self.texts)
            is_part = len(self.places) < len(self.rows)
            return replace(own_texts, all_texts=len(self.rows) if is_part else None)
        path, vectors = self.given
        blank = Reference(self.name, self.rows, self.tokens, self.truncated, vectors, "")
        checked = given.checked(len(self.rows))
        own: Vectors | None = None
        if self.stored is not None:
            own = self.stored.vectors[checked]
        elif "fp16" in self.bundle.manifest.variants:
            some = [self.rows[place] for place in checked]
            own = reference.compute(self.bundle, self.name, some, threads).vectors
        return given.replaced(blank, vectors, path, own).part(self.places)


def want(
    bundle: Bundle,
    *,
    texts: tuple[str, Sequence[Row]] | None,
    given_file: Path | None,
    limit: int | None,
    collection: Collection | None,
    pairs: Pairs | None,
) -> Wanted:
    """Reads and checks all that can be checked before anything is computed.

    Args:
        bundle: The bundle.
        texts: Name and rows of the user's texts, or None for the built-in ones.
        given_file: A ``.npy`` file with the reference of these texts, or None to compute it.
        limit: Most texts, documents and pairs to take, or None for all.
        collection: A judged collection, or None.
        pairs: Judged pairs, or None.

    Raises:
        InputError: There is no text or no reference, a file does not belong to the texts, or the
            contract has no prompt for one of them.
        BundleError: The bundle's own reference is damaged.
    """
    rows: Sequence[Row]
    stored = stored_reference.read(bundle) if texts is None else None
    if stored:
        name, rows = stored.name, stored.rows
    elif texts is None:
        name = reference.wanted_texts(bundle)
        rows = data.load(name)
    else:
        name, rows = texts
    if not rows:
        raise InputError(f"{name} holds no text")
    own = list(rows) if texts else []  # built-in ones do without an instruction where need be
    own += collection.rows if collection else ()
    own += pairs.rows if pairs else ()
    for row in own:
        bundle.contract.prompt(row.input_type, row.task)
    if stored:
        tokens, truncated = stored.tokens, stored.truncated
    else:
        tokens, truncated = lengths(bundle, rows)
    vectors = None
    if given_file is not None:
        size = _checkpoint(bundle).config.hidden_size
        normalizes = bundle.contract.normalize_embeddings
        vectors = given_file, given.read_vectors(given_file, len(rows), size, normalizes)
    places = range(len(rows)) if limit is None else stratified(rows, tokens, limit)
    if limit is not None:
        collection = collection and collection.part(limit)
        pairs = pairs and pairs.part(limit)
    return Wanted(
        bundle,
        name,
        tuple(rows),
        tokens,
        truncated,
        texts is None,
        stored,
        vectors,
        tuple(places),
        collection,
        pairs,
    )


def lengths(bundle: Bundle, rows: Sequence[Row]) -> tuple[tuple[int, ...], int]:
    """Tokens of each text as it will be embedded, and how many are cut for that."""
    encoded = open_tokenizer(bundle).encode_rows(rows)
    return (
        tuple(len(text.input_ids) for text in encoded),
        sum(text.cut_tokens > 0 for text in encoded),
    )


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer, which is the same in every variant."""
    checkpoint = _checkpoint(bundle)
    path = checkpoint.directory / "tokenizer.json"
    return Tokenizer(path, bundle.contract, checkpoint.config.vocab_size)


def _checkpoint(bundle: Bundle) -> Checkpoint:
    return Checkpoint(bundle.directory(min(bundle.manifest.variants)))
