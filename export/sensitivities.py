"""How much each token of the calibration texts matters to the pooled vectors, stage by stage.

An error in what a stage gives a token reaches the vector in part, and the parts differ by orders of
magnitude: what nobody looks at again could be anything. The derivative says which part: the texts
go through the full-precision model once, and the derivative of their vectors goes the way back. Not
all of it: for one direction of random signs a text, whose mean square is that of all directions
(Hutchinson's estimator). The signs come from a fixed stream: on a CPU the same inputs give the same
bytes. Attention's derivative on a card is summed in no fixed order. A CPU that multiplies bfloat16
does so here, and rounds products to it: what a token counts may be a few per cent off, unlike what
is fitted with it.

The way back needs each layer's inputs again. They lie in scratch files, of as many texts at a time
as find room there; the weights are read twice for each such part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.calibration import FullLayer
from export.groups import read_layer, read_tensor
from export.hidden_states import (
    ATTENTION,
    BEFORE_ATTENTION,
    BEFORE_MLP,
    DOWN,
    LONGEST_TOKENS,
    MLP,
    OUTPUT,
    STAGES,
    Batch,
    Stage,
    Texts,
)
from export.sources import Source
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM
from lowmem.compute.attention import attend
from lowmem.compute.decoder import Rotation
from lowmem.compute.operations.linear import to_torch
from lowmem.compute.operations.products import filled, reproducible_product
from lowmem.compute.pooling import mean_pool
from lowmem.hardware import probe
from lowmem.progress import Progress

_STEP = "measuring what each token does to pooled vectors"
_SEED = 0
_PART_BYTES = 4 * 2**30
_MLP_ROWS = 1024
"""Tokens of which the derivative through an MLP, by far the widest states, is held at a time."""


def scratch_bytes(config: ModelConfig, tokens: int) -> int:
    """What this takes of the disk while it goes on, at most, unless one batch is more."""
    return min(_PART_BYTES, tokens * _token_bytes(config))


def peak_bytes(config: ModelConfig) -> int:
    """Most bytes that this holds of the device's memory, as an upper bound."""
    inner, hidden, query = config.intermediate_size, config.hidden_size, config.query_size
    layer = sum(rows * columns for rows, columns in config.linears().values())
    attention = LONGEST_TOKENS * (6 * hidden + 8 * query)
    return 4 * (layer + attention + _MLP_ROWS * (8 * inner + 4 * hidden))


def _token_bytes(config: ModelConfig) -> int:
    """A token's hidden states before every layer and behind the last, float32."""
    return 4 * (config.num_hidden_layers + 1) * config.hidden_size


@torch.inference_mode(False)
@torch.no_grad()
def token_sensitivities(
    source: Source,
    texts: Texts,
    dtype: str,
    progress: Progress = lambda what, done, total: None,
) -> Tensor:
    """The squared length of the derivative of a text's unit vector by what a stage gives a token.

    Args:
        source: The checkpoint. A mean stands for what latent attention makes of hidden states.
        texts: The texts, and what computes.
        dtype: F16 or BF16, of what is not quantized.
        progress: Told of each layer, on the way there and on the way back.

    Returns:
        float32 ``[layers, stages, tokens]``, stages in the order of ``STAGES``.

    Raises:
        CapacityError: The disk is full.
    """
    config = source.config
    result = torch.empty(config.num_hidden_layers, len(STAGES), texts.tokens)
    parts = list(_parts(texts))
    signs = np.random.RandomState(_SEED)  # this stream is frozen
    steps = 2 * config.num_hidden_layers
    for done, part in enumerate(parts):

        def told(step: int, done: int = done) -> None:
            progress(_STEP, done * steps + step, len(parts) * steps)

        _measure(source, part, dtype, signs, result, told)
    return result


