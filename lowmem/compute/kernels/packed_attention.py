"""Attention over packed texts by a kernel that knows where each text begins: one call a batch.

With shared prefixes the keys of every text are its prefix's and its own, gathered for as many texts
at a time as have no more keys than the batch; causal masks of these
kernels are aligned to the last key, so that queries need no padding. Which of the kernels there is
depends on card and torch: each must first agree with the plain form on small extreme texts.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowmem.compute import attention
from lowmem.compute.attention import Run, Spans
from lowmem.compute.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

# What two roundings of weights and values to 16 bits may do to a mixture, relative to the values.
_TOLERANCE = {torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}


@dataclass(frozen=True)
class Layout:
    """Where texts begin among queries and keys.

    Attributes:
        queries: int32 ``[texts + 1]``.
        keys: int32 ``[texts + 1]``.
        longest_query: Most queries of a text.
        longest_key: Most keys of a text.
        key_rows: Which row of the packed keys each key is, or None where they are taken in order.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    key_rows: Tensor | None


Kernel = Callable[[Tensor, Tensor, Tensor, Layout, bool], Tensor]
"""(query, key, value, layout, causal) to ``[queries, heads, head_dim]``."""


def attend(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """As :func:`lowmem.compute.attention.attend`, by a kernel."""
    device = str(query.device)
    if not spans.prefix_tokens:
        layout = _layout(spans, spans.runs, None, device)
        return kernel(query, key, value, layout, spans.is_causal).flatten(1)
    mixed = torch.empty_like(query)
    for parts in _calls(spans, len(key)):
        runs, queries, keys = zip(*parts, strict=True)
        asked = slice(queries[0].start, queries[-1].stop)
        layout = _layout(spans, runs, keys[0].start, device)
        gathered = key[layout.key_rows], value[layout.key_rows]
        mixed[asked] = kernel(query[asked], *gathered, layout, spans.is_causal)
    return mixed.flatten(1)


def _calls(spans: Spans, most_keys: int) -> Iterator[list[tuple[Run, slice, slice]]]:
    """Texts of each call, whose keys with a prefix before each are no more than given."""
    parts: list[tuple[Run, slice, slice]] = []
    held = 0
    for run, queries, keys in attention.slices(spans, most_keys):
        size = run.texts * (run.prefix_tokens + run.length)
        if parts and held + size > most_keys:
            yield parts
            parts, held = [], 0
        parts.append((run, queries, keys))
        held += size
    yield parts


def by_length(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """The plain form, where torch has no such kernel, or none for the dtype.

    Key and value heads are repeated: of SDPA's kernels only flash takes fewer of them, and what
    would serve otherwise holds all scores at once.
    """
    share = query.shape[1] // key.shape[1]
    if share > 1:
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    return attention.attend(query, key, value, spans)


@cache
def find_kernel(dtype: torch.dtype, head_dim: int, device: str) -> Kernel | None:
    """The first kernel that runs here and agrees with the plain form, or None.

    Args:
        dtype: Of queries, keys and values.
        head_dim: Features of a head.
        device: Such as ``cuda``.
    """
    for kernel in (varlen, flash):
        try:
            agrees = _agrees(kernel, dtype, head_dim, device)
        except (ImportError, AttributeError, RuntimeError, TypeError) as error:
            if is_out_of_memory(error):
                raise  # which says nothing of the kernel
            logger.info("%s attention does not run here: %s", kernel.__name__, error)
            continue
        if agrees:
            return kernel
        logger.warning("%s attention is wrong on this card, and is not used", kernel.__name__)
    return None


def varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool) -> Tensor:
    """torch's own packed attention; its arguments changed between 2.10 and 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    function: Callable[..., Any] = varlen_attn
    known = _parameters(function)
    options: dict[str, object] = {}
    if causal:
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    places = (layout.queries, layout.keys, layout.longest_query, layout.longest_key)
    mixed: Tensor = function(query, key, value, *places, **options)
    return mixed


def flash(query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool) -> Tensor:
    """The flash kernel behind it, which older versions of torch have as well."""
    mixed: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        layout.queries,
        layout.keys,
        layout.longest_query,
        layout.longest_key,
        0.0,
        causal,
        False,
    )[0]
    return mixed


@cache
def _parameters(function: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _layout(spans: Spans, runs: tuple[Run, ...], first_key: int | None, device: str) -> Layout:
    """Where texts of some runs lie, found once for all layers.

    Args:
        spans: Of all texts.
        runs: Those of one call.
        first_key: The first key of their own, behind prefixes, if there are any.
        device: Where the batch is.
    """
    known = (runs, first_key, spans.pooled_only)
    if known not in spans.layouts:
        spans.layouts[known] = _laid_out(runs, first_key, spans.pooled_only, device)
    layout: Layout = spans.layouts[known]
    return layout


def _laid_out(
    runs: tuple[Run, ...], first_key: int | None, pooled_only: bool, device: str
) -> Layout:
    each = [run for run in runs for _ in range(run.texts)]
    lengths = torch.tensor([run.length for run in each], device="cpu")
    queries = torch.ones_like(lengths) if pooled_only else lengths
    keys = lengths + torch.tensor([run.prefix_tokens for run in each], device="cpu")
    rows = None
    if first_key is not None:
        begins = first_key + lengths.cumsum(0) - lengths
        pieces = []
        for run, begin in zip(each, begins.tolist(), strict=True):
            pieces.append(torch.arange(run.prefix_begin, run.prefix_end, device="cpu"))
            pieces.append(torch.arange(begin, begin + run.length, device="cpu"))
        rows = torch.cat(pieces).to(device)
    return Layout(
        _edges(queries, device), _edges(keys, device), int(queries.max()), int(keys.max()), rows
    )


def _edges(counts: Tensor, device: str) -> Tensor:
    edges = torch.zeros(len(counts) + 1, dtype=torch.int32, device="cpu")
    edges[1:] = counts.cumsum(0)
    return edges.to(device)


def _agrees(kernel: Kernel, dtype: torch.dtype, head_dim: int, device: str) -> bool:
    """Whether a kernel gives the plain form's mixtures, with prefix and without, causal or not.

    Scores are up to some hundreds, where a softmax without its maximum taken off would overflow.
    """
    generator = torch.Generator().manual_seed(0)
    for sections, causal in (
        ([(0, [1, 1, 130, 7])], True),
        ([(5, [3, 3, 40]), (0, [2]), (9, [40, 1])], True),
        ([(0, [9])], False),
    ):
        full = Spans.of(sections, causal, "cpu")
        tokens = sum(sum(lengths) for _, lengths in sections)
        keys = full.prefix_tokens + tokens
        query, key, value = (
            torch.randn(
                *(count, heads, head_dim), generator=generator, dtype=torch.float32, device="cpu"
            ).to(dtype)
            for count, heads in ((tokens, 4), (keys, 2), (keys, 2))
        )
        query *= 16
        for spans in (full, full.of_last_tokens()):
            asked = query[spans.last_tokens] if spans.pooled_only else query
            expected = attention.attend(asked.float(), key.float(), value.float(), spans)
            got = attend(kernel, asked.to(device), key.to(device), value.to(device), spans)
            error = (got.float().cpu() - expected).abs().max()
            if not float(error) <= _TOLERANCE[dtype] * float(value.float().abs().max()):
                return False
    return True
