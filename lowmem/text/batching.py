"""Texts as packed batches: token ids end to end, no padding anywhere.

Batches are cut by tokens and not by texts, from texts sorted by length, so that every pass costs
about the same. Equal texts are computed once. Texts that begin with the same shared prefix (BOS
and instruction) travel together, and the prefix itself is left out of them: its keys and values
are computed once for the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


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


@dataclass(frozen=True)
class PackedBatch:
    """Texts of one pass, end to end.

    Attributes:
        input_ids: ``[tokens]``, without the prefix.
        position_ids: ``[tokens]``, counted from the start of each text, prefix included.
        cu_seqlens: ``[texts + 1]``, where each text begins in ``input_ids``.
        pooling_mask: ``[tokens]``, the tokens whose hidden states are pooled.
        rows: ``[texts]``, whose vectors these are.
        prefix: Ids that stand before every text of the batch, ``[prefix tokens]``, or None.
    """

    input_ids: Ids
    position_ids: Ids
    cu_seqlens: Ids
    pooling_mask: NDArray[np.bool_]
    rows: Ids
    prefix: Ids | None

    @property
    def tokens(self) -> int:
        """Tokens computed in a pass, the prefix not counted."""
        return len(self.input_ids)

    @property
    def texts(self) -> int:
        """How many texts there are."""
        return len(self.rows)

    def split(self) -> tuple[PackedBatch, PackedBatch]:
        """Two batches of about half the texts each; needs at least two texts."""
        middle = self.texts // 2
        return self._part(0, middle), self._part(middle, self.texts)

    def without_prefix(self) -> PackedBatch:
        """The same texts with the prefix put back into each of them."""
        if self.prefix is None:
            return self
        size = len(self.prefix)
        pieces, masks = [], []
        for begin, end in zip(self.cu_seqlens[:-1], self.cu_seqlens[1:], strict=True):
            pieces.append(np.concatenate([self.prefix, self.input_ids[begin:end]]))
            masks.append(np.concatenate([np.zeros(size, np.bool_), self.pooling_mask[begin:end]]))
        return _pack(pieces, masks, self.rows, None)

    def _part(self, first: int, last: int) -> PackedBatch:
        begin, end = self.cu_seqlens[first], self.cu_seqlens[last]
        return PackedBatch(
            self.input_ids[begin:end],
            self.position_ids[begin:end],
            self.cu_seqlens[first : last + 1] - begin,
            self.pooling_mask[begin:end],
            self.rows[first:last],
            self.prefix,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that will share a pass, of which nothing is copied yet.

    Attributes:
        rows: Whose vectors these are, longest text first.
        prefix: Ids that stand before every text of the batch, ``[prefix tokens]``; may be empty.
        tokens: Tokens computed in a pass, the prefix not counted.
    """

    rows: Sequence[int]
    prefix: Ids
    tokens: int

    def pack(self, texts: Sequence[EncodedText], pooling: str) -> PackedBatch:
        """Copies the texts end to end.

        Args:
            texts: All texts, of which ``rows`` are some.
            pooling: The contract's pooling, which says which tokens are pooled.
        """
        pieces, masks = [], []
        for row in self.rows:
            ids = texts[row].input_ids
            mask = np.zeros(len(ids), np.bool_)
            if pooling == "lasttoken":
                mask[-1] = True
            else:
                mask[texts[row].pooled_from :] = True
            pieces.append(ids[len(self.prefix) :])
            masks.append(mask[len(self.prefix) :])
        rows = np.array(self.rows, np.int64)
        return _pack(pieces, masks, rows, self.prefix if len(self.prefix) else None)


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
        batch_tokens: Most tokens of a batch, the prefix not counted; a longer text gets a batch of
            its own.
        batch_size: Most texts of a batch, or None.
        shortest_prefix: Fewest tokens of a prefix that is left out of its texts, or None where
            none is. Only sound where attention is causal, the prefix is not pooled, and the engine
            computes it apart.

    Returns:
        Batches, longest texts first, so that what does not fit in memory shows at once.
    """
    groups: dict[bytes, list[int]] = {}
    for row in rows.tolist():
        text = texts[row]
        is_shared = shortest_prefix is not None and text.prefix_tokens >= shortest_prefix
        prefix = text.input_ids[: text.prefix_tokens if is_shared else 0]
        groups.setdefault(prefix.tobytes(), []).append(row)
    batches = []
    for key, group in groups.items():
        prefix = np.frombuffer(key, np.int64)
        group.sort(key=lambda row: (-len(texts[row].input_ids), row))
        begin = 0
        while begin < len(group):
            end, tokens = begin, 0
            while end < len(group) and (batch_size is None or end - begin < batch_size):
                more = len(texts[group[end]].input_ids) - len(prefix)
                if tokens + more > batch_tokens and end > begin:
                    break
                tokens += more
                end += 1
            batches.append(Batch(group[begin:end], prefix, tokens))
            begin = end
    batches.sort(key=lambda batch: len(batch.prefix) - len(texts[batch.rows[0]].input_ids))
    return batches


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


def _pack(
    pieces: Sequence[Ids], masks: Sequence[NDArray[np.bool_]], rows: Ids, prefix: Ids | None
) -> PackedBatch:
    start = 0 if prefix is None else len(prefix)
    positions = [np.arange(start, start + len(piece), dtype=np.int64) for piece in pieces]
    return PackedBatch(
        np.concatenate(pieces),
        np.concatenate(positions),
        np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        np.concatenate(masks),
        rows,
        prefix,
    )
