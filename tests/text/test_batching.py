"""Packing: nothing is lost, nothing is computed twice, and no batch is too large."""

from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.text.batching import PREFIX_TOKENS, EncodedText, PackedBatch, duplicates, pack

PREFIXES = ([], [1], [1, 7, 7], [1, 7, 8, 9])


@st.composite
def encoded_text(draw: st.DrawFn) -> EncodedText:
    """A text from a small vocabulary, so that equal ones are common."""
    prefix = draw(st.sampled_from(PREFIXES))
    ids = prefix + draw(st.lists(st.integers(1, 3), min_size=1, max_size=6))
    pooled_from = draw(st.sampled_from([0, len(ids) - 1]))
    return EncodedText(np.array(ids, np.int64), len(prefix), pooled_from)


TEXTS = st.lists(encoded_text(), max_size=14)
BUDGETS = st.integers(1, 30)
SIZES = st.none() | st.integers(1, 4)
SHORTEST = st.none() | st.integers(1, 4)
POOLINGS = st.sampled_from(["lasttoken", "mean"])


def text(ids: Sequence[int], prefix_tokens: int = 0, pooled_from: int = 0) -> EncodedText:
    return EncodedText(np.array(ids, np.int64), prefix_tokens, pooled_from)


def prefixes(batch: PackedBatch) -> list[list[int]]:
    """What stands before each text."""
    return [section.prefix.tolist() for section in batch.sections for _ in range(section.texts)]


def pieces(batch: PackedBatch) -> list[tuple[int, list[int], list[int], list[bool]]]:
    """Row, ids, positions and pooling mask of each text."""
    return [
        (
            int(row),
            batch.input_ids[begin:end].tolist(),
            batch.position_ids[begin:end].tolist(),
            batch.pooling_mask[begin:end].tolist(),
        )
        for row, begin, end in zip(
            batch.rows, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True
        )
    ]


@settings(max_examples=200, deadline=None)
@given(TEXTS, BUDGETS, SIZES, SHORTEST)
def test_every_distinct_text_is_packed_whole_and_once(
    texts: list[EncodedText], budget: int, size: int | None, shortest: int | None
) -> None:
    batches = pack(texts, budget, batch_size=size, shortest_prefix=shortest)
    rows = [row for batch in batches for row in batch.rows.tolist()]
    assert sorted(rows) == sorted(set(duplicates(texts).tolist()))
    for batch in batches:
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == batch.tokens == len(batch.pooling_mask)
        for before, (row, ids, positions, _) in zip(prefixes(batch), pieces(batch), strict=True):
            assert ids
            assert before + ids == texts[row].input_ids.tolist()
            assert positions == list(range(len(before), len(before) + len(ids)))


@settings(max_examples=200, deadline=None)
@given(TEXTS, BUDGETS, SIZES, SHORTEST)
def test_a_batch_is_within_its_budget_unless_it_is_one_text(
    texts: list[EncodedText], budget: int, size: int | None, shortest: int | None
) -> None:
    for batch in pack(texts, budget, batch_size=size, shortest_prefix=shortest):
        assert batch.tokens <= budget or batch.texts == 1
        assert size is None or batch.texts <= size


@settings(max_examples=100, deadline=None)
@given(TEXTS, BUDGETS, SHORTEST)
def test_a_batch_is_full_before_the_next_begins(
    texts: list[EncodedText], budget: int, shortest: int | None
) -> None:
    for batch, following in pairwise(pack(texts, budget, shortest_prefix=shortest)):
        assert batch.tokens + max(map(len, ids_of(following))) > budget


def ids_of(batch: PackedBatch) -> list[list[int]]:
    return [ids for _, ids, _, _ in pieces(batch)]


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_rows_point_at_the_first_equal_text(texts: list[EncodedText]) -> None:
    first = duplicates(texts)
    assert first.dtype == np.int64
    for row, other in enumerate(first.tolist()):
        assert other <= row
        assert first[other] == other
        assert texts[other].input_ids.tolist() == texts[row].input_ids.tolist()
        assert texts[other].pooled_from == texts[row].pooled_from
        assert texts[other].prefix_tokens == texts[row].prefix_tokens


def test_texts_that_are_pooled_or_cut_up_otherwise_are_not_equal() -> None:
    same = [text([1, 2, 3]), text([1, 2, 3], 0, 1), text([1, 2, 3], 1), text([1, 2, 3])]
    assert duplicates(same).tolist() == [0, 1, 2, 0]


