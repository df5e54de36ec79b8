"""Attention in blocks of queries against the mask written out, and what it costs to be asked."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowmem.compute import attention
from lowmem.compute.attention import Spans, attend
from lowmem.compute.blocked_attention import attend_in_blocks
from lowmem.compute.operations import attention_forms, int8, plain, products, trials
from lowmem.compute.plan import (
    BLOCK_QUERIES,
    FEWEST_BLOCK_HEADS,
    SHORTEST_BLOCKED,
    keys_multiplied,
)
from tests.compute.test_attention import heads, slow_attend
from tests.tolerances import ATTENTION, NARROW_ATTENTION

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="torch has no oneDNN here")


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    attention_forms.blocks_from.cache_clear()
    yield
    attention_forms.blocks_from.cache_clear()


def states(tokens: int, share: int, head_dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    query = heads(tokens, 2 * share, head_dim, 0)
    return query, heads(tokens, 2, head_dim, 1), heads(tokens, 2, head_dim, 2)


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 256, 257, 700, 1100])
def test_it_is_attention(tokens: int, share: int) -> None:
    query, key, value = states(tokens, share)
    expected = slow_attend(query, key, value, [(0, [tokens])], True)
    got = attend_in_blocks(query, key, value).flatten(1)
    assert float((got - expected).abs().max()) <= ATTENTION


def test_a_text_of_4096_tokens() -> None:
    query, key, value = states(4096, 1)
    expected = attend(query, key, value, Spans.of([(0, [4096])], True, "cpu"))
    got = attend_in_blocks(query, key, value).flatten(1)
    assert float((got - expected).abs().max()) <= 2 * ATTENTION


def test_the_last_of_more_tokens_than_fill_a_block() -> None:
    query, key, value = states(4500, 3, 8)
    got = attend_in_blocks(query, key, value)[-70:].flatten(1)
    keys, values = (one.double().repeat_interleave(3, 1) for one in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query[-70:].double(), keys) / 8**0.5
    seen = torch.ones(70, 4500, dtype=torch.bool).tril(4430)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
    assert float((got - expected).abs().max()) <= ATTENTION


def test_large_scores_do_not_overflow() -> None:
    query, key, value = states(300, 2)
    query *= 1000
    expected = slow_attend(query, key, value, [(0, [300])], True)
    got = attend_in_blocks(query, key, value).flatten(1)
    assert bool(got.isfinite().all())
    # Scores are up to some thousands, and off by as much as these are larger.
    assert float((got - expected).abs().max()) <= 1000 * ATTENTION


def test_later_tokens_are_not_seen() -> None:
    query, key, value = states(400, 2)
    got = attend_in_blocks(query, key, value)
    for cut in (1, 128, 200):
        torch.testing.assert_close(
            attend_in_blocks(query[:cut], key[:cut], value[:cut]),
            got[:cut],
            rtol=0,
            atol=2 * ATTENTION,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_states_come_back_in_their_dtype(dtype: torch.dtype) -> None:
    query, key, value = (one.to(dtype) for one in states(300, 2))
    expected = slow_attend(query, key, value, [(0, [300])], True)
    got = attend_in_blocks(query, key, value)
    assert got.dtype == dtype
    assert float((got.flatten(1) - expected).abs().max()) <= ATTENTION + 2.0**-8


@pytest.mark.parametrize("narrow_from", [None, 0])
def test_long_texts_go_in_blocks_wherever_they_lie(
    narrow_from: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks = []

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        in_blocks.append(len(query))
        return attend_in_blocks(query, key, value)

    monkeypatch.setattr(attention, "attend_in_blocks", counted)
    sections = [(9, [260, 260, 30]), (0, [300]), (700, [650, 12])]
    before = sum(prefix for prefix, _ in sections)
    tokens = sum(sum(lengths) for _, lengths in sections)
    query = heads(tokens, 4, 32, 0)
    key, value = heads(before + tokens, 2, 32, 1), heads(before + tokens, 2, 32, 2)
    spans = Spans.of(sections, True, "cpu")
    expected = slow_attend(query, key, value, sections, True)
    got = attend(query, key, value, spans, narrow_from=narrow_from, blocks_from=256)
    assert in_blocks == [300, 700 + 650]  # a mask serves short ones behind a prefix
    exact = torch.full((tokens,), narrow_from is None)
    exact[550:-12] = True
    assert float((got - expected)[exact].abs().max()) <= ATTENTION
    assert float((got - expected).abs().max()) <= NARROW_ATTENTION
    last = query[spans.last_tokens]
    pooled = attend(last, key, value, spans.of_last_tokens(), blocks_from=0)
    assert float((pooled - expected[spans.last_tokens]).abs().max()) <= ATTENTION


def test_without_causality_nothing_goes_in_blocks() -> None:
    query, key, value = states(300, 2)
    spans = Spans.of([(0, [300])], False, "cpu")
    plain_form = attend(query, key, value, spans)
    assert torch.equal(attend(query, key, value, spans, blocks_from=0), plain_form)


def test_a_text_gives_the_same_alone_and_among_others() -> None:
    query, key, value = states(900, 2)
    together = attend(query, key, value, Spans.of([(0, [300] * 3)], True, "cpu"), blocks_from=256)
    for begin in (0, 300, 600):
        own = slice(begin, begin + 300)
        alone = attend_in_blocks(query[own], key[own], value[own]).flatten(1)
        assert torch.equal(together[own], alone)


def test_few_numbers_of_keys_are_multiplied() -> None:
    found = {keys_multiplied(keys) for keys in range(1, 4097)}
    assert len(found) == 12
    for keys in (1, 255, 256, 257, 1025, 2049, 4096, 5000, 32768):
        assert keys <= keys_multiplied(keys) < keys + max(256, keys / 4)
        assert keys_multiplied(keys) % BLOCK_QUERIES == 0


@pytest.mark.parametrize(
    ("wins", "expected"),
    [((), math.inf), ((1024,), 1024), ((256, 512, 1024), 256), ((256, 1024), 1024)],
    ids=str,
)
def test_blocks_must_be_faster_over_all_longer_texts(
    wins: tuple[int, ...], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = {f"attention over {length} tokens in float32" for length in wins}

    def winner(question: str, forms: object) -> str:
        return "blocks" if question in questions else "kernel"

    monkeypatch.setattr(trials, "fastest", winner)
    assert attention_forms.blocks_from(1, torch.float32) == expected
    attention_forms.blocks_from.cache_clear()
    monkeypatch.setattr(attention_forms, "has_onednn", lambda: False)
    assert attention_forms.blocks_from(1, torch.float32) == math.inf


@pytest.mark.parametrize("narrow_from", [math.inf, 40])
def test_operations_use_them_from_where_they_are_faster(
    narrow_from: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def blocks_from(threads: int, dtype: torch.dtype) -> float:
        asked.append(dtype)
        return SHORTEST_BLOCKED

    monkeypatch.setattr(plain, "blocks_from", blocks_from)
    monkeypatch.setattr(int8, "narrow_from", lambda threads: narrow_from)
    query, key, value = states(300, 2)
    spans = Spans.of([(0, [300])], True, "cpu")
    expected = attend_in_blocks(query, key, value).flatten(1)
    for ops in (plain.PlainOperations("fp32", 1e-5), int8.Int8Operations(1e-5)):
        assert torch.equal(ops.attend(query, key, value, spans), expected)
    rival = torch.float32 if math.isinf(narrow_from) else torch.bfloat16
    assert asked == [torch.float32, rival]


def test_a_key_head_may_be_shared_by_more_heads_than_a_block_has() -> None:
    share = 2 * FEWEST_BLOCK_HEADS
    query, key, value = (heads(4200, each, 4, seed) for seed, each in enumerate((share, 1, 1)))
    got = attend_in_blocks(query, key, value)[-1]
    scores = torch.einsum("hd,kd->hk", query[-1].double(), key[:, 0].double()) / 2
    expected = scores.softmax(-1) @ value[:, 0].double()
    assert float((got - expected).abs().max()) <= ATTENTION
