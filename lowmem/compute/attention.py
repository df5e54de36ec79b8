"""Attention within each of the packed texts.

Texts of equal length lie next to each other, because batches are sorted by length, and go through
one call of ``scaled_dot_product_attention`` as a view, without padding or copies. Keys and values
of shared prefixes stand once, in front of the batch's own; they are put before those of their
texts, as many texts at a time as give no more tokens than the batch has itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.compute.blocked_attention import attend_in_blocks

_LONGEST_MASKED = 512
# Few enough that copies in another precision do not count, and enough for a call to be worth it.
_CONVERTED_TOKENS = 1024


class Run(NamedTuple):
    """Consecutive texts of one length behind one prefix.

    Attributes:
        texts: How many.
        length: Tokens of each, the prefix not counted.
        prefix_begin: Where the prefix begins among the keys.
        prefix_end: Where it ends; there, too, if there is none.
    """

    texts: int
    length: int
    prefix_begin: int
    prefix_end: int

    @property
    def prefix_tokens(self) -> int:
        """Tokens of the prefix."""
        return self.prefix_end - self.prefix_begin


@dataclass(frozen=True)
class Spans:
    """Where texts lie in a packed batch.

    Attributes:
        prefix_tokens: Leading keys and values that belong to shared prefixes, 0 if there are none.
        runs: All texts, in order.
        last_tokens: Index of each text's last token, prefixes not counted, ``[texts]``.
        is_causal: Whether a token sees only itself and earlier ones.
        pooled_only: Whether queries are given for last tokens alone, ``[texts]`` of them.
        layouts: The same in the form that a kernel wants, once it has been made; it is kept here
            so that it stays for as long as anything computes these texts.
    """

    prefix_tokens: int
    runs: tuple[Run, ...]
    last_tokens: Tensor
    is_causal: bool
    pooled_only: bool = False
    layouts: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls, sections: Sequence[tuple[int, Sequence[int]]], is_causal: bool, device: str
    ) -> Spans:
        """Spans of texts that lie end to end.

        Args:
            sections: Tokens of each prefix, and of each text that stands behind it.
            is_causal: Whether a token sees only itself and earlier ones.
            device: Where the batch is.
        """
        runs: list[Run] = []
        begin = 0
        for prefix_tokens, lengths in sections:
            end = begin + prefix_tokens
            for length, texts in groupby(lengths):
                runs.append(Run(len(list(texts)), length, begin, end))
            begin = end
        assert is_causal or not begin, "a prefix would see the texts behind it"
        lengths = [length for _, lengths in sections for length in lengths]
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1
        return cls(begin, tuple(runs), ends, is_causal)

    def of_last_tokens(self) -> Spans:
        """The same texts with one query each."""
        return replace(self, pooled_only=True)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    *,
    narrow_from: float | None = None,
    blocks_from: float = math.inf,
) -> Tensor:
    """Softmax attention in each text, grouped-query heads allowed.

    Args:
        query: ``[tokens, heads, head_dim]``, or ``[texts, …]`` where spans are of last tokens.
        key: Of all prefixes and then of the texts, ``[prefix tokens + tokens, key-value heads,
            head_dim]``.
        value: As ``key``.
        spans: Where the texts lie.
        narrow_from: From how many tokens on, its prefix counted, a text goes through bfloat16;
            None leaves all as they are given.
        blocks_from: From how many on it goes in blocks through float32 instead, on a CPU, where
            attention is causal.

    Returns:
        ``[queries, heads * head_dim]``, in the order and the dtype of ``query``.
    """
    mixed = torch.empty_like(query)
    most_tokens = len(key) if narrow_from is None else min(len(key), _CONVERTED_TOKENS)
    for run, queries, keys in slices(spans, most_tokens):
        texts, shared = run.texts, run.prefix_tokens
        is_masked = bool(shared) and run.length <= _LONGEST_MASKED
        in_blocks = (
            spans.is_causal
            and not (spans.pooled_only or is_masked)
            and shared + run.length >= blocks_from
        )
        is_narrow = narrow_from is not None and shared + run.length >= narrow_from
        is_cast = is_narrow and not in_blocks and not spans.pooled_only
        dtype = torch.bfloat16 if is_cast else query.dtype
        run_query, run_key, run_value = (
            states.to(dtype) for states in (query[queries], key[keys], value[keys])
        )
        if shared:
            prefix = slice(run.prefix_begin, run.prefix_end)
            run_key = _behind(key[prefix].to(dtype), run_key, texts)
            run_value = _behind(value[prefix].to(dtype), run_value, texts)
        if shared and not spans.pooled_only:
            mixed[queries] = _attend_behind(run_query, run_key, run_value, texts, shared, in_blocks)
        else:
            causal = spans.is_causal and not spans.pooled_only
            mixed[queries] = _attend_texts(
                run_query, run_key, run_value, texts, causal, in_blocks=in_blocks
            )
    return mixed.flatten(1)


def slices(spans: Spans, most_tokens: int) -> Iterator[tuple[Run, slice, slice]]:
    """Texts of one length, their queries and their own keys, in order.

    All of a run, unless its texts with a prefix before each would be more tokens than given.

    Args:
        spans: Where the texts lie.
        most_tokens: Of the texts and the prefixes before each; a single text may have more.
    """
    query, key = 0, spans.prefix_tokens
    for run in spans.runs:
        step = max(1, most_tokens // (run.prefix_tokens + run.length))
        for first in range(0, run.texts, step):
            part = run._replace(texts=min(step, run.texts - first))
            keys = slice(key, key + part.texts * part.length)
            queries = part.texts if spans.pooled_only else part.texts * part.length
            yield part, slice(query, query + queries), keys
            query, key = query + queries, keys.stop


def _behind(prefix: Tensor, states: Tensor, texts: int) -> Tensor:
    """Puts the prefix before each text: ``[texts * (prefix + length), heads, head_dim]``."""
    each = states.unflatten(0, (texts, -1))
    return torch.cat([prefix.expand(texts, -1, -1, -1), each], dim=1).flatten(0, 1)


def _attend_behind(
    query: Tensor, key: Tensor, value: Tensor, texts: int, shared: int, in_blocks: bool
) -> Tensor:
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
    result = _attend_texts(padded, key, value, texts, True, in_blocks=in_blocks)
    own: Tensor = result.unflatten(0, (texts, -1))[:, -length:].flatten(0, 1)
    return own


def _attend_texts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    texts: int,
    causal: bool,
    mask: Tensor | None = None,
    *,
    in_blocks: bool = False,
) -> Tensor:
    """Texts of one length, ``[texts * length, heads, head_dim]``: one call, or one for each.

    ``mask`` is added to the scores, ``[query length, key length]``.
    """
    if in_blocks:
        each = zip(*(states.chunk(texts) for states in (query, key, value)), strict=True)
        parts = [attend_in_blocks(*text) for text in each]
        return torch.cat(parts) if texts > 1 else parts[0]
    query, key, value = (
        states.unflatten(0, (texts, -1)).transpose(1, 2) for states in (query, key, value)
    )  # [texts, heads, length, head_dim]
    mixed = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
    )
    return mixed.transpose(1, 2).flatten(0, 1)
