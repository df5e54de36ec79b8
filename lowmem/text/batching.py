"""Texts as packed batches: token ids end to end, no padding anywhere.

Batches are cut by tokens and not by texts, from texts sorted by length, so that every pass costs
about the same. Equal texts are computed once. A shared prefix (BOS and instruction) is left out of
the texts that begin with it, which lie together in a section of their batch: its keys and values
are computed once for all of them.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
PREFIX_TOKENS = 256
"""Most tokens of all shared prefixes of a batch, whose keys and values are held together."""
_NO_PREFIX: Ids = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One text as the model gets it.

    Attributes:
        input_ids: All its ids, special tokens included, ``[tokens]``.
        prefix_tokens: How many leading ids are the shared prefix that may be computed apart.
        pooled_from: Index of the first token that a mean takes in.
        cut_tokens: Ids that truncation removed.
    """

    input_ids: Ids
    prefix_tokens: int
    pooled_from: int
    cut_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Section:
    """Consecutive texts of a batch that begin with the same prefix.

    Attributes:
        prefix: Ids that stand before each of the texts, ``[prefix tokens]``; may be empty.
        texts: How many texts there are.
    """

    prefix: Ids
    texts: int


@dataclass(frozen=True)
class PackedBatch:
    """Texts of one pass, end to end, without their prefixes.

    Attributes:
        input_ids: ``[tokens]``.
        position_ids: ``[tokens]``, counted from the start of each text, prefix included.
        cu_seqlens: ``[texts + 1]``, where each text begins in ``input_ids``.
        pooling_mask: ``[tokens]``, the tokens whose hidden states are pooled.
        rows: ``[texts]``, whose vectors these are.
        sections: What stands before the texts, in their order; no two have the same prefix, but
            that what fills a batch has none.
    """

    input_ids: Ids
    position_ids: Ids
    cu_seqlens: Ids
    pooling_mask: NDArray[np.bool_]
    rows: Ids
    sections: tuple[Section, ...]

    @property
    def tokens(self) -> int:
        """Tokens computed in a pass, prefixes not counted."""
        return len(self.input_ids)

    @property
    def texts(self) -> int:
        """How many texts there are."""
        return len(self.rows)

    def split(self) -> tuple[PackedBatch, PackedBatch]:
        """Two batches of about half the texts each; needs at least two texts."""
        middle = self.texts // 2
        return self._part(0, middle), self._part(middle, self.texts)

    def without_prefixes(self) -> PackedBatch:
        """The same texts with its prefix put back into each of them."""
        if not any(len(section.prefix) for section in self.sections):
            return self
        pieces, masks = [], []
        prefixes = _prefix_of_each(self.sections)
        for prefix, (begin, end) in zip(prefixes, pairwise(self.cu_seqlens), strict=True):
            unpooled = np.zeros(len(prefix), np.bool_)
            pieces.append(np.concatenate([prefix, self.input_ids[begin:end]]))
            masks.append(np.concatenate([unpooled, self.pooling_mask[begin:end]]))
        return _pack(pieces, masks, self.rows, (Section(_NO_PREFIX, self.texts),))

    def filled(self, tokens: int) -> PackedBatch:
        """The batch with a text of zeros that nobody reads behind it, so that it has such a size.

        It has a section of its own, without a prefix, and the row -1; where nothing is missing
        there is none.
        """
        missing = tokens - self.tokens
        if missing <= 0:
            return self
        return PackedBatch(
            np.append(self.input_ids, np.zeros(missing, np.int64)),
            np.append(self.position_ids, np.arange(missing)),
            np.append(self.cu_seqlens, tokens),
            np.append(self.pooling_mask, np.ones(missing, np.bool_)),
            np.append(self.rows, -1),
            (*self.sections, Section(_NO_PREFIX, 1)),
        )

    def _part(self, first: int, last: int) -> PackedBatch:
        begin, end = self.cu_seqlens[first], self.cu_seqlens[last]
        sections, start = [], 0
        for section in self.sections:
            texts = min(last, start + section.texts) - max(first, start)
            if texts > 0:
                sections.append(replace(section, texts=texts))
            start += section.texts
        return PackedBatch(
            self.input_ids[begin:end],
            self.position_ids[begin:end],
            self.cu_seqlens[first : last + 1] - begin,
            self.pooling_mask[begin:end],
            self.rows[first:last],
            tuple(sections),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that will share a pass, of which nothing is copied yet.

    Attributes:
        rows: Whose vectors these are, section by section, longest text first in each.
        sections: What stands before the texts, as in a ``PackedBatch``.
        tokens: Tokens computed in a pass, prefixes not counted.
    """

    rows: Sequence[int]
    sections: tuple[Section, ...]
    tokens: int

    def pack(self, texts: Sequence[EncodedText], pooling: str) -> PackedBatch:
        """Copies the texts end to end.

        Args:
            texts: All texts, of which ``rows`` are some.
            pooling: The contract's pooling, which says which tokens are pooled.
        """
        pieces, masks = [], []
        for row, prefix in zip(self.rows, _prefix_of_each(self.sections), strict=True):
            ids = texts[row].input_ids
            mask = np.zeros(len(ids), np.bool_)
            if pooling == "lasttoken":
                mask[-1] = True
            else:
                mask[texts[row].pooled_from :] = True
            pieces.append(ids[len(prefix) :])
            masks.append(mask[len(prefix) :])
        return _pack(pieces, masks, np.array(self.rows, np.int64), self.sections)


class _Member(NamedTuple):
    """A text on its way into a batch: tokens without the prefix, and the prefix's ids as bytes."""

    tokens: int
    row: int
    prefix: bytes


def pack(
    texts: Sequence[EncodedText],
    batch_tokens: int,
    *,
    batch_size: int | None = None,
    pooling: str = "lasttoken",
    shortest_prefix: int | None = None,
) -> list[PackedBatch]:
    """Arranges distinct texts in batches, and packs them all: ``arrange`` and ``Batch.pack``."""
    batches = arrange(
        texts,
        np.unique(duplicates(texts)),
        batch_tokens,
        batch_size=batch_size,
        shortest_prefix=shortest_prefix,
    )
    return [batch.pack(texts, pooling) for batch in batches]


def arrange(
    texts: Sequence[EncodedText],
    rows: Ids,
    batch_tokens: int,
    *,
    batch_size: int | None = None,
    shortest_prefix: int | None = None,
) -> list[Batch]:
    """Sorts texts and cuts them into batches.

    Args:
        texts: The texts; position i is row i.
        rows: Which of them, ``[rows]``: of equal ones the first, as ``duplicates`` finds them.
        batch_tokens: Most tokens of a batch, prefixes not counted; a longer text gets a batch of
            its own.
        batch_size: Most texts of a batch, or None.
        shortest_prefix: Fewest tokens of a prefix that is left out of its texts, or None where
            none is. Only sound where attention is causal, the prefix is not pooled, and the engine
            computes it apart.

    Returns:
        Batches, longest texts first, so that what does not fit in memory shows at once.
    """
    by_prefix: defaultdict[bytes, list[int]] = defaultdict(list)
    for row in rows.tolist():
        text = texts[row]
        is_shared = shortest_prefix is not None and text.prefix_tokens >= shortest_prefix
        prefix = text.input_ids[: text.prefix_tokens if is_shared else 0]
        by_prefix[prefix.tobytes()].append(row)
    cuts: list[list[_Member]] = []
    for prefixes in _held_together(sorted(by_prefix)):
        members = [
            _Member(len(texts[row].input_ids) - _tokens(prefix), row, prefix)
            for prefix in prefixes
            for row in by_prefix[prefix]
        ]
        members.sort(key=lambda member: (-member.tokens, member.row))
        cuts += _cut(members, batch_tokens, batch_size)
    cuts.sort(key=lambda members: -members[0].tokens)
    return [_batch(members) for members in cuts]


def duplicates(texts: Sequence[EncodedText]) -> Ids:
    """For each row, the first row with the same ids, prefix and pooling, ``[rows]``."""
    seen: dict[bytes, int] = {}
    return np.array(
        [seen.setdefault(_digest(text), row) for row, text in enumerate(texts)], np.int64
    )


def _digest(text: EncodedText) -> bytes:
    """Tells texts apart in 16 bytes: no two in 10^15 texts are expected to share them."""
    numbers = np.array([text.prefix_tokens, text.pooled_from], np.int64)
    return hashlib.blake2b(numbers.tobytes() + text.input_ids.tobytes(), digest_size=16).digest()


def _cut(
    members: Sequence[_Member], batch_tokens: int, batch_size: int | None
) -> Iterator[list[_Member]]:
    """Parts of sorted texts, each as large as it may be."""
    part: list[_Member] = []
    tokens = 0
    for member in members:
        tokens += member.tokens
        if part and (tokens > batch_tokens or len(part) == batch_size):
            yield part
            part, tokens = [], member.tokens
        part.append(member)
    yield part


def _batch(members: Sequence[_Member]) -> Batch:
    """Texts that share a pass, those with one prefix brought together."""
    rows: defaultdict[bytes, list[int]] = defaultdict(list)
    for member in members:
        rows[member.prefix].append(member.row)
    sections = [Section(np.frombuffer(prefix, np.int64), len(rows[prefix])) for prefix in rows]
    tokens = sum(member.tokens for member in members)
    return Batch(list(chain.from_iterable(rows.values())), tuple(sections), tokens)


def _held_together(prefixes: Sequence[bytes]) -> list[list[bytes]]:
    """Groups of consecutive prefixes, none of more than ``PREFIX_TOKENS`` unless it is one."""
    groups: list[list[bytes]] = []
    tokens = 0
    for prefix in prefixes:
        tokens += _tokens(prefix)
        if not groups or tokens > PREFIX_TOKENS:
            groups.append([])
            tokens = _tokens(prefix)
        groups[-1].append(prefix)
    return groups


def _tokens(prefix: bytes) -> int:
    """How many ids lie in the bytes."""
    return len(prefix) // np.dtype(np.int64).itemsize


def _prefix_of_each(sections: Sequence[Section]) -> list[Ids]:
    """The prefix of each text."""
    return [section.prefix for section in sections for _ in range(section.texts)]


def _pack(
    pieces: Sequence[Ids],
    masks: Sequence[NDArray[np.bool_]],
    rows: Ids,
    sections: tuple[Section, ...],
) -> PackedBatch:
    starts = [len(prefix) for prefix in _prefix_of_each(sections)]
    positions = [
        np.arange(start, start + len(piece), dtype=np.int64)
        for start, piece in zip(starts, pieces, strict=True)
    ]
    return PackedBatch(
        np.concatenate(pieces),
        np.concatenate(positions),
        np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        np.concatenate(masks),
        rows,
        sections,
    )
