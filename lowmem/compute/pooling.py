"""Hidden states of a batch to one vector a text."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_pool(hidden: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    """Mean over the masked tokens of each text.

    Args:
        hidden: Final hidden states, float32 ``[tokens, hidden]``.
        mask: Tokens to take in, bool ``[tokens]``; at least one in each text.
        lengths: Tokens of each text, in order.

    Returns:
        float32 ``[texts, hidden]``.
    """
    counts = torch.tensor(lengths, device=hidden.device)
    rows = torch.arange(len(lengths), device=hidden.device).repeat_interleave(counts)
    weights = mask.to(hidden.dtype)
    sums = hidden.new_zeros(len(lengths), hidden.shape[1])
    sums.index_add_(0, rows, hidden * weights[:, None])
    taken = hidden.new_zeros(len(lengths)).index_add_(0, rows, weights)
    return sums / taken[:, None]
