"""Causal attention over one long text, a block of queries at a time, by oneDNN's products.

torch's own kernel multiplies float32 and bfloat16 by a library that reaches half of oneDNN's speed
on some processors. Here a block's scores stand in memory, up to the last key that it sees, and no
others. oneDNN compiles code for each number of keys that it meets, so that few are asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.compute.operations.products import onednn
from lowmem.compute.plan import BLOCK_QUERIES, keys_multiplied


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one text, each token over itself and earlier ones, in float32.

    Args:
        query: ``[tokens, heads, head_dim]``, of a floating dtype on a CPU.
        key: ``[tokens, key-value heads, head_dim]``.
        value: As ``key``.

    Returns:
        ``[tokens, heads, head_dim]`` in the dtype of ``query``.
    """
    tokens, _, head_dim = query.shape
    result = torch.empty_like(query)
    blocks = [
        (begin, keys_multiplied(begin + BLOCK_QUERIES)) for begin in range(0, tokens, BLOCK_QUERIES)
    ]
    widest = max(reach - begin for begin, reach in blocks)
    later = torch.full(
        (BLOCK_QUERIES, widest), -torch.inf, dtype=torch.float32, device="cpu"
    ).triu_(1)
    for queries, keys, values, mixed in zip(
        query.unflatten(1, (key.shape[1], -1)).unbind(1),
        key.unbind(1),
        value.unbind(1),
        result.unflatten(1, (key.shape[1], -1)).unbind(1),
        strict=True,
    ):
        keys, values = _filled(keys, blocks[-1][1]), _filled(values, blocks[-1][1]).T.contiguous()
        for begin, reach in blocks:
            end = min(begin + BLOCK_QUERIES, tokens)
            rows = _filled(queries[begin:end], BLOCK_QUERIES).mul_(head_dim**-0.5)
            scores = onednn(rows.flatten(0, 1), keys[:reach])
            scores.view(BLOCK_QUERIES, -1, reach)[..., begin:] += later[:, None, : reach - begin]
            weights = scores.softmax(dim=-1)
            block = onednn(weights, values[:, :reach].contiguous())
            mixed[begin:end] = block.view(rows.shape)[: end - begin]
    return result


def _filled(states: Tensor, rows: int) -> Tensor:
    """The states in float32 with rows of zeros behind them."""
    result = states.new_zeros(rows, *states.shape[1:], dtype=torch.float32)
    result[: len(states)] = states
    return result
