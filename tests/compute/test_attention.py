"""Attention over packed texts against one text after another, with the mask written out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem.compute.attention import Spans, attend
from tests.tolerances import ATTENTION, NARROW_ATTENTION

Sections = list[tuple[int, list[int]]]
SECTIONS = st.lists(
    st.tuples(st.integers(0, 7), st.lists(st.sampled_from([1, 2, 3, 9]), min_size=1, max_size=6)),
    min_size=1,
    max_size=4,
)  # tokens of each prefix, and of the texts behind it


def heads(tokens: int, count: int, head_dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(tokens, count, head_dim, generator=generator) - 1


def slow_attend(
    query: Tensor, key: Tensor, value: Tensor, sections: Sections, causal: bool
) -> Tensor:
    """Each text alone, in float64: its tokens see its prefix and, if causal, no later token.

    ``key`` and ``value`` begin with those of all prefixes, and ``query`` has none of them.
    """
    share = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    mixed = torch.empty_like(query)
    before = sum(prefix for prefix, _ in sections)
    begin = prefix_begin = 0
    for prefix, lengths in sections:
        for length in lengths:
            own = slice(begin, begin + length)
            seen = [*range(prefix_begin, prefix_begin + prefix)]
            seen += range(before + begin, before + own.stop)
            visible = torch.ones(length, len(seen), dtype=torch.bool)
            if causal:
                visible = visible.tril(prefix)
            scores = torch.einsum("qhd,khd->hqk", query[own], key[seen]) / query.shape[2] ** 0.5
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            mixed[own] = torch.einsum("hqk,khd->qhd", weights, value[seen])
            begin = own.stop
        prefix_begin += prefix
    return mixed.flatten(1)


@settings(max_examples=60, deadline=None)
@given(
    sections=SECTIONS,
    key_heads=st.integers(1, 3),
    share=st.integers(1, 4),
    head_dim=st.sampled_from([2, 8, 32]),
    is_causal=st.booleans(),
    pooled_only=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_packed_attention_is_attention_in_each_text(
    sections: Sections,
    key_heads: int,
    share: int,
    head_dim: int,
    is_causal: bool,
    pooled_only: bool,
    seed: int,
) -> None:
    if not is_causal:
        sections = [(0, lengths) for _, lengths in sections]
    prefix = sum(tokens for tokens, _ in sections)
    tokens = sum(sum(lengths) for _, lengths in sections)
    query = heads(tokens, key_heads * share, head_dim, seed)
    key, value = (heads(prefix + tokens, key_heads, head_dim, seed + n) for n in (1, 2))
    spans = Spans.of(sections, is_causal, "cpu")
    assert spans.prefix_tokens == prefix
    expected = slow_attend(query, key, value, sections, is_causal)
    if pooled_only:
        spans, query = spans.of_last_tokens(), query[spans.last_tokens]
        expected = expected[spans.last_tokens]
    got = attend(query, key, value, spans)
    assert got.shape == (len(query), key_heads * share * head_dim)
    assert float((got - expected).abs().max()) <= ATTENTION


def test_last_tokens_are_found_and_prefixes_are_not_counted() -> None:
    spans = Spans.of([(4, [3, 3, 1]), (0, [1]), (2, [1])], True, "cpu")
    assert spans.runs == ((2, 3, 0, 4), (1, 1, 0, 4), (1, 1, 4, 4), (1, 1, 4, 6))
    assert spans.prefix_tokens == 6
    assert spans.last_tokens.tolist() == [2, 5, 6, 7, 8]


def test_texts_of_one_length_go_through_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = record_calls(monkeypatch)
    spans = Spans.of([(0, [5, 5, 5, 2, 2])], True, "cpu")
    attend(heads(19, 2, 4, 0), heads(19, 1, 4, 1), heads(19, 1, 4, 2), spans)
    assert shapes == [(3, 2, 5, 4), (2, 2, 2, 4)]


def test_copies_of_the_prefix_hold_no_more_tokens_than_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefix, lengths = 30, [2] * 50
    tokens = prefix + sum(lengths)
    query, key, value = (heads(tokens, 1, 4, seed) for seed in range(3))
    query = query[prefix:]
    spans = Spans.of([(prefix, lengths)], True, "cpu")
    expected = slow_attend(query, key, value, [(prefix, lengths)], True)
    shapes = record_calls(monkeypatch)
    got = attend(query, key, value, spans)
    assert float((got - expected).abs().max()) <= ATTENTION
    assert max(texts * length for texts, _, length, _ in shapes) <= tokens
    assert len(shapes) == -(-50 // (tokens // 32))


def test_a_prefix_that_is_longer_than_the_texts_still_takes_one_text_at_a_time() -> None:
    query, key, value = (heads(23, 2, 4, seed) for seed in range(3))
    query = query[20:]
    spans = Spans.of([(20, [1, 1, 1])], True, "cpu")
    expected = slow_attend(query, key, value, [(20, [1, 1, 1])], True)
    assert float((attend(query, key, value, spans) - expected).abs().max()) <= ATTENTION


@pytest.mark.parametrize("lengths", [[513], [512, 512], [700, 700, 3]], ids=str)
def test_texts_too_long_for_a_mask_see_the_same_behind_a_prefix(lengths: list[int]) -> None:
    prefix, tokens = 5, sum(lengths)
    query = heads(tokens, 2, 8, 0)
    key, value = (heads(prefix + tokens, 1, 8, seed) for seed in (1, 2))
    spans = Spans.of([(prefix, lengths)], True, "cpu")
    expected = slow_attend(query, key, value, [(prefix, lengths)], True)
    assert float((attend(query, key, value, spans) - expected).abs().max()) <= ATTENTION


@pytest.mark.parametrize("prefix", [0, 5])
def test_long_texts_go_through_bfloat16_and_short_ones_stay_as_they_are(
    prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [*[40] * 3, *[12] * 200]  # the short ones are more than are converted at a time
    tokens = sum(lengths)
    query = heads(tokens, 4, 32, 0)
    key, value = (heads(prefix + tokens, 2, 32, seed) for seed in (1, 2))
    spans = Spans.of([(prefix, lengths)], True, "cpu")
    dtypes = []
    plain = F.scaled_dot_product_attention

    def recorded(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        dtypes.append((query.shape[2], query.dtype))
        return plain(query, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    got = attend(query, key, value, spans, narrow_from=prefix + 40)
    assert set(dtypes) == {(40, torch.bfloat16), (12, torch.float32)}
    assert len(dtypes) > 2
    assert got.dtype == torch.float32
    error = (got - slow_attend(query, key, value, [(prefix, lengths)], True)).abs().amax(1)
    assert float(error[:120].max()) <= NARROW_ATTENTION
    assert float(error[120:].max()) <= ATTENTION


def test_a_prefix_is_only_for_causal_attention() -> None:
    with pytest.raises(AssertionError, match="would see the texts behind it"):
        Spans.of([(2, [3])], False, "cpu")


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Query shapes ``(texts, heads, tokens, head_dim)`` of every call from here on."""
    shapes: list[tuple[int, ...]] = []
    plain = F.scaled_dot_product_attention

    def recorded(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        shapes.append(tuple(query.shape))
        return plain(query, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return shapes
