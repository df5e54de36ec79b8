"""Packing: nothing is lost, nothing is computed twice, and no batch is too large."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem.text.batching import EncodedText, PackedBatch, duplicates, pack

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
        before = [] if batch.prefix is None else batch.prefix.tolist()
        assert batch.cu_seqlens[0] == 0
        assert batch.cu_seqlens[-1] == batch.tokens == len(batch.pooling_mask)
        for row, ids, positions, _ in pieces(batch):
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
    groups: dict[bytes, list[PackedBatch]] = {}
    for batch in pack(texts, budget, shortest_prefix=shortest):
        key = b"" if batch.prefix is None else batch.prefix.tobytes()
        groups.setdefault(key, []).append(batch)
    for group in groups.values():
        for batch, following in pairwise(group):
            assert batch.tokens + len(ids_of(following)[0]) > budget


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
        whole = batch.without_prefix()
        assert whole.prefix is None
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
        for part in (first, second):
            assert part.cu_seqlens[0] == 0
            assert (part.prefix is None) == (batch.prefix is None)


@settings(max_examples=100, deadline=None)
@given(TEXTS, BUDGETS, SHORTEST)
def test_a_prefix_is_left_out_only_where_it_is_long_enough(
    texts: list[EncodedText], budget: int, shortest: int | None
) -> None:
    for batch in pack(texts, budget, shortest_prefix=shortest):
        for row in batch.rows.tolist():
            tokens = texts[row].prefix_tokens
            shared = shortest is not None and tokens >= shortest
            assert (0 if batch.prefix is None else len(batch.prefix)) == tokens * shared


@settings(max_examples=100, deadline=None)
@given(TEXTS, BUDGETS, SHORTEST)
def test_longest_texts_come_first(
    texts: list[EncodedText], budget: int, shortest: int | None
) -> None:
    batches = pack(texts, budget, shortest_prefix=shortest)
    longest = [max(map(len, ids_of(batch))) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch in batches:
        lengths = [len(ids) for ids in ids_of(batch)]
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_the_shape_of_batches_does_not_depend_on_the_order_of_texts(order: Sequence[int]) -> None:
    texts = [text([1] * size) for size in (5, 2, 9, 3)]
    batches = pack([texts[row] for row in order], 11)
    assert [np.diff(batch.cu_seqlens).tolist() for batch in batches] == [[9], [5, 3, 2]]


def test_no_texts_give_no_batches() -> None:
    assert pack([], 100) == []
    assert duplicates([]).tolist() == []
