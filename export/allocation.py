"""Which linears get 8 bits where most get 4: those whose errors reach the pooled vectors most.

The error of a weight says little of that. So a few texts go through the full-precision model once
for each stage of each layer, with that stage alone at 4 bits, and what counts is how far the pooled
vectors turn. All these passes go through a layer together: its weights are read once. Then the
stages with the largest effect for their size get 8 bits, as many as the budget allows. An export
that goes on after a killed one measures them anew, and finds the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from export.calibration import FullLayer, stacked
from export.groups import read_layer, read_tensor
from export.hidden_states import STAGES, HiddenStates, Stage, Texts, Weigh
from export.quantizers.data_free import quantize
from export.sources import Source
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import Format, weight_bytes
from lowmem.artifact.variants import HIGH, LOW
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM, LayerWeights, LinearWeights
from lowmem.compute.operations.linear import to_torch
from lowmem.progress import Progress
from lowmem.text.batching import EncodedText

_STEP = "measuring what each stage does to pooled vectors"
_LONGEST_TEXT, _TOKENS = 96, 768

Effects = dict[tuple[int, Stage], float]
"""Layer and stage to 1 - cosine of the pooled vectors, the mean over texts."""


def some_texts(texts: Sequence[EncodedText]) -> list[EncodedText]:
    """Texts that are short enough for many passes, from everywhere in a set."""
    longest = max(_LONGEST_TEXT, min(len(text.input_ids) for text in texts))
    short = [text for text in texts if len(text.input_ids) <= longest]
    tokens = sum(len(text.input_ids) for text in short)
    return short[:: max(1, tokens // _TOKENS)]


@torch.inference_mode()
def pooled_effects(
    source: Source,
    contract: Contract,
    dtype: str,
    texts: Sequence[EncodedText],
    directory: Path,
    device: str = "cpu",
    progress: Progress = lambda what, done, total: None,
) -> Effects:
    """What each stage does to the pooled vectors when it alone is quantized to the lower bits.

    Args:
        source: The checkpoint.
        contract: Attention and pooling; a mean stands for what latent attention makes of it.
        dtype: F16 or BF16, of what is not quantized.
        texts: The texts, tokenized.
        directory: Where scratch files may lie, without a name.
        device: What computes: ``cpu`` or ``cuda``.
        progress: Told of each layer before it is read.

    Raises:
        BundleError: A weight does not fit the format.
        CapacityError: The disk is full.
    """
    config = source.config
    packed = Texts(texts, config, contract, directory, device)
    exact = HiddenStates(packed, read_tensor(source, EMBEDDING, dtype))
    disturbed: dict[tuple[int, Stage], HiddenStates] = {}
    for index in range(config.num_hidden_layers):
        progress(_STEP, index, config.num_hidden_layers)
        layer = read_layer(source, index, dtype)
        full = FullLayer(layer, device)
        weights = {stage: full.weights(stage) for stage in STAGES}
        for states in disturbed.values():
            states.advance(full.norms, _given(weights))
        for stage in STAGES:
            states = disturbed[index, stage] = exact.copy()
            states.advance(full.norms, _given(weights | {stage: _quantized(layer, stage, device)}))
        exact.advance(full.norms, _given(weights))
    norm = to_torch(read_tensor(source, FINAL_NORM, dtype), device).float()
    vectors = exact.pooled(norm)
    return {
        place: float((1 - torch.cosine_similarity(vectors, states.pooled(norm))).mean())
        for place, states in disturbed.items()
    }


def allocate(effects: Effects, config: ModelConfig, budget: float) -> dict[str, Format]:
    """The format of every linear, within a budget.

    Args:
        effects: Of every stage in the lower format.
        config: The model's shape.
        budget: Bits per weight of all linears together, codes and scales counted.
    """
    shapes = config.linears()

    def bits(form: Format, linears: Iterable[str]) -> int:
        return 8 * sum(weight_bytes(form, *shapes[name]) for name in linears)

    left = budget * config.linear_weights - config.num_hidden_layers * bits(LOW, shapes)
    assert left >= 0, "a variant's name allows the lower format at least"
    costs = {stage: bits(HIGH, stage) - bits(LOW, stage) for stage in STAGES}
    chosen = set()
    for place in sorted(effects, key=lambda place: -effects[place] / costs[place[1]]):
        fills_groups = shapes[place[1][0]][1] % HIGH.group_size == 0
        if fills_groups and costs[place[1]] <= left:
            chosen.add(place)
            left -= costs[place[1]]
    return {
        f"layers.{index}.{linear}": HIGH if (index, stage) in chosen else LOW
        for index, stage in effects
        for linear in stage
    }


def _given(weights: Mapping[Stage, Tensor]) -> Weigh:
    return lambda stage, inputs: weights[stage]


def _quantized(layer: LayerWeights, stage: Stage, device: str) -> Tensor:
    """A stage's weights after a way through the lower format, stacked, float32."""
    stored = {}
    for linear in stage:
        weights = layer.linears[linear]
        place = f"layers.{layer.index}.{linear}"
        parts = quantize(to_torch(weights.tensors["weight"]), LOW, place)
        stored[linear] = LinearWeights(LOW, weights.out_features, weights.in_features, parts)
    return stacked(stored, stage, device)
