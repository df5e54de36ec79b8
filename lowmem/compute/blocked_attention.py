"""Causal attention over one long text, a block of queries at a time, by oneDNN's products.

torch's own kernel multiplies float32 and bfloat16 by a library that reaches half of oneDNN's speed
on some processors. Here a block's scores stand in memory, up to the last key that it sees, and no
others. oneDNN compiles code for each number of keys that it meets, so that few are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.compute.operations.products import onednn
from lowmem.compute.plan import (
    BLOCK_QUERIES,
    BLOCK_SCORES,
    FEWEST_BLOCK_HEADS,
    keys_multiplied,
)


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one text, each token over itself and earlier ones, in float32.

    Args:
        query: ``[tokens, heads, head_dim]``, of a floating dtype on a CPU.
        key: ``[tokens, key-value heads, head_dim]``.
        value: As ``key``.

    Returns:
        ``[tokens, heads, head_dim]`` in the dtype of ``query``.
    """
    tokens, heads, head_dim = query.shape
    result = torch.empty_like(query)
    blocks = list(_blocks(tokens, heads // key.shape[1]))
    longest = blocks[-1].keys
    later = _later(max(block.keys - block.begin for block in blocks))
    for queries, keys, values, mixed in zip(
        query.unflatten(1, (key.shape[1], -1)).unbind(1),
        key.unbind(1),
        value.unbind(1),
        result.unflatten(1, (key.shape[1], -1)).unbind(1),
        strict=True,
    ):
        keys, values = _filled(keys, longest), _filled(values, longest).T.contiguous()
        for begin, rows, seen in blocks:
            end = min(begin + rows, tokens)
            own = _filled(queries[begin:end], rows).mul_(head_dim**-0.5)
            scores = onednn(own.flatten(0, 1), keys[:seen])
            scores.view(rows, -1, seen)[..., begin:] += later[:rows, None, : seen - begin]
            scores = scores.softmax(dim=-1)  # two of their size are held, not three
            block = onednn(scores, values[:, :seen].contiguous())
            mixed[begin:end] = block.view(own.shape)[: end - begin]
    return result


class _Block(NamedTuple):
    """Consecutive queries, and the keys from the first one on that they meet."""

    begin: int
    queries: int
    keys: int


def _blocks(tokens: int, share: int) -> Iterator[_Block]:
    """Those of a text, the last of which may reach beyond its end.

    Args:
        tokens: Of the text.
        share: Query heads of a key head.
    """
    begin, fewest = 0, max(1, FEWEST_BLOCK_HEADS // share)
    while begin < tokens:
        queries, keys = BLOCK_QUERIES, keys_multiplied(begin + BLOCK_QUERIES)
        while queries > fewest and queries * share * keys > BLOCK_SCORES:
            queries //= 2
            keys = keys_multiplied(begin + queries)
        yield _Block(begin, queries, keys)
        begin += queries


def _later(keys: int) -> Tensor:
    """What is added to the scores of a block with keys from its own first token on."""
    hidden = torch.full((BLOCK_QUERIES, keys), -torch.inf, dtype=torch.float32, device="cpu")
    return hidden.triu_(1)


def _filled(states: Tensor, rows: int) -> Tensor:
    """The states in float32 with rows of zeros behind them."""
    result = states.new_zeros(rows, *states.shape[1:], dtype=torch.float32)
    result[: len(states)] = states
    return result
