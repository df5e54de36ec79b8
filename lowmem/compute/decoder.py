"""The decoder of the Llama and Mistral family, over packed tokens.

RMSNorm, rotary positions, grouped-query attention and SwiGLU; padding does not exist, and biases
do not either. The maths is written over four operations and knows nothing of quantization,
devices or files. The residual stream is float32 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem.compute.attention import Spans
from lowmem.compute.operations.linear import Linear


class Operations(Protocol):
    """What the decoder is made of; each has a plain torch form, and a backend may replace any.

    ``exact_rows`` is the number of leading rows (those of a shared prefix) whose activations are
    never rounded, whatever the compute.
    """

    def norm_project(
        self, hidden: Tensor, norm: Tensor, linears: Sequence[Linear], exact_rows: int
    ) -> list[Tensor]:
        """RMSNorm, then each linear: ``[tokens, hidden]`` to ``[tokens, out_features]`` each."""

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Rotary positions: ``[tokens, heads, head_dim]``, whose memory the result may take."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        """Attention within each text: ``[tokens, heads, head_dim]`` to ``[tokens, query size]``."""

    def project_add(
        self, mixed: Tensor, linear: Linear, residual: Tensor, exact_rows: int
    ) -> Tensor:
        """residual + linear(mixed), float32 ``[tokens, hidden]``."""

    def gated_mlp(
        self,
        hidden: Tensor,
        norm: Tensor,
        gate: Linear,
        up: Linear,
        down: Linear,
        exact_rows: int,
    ) -> Tensor:
        """hidden + down(SiLU(gate(n)) * up(n)) with n = RMSNorm(hidden), ``[tokens, hidden]``."""


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's weights on the device that computes."""

    index: int
    input_norm: Tensor
    query: Linear
    key: Linear
    value: Linear
    output: Linear
    mlp_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of rotary positions, float32 ``[tokens, 1, head_dim / 2]``."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, theta: float, head_dim: int) -> Rotation:
        """The rotation at each position, ``[tokens]`` (https://arxiv.org/abs/2104.09864)."""
        exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = 1.0 / theta ** (exponent / head_dim)
        angles = (positions.float()[:, None] * frequencies)[:, None]
        return cls(angles.cos(), angles.sin())

    def apply(self, heads: Tensor) -> Tensor:
        """Rotates ``[tokens, heads, head_dim]``, pairing feature i with i + head_dim / 2."""
        first, second = heads.float().chunk(2, dim=-1)
        rotated = torch.empty_like(heads, dtype=torch.float32)
        left, right = rotated.chunk(2, dim=-1)
        torch.mul(first, self.cos, out=left).addcmul_(second, self.sin, value=-1)
        torch.mul(second, self.cos, out=right).addcmul_(first, self.sin)
        return rotated.to(heads.dtype)

    def select(self, rows: Tensor) -> Rotation:
        """The rotation of some of the tokens."""
        return Rotation(self.cos[rows], self.sin[rows])


def decode_layer(
    ops: Operations, layer: DecoderLayer, hidden: Tensor, rotation: Rotation, spans: Spans
) -> Tensor:
    """One layer over all tokens: float32 ``[tokens, hidden]`` to the same."""
    exact = spans.prefix_tokens
    head_dim = 2 * rotation.cos.shape[-1]
    query, key, value = (
        states.unflatten(-1, (-1, head_dim))
        for states in ops.norm_project(
            hidden, layer.input_norm, (layer.query, layer.key, layer.value), exact
        )
    )
    mixed = ops.attend(ops.rotate(query, rotation), ops.rotate(key, rotation), value, spans)
    hidden = ops.project_add(mixed, layer.output, hidden, exact)
    return ops.gated_mlp(hidden, layer.mlp_norm, layer.gate, layer.up, layer.down, exact)


def decode_last_layer(
    ops: Operations, layer: DecoderLayer, hidden: Tensor, rotation: Rotation, spans: Spans
) -> Tensor:
    """The last layer where only each text's last token is pooled: ``[texts, hidden]``.

    Keys and values need every token; queries, output and MLP only those that are pooled.
    """
    head_dim = 2 * rotation.cos.shape[-1]
    key, value = (
        states.unflatten(-1, (-1, head_dim))
        for states in ops.norm_project(
            hidden, layer.input_norm, (layer.key, layer.value), spans.prefix_tokens
        )
    )
    last = spans.last_tokens
    pooled = hidden[last]
    (query,) = ops.norm_project(pooled, layer.input_norm, (layer.query,), 0)
    query = ops.rotate(query.unflatten(-1, (-1, head_dim)), rotation.select(last))
    mixed = ops.attend(query, ops.rotate(key, rotation), value, spans.of_last_tokens())
    pooled = ops.project_add(mixed, layer.output, pooled, 0)
    return ops.gated_mlp(pooled, layer.mlp_norm, layer.gate, layer.up, layer.down, 0)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x²) + eps) in float32 (https://arxiv.org/abs/1910.07467)."""
    hidden = hidden.float()
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    scale = torch.rsqrt(length.square_().div_(hidden.shape[-1]).add_(eps))
    return (hidden * scale).mul_(weight.float())
