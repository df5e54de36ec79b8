"""Exact folds: what a linear's inputs are divided by, its weight and what makes them multiply.

An input of large range costs all others of its token their precision once activations are rounded
to 8 bits. Divided by a scale of its own it does not, and the model stays the same: norm weights,
``up_proj`` and ``v_proj`` take the division, the linears behind them the multiplication
(SmoothQuant, https://arxiv.org/abs/2211.10438).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from export.hidden_states import ATTENTION, DOWN, MLP, OUTPUT, Stage
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.tensors import RawTensor
from lowmem.compute.operations.linear import to_torch

STRENGTH = 0.65
"""How much of the range moves into the weights: 0 none, 1 all."""
BEFORE_ATTENTION, BEFORE_MLP = "input_layernorm", "post_attention_layernorm"

_SMALLEST = 1e-5


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
    inputs: Mapping[Stage, Tensor],
    columns: Mapping[Stage, Tensor],
    config: ModelConfig,
) -> tuple[dict[str, RawTensor], Folds]:
    """Finds scales for a layer, and divides its norms by them.

    Args:
        norms: The layer's norms as they are stored.
        inputs: Absolute maximum of each input of a stage, over the calibration tokens.
        columns: Absolute maximum of each column of a stage's weights.
        config: The model's shape.

    Returns:
        The new norms, in the dtype of the old ones, and the folds of the linears.
    """
    stored: dict[str, RawTensor] = {}
    scales: dict[Stage, Tensor] = {}
    for norm, stage in ((BEFORE_ATTENTION, ATTENTION), (BEFORE_MLP, MLP)):
        stored[norm], scales[stage] = _fold_norm(norms[norm], smooth(inputs[stage], columns[stage]))
    scales[OUTPUT], values = smooth_values(
        inputs[OUTPUT], columns[OUTPUT], config.num_key_value_heads, config.head_dim
    )
    scales[DOWN] = smooth(inputs[DOWN], columns[DOWN])
    return stored, Folds(
        {linear: scales[stage] for stage in scales for linear in stage},
        {"self_attn.v_proj": values, "mlp.up_proj": scales[DOWN]},
    )


def smooth(largest_inputs: Tensor, largest_weights: Tensor) -> Tensor:
    """inputs^strength / weights^(1 - strength), with a geometric mean of 1.

    Args:
        largest_inputs: Absolute maximum of each input over the calibration tokens.
        largest_weights: Absolute maximum of each input's column in all weights that read it.
    """
    inputs = largest_inputs.clamp_min(_SMALLEST).pow(STRENGTH)
    scales = inputs / largest_weights.clamp_min(_SMALLEST).pow(1 - STRENGTH)
    return scales / scales.log().mean().exp()


def smooth_values(
    largest_inputs: Tensor, largest_weights: Tensor, key_value_heads: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """``smooth`` for inputs of ``o_proj``, of which several heads share one value.

    Returns:
        The scales of ``o_proj``'s inputs, and those of ``v_proj``'s outputs.
    """
    shape = (key_value_heads, -1, head_dim)
    of_values = smooth(
        largest_inputs.view(shape).amax(1).flatten(), largest_weights.view(shape).amax(1).flatten()
    )
    shared = of_values.view(key_value_heads, 1, head_dim)
    heads = len(largest_inputs) // (key_value_heads * head_dim)
    return shared.expand(-1, heads, -1).flatten(), of_values


def _fold_norm(norm: RawTensor, scales: Tensor) -> tuple[RawTensor, Tensor]:
    """Divides a norm; its outputs are then divided by the scales returned, to the last bit.

    They differ from those wanted by the rounding of the stored norm, and are 1 where the norm is
    zero and divides nothing.
    """
    weight = to_torch(norm)
    stored = (weight.float() / scales).to(weight.dtype)
    exact = torch.where(stored == 0, torch.ones_like(scales), weight.float() / stored.float())
    array = stored.view(torch.uint16).numpy() if norm.dtype == "BF16" else stored.numpy()
    return RawTensor(norm.dtype, array), exact
