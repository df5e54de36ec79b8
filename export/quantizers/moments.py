"""Second moments of what goes into linears: all that their quantizer sees of the texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from export.hidden_states import Inputs
from lowmem.hardware import probe

# Of a symmetric sum of products, only blocks on and above the diagonal are computed.
_BLOCKS = 4


@dataclass(frozen=True)
class Moments:
    """Sums over the calibration tokens; x are a linear's inputs, t its wanted outputs.

    Attributes:
        inputs: x xᵀ, float32 ``[in_features, in_features]``.
        targets: t xᵀ, float32 ``[out_features, in_features]``.
    """

    inputs: Tensor
    targets: Tensor


def second_moments(
    inputs: Inputs, wanted: Iterator[Tensor], weights: Iterator[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted sums over all tokens: x xᵀ of the inputs, and t xᵀ with what is wanted.

    Args:
        inputs: What a stage multiplies, batch by batch.
        wanted: t of the same tokens, ``[rows, features]``.
        weights: What each token counts, ``[rows, 1]``.
        dtype: In which products are taken; sums are float32.

    Returns:
        float32 ``[in_features, in_features]`` and ``[features, in_features]``.
    """
    seen = crossed = None
    for (_, states), targets, weight in zip(inputs(), wanted, weights, strict=True):
        if seen is None or crossed is None:
            seen = states.new_zeros(states.shape[1], states.shape[1])
            crossed = states.new_zeros(targets.shape[1], states.shape[1])
        root = weight.sqrt()
        states, targets = (states * root).to(dtype), (targets * root).to(dtype)
        step = -(-states.shape[1] // _BLOCKS)
        for begin in range(0, states.shape[1], step):
            rows = slice(begin, begin + step)  # what lies left of the diagonal is mirrored below
            _add_product(seen[rows, begin:], states[:, rows], states[:, begin:])
        _add_product(crossed, targets, states)
    assert seen is not None, "no texts"
    assert crossed is not None
    return seen.triu_().add_(seen.triu(1).T), crossed


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums + leftᵀ right, in place."""
    if left.dtype == sums.dtype:
        sums.addmm_(left.T, right)
    else:
        sums += left.T @ right


@cache
def fastest_dtype(device: str) -> torch.dtype:
    """bfloat16 where a processor has it, at twice the speed; a card is fast enough without.

    What it loses is far below what 4 bits lose, and not below what 8 bits do.
    """
    is_worth_it = device == "cpu" and probe().has_native_bf16
    return torch.bfloat16 if is_worth_it else torch.float32