def _measure(
    source: Source,
    part: Texts,
    dtype: str,
    signs: np.random.RandomState,
    result: Tensor,
    told: Callable[[int], None],
) -> None:
    """Fills in the result of some batches, whose scratch goes when they are done."""
    config, device, layers = source.config, part.device, source.config.num_hidden_layers
    factors = _factors(device)
    begin = part.rows[0].start
    tokens = part.rows[-1].stop - begin
    inputs = [part.scratch(config.hidden_size, tokens) for _ in range(layers)]
    states = part.scratch(config.hidden_size, tokens)
    embedded = part.looked_up(read_tensor(source, EMBEDDING, dtype))
    for (rows, _), looked_up in zip(_rows(part, begin), embedded, strict=True):
        states[rows] = looked_up
    for index in range(layers):
        told(index)
        inputs[index].copy_(states)
        layer = _Layer.read(source, index, dtype, device, factors)
        for rows, batch in _rows(part, begin):
            states[rows] = _advanced(layer, states[rows].to(device), batch, config).cpu()
        del layer  # before the next one is read
    norm = to_torch(read_tensor(source, FINAL_NORM, dtype), device).float()
    for rows, batch in _rows(part, begin):
        states[rows] = _of_vectors(states[rows].to(device), norm, batch, config, signs).cpu()
    for index in reversed(range(layers)):
        told(2 * layers - 1 - index)
        layer = _Layer.read(source, index, dtype, device, factors)
        for rows, batch in _rows(part, begin):
            before, behind = inputs[index][rows].to(device), states[rows].to(device)
            slope, squares = _slopes(layer, before, behind, batch, config)
            states[rows] = slope.cpu()
            result[index, :, batch.rows] = squares.cpu()
        del layer


class _Layer(NamedTuple):
    """A layer on the device that computes: norms in float32, weights in the dtype of products."""

    norms: Mapping[str, Tensor]
    weights: Mapping[Stage, Tensor]

    @classmethod
    def read(
        cls, source: Source, index: int, dtype: str, device: str, factors: torch.dtype
    ) -> _Layer:
        full = FullLayer(read_layer(source, index, dtype), device)
        return cls(full.norms, {stage: full.weights(stage).to(factors) for stage in STAGES})


def _factors(device: str) -> torch.dtype:
    """What is multiplied, and what products are rounded to."""
    native = device == "cpu" and probe().has_native_bf16
    return torch.bfloat16 if native else torch.float32


