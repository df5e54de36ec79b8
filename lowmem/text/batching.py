"""Texts as packed batches: token ids end to end, no padding anywhere.

Batches are cut by tokens and not by texts, from texts sorted by length, so that every pass costs
about the same. Equal texts are computed once. Texts that begin with the same shared prefix (BOS
and instruction) travel together, and the prefix itself is left out of them: its keys and values
are computed once for the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
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


def pack(
    texts: Sequence[EncodedText],
    batch_tokens: int,
    *,
    batch_size: int | None = None,
    pooling: str = "lasttoken",
    shortest_prefix: int | None = None,
) -> list[PackedBatch]:
    """Sorts, deduplicates and packs texts into batches.

    Args:
        texts: The texts; position i becomes row i.
        batch_tokens: Most tokens of a batch, the prefix not counted; a longer text gets a batch of
            its own.
        batch_size: Most texts of a batch, or None.
        pooling: The contract's pooling, which says which tokens are pooled.
        shortest_prefix: Fewest tokens of a prefix that is left out of its texts, or None where
            none is. Only sound where attention is causal, the prefix is not pooled, and the engine
            computes it apart.

    Returns:
        Batches, longest texts first, so that what does not fit in memory shows at once. Equal
        texts appear once, as the first of their rows; ``duplicates`` finds the others.
    """
    first_rows = np.unique(duplicates(texts))
    groups: dict[bytes, list[int]] = {}
    for row in first_rows.tolist():
        text = texts[row]
        is_shared = shortest_prefix is not None and text.prefix_tokens >= shortest_prefix
        prefix = text.input_ids[: text.prefix_tokens if is_shared else 0]
        groups.setdefault(prefix.tobytes(), []).append(row)
    batches = []
    for key, rows in groups.items():
        prefix = np.frombuffer(key, np.int64)
        rows.sort(key=lambda row: (-len(texts[row].input_ids), row))
        begin = 0
        while begin < len(rows):
            end, tokens = begin, 0
            while end < len(rows) and (batch_size is None or end - begin < batch_size):
                tokens += len(texts[rows[end]].input_ids) - len(prefix)
                if tokens > batch_tokens and end > begin:
                    break
                end += 1
            batches.append(_pack_rows(texts, rows[begin:end], prefix, pooling))
            begin = end
    batches.sort(key=lambda batch: -int(np.diff(batch.cu_seqlens).max()))
    return batches


def duplicates(texts: Sequence[EncodedText]) -> Ids:
    """For each row, the first row with the same ids, prefix and pooling, ``[rows]``."""
    seen: dict[tuple[bytes, int, int], int] = {}
    first = [
        seen.setdefault((text.input_ids.tobytes(), text.prefix_tokens, text.pooled_from), row)
        for row, text in enumerate(texts)
    ]
    return np.array(first, np.int64)


def _pack_rows(
    texts: Sequence[EncodedText], rows: Sequence[int], prefix: Ids, pooling: str
) -> PackedBatch:
    pieces, masks = [], []
    for row in rows:
        ids = texts[row].input_ids
        mask = np.zeros(len(ids), np.bool_)
        if pooling == "lasttoken":
            mask[-1] = True
        else:
            mask[texts[row].pooled_from :] = True
        pieces.append(ids[len(prefix) :])
        masks.append(mask[len(prefix) :])
    return _pack(pieces, masks, np.array(rows, np.int64), prefix if len(prefix) else None)


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
