"""Packed attention through kernels: the layouts they get, and which of them is used."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem.compute import attention
from lowmem.compute.attention import Spans
from lowmem.compute.kernels import packed_attention
from lowmem.compute.kernels.packed_attention import Layout, attend, by_length, find_kernel
from tests.tolerances import ATTENTION


@pytest.fixture(autouse=True)
def _forget_kernels() -> Iterator[None]:
    find_kernel.cache_clear()
    packed_attention._parameters.cache_clear()
    yield
    find_kernel.cache_clear()


def reference(query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool) -> Tensor:
    """What a kernel has to do: each text alone, masks aligned to the last key, in float64."""
    share = query.shape[1] // key.shape[1]
    wide = query.double()
    keys, values = (states.double().repeat_interleave(share, 1) for states in (key, value))
    mixed = torch.empty_like(wide)
    edges = zip(
        layout.queries[:-1], layout.queries[1:], layout.keys[:-1], layout.keys[1:], strict=True
    )
    for first, last, begin, end in edges:
        assert last - first <= layout.longest_query
        assert end - begin <= layout.longest_key
        scores = torch.einsum("qhd,khd->hqk", wide[first:last], keys[begin:end])
        scores /= query.shape[2] ** 0.5
        if causal:
            visible = torch.ones(scores.shape[1:], dtype=torch.bool)
            hidden = ~visible.tril(int((end - begin) - (last - first)))
            scores = scores.masked_fill(hidden, -torch.inf)
        mixed[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[begin:end])
    return mixed.to(query.dtype)


@settings(max_examples=50, deadline=None)
@given(
    sections=st.lists(
        st.tuples(st.integers(0, 7), st.lists(st.integers(1, 9), min_size=1, max_size=6)),
        min_size=1,
        max_size=4,
    ),
    share=st.integers(1, 3),
    is_causal=st.booleans(),
    pooled_only=st.booleans(),
)
def test_a_kernel_and_sdpa_by_length_give_the_plain_form(
    sections: list[tuple[int, list[int]]], share: int, is_causal: bool, pooled_only: bool
) -> None:
    if not is_causal:
        sections = [(0, lengths) for _, lengths in sections]
    prefix = sum(tokens for tokens, _ in sections)
    tokens = sum(sum(lengths) for _, lengths in sections)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        2 * torch.rand(count, heads, 8, generator=generator) - 1
        for count, heads in ((tokens, 2 * share), (prefix + tokens, 2), (prefix + tokens, 2))
    )
    spans = Spans.of(sections, is_causal, "cpu")
    if pooled_only:
        spans, query = spans.of_last_tokens(), query[spans.last_tokens]
    expected = attention.attend(query, key, value, spans)
    for got in (attend(reference, query, key, value, spans), by_length(query, key, value, spans)):
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= ATTENTION


def test_keys_behind_shared_prefixes_are_gathered_for_no_more_than_the_batch_has() -> None:
    gathered: list[int] = []

    def counting(query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool) -> Tensor:
        gathered.append(len(key))
        return reference(query, key, value, layout, causal)

    spans = Spans.of([(40, [3] * 30 + [2] * 5), (0, [1]), (25, [7])], True, "cpu")
    query, key, value = (
        torch.rand(count, 1, 8, generator=torch.Generator().manual_seed(0))
        for count in (108, 65 + 108, 65 + 108)
    )
    for one in (spans, spans.of_last_tokens()):
        asked = query[spans.last_tokens] if one.pooled_only else query
        got = attend(counting, asked, key, value, one)
        assert float((got - attention.attend(asked, key, value, one)).abs().max()) <= ATTENTION
    assert max(gathered) <= len(key)
    assert len(gathered) >= 2 * (35 * 40 // len(key))


def top_left(query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool) -> Tensor:
    """Wrong with a prefix, as SDPA's own mask is: aligned to the first key."""
    begins = layout.keys[:-1]
    ends = begins + (layout.queries[1:] - layout.queries[:-1])
    if not causal:
        return reference(query, key, value, layout, causal)
    taken = [torch.arange(int(b), int(e)) for b, e in zip(begins, ends, strict=True)]
    rows = torch.cat(taken)
    cut = Layout(layout.queries, layout.queries, layout.longest_query, layout.longest_query, None)
    return reference(query, key[rows], value[rows], cut, causal)


def ignores_the_mask(query: Tensor, key: Tensor, value: Tensor, layout: Layout, _: bool) -> Tensor:
    return reference(query, key, value, layout, False)


def overflows(query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool) -> Tensor:
    return reference(query, key, value, layout, causal) * torch.nan


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", [top_left, ignores_the_mask, overflows])
def test_a_kernel_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    wrong: packed_attention.Kernel,
) -> None:
    monkeypatch.setattr(packed_attention, "varlen", wrong)
    monkeypatch.setattr(packed_attention, "flash", reference)
    assert find_kernel(dtype, 32, "cpu") is reference
    assert f"{wrong.__name__} attention is wrong on this card" in caplog.text


def test_where_no_kernel_runs_there_is_none() -> None:
    assert find_kernel(torch.float16, 32, "cpu") is None


class Recorded(Exception):
    """Carries what torch's function was called with."""


def of_2_10(*states_and_places: Any, is_causal: bool = False) -> None:
    raise Recorded({"is_causal": is_causal})


def of_2_11(*states_and_places: Any, window_size: tuple[int, int] = (-1, -1)) -> None:
    raise Recorded({"window_size": window_size})


def of_2_12(
    *states_and_places: Any, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False
) -> None:
    raise Recorded({"window_size": window_size, "enable_gqa": enable_gqa})


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (of_2_10, {"is_causal": True}),
        (of_2_11, {"window_size": (-1, 0)}),
        (of_2_12, {"window_size": (-1, 0), "enable_gqa": True}),
    ],
)
def test_torch_gets_the_arguments_of_its_version(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., None], expected: dict[str, object]
) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", function)
    edges = torch.tensor([0, 2], dtype=torch.int32)
    states = torch.zeros(2, 4, 8)
    with pytest.raises(Recorded) as caught:
        packed_attention.varlen(
            states, states[:, :2], states[:, :2], Layout(edges, edges, 2, 2, None), True
        )
    assert caught.value.args == (expected,)
