"""The one loop: bring a layer in, push every batch through it, go on to the next.

Resident plans run it over layers that are in memory, streamed plans and the reference over layers
that are read on the way, calibration with an observer. What differs is the iterator, never the
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.contract import Contract
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.weights import LayerWeights
from lowmem.compute.attention import Spans
from lowmem.compute.decoder import (
    DecoderLayer,
    Operations,
    Rotation,
    decode_last_layer,
    decode_layer,
    rms_norm,
)
from lowmem.compute.latent_attention import LatentAttention
from lowmem.compute.operations.linear import Linear
from lowmem.compute.pooling import latent_attention_pool, mean_pool
from lowmem.text.batching import PackedBatch

Observer = Callable[[int, int, Tensor], None]
"""Called with (layer index, batch index, hidden states ``[tokens, hidden]``) after each step."""


@dataclass(frozen=True)
class Ends:
    """What stands before the first layer and behind the last.

    Attributes:
        embedding: The token embeddings, mapped on the host; rows are looked up there.
        final_norm: Weight of the last norm, on the device.
        latent_attention: The pooling's own weights, or None where it has none.
    """

    embedding: RawTensor
    final_norm: Tensor
    latent_attention: LatentAttention | None = None


@dataclass(frozen=True)
class _Step:
    """A batch on the device, between layers."""

    rotation: Rotation
    spans: Spans
    lengths: list[int]
    pooling_mask: Tensor


def load_layer(weights: LayerWeights, place: Callable[[RawTensor], Tensor]) -> DecoderLayer:
    """One layer, with each of its tensors where ``place`` puts it."""
    linears = {name: Linear.load(linear, place) for name, linear in weights.linears.items()}
    norms = {name: place(norm) for name, norm in weights.norms.items()}
    return DecoderLayer(
        index=weights.index,
        input_norm=norms["input_layernorm"],
        query=linears["self_attn.q_proj"],
        key=linears["self_attn.k_proj"],
        value=linears["self_attn.v_proj"],
        output=linears["self_attn.o_proj"],
        mlp_norm=norms["post_attention_layernorm"],
        gate=linears["mlp.gate_proj"],
        up=linears["mlp.up_proj"],
        down=linears["mlp.down_proj"],
    )


def run(
    ops: Operations,
    layers: Iterable[DecoderLayer],
    batches: Sequence[PackedBatch],
    ends: Ends,
    config: ModelConfig,
    contract: Contract,
    on_layer: Observer | None = None,
) -> list[Tensor]:
    """Pushes batches through the whole stack, layer by layer.

    Args:
        ops: The arithmetic.
        layers: All layers, in order.
        batches: The texts. Hidden states of all of them are held at once.
        ends: Embedding and final norm.
        config: The model's shape.
        contract: Attention and pooling.
        on_layer: Sees the hidden states after each layer. With an observer the last layer is
            computed for all tokens, too.

    Returns:
        For each batch the pooled vectors, not normalised, float32 ``[texts, hidden]``.
    """
    device = str(ends.final_norm.device)
    hidden = [_embed(batch, ends.embedding).to(device) for batch in batches]
    steps = [_step(batch, config, contract, device) for batch in batches]
    last_tokens_only = contract.pooling == "lasttoken" and on_layer is None
    for layer in layers:
        is_last = layer.index == config.num_hidden_layers - 1
        decode = decode_last_layer if is_last and last_tokens_only else decode_layer
        for number, step in enumerate(steps):
            hidden[number] = decode(ops, layer, hidden[number], step.rotation, step.spans)
            if on_layer is not None:
                on_layer(layer.index, number, hidden[number])
    vectors = []
    for states, step in zip(hidden, steps, strict=True):
        if contract.pooling == "lasttoken" and not last_tokens_only:
            states = states[step.spans.last_tokens]
        normed = rms_norm(states, ends.final_norm, config.rms_norm_eps)
        if contract.pooling == "lasttoken":
            vectors.append(normed)
        elif contract.pooling == "mean":
            vectors.append(mean_pool(normed, step.pooling_mask, step.lengths))
        else:
            assert ends.latent_attention is not None, contract.pooling
            mask, latents = step.pooling_mask, ends.latent_attention
            vectors.append(latent_attention_pool(normed, mask, step.lengths, latents))
    return vectors


def _embed(batch: PackedBatch, embedding: RawTensor) -> Tensor:
    """Looks up the prefix's and the texts' tokens, float32 ``[tokens, hidden]`` on the host."""
    ids = batch.input_ids
    if batch.prefix is not None:
        ids = np.concatenate([batch.prefix, ids])
    return torch.from_numpy(RawTensor(embedding.dtype, embedding.array[ids]).float32())


def _step(batch: PackedBatch, config: ModelConfig, contract: Contract, device: str) -> _Step:
    prefix_tokens = 0 if batch.prefix is None else len(batch.prefix)
    lengths = np.diff(batch.cu_seqlens).tolist()
    positions = np.concatenate([np.arange(prefix_tokens), batch.position_ids])
    return _Step(
        Rotation.at(torch.from_numpy(positions).to(device), config.rope_theta, config.head_dim),
        Spans.of(lengths, prefix_tokens, contract.is_causal, device),
        lengths,
        torch.from_numpy(batch.pooling_mask).to(device),
    )
