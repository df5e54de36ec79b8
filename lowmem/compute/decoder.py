"""The decoder of the Llama and Mistral family, over packed tokens.

RMSNorm, rotary positions, grouped-query attention and SwiGLU; padding does not exist, and biases
do not either. The maths is written over five operations and knows nothing of formats, devices or
files; of rounding it says only which rows are spared. The residual stream is float32 throughout.
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

    ``exact_rows`` is the number of leading rows whose activations are never rounded, whatever the
    compute: all of a shared prefix, unless weights were fitted to rounded ones, and none of a text.
    """

    def norm_project(
        self, hidden: Tensor, norm: Tensor, linears: Sequence[Linear], exact_rows: int
    ) -> list[Tensor]:
        """RMSNorm, then each linear: ``[tokens, hidden]`` to ``[tokens, out_features]`` each."""

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Rotary positions: ``[tokens, heads, head_dim]``, whose memory the result may take."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        """Attention within each text: ``[tokens, heads, head_dim]`` to ``[tokens, query size]``.

        Keys and values of shared prefixes stand in front of those of the tokens.
        """

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


@dataclass(frozen=True)
class PrefixStates:
    """What one layer leaves of a shared prefix: ``[tokens, key-value heads, head_dim]`` each.

    Attributes:
        key: Its keys, rotated.
        value: Its values.
    """

    key: Tensor
    value: Tensor


def decode_layer(
    ops: Operations,
    layer: DecoderLayer,
    hidden: Tensor,
    rotation: Rotation,
    spans: Spans,
    prefixes: Sequence[PrefixStates] = (),
) -> Tensor:
    """One layer over all tokens: float32 ``[tokens, hidden]`` to the same."""
    hidden = _add_attention(ops, layer, hidden, rotation, spans, prefixes)
    return ops.gated_mlp(hidden, layer.mlp_norm, layer.gate, layer.up, layer.down, 0)


def _add_attention(
    ops: Operations,
    layer: DecoderLayer,
    hidden: Tensor,
    rotation: Rotation,
    spans: Spans,
    prefixes: Sequence[PrefixStates],
) -> Tensor:
    """The residual stream behind attention, of which nothing else is held any more."""
    linears = (layer.query, layer.key, layer.value)
    query, key, value = _heads(ops, layer, hidden, rotation, linears, 0)
    query = ops.rotate(query, rotation)
    key, value = _behind(prefixes, ops.rotate(key, rotation), value)
    mixed = ops.attend(query, key, value, spans)
    del query, key, value
    return ops.project_add(mixed, layer.output, hidden, 0)


def decode_prefix(
    ops: Operations,
    layer: DecoderLayer,
    hidden: Tensor,
    rotation: Rotation,
    spans: Spans,
    *,
    is_exact: bool,
) -> tuple[Tensor, PrefixStates]:
    """One layer over a shared prefix: float32 ``[tokens, hidden]`` to the same, and what it leaves.

    Where it is exact no activation is rounded: every text that follows sees these keys and values,
    and BOS carries the largest activations of all.
    """
    exact = len(hidden) if is_exact else 0
    linears = (layer.query, layer.key, layer.value)
    query, key, value = _heads(ops, layer, hidden, rotation, linears, exact)
    key = ops.rotate(key, rotation)
    mixed = ops.attend(ops.rotate(query, rotation), key, value, spans)
    hidden = ops.project_add(mixed, layer.output, hidden, exact)
    hidden = ops.gated_mlp(hidden, layer.mlp_norm, layer.gate, layer.up, layer.down, exact)
    # Clones, for they may be views of all that was projected.
    return hidden, PrefixStates(key.clone(), value.clone())


def decode_last_layer(
    ops: Operations,
    layer: DecoderLayer,
    hidden: Tensor,
    rotation: Rotation,
    spans: Spans,
    prefixes: Sequence[PrefixStates] = (),
) -> Tensor:
    """The last layer where only each text's last token is pooled: ``[texts, hidden]``.

    Keys and values need every token; queries, output and MLP only those that are pooled.
    """
    key, value = _heads(ops, layer, hidden, rotation, (layer.key, layer.value), 0)
    key, value = _behind(prefixes, ops.rotate(key, rotation), value)
    last = spans.last_tokens
    pooled = hidden[last]
    (query,) = _heads(ops, layer, pooled, rotation, (layer.query,), 0)
    query = ops.rotate(query, rotation.select(last))
    mixed = ops.attend(query, key, value, spans.of_last_tokens())
    pooled = ops.project_add(mixed, layer.output, pooled, 0)
    return ops.gated_mlp(pooled, layer.mlp_norm, layer.gate, layer.up, layer.down, 0)


def _heads(
    ops: Operations,
    layer: DecoderLayer,
    hidden: Tensor,
    rotation: Rotation,
    linears: Sequence[Linear],
    exact_rows: int,
) -> list[Tensor]:
    """Projections of the normed states, ``[tokens, heads, head_dim]`` each, not yet rotated."""
    head_dim = 2 * rotation.cos.shape[-1]
    projected = ops.norm_project(hidden, layer.input_norm, linears, exact_rows)
    return [states.unflatten(-1, (-1, head_dim)) for states in projected]


def _behind(prefixes: Sequence[PrefixStates], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all prefixes, and then those of the tokens."""
    if not prefixes:
        return key, value
    keys = [prefix.key for prefix in prefixes]
    values = [prefix.value for prefix in prefixes]
    return torch.cat([*keys, key]), torch.cat([*values, value])


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x²) + eps) in float32 (https://arxiv.org/abs/1910.07467)."""
    hidden = hidden.float()
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    scale = torch.rsqrt(length.square_().div_(hidden.shape[-1]).add_(eps))
    return (hidden * scale).mul_(weight.float())