@settings(max_examples=100, deadline=None)
@given(TEXTS, BUDGETS, POOLINGS)
def test_pooling_takes_the_last_token_or_those_behind_the_instruction(
    texts: list[EncodedText], budget: int, pooling: str
) -> None:
    for batch in pack(texts, budget, pooling=pooling):
        for row, ids, _, mask in pieces(batch):
            start = len(ids) - 1 if pooling == "lasttoken" else texts[row].pooled_from
            assert mask == [position >= start for position in range(len(ids))]


@settings(max_examples=100, deadline=None)
@given(TEXTS, BUDGETS, SHORTEST)
def test_without_its_prefix_a_batch_is_as_if_none_had_been_shared(
    texts: list[EncodedText], budget: int, shortest: int | None
) -> None:
    for batch in pack(texts, budget, shortest_prefix=shortest):
        whole = batch.without_prefixes()
        assert not any(prefixes(whole))
        assert whole.rows.tolist() == batch.rows.tolist()
        for row, ids, positions, mask in pieces(whole):
            assert ids == texts[row].input_ids.tolist()
            assert positions == list(range(len(ids)))
            assert mask == [False] * (len(ids) - 1) + [True]


@settings(max_examples=100, deadline=None)
@given(TEXTS, SHORTEST)
def test_splitting_a_batch_loses_no_text(texts: list[EncodedText], shortest: int | None) -> None:
    for batch in pack(texts, 1000, shortest_prefix=shortest):
        if batch.texts == 1:
            continue
        first, second = batch.split()
        assert abs(first.texts - second.texts) <= 1
        assert pieces(first) + pieces(second) == pieces(batch)
        assert prefixes(first) + prefixes(second) == prefixes(batch)
        assert first.cu_seqlens[0] == second.cu_seqlens[0] == 0


@settings(max_examples=100, deadline=None)
@given(TEXTS, BUDGETS, SHORTEST)
def test_a_prefix_is_left_out_only_where_it_is_long_enough(
    texts: list[EncodedText], budget: int, shortest: int | None
) -> None:
    for batch in pack(texts, budget, shortest_prefix=shortest):
        for row, prefix in zip(batch.rows.tolist(), prefixes(batch), strict=True):
            tokens = texts[row].prefix_tokens
            assert len(prefix) == (0 if shortest is None or tokens < shortest else tokens)


@settings(max_examples=100, deadline=None)
@given(TEXTS, BUDGETS, SHORTEST)
def test_a_prefix_stands_once_in_a_batch(
    texts: list[EncodedText], budget: int, shortest: int | None
) -> None:
    for batch in pack(texts, budget, shortest_prefix=shortest):
        known = [tuple(section.prefix.tolist()) for section in batch.sections]
        assert len(known) == len(set(known))


def test_batches_have_no_more_prefixes_than_are_held_together() -> None:
    sizes = [PREFIX_TOKENS // 2, PREFIX_TOKENS // 2, 1, PREFIX_TOKENS + 1, 3]
    texts = [text([number] * size + [9], size) for number, size in enumerate(sizes)]
    batches = pack(texts, 1000, shortest_prefix=1)
    assert sorted(batch.rows.tolist() for batch in batches) == [[0, 1], [2], [3], [4]]


@settings(max_examples=100, deadline=None)
@given(TEXTS, BUDGETS, SHORTEST)
def test_longest_texts_come_first(
    texts: list[EncodedText], budget: int, shortest: int | None
) -> None:
    batches = pack(texts, budget, shortest_prefix=shortest)
    longest = [max(map(len, ids_of(batch))) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch in batches:
        lengths = iter([len(ids) for ids in ids_of(batch)])
        for section in batch.sections:
            of_section = list(islice(lengths, section.texts))
            assert of_section == sorted(of_section, reverse=True)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_the_shape_of_batches_does_not_depend_on_the_order_of_texts(order: Sequence[int]) -> None:
    texts = [text([1] * size) for size in (5, 2, 9, 3)]
    batches = pack([texts[row] for row in order], 11)
    assert [np.diff(batch.cu_seqlens).tolist() for batch in batches] == [[9], [5, 3, 2]]


@pytest.mark.parametrize("shortest", [None, 1])
def test_a_filled_batch_has_the_same_texts_and_one_more(shortest: int | None) -> None:
    texts = [text([1, 7, 7, *range(size)], 3) for size in (2, 5, 9)]
    (batch,) = pack(texts, 100, shortest_prefix=shortest)
    filled = batch.filled(64)
    assert (filled.tokens, filled.texts, filled.rows[-1]) == (64, 4, -1)
    assert pieces(filled)[:-1] == pieces(batch)
    assert pieces(filled)[-1][2] == list(range(64 - batch.tokens))
    assert len(filled.sections[-1].prefix) == 0
    assert batch.filled(batch.tokens) is batch


def test_no_texts_give_no_batches() -> None:
    assert pack([], 100) == []
    assert duplicates([]).tolist() == []
