"""Second moments of what goes into linears: all that their quantizer sees of the texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from export.hidden_states import Inputs

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
        states, targets = states * root, targets * root
        step = -(-states.shape[1] // _BLOCKS)
        for begin in range(0, states.shape[1], step):
            rows = slice(begin, begin + step)  # what lies left of the diagonal is mirrored below
            seen[rows, begin:].addmm_(states[:, rows].T, states[:, begin:])
        crossed.addmm_(targets.T, states)
    assert seen is not None, "no texts"
    assert crossed is not None
    return seen.triu_().add_(seen.triu(1).T), crossed
