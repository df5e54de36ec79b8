"""Exact folds: what a linear's inputs are divided by, its weight and what makes them multiply.

An input of large range costs all others of its token their precision once activations are rounded
to 8 bits, and a large weight does so to its row. Divided by a scale of its own an input costs less,
its weights more, and the model stays the same: norm weights, ``up_proj`` and ``v_proj`` take the
division, the linears behind them the multiplication. That is SmoothQuant's
(https://arxiv.org/abs/2211.10438), whose formula for the scales is only the start here: they are
moved to where the two roundings together disturb the outputs least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from export.hidden_states import (
    ATTENTION,
    BEFORE_ATTENTION,
    BEFORE_MLP,
    DOWN,
    MLP,
    OUTPUT,
    Stage,
)
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.tensors import RawTensor
from lowmem.compute.operations.linear import to_torch

_STRENGTH = 0.65  # of SmoothQuant's formula, whose best is near it for most linears
_STEPS = 40
_LARGEST_STEP = 0.3
_SMALLEST = 1e-5
_LEAST_SCALE = 0.1  # of the median


@dataclass(frozen=True)
class Folds:
    """What the inputs and outputs of a layer's linears are divided by.

    Attributes:
        inputs: Linear to positive scales of its inputs, float32 ``[in_features]``.
        outputs: ``v_proj`` and ``up_proj`` to those of their outputs, ``[out_features]``.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def apply(self, linear: str, weight: Tensor) -> Tensor:
        """The weight that goes with scaled inputs and outputs, ``(out_features, in_features)``."""
        weight = weight * self.inputs[linear]
        outputs = self.outputs.get(linear)
        return weight if outputs is None else weight.div_(outputs[:, None])


def fold(
    norms: Mapping[str, RawTensor],
    inputs: Callable[[Stage], Tensor],
    weights: Callable[[Stage], Tensor],
    config: ModelConfig,
) -> tuple[dict[str, RawTensor], Folds]:
    """Finds scales for a layer, and divides its norms by them.

    Args:
        norms: The layer's norms as they are stored.
        inputs: A sample of what a stage multiplies, ``[tokens, in_features]``, each token times
            the root of what its errors count.
        weights: The weights of a stage, stacked, ``[out_features, in_features]``.
        config: The model's shape.

    Returns:
        The new norms, in the dtype of the old ones, and the folds of the linears.
    """

    def scales_of(stage: Stage, shared: Tensor | None = None) -> Tensor:
        return balance(inputs(stage), weights(stage), shared)

    stored: dict[str, RawTensor] = {}
    scales: dict[Stage, Tensor] = {}
    for norm, stage in ((BEFORE_ATTENTION, ATTENTION), (BEFORE_MLP, MLP)):
        stored[norm], scales[stage] = _fold_norm(norms[norm], scales_of(stage))
    # Heads that share a value share its scale.
    device = scales[MLP].device
    values = torch.arange(config.num_key_value_heads * config.head_dim, device=device)
    heads = config.num_attention_heads // config.num_key_value_heads
    by_head = values.view(-1, 1, config.head_dim).expand(-1, heads, -1)
    scales[OUTPUT] = scales_of(OUTPUT, by_head.flatten())
    scales[DOWN] = scales_of(DOWN)
    first_heads = scales[OUTPUT].view(by_head.shape)[:, 0]
    return stored, Folds(
        {linear: scales[stage] for stage in scales for linear in stage},
        {"self_attn.v_proj": first_heads.flatten(), "mlp.up_proj": scales[DOWN]},
    )


def balance(inputs: Tensor, weight: Tensor, shared: Tensor | None = None) -> Tensor:
    """Scales under which rounding inputs by token and weights by row disturbs outputs least.

    With inputs x / s and weights w s, rounding to whole steps of absmax / 127 gives outputs a
    variance in proportion to

        mean over tokens of max(x / s)² * sum of (w s)²  +  sum over rows of max(w s)² *
        sum of the means of (x / s)²

    An input raises the first product where it is a token's largest, and lowers it through its
    weights; the second the other way round. Each step multiplies s by the ratio of what would fall
    and what would rise; the best of all steps is kept.

    Args:
        inputs: ``[tokens, in_features]``.
        weight: ``[out_features, in_features]``.
        shared: Number of the scale that each input has, where several share one.

    Returns:
        Positive scales with a geometric mean of 1, ``[in_features]``.
    """
    inputs, weight = inputs.abs(), weight.abs()
    if shared is None:
        shared = torch.arange(inputs.shape[1], device=inputs.device)
    count = int(shared.max()) + 1

    def by_scale(parts: Tensor) -> Tensor:
        return parts.new_zeros(count).index_add_(0, shared, parts)

    def largest(values: Tensor) -> Tensor:
        return values.new_zeros(count).scatter_reduce_(0, shared, values, "amax")

    ranges = largest(inputs.amax(0)).clamp_min_(_SMALLEST).pow_(_STRENGTH)
    scales = ranges / largest(weight.amax(0)).clamp_min_(_SMALLEST).pow_(1 - _STRENGTH)
    of_inputs, of_weights = inputs.square().mean(0), weight.square().sum(0)
    best, least = scales, torch.inf
    for step in range(_STEPS):
        wide = scales[shared]
        by_token, token_inputs = (inputs / wide).max(dim=-1)
        by_row, row_inputs = (weight * wide).max(dim=-1)
        by_token, by_row = by_token.square_().div_(len(inputs)), by_row.square_()
        weights, means = of_weights * wide.square(), of_inputs / wide.square()
        variance = by_token.sum() * weights.sum() + by_row.sum() * means.sum()
        if float(variance) < least:
            best, least = scales, float(variance)
        falls = torch.zeros_like(wide).index_add_(0, token_inputs, by_token * weights.sum())
        falls += by_row.sum() * means
        rises = torch.zeros_like(wide).index_add_(0, row_inputs, by_row * means.sum())
        rises += by_token.sum() * weights
        floor = 1e-12 * variance.clamp_min(torch.finfo(variance.dtype).tiny)
        ratio = by_scale(falls).clamp_min_(floor) / by_scale(rises).clamp_min_(floor)
        scales = scales * ratio.pow_(_LARGEST_STEP * (1 - step / _STEPS) / 2)
    # Where the sample was silent, a later token may not be: its scale must leave room for that.
    best = best.clamp_min(best.median() * _LEAST_SCALE)
    best = best / best.log().mean().exp()
    return best[shared]


def _fold_norm(norm: RawTensor, scales: Tensor) -> tuple[RawTensor, Tensor]:
    """Divides a norm; its outputs are then divided by the scales returned, to the last bit.

    They differ from those wanted by the rounding of the stored norm, and are 1 where the norm is
    zero and divides nothing.
    """
    weight = to_torch(norm).to(scales.device)
    least = weight.float().abs() / torch.finfo(weight.dtype).max
    stored = (weight.float() / torch.maximum(scales, least)).to(weight.dtype)
    exact = torch.where(stored == 0, torch.ones_like(scales), weight.float() / stored.float())
    codes = stored.view(torch.uint16) if norm.dtype == "BF16" else stored
    return RawTensor(norm.dtype, codes.cpu().numpy()), exact
