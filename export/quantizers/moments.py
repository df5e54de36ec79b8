"""Second moments of what goes into linears: all that their quantizer sees of the texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from export.hidden_states import Inputs
from lowmem.compute.operations.products import reproducible_product, rows_computed

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
    inputs: Inputs, wanted: Iterator[Tensor], weights: Iterator[Tensor]
) -> tuple[Tensor, Tensor]:
    """Weighted sums over all tokens: x xᵀ of the inputs, and t xᵀ with what is wanted.

    In float32 on every processor: what is missing is the small difference of large sums, so that
    products in bfloat16, rounded, would lose more than the codes do.

    Args:
        inputs: What a stage multiplies, batch by batch.
        wanted: t of the same tokens, ``[rows, features]``.
        weights: What each token counts, ``[rows, 1]``.

    Returns:
        float32 ``[in_features, in_features]`` and ``[features, in_features]``.
    """
    seen = crossed = None
    for (_, states), targets, weight in zip(inputs(), wanted, weights, strict=True):
        if seen is None or crossed is None:
            seen = states.new_zeros(states.shape[1], states.shape[1])
            crossed = states.new_zeros(targets.shape[1], states.shape[1])
        root = weight.sqrt()
        columns = _columns(states, root)
        step = -(-states.shape[1] // _BLOCKS)
        for begin in range(0, states.shape[1], step):
            rows = slice(begin, begin + step)  # what lies left of the diagonal is mirrored below
            seen[rows, begin:] += reproducible_product(columns[rows], columns[begin:])
        crossed += reproducible_product(_columns(targets, root), columns)
    assert seen is not None, "no texts"
    assert crossed is not None
    return seen.triu_().add_(seen.triu(1).T), crossed


def _columns(states: Tensor, root: Tensor) -> Tensor:
    """Weighted states, ``[features, tokens]``, up to one of few numbers of tokens."""
    result = states.new_zeros(states.shape[1], rows_computed(len(states)))
    torch.mul(states.T, root.T, out=result[:, : len(states)])
    return result
