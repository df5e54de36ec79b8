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
    PrefixStates,
    Rotation,
    decode_last_layer,
    decode_layer,
    decode_prefix,
    rms_norm,
)
from lowmem.compute.latent_attention import LatentAttention
from lowmem.compute.operations.linear import Linear
from lowmem.compute.pooling import latent_attention_pool, mean_pool
from lowmem.compute.prefixes import PrefixCache
from lowmem.text.batching import Ids, PackedBatch

Observer = Callable[[int, int, Tensor], None]
"""Called with (layer index, batch index, hidden states ``[tokens, hidden]``) after each step.

The states are those of the texts' own tokens; a shared prefix is computed apart.
"""


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
    """A batch on the device, between layers; ``prefix`` are its ids as bytes, empty for none."""

    prefix: bytes
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
    prefixes: PrefixCache | None = None,
    *,
    rounds_prefixes: bool = False,
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
        prefixes: What is known of shared prefixes, and where to keep what is found; without it
            each is computed once for this call.
        rounds_prefixes: Whether 8-bit compute rounds shared prefixes as it rounds texts.

    Returns:
        For each batch the pooled vectors, not normalised, float32 ``[texts, hidden]``.
    """
    device = str(ends.final_norm.device)
    prefixes = prefixes or PrefixCache(0)
    shared = _prefix_steps(batches, prefixes, ends, config, device)
    hidden = [_embed(batch.input_ids, ends.embedding).to(device) for batch in batches]
    steps = [_step(batch, config, contract, device) for batch in batches]
    last_tokens_only = contract.pooling == "lasttoken" and on_layer is None
    for layer in layers:
        is_last = layer.index == config.num_hidden_layers - 1
        decode = decode_last_layer if is_last and last_tokens_only else decode_layer
        for prefix in shared.values():
            prefix.go_through(ops, layer, is_exact=not rounds_prefixes)
        for number, step in enumerate(steps):
            prefix_states = shared[step.prefix].states[layer.index] if step.prefix else None
            hidden[number] = decode(
                ops, layer, hidden[number], step.rotation, step.spans, prefix_states
            )
            if on_layer is not None:
                on_layer(layer.index, number, hidden[number])
    for ids, prefix in shared.items():
        prefixes.keep(ids, prefix.states)
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


class _PrefixStep:
    """A shared prefix on the device, between layers.

    Attributes:
        states: Of each layer so far; of all layers from the start where they were known.
    """

    def __init__(
        self,
        ids: bytes,
        known: Sequence[PrefixStates] | None,
        ends: Ends,
        config: ModelConfig,
        device: str,
    ) -> None:
        self.states = list(known or ())
        self._is_known = known is not None
        if not self._is_known:
            tokens = np.frombuffer(ids, np.int64)
            positions = torch.arange(len(tokens), device=device)
            self._rotation = Rotation.at(positions, config.rope_theta, config.head_dim)
            self._spans = Spans.of([len(tokens)], 0, True, device)
            self._hidden = _embed(tokens, ends.embedding).to(device)

    def go_through(self, ops: Operations, layer: DecoderLayer, *, is_exact: bool) -> None:
        """Computes the layer, unless it was known."""
        if not self._is_known:
            self._hidden, states = decode_prefix(
                ops, layer, self._hidden, self._rotation, self._spans, is_exact=is_exact
            )
            self.states.append(states)


def _prefix_steps(
    batches: Sequence[PackedBatch],
    prefixes: PrefixCache,
    ends: Ends,
    config: ModelConfig,
    device: str,
) -> dict[bytes, _PrefixStep]:
    """Each prefix of the batches once, by its ids."""
    all_ids = dict.fromkeys(batch.prefix.tobytes() for batch in batches if batch.prefix is not None)
    return {ids: _PrefixStep(ids, prefixes.get(ids), ends, config, device) for ids in all_ids}


def _embed(ids: Ids, embedding: RawTensor) -> Tensor:
    """Looks up tokens, float32 ``[tokens, hidden]`` on the host."""
    return torch.from_numpy(RawTensor(embedding.dtype, embedding.array[ids]).float32())


def _step(batch: PackedBatch, config: ModelConfig, contract: Contract, device: str) -> _Step:
    prefix_tokens = 0 if batch.prefix is None else len(batch.prefix)
    lengths = np.diff(batch.cu_seqlens).tolist()
    positions = torch.from_numpy(batch.position_ids).to(device)
    return _Step(
        b"" if batch.prefix is None else batch.prefix.tobytes(),
        Rotation.at(positions, config.rope_theta, config.head_dim),
        Spans.of(lengths, prefix_tokens, contract.is_causal, device),
        lengths,
        torch.from_numpy(batch.pooling_mask).to(device),
    )
