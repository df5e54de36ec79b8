"""Hidden states of all calibration texts, and their way through a layer whose weights come late.

A layer is four stages of linears that share their inputs. Before a stage computes, whoever advances
the states is shown its inputs and gives its weights: as they are in the source, as they are stored,
or as they have just been quantized to suit those inputs.

The states themselves lie in scratch files of the host; what computes, a batch at a time, may be a
CUDA device. There key and value heads are repeated, as in every other pass in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.artifact.config import NORMS, ModelConfig
from lowmem.artifact.contract import Contract
from lowmem.artifact.tensors import RawTensor
from lowmem.compute.attention import Spans, attend
from lowmem.compute.decoder import Rotation, rms_norm
from lowmem.compute.kernels import packed_attention
from lowmem.compute.operations.plain import round_rows
from lowmem.compute.operations.products import reproducible_product
from lowmem.compute.pooling import mean_pool
from lowmem.disk import mapped
from lowmem.text.batching import EncodedText, pack

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = ("self_attn.o_proj",)
MLP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)
"""The stages: linears that share their inputs, in the order in which a layer computes them."""
BEFORE_ATTENTION, BEFORE_MLP = NORMS

Stage = tuple[str, ...]
STAGES: tuple[Stage, ...] = (ATTENTION, OUTPUT, MLP, DOWN)
Inputs = Callable[[], Iterator[tuple[slice, Tensor]]]
"""Gives rows among all tokens, and what a stage multiplies there, ``[rows, in_features]``."""
Weigh = Callable[[Stage, Inputs], Tensor]
"""Gives the weights of a stage, stacked, float32 ``[sum of out_features, in_features]``."""

_BATCH_TOKENS = 2048
LONGEST_TOKENS = 4096
"""Most tokens of a text, which makes a batch by itself where it is longer than one."""


def texts_scratch_bytes(config: ModelConfig, tokens: int) -> int:
    """What texts take of the disk, hidden states left out."""
    return 4 * tokens * (config.query_size + config.intermediate_size)


@dataclass(frozen=True)
class Batch:
    """Texts that are computed together; ``rows`` are their tokens among all."""

    rows: slice
    rotation: Rotation
    spans: Spans
    lengths: list[int]
    pooling_mask: Tensor  # bool [tokens]


class Texts:
    """The calibration texts, and scratch that all paths through a layer share.

    Attributes:
        tokens: How many tokens the texts have.
        config: The model's shape.
        device: What computes: ``cpu`` or ``cuda``.
    """

    @torch.inference_mode(False)  # derivatives may go through what is made here
    def __init__(
        self,
        texts: Sequence[EncodedText],
        config: ModelConfig,
        contract: Contract,
        directory: Path,
        device: str,
    ) -> None:
        """Packs the texts; scratch files lie in the directory, without a name.

        Raises:
            CapacityError: The disk is full.
        """
        self.config = config
        self.device = device
        self.tokens = 0
        self._directory = directory
        self._ids = []
        self.batches = []
        for batch in pack(texts, _BATCH_TOKENS, pooling=contract.pooling):
            positions = torch.from_numpy(batch.position_ids).to(device)
            lengths = np.diff(batch.cu_seqlens).tolist()
            self.batches.append(
                Batch(
                    slice(self.tokens, self.tokens + batch.tokens),
                    Rotation.at(positions, config.rope_theta, config.head_dim),
                    Spans.of([(0, lengths)], contract.is_causal, device),
                    lengths,
                    torch.from_numpy(batch.pooling_mask).to(device),
                )
            )
            self._ids.append(batch.input_ids)
            self.tokens += batch.tokens
        self.mixed = self.scratch(config.query_size)
        self.gated = self.scratch(config.intermediate_size)

    def part(self, tokens: int | None) -> Texts:
        """Batches of about so many tokens, from everywhere, in the same scratch and rows.

        Args:
            tokens: How many; None for all.
        """
        if tokens is None:
            return self
        every = len(self.batches)
        wanted = min(every, max(1, round(every * tokens / self.tokens)))
        return self.only([i * every // wanted for i in range(wanted)])

    def only(self, chosen: Sequence[int]) -> Texts:
        """Some of the batches, by their numbers, in the same scratch and rows."""
        some = copy(self)
        some.batches = [self.batches[i] for i in chosen]
        some._ids = [self._ids[i] for i in chosen]
        return some

    def scratch(self, features: int, tokens: int | None = None) -> Tensor:
        """Zeros on the disk, float32 ``[tokens, features]``, for all tokens or so many."""
        shape = (self.tokens if tokens is None else tokens, features)
        return torch.from_numpy(mapped(self._directory, shape, "calibration"))

    @property
    def rows(self) -> list[slice]:
        """Where each batch lies among all tokens."""
        return [batch.rows for batch in self.batches]

    def normed(self, hidden: Tensor, norm: Tensor) -> Iterator[Tensor]:
        """RMSNorm of states ``[tokens, hidden_size]``, batch by batch, on the device."""
        for states in self.brought(hidden):
            yield rms_norm(states, norm, self.config.rms_norm_eps)

    def brought(self, states: Tensor) -> Iterator[Tensor]:
        """States ``[tokens, features]``, batch by batch, on the device."""
        for rows in self.rows:
            yield states[rows].to(self.device)

    def embedded(self, embedding: RawTensor) -> Tensor:
        """The hidden states before the first layer, float32 ``[tokens, hidden_size]``."""
        hidden = self.scratch(self.config.hidden_size)
        for batch, states in zip(self.batches, self.looked_up(embedding), strict=True):
            hidden[batch.rows] = states
        return hidden

    def looked_up(self, embedding: RawTensor) -> Iterator[Tensor]:
        """The embeddings of each batch, float32 ``[rows, hidden_size]``."""
        for ids in self._ids:
            yield torch.from_numpy(RawTensor(embedding.dtype, embedding.array[ids]).float32())


class HiddenStates:
    """One model's hidden states of the texts, between layers.

    Attributes:
        hidden: float32 ``[tokens, hidden_size]``.
        texts: The texts that are computed.
    """

    def __init__(self, texts: Texts, embedding: RawTensor) -> None:
        """Starts before the first layer."""
        self.hidden = texts.embedded(embedding)
        self.texts = texts

    def copy(self) -> HiddenStates:
        """The same states, to go another way from here."""
        other = copy(self)
        other.hidden = self.texts.scratch(self.texts.config.hidden_size)
        other.hidden.copy_(self.hidden)
        return other

    def pooled(self, norm: Tensor) -> Tensor:
        """One vector a text, the mean of its pooled tokens, float32 ``[texts, hidden_size]``.

        Args:
            norm: Weight of the norm behind the last layer, on the device.
        """
        return torch.cat(
            [
                mean_pool(states, batch.pooling_mask, batch.lengths).cpu()
                for batch, states in zip(
                    self.texts.batches, self.texts.normed(self.hidden, norm), strict=True
                )
            ]
        )

    def advance(
        self, norms: Mapping[str, Tensor], weigh: Weigh, rounded: frozenset[str] = frozenset()
    ) -> None:
        """Takes the states through a layer.

        Args:
            norms: Weight of each norm, float32, on the device.
            weigh: Asked for the weights of each stage in turn, on the device. While it looks at the
                inputs of ``o_proj`` and ``down_proj``, ``hidden`` is what their outputs will be
                added to.
            rounded: Linears whose inputs are rounded to 8 bits per token.
        """
        texts, head_dim = self.texts, self.texts.config.head_dim
        mix = attend if texts.device == "cpu" else packed_attention.by_length

        def inputs(stage: Stage, states: Inputs) -> Inputs:
            if not rounded.issuperset(stage):
                return states
            return lambda: ((rows, _rounded(one)) for rows, one in states())

        def normed(norm: Tensor) -> Inputs:
            return lambda: zip(texts.rows, texts.normed(self.hidden, norm), strict=True)

        states_of = inputs(ATTENTION, normed(norms[BEFORE_ATTENTION]))
        weight = weigh(ATTENTION, states_of)
        sizes = [texts.config.linears()[name][0] for name in ATTENTION]
        for batch, (rows, states) in zip(texts.batches, states_of(), strict=True):
            query, key, value = (
                part.unflatten(-1, (-1, head_dim))
                for part in reproducible_product(states, weight).split(sizes, dim=-1)
            )
            query, key = batch.rotation.apply(query), batch.rotation.apply(key)
            texts.mixed[rows] = mix(query, key, value.contiguous(), batch.spans)
        self._add(OUTPUT, weigh, inputs(OUTPUT, lambda: self._rows(texts.mixed)))

        states_of = inputs(MLP, normed(norms[BEFORE_MLP]))
        weight = weigh(MLP, states_of)
        for rows, states in states_of():
            gate, up = reproducible_product(states, weight).chunk(2, dim=-1)
            texts.gated[rows] = F.silu(gate).mul_(up)
        del weight
        self._add(DOWN, weigh, inputs(DOWN, lambda: self._rows(texts.gated)))

    def _add(self, stage: Stage, weigh: Weigh, inputs: Inputs) -> None:
        weight = weigh(stage, inputs)
        for rows, states in inputs():
            self.hidden[rows] += reproducible_product(states, weight).cpu()

    def _rows(self, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return zip(self.texts.rows, self.texts.brought(states), strict=True)


def _rounded(states: Tensor) -> Tensor:
    codes, scales = round_rows(states)
    return codes.mul_(scales)
