"""NV-Embed's latent attention: what it does to the final hidden states before their mean.

Tokens are queries; keys and values come from learned latents and so are constants. Folded with the
query and the output projection, they leave two small matrices in the place of three large ones: of
535 million weights of the published model, 34 million, in float32. The sums are the same in another
order.

Shape letters: H hidden_size, N latents, D features of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.artifact.latent_attention import (
    ATTENTION,
    LATENTS,
    LAYER_NORM_EPS,
    MLP,
    LatentAttentionConfig,
)
from lowmem.artifact.tensors import RawTensor
from lowmem.compute.operations.linear import to_torch

_CHUNK_TOKENS = 512
# Features of the MLP whose weights are brought to float32 at once: 48 MiB of the published model.
_BLOCK_FEATURES = 1024


@dataclass(frozen=True)
class LayerNorm:
    """Weight and bias ``[H]``."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def load(cls, tensors: Mapping[str, RawTensor], name: str, device: str) -> LayerNorm:
        """The norm whose tensors begin with a name, as float32 on a device."""
        weight, bias = (_float32(tensors[f"{name}.{part}"], device) for part in ("weight", "bias"))
        return cls(weight, bias)

    def __call__(self, states: Tensor) -> Tensor:
        """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
        return F.layer_norm(states, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)


@dataclass(frozen=True)
class LatentAttention:
    """The layer's weights on the device that computes.

    Attributes:
        query_norm: Of the hidden states.
        keys: Folded with the query projection, float32 ``[heads * N, H]``.
        values: Folded with the output projection, float32 ``[heads * N, H]``.
        heads: Attention heads.
        mlp_norm: In front of the MLP.
        gated: Weight of the MLP's first product, ``[2 * inner, H]``; the gate's rows come second.
        gated_bias: float32 ``[2 * inner]``.
        down: Weight of its second product, ``[H, inner]``.
        down_bias: float32 ``[H]``.
    """

    query_norm: LayerNorm
    keys: Tensor
    values: Tensor
    heads: int
    mlp_norm: LayerNorm
    gated: Tensor
    gated_bias: Tensor
    down: Tensor
    down_bias: Tensor

    @classmethod
    def load(
        cls, tensors: Mapping[str, RawTensor], config: LatentAttentionConfig, device: str
    ) -> LatentAttention:
        """Brings the stored tensors to a device; the MLP's weights stay in their own dtype."""
        keys, values = fold(tensors, config, device)
        return cls(
            query_norm=LayerNorm.load(tensors, f"{ATTENTION}norm", device),
            keys=keys,
            values=values,
            heads=config.num_cross_heads,
            mlp_norm=LayerNorm.load(tensors, f"{MLP}norm", device),
            gated=to_torch(tensors[f"{MLP}fn.net.0.weight"], device),
            gated_bias=_float32(tensors[f"{MLP}fn.net.0.bias"], device),
            down=to_torch(tensors[f"{MLP}fn.net.2.weight"], device),
            down_bias=_float32(tensors[f"{MLP}fn.net.2.bias"], device),
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """Attention to the latents, then the MLP, each added to its input.

        Args:
            hidden: Hidden states behind the final norm, float32 ``[tokens, H]``; changed in place.

        Returns:
            float32 ``[tokens, H]``.
        """
        for begin in range(0, len(hidden), _CHUNK_TOKENS):
            chunk = hidden[begin : begin + _CHUNK_TOKENS]
            scores = F.linear(self.query_norm(chunk), self.keys).unflatten(-1, (self.heads, -1))
            weights = scores.softmax(dim=-1).flatten(1)  # [tokens, heads * N]
            chunk.addmm_(weights, self.values)
        normed = self.mlp_norm(hidden)
        hidden += self.down_bias
        inner = self.down.shape[1]
        for first in range(0, inner, _BLOCK_FEATURES):
            block = slice(first, min(first + _BLOCK_FEATURES, inner))
            gate_block = slice(inner + block.start, inner + block.stop)
            raise_by, gate_by = self.gated[block].float(), self.gated[gate_block].float()
            down = self.down[:, block].float()
            for begin in range(0, len(hidden), _CHUNK_TOKENS):
                rows = slice(begin, begin + _CHUNK_TOKENS)
                raised = F.linear(normed[rows], raise_by, self.gated_bias[block])
                gate = F.linear(normed[rows], gate_by, self.gated_bias[gate_block])
                hidden[rows].addmm_(raised.mul_(F.gelu(gate)), down.T)
        return hidden


def fold(
    tensors: Mapping[str, RawTensor], config: LatentAttentionConfig, device: str
) -> tuple[Tensor, Tensor]:
    """Keys and values of the latents, each folded with the projection on its other side.

    With c = LayerNorm(latents), for each head: keys = c Kᵀ Q / sqrt(D) and values = c Vᵀ Oᵀ. A head
    of each projection is held as float32 at a time.

    Args:
        tensors: The stored tensors, by name.
        config: Heads and their size.
        device: Where to compute.

    Returns:
        Both float32 ``[heads * N, H]``: scores of a normed token x are keys x, and what attention
        adds is the softmax of each head's N scores, times values.
    """
    norm = LayerNorm.load(tensors, f"{ATTENTION}norm_context", device)
    context = norm(_float32(tensors[LATENTS], device))  # [N, H]
    queries = to_torch(tensors[f"{ATTENTION}fn.to_q.weight"], "cpu")
    both = to_torch(tensors[f"{ATTENTION}fn.to_kv.weight"], "cpu")
    outputs = to_torch(tensors[f"{ATTENTION}fn.to_out.weight"], "cpu")
    count, size = config.num_latents_value, config.cross_dim_head
    keys = context.new_empty(config.num_cross_heads * count, context.shape[1])
    values = torch.empty_like(keys)
    for head in range(config.num_cross_heads):
        rows = slice(head * size, (head + 1) * size)
        value_rows = slice(len(queries) + rows.start, len(queries) + rows.stop)
        place = slice(head * count, (head + 1) * count)
        key = context @ both[rows].to(device).float().T  # [N, D]
        torch.mm(key.div_(size**0.5), queries[rows].to(device).float(), out=keys[place])
        value = context @ both[value_rows].to(device).float().T
        torch.mm(value, outputs[:, rows].to(device).float().T, out=values[place])
    return keys, values


def _float32(raw: RawTensor, device: str) -> Tensor:
    return to_torch(raw, device).float()
