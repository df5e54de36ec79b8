"""Attention within each of the packed texts.

Texts of equal length lie next to each other, because batches are sorted by length, and go through
one call of ``scaled_dot_product_attention`` as a view, without padding or copies. Keys and values
of a shared prefix stand once, in front of the batch's own; they are put before those of every text,
as many texts at a time as give no more tokens than the batch has itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

_LONGEST_MASKED = 512


@dataclass(frozen=True)
class Spans:
    """Where texts lie in a packed batch.

    Attributes:
        prefix_tokens: Leading keys and values that belong to the shared prefix, 0 if there is none.
        runs: (texts, tokens of each) of consecutive texts with one length, in order.
        last_tokens: Index of each text's last token, the prefix not counted, ``[texts]``.
        is_causal: Whether a token sees only itself and earlier ones.
        pooled_only: Whether queries are given for last tokens alone, ``[texts]`` of them.
    """

    prefix_tokens: int
    runs: tuple[tuple[int, int], ...]
    last_tokens: Tensor
    is_causal: bool
    pooled_only: bool = False

    @classmethod
    def of(cls, lengths: list[int], prefix_tokens: int, is_causal: bool, device: str) -> Spans:
        """Spans of texts that lie end to end."""
        assert is_causal or not prefix_tokens, "a prefix would see the texts behind it"
        runs: list[tuple[int, int]] = []
        for length in lengths:
            if runs and runs[-1][1] == length:
                runs[-1] = (runs[-1][0] + 1, length)
            else:
                runs.append((1, length))
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        return cls(prefix_tokens, tuple(runs), ends, is_causal)

    def of_last_tokens(self) -> Spans:
        """The same texts with one query each."""
        return replace(self, pooled_only=True)


def attend(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """Softmax attention in each text, grouped-query heads allowed.

    Args:
        query: ``[tokens, heads, head_dim]``, or ``[texts, …]`` where spans are of last tokens.
        key: ``[prefix tokens + tokens, key-value heads, head_dim]``.
        value: As ``key``.
        spans: Where the texts lie.

    Returns:
        ``[queries, heads * head_dim]``, in the order of ``query``.
    """
    shared = spans.prefix_tokens
    mixed = torch.empty_like(query)
    for queries, keys, texts in _slices(spans, len(key)):
        run_key, run_value = key[keys], value[keys]
        run_query = query[queries]
        if shared:
            run_key = _behind(key[:shared], run_key, texts)
            run_value = _behind(value[:shared], run_value, texts)
        if shared and not spans.pooled_only:
            mixed[queries] = _attend_behind(run_query, run_key, run_value, texts, shared)
        else:
            causal = spans.is_causal and not spans.pooled_only
            mixed[queries] = _attend_texts(run_query, run_key, run_value, texts, causal)
    return mixed.flatten(1)


def _slices(spans: Spans, most_tokens: int) -> Iterator[tuple[slice, slice, int]]:
    """Queries, keys and number of texts of each call.

    A run is one call, unless its texts with a prefix before each would be more tokens than given.
    """
    begin = row = 0
    for texts, length in spans.runs:
        step = max(1, most_tokens // (spans.prefix_tokens + length))
        for first in range(0, texts, step):
            count = min(step, texts - first)
            own = slice(begin, begin + count * length)
            queries = slice(row, row + count) if spans.pooled_only else own
            yield queries, slice(spans.prefix_tokens + begin, spans.prefix_tokens + own.stop), count
            begin, row = own.stop, row + count


def _behind(prefix: Tensor, states: Tensor, texts: int) -> Tensor:
    """Puts the prefix before each text: ``[texts * (prefix + length), heads, head_dim]``."""
    each = states.unflatten(0, (texts, -1))
    return torch.cat([prefix.expand(texts, -1, -1, -1), each], dim=1).flatten(0, 1)


def _attend_behind(query: Tensor, key: Tensor, value: Tensor, texts: int, shared: int) -> Tensor:
    """Causal attention of texts of one length, whose keys and values begin with the prefix's.

    SDPA aligns its own causal mask to the first key. Short texts bring a mask instead, which costs
    less than the prefix's queries would; long ones, whose mask would be large and of whose keys
    half are not seen, get queries of zeros in the prefix's place.
    """
    length = len(query) // texts
    if length <= _LONGEST_MASKED:
        mask = query.new_full((length, shared + length), -torch.inf).triu_(shared + 1)
        return _attend_texts(query, key, value, texts, False, mask)
    padded = _behind(query.new_zeros(shared, *query.shape[1:]), query, texts)
    result = _attend_texts(padded, key, value, texts, True)
    own: Tensor = result.unflatten(0, (texts, -1))[:, -length:].flatten(0, 1)
    return own


def _attend_texts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    texts: int,
    causal: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """One call for texts of one length, ``[texts * length, heads, head_dim]`` each.

    ``mask`` is added to the scores, ``[query length, key length]``.
    """
    query, key, value = (
        states.unflatten(0, (texts, -1)).transpose(1, 2) for states in (query, key, value)
    )  # [texts, heads, length, head_dim]
    mixed = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )
    return mixed.transpose(1, 2).flatten(0, 1)