def _parts(texts: Texts) -> Iterator[Texts]:
    """Consecutive batches whose hidden states find room in the scratch together."""
    most = max(1, _PART_BYTES // _token_bytes(texts.config))
    begin = 0
    for end in range(1, len(texts.batches) + 1):
        is_last = end == len(texts.batches)
        if is_last or texts.rows[end].stop - texts.rows[begin].start > most:
            yield texts.only(range(begin, end))
            begin = end


def _rows(part: Texts, begin: int) -> Iterator[tuple[slice, Batch]]:
    """Where each batch lies in the scratch of its part, which begins at that token."""
    for batch in part.batches:
        yield slice(batch.rows.start - begin, batch.rows.stop - begin), batch


def _advanced(layer: _Layer, states: Tensor, batch: Batch, config: ModelConfig) -> Tensor:
    """The hidden states behind a layer, ``[rows, hidden_size]``."""
    states = states + _attention(layer, states, batch, config)[1]
    return torch.cat([part + _mlp(layer, part, config)[1] for part in states.split(_MLP_ROWS)])


def _slopes(
    layer: _Layer, states: Tensor, behind: Tensor, batch: Batch, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """The derivative by a layer's inputs, and its squares by what each stage gives.

    Args:
        layer: The layer.
        states: Its inputs, ``[rows, hidden_size]``.
        behind: The derivative by what it gives, ``[rows, hidden_size]``.
        batch: The texts.
        config: The model's shape.

    Returns:
        ``[rows, hidden_size]`` and ``[stages, rows]``.
    """

    def squared(slope: Tensor) -> Tensor:
        return slope.square().sum(dim=-1)

    with torch.enable_grad():
        states.requires_grad_()
        attention, output = _attention(layer, states, batch, config)
        middle, gated = [], []
        for part, slope in zip(
            (states.detach() + output.detach()).split(_MLP_ROWS),
            behind.split(_MLP_ROWS),
            strict=True,
        ):
            part.requires_grad_()
            gate_and_up, down = _mlp(layer, part, config)
            by_part, by_gates = torch.autograd.grad(down, [part, gate_and_up], slope)
            middle.append(slope + by_part)
            gated.append(squared(by_gates))
        between = torch.cat(middle)
        by_states, by_attention = torch.autograd.grad(output, [states, attention], between)
    squares = [squared(by_attention), squared(between), torch.cat(gated), squared(behind)]
    return between + by_states, torch.stack(squares)


def _attention(
    layer: _Layer, states: Tensor, batch: Batch, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Queries, keys and values of a batch, ``[rows, features]``, and what ``o_proj`` gives."""
    projected = _product(_normed(states, layer.norms[BEFORE_ATTENTION], config), layer, ATTENTION)
    sizes = [config.linears()[name][0] for name in ATTENTION]
    query, key, value = (
        part.unflatten(-1, (-1, config.head_dim)) for part in projected.split(sizes, dim=-1)
    )
    shared = config.num_attention_heads // config.num_key_value_heads
    mixed = attend(
        _rotated(query, batch.rotation),
        _rotated(key, batch.rotation).repeat_interleave(shared, dim=1),
        value.repeat_interleave(shared, dim=1),
        batch.spans,
    )
    return projected, _product(mixed, layer, OUTPUT)


def _mlp(layer: _Layer, states: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """A batch's gates and up projections, ``[rows, features]``, and what ``down_proj`` gives."""
    gate_and_up = _product(_normed(states, layer.norms[BEFORE_MLP], config), layer, MLP)
    gate, up = gate_and_up.chunk(2, dim=-1)
    return gate_and_up, _product(F.silu(gate) * up, layer, DOWN)


def _normed(states: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return F.rms_norm(states, states.shape[-1:], weight, config.rms_norm_eps)


def _product(states: Tensor, layer: _Layer, stage: Stage) -> Tensor:
    result: Tensor = _Product.apply(states, layer.weights[stage])  # type: ignore[no-untyped-call]
    return result


def _rotated(heads: Tensor, rotation: Rotation) -> Tensor:
    """``Rotation.apply``, with a derivative."""
    first, second = heads.chunk(2, dim=-1)
    left = first * rotation.cos - second * rotation.sin
    return torch.cat([left, second * rotation.cos + first * rotation.sin], dim=-1)


def _of_vectors(
    states: Tensor,
    norm: Tensor,
    batch: Batch,
    config: ModelConfig,
    signs: np.random.RandomState,
) -> Tensor:
    """The derivative by the last hidden states of each unit vector in a direction of its own."""
    drawn = signs.randint(0, 2, size=(len(batch.lengths), config.hidden_size))
    directions = torch.from_numpy(2.0 * drawn - 1.0).to(states)
    with torch.enable_grad():
        states.requires_grad_()
        last = _normed(states, norm, config)
        vectors = F.normalize(mean_pool(last, batch.pooling_mask, batch.lengths), dim=-1)
        (slope,) = torch.autograd.grad(vectors, states, directions)
    return slope


class _Product(torch.autograd.Function):
    """A product of float32 states, with a derivative by them alone."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _multiplied(states, weight)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _multiplied(slope, weight.T), None


def _multiplied(states: Tensor, weight: Tensor) -> Tensor:
    """states @ weightᵀ, float32, of factors in the weight's dtype."""
    rows = filled(states) if weight.device.type == "cpu" else states
    if weight.dtype == torch.float32:
        return reproducible_product(rows, weight)[: len(states)]
    return F.linear(rows.to(weight.dtype), weight)[: len(states)].float()
