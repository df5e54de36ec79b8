"""The one loop: bring a layer in, push every batch through it, go on to the next.

Resident plans run it over layers that are in memory, streamed plans and the reference over layers
that are read on the way, calibration with an observer. What differs is the iterator, never the
arithmetic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

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

The states are those of the texts' own tokens; shared prefixes are computed apart.
"""


@dataclass(frozen=True)
class Ends:
    """What stands before the first layer and behind the last.

    Attributes:
        embedding: The token embeddings in 16 bits, mapped on the host; rows are looked up there.
        final_norm: Weight of the last norm, on the device.
        latent_attention: The pooling's own weights, or None where it has none.
    """

    embedding: Tensor
    final_norm: Tensor
    latent_attention: LatentAttention | None = None


@dataclass(frozen=True)
class Step:
    """A batch on the device, but for its hidden states.

    Attributes:
        prefixes: The ids of each shared prefix, int64 as bytes.
        rotation: Of each token.
        spans: Where the texts lie.
        lengths: Tokens of each text.
        pooling_mask: Tokens that are pooled, bool ``[tokens]``.
    """

    prefixes: list[bytes]
    rotation: Rotation
    spans: Spans
    lengths: list[int]
    pooling_mask: Tensor

    @classmethod
    def of(cls, batch: PackedBatch, config: ModelConfig, contract: Contract, device: str) -> Step:
        """Brings a batch to the device."""
        lengths = np.diff(batch.cu_seqlens).tolist()
        rest = iter(lengths)
        sections = [
            (len(section.prefix), list(islice(rest, section.texts))) for section in batch.sections
        ]
        positions = torch.from_numpy(batch.position_ids).to(device)
        return cls(
            prefixes_of(batch),
            Rotation.at(positions, config.rope_theta, config.head_dim),
            Spans.of(sections, contract.is_causal, device),
            lengths,
            torch.from_numpy(batch.pooling_mask).to(device),
        )


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
    steps: Sequence[Step],
    hidden: deque[Tensor],
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
        steps: The texts, batch by batch.
        hidden: Embeddings of each batch's tokens, float32 ``[tokens, hidden]`` on the device. Each
            is taken out when it is needed for the last time.
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
    known = {ids: prefixes.get(ids) for step in steps for ids in step.prefixes}
    shared = {ids: _PrefixStep(ids, states, ends, config, device) for ids, states in known.items()}
    kept: dict[bytes, list[PrefixStates]] = {ids: [] for ids in prefixes.fitting(list(known))}
    last_tokens_only = contract.pooling == "lasttoken" and on_layer is None
    for layer in layers:
        is_last = layer.index == config.num_hidden_layers - 1
        decode = decode_last_layer if is_last and last_tokens_only else decode_layer
        left = {
            ids: prefix.go_through(ops, layer, is_exact=not rounds_prefixes)
            for ids, prefix in shared.items()
        }
        for ids, of_layers in kept.items():
            of_layers.append(left[ids])
        for number, step in enumerate(steps):
            before = [left[ids] for ids in step.prefixes]
            # Taken out, so that the layer can let go of what it has read.
            states = decode(ops, layer, hidden.popleft(), step.rotation, step.spans, before)
            hidden.append(states)
            if on_layer is not None:
                on_layer(layer.index, number, states)
            del states
    for ids, of_layers in kept.items():
        prefixes.keep(ids, of_layers)
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

    It is computed alone, so that what it leaves does not depend on what else is computed.
    """

    def __init__(
        self,
        ids: bytes,
        known: Sequence[PrefixStates] | None,
        ends: Ends,
        config: ModelConfig,
        device: str,
    ) -> None:
        self._known = known
        if known is None:
            tokens = np.frombuffer(ids, np.int64)
            positions = torch.arange(len(tokens), device=device)
            self._rotation = Rotation.at(positions, config.rope_theta, config.head_dim)
            self._spans = Spans.of([(0, [len(tokens)])], True, device)
            self._hidden = embed(tokens, ends.embedding, device)

    def go_through(self, ops: Operations, layer: DecoderLayer, *, is_exact: bool) -> PrefixStates:
        """What the layer leaves of it, which is computed unless it was known."""
        if self._known is not None:
            return self._known[layer.index]
        self._hidden, states = decode_prefix(
            ops, layer, self._hidden, self._rotation, self._spans, is_exact=is_exact
        )
        return states


def prefixes_of(batch: PackedBatch) -> list[bytes]:
    """The ids of each shared prefix of a batch, int64 as bytes."""
    return [section.prefix.tobytes() for section in batch.sections if len(section.prefix)]


def embed(ids: Ids, embedding: Tensor, device: str) -> Tensor:
    """Looks up tokens on the host, float32 ``[tokens, hidden]`` on the device.

    They go there in 16 bits: a fast card would wait for more.
    """
    rows = embedding.index_select(0, torch.tensor(ids, device="cpu"))
    return rows.to(device).float()
