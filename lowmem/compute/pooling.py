"""Hidden states of a batch to one vector a text."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.compute.latent_attention import LatentAttention


def mean_pool(hidden: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    """Mean over the masked tokens of each text.

    Args:
        hidden: Final hidden states, float32 ``[tokens, hidden]``.
        mask: Tokens to take in, bool ``[tokens]``; at least one in each text.
        lengths: Tokens of each text, in order.

    Returns:
        float32 ``[texts, hidden]``.
    """
    return _mean_of_each(hidden[mask], mask, lengths)


def latent_attention_pool(
    hidden: Tensor, mask: Tensor, lengths: list[int], attention: LatentAttention
) -> Tensor:
    """Mean over the masked tokens of each text, of what latent attention makes of them.

    Tokens that the mask leaves out change no other token's result, and are not computed.

    Args:
        hidden: Final hidden states, float32 ``[tokens, hidden]``.
        mask: Tokens to take in, bool ``[tokens]``; at least one in each text.
        lengths: Tokens of each text, in order.
        attention: The layer.

    Returns:
        float32 ``[texts, hidden]``.
    """
    return _mean_of_each(attention(hidden[mask]), mask, lengths)


def _mean_of_each(taken: Tensor, mask: Tensor, lengths: list[int]) -> Tensor:
    """Means of the tokens that a mask has taken, ``[taken, hidden]``, by text."""
    counts = torch.tensor(lengths, device=taken.device)
    rows = torch.arange(len(lengths), device=taken.device).repeat_interleave(counts)[mask]
    sums = taken.new_zeros(len(lengths), taken.shape[1]).index_add_(0, rows, taken)
    numbers = torch.bincount(rows, minlength=len(lengths)).to(taken.dtype)
    return sums / numbers[:, None]
