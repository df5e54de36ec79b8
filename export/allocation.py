"""Which linears get 8 bits where most get 4: those whose errors reach the pooled vectors most.

The error of a weight says little of that. So a few texts go through the full-precision model once
for each stage of each layer, with that stage alone at 4 bits, and what counts is how far the pooled
vectors turn. All these passes go through a layer together: its weights are read once. Then the
stages with the largest effect for their size get 8 bits, as many as the budget allows. An export
that goes on after a killed one measures them anew, and finds the same.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from export.calibration import FullLayer, stacked
from export.groups import read_tensor
from export.hidden_states import STAGES, HiddenStates, Stage, Texts, Weigh
from export.quantizers.data_free import quantize
from export.sources import Source
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import Format, Plain
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.variants import HIGH, LOW
from lowmem.artifact.weights import (
    EMBEDDING,
    FINAL_NORM,
    LayerWeights,
    LinearWeights,
    layer_weights,
    module_shapes,
)
from lowmem.compute.operations.linear import to_torch
from lowmem.data import Row
from lowmem.errors import InputError
from lowmem.text.batching import EncodedText
from lowmem.text.tokenizer import Tokenizer

_STEP = "measuring what each stage does to pooled vectors"
_LONGEST_TEXT, _TOKENS = 96, 768

Progress = Callable[[str, int, int], None]
Effects = dict[tuple[int, Stage], float]
"""Layer and stage to 1 - cosine of the pooled vectors, the mean over texts."""


def mixed_formats(
    budget: float,
    source: Source,
    contract: Contract,
    dtype: str,
    rows: Sequence[Row],
    tokenizer: bytes,
    directory: Path,
    progress: Progress,
) -> dict[str, Format]:
    """The format of every linear of a variant that may take so many bits per weight.

    Args:
        budget: Bits per weight of all linears together.
        source: The checkpoint.
        contract: Templates, attention and pooling.
        dtype: F16 or BF16, of what is not quantized.
        rows: Calibration texts.
        tokenizer: The content of ``tokenizer.json``.
        directory: Where scratch files may lie for a while.
        progress: Told of each layer before it is read.

    Raises:
        BundleError: A weight does not fit its format.
        CapacityError: The disk is full.
        InputError: The budget is too small.
    """
    config = source.config
    plain = dict.fromkeys(module_shapes(config), Plain(dtype))
    with tempfile.TemporaryDirectory(prefix="lowmem-") as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(tokenizer)
        texts = Tokenizer(path, contract, config.vocab_size).encode_rows(rows)

    def layers() -> Iterator[LayerWeights]:
        for index in range(config.num_hidden_layers):
            progress(_STEP, index, config.num_hidden_layers)
            yield layer_weights(index, config, plain, lambda name: read_tensor(source, name, dtype))

    effects = pooled_effects(
        some_texts(texts),
        config,
        contract,
        read_tensor(source, EMBEDDING, dtype),
        layers(),
        read_tensor(source, FINAL_NORM, dtype),
        LOW,
        directory,
    )
    return allocate(effects, config, LOW, HIGH, budget)


def some_texts(texts: Sequence[EncodedText]) -> list[EncodedText]:
    """Texts that are short enough for many passes, from everywhere in a set."""
    longest = max(_LONGEST_TEXT, min(len(text.input_ids) for text in texts))
    short = [text for text in texts if len(text.input_ids) <= longest]
    tokens = sum(len(text.input_ids) for text in short)
    return short[:: max(1, tokens // _TOKENS)]


@torch.inference_mode()
def pooled_effects(
    texts: Sequence[EncodedText],
    config: ModelConfig,
    contract: Contract,
    embedding: RawTensor,
    layers: Iterable[LayerWeights],
    final_norm: RawTensor,
    form: Format,
    directory: Path,
) -> Effects:
    """What each stage does to the pooled vectors when it alone is quantized.

    Args:
        texts: The texts, tokenized.
        config: The model's shape.
        contract: Attention and pooling; a mean stands for what latent attention makes of it.
        embedding: The token embeddings.
        layers: The layers in full precision, in order.
        final_norm: The norm behind them.
        form: What the stage is quantized to, by its weights alone.
        directory: Where scratch files may lie, without a name.

    Raises:
        BundleError: A weight does not fit the format.
        CapacityError: The disk is full.
    """
    packed = Texts(texts, config, contract, directory)
    exact = HiddenStates(packed, embedding)
    disturbed: dict[tuple[int, Stage], HiddenStates] = {}
    for layer in layers:
        full = FullLayer(layer)
        weights = {stage: full.weights(stage) for stage in STAGES}
        for states in disturbed.values():
            states.advance(full.norms, _given(weights))
        for stage in STAGES:
            states = disturbed[layer.index, stage] = exact.copy()
            states.advance(full.norms, _given(weights | {stage: _quantized(layer, stage, form)}))
        exact.advance(full.norms, _given(weights))
    norm = to_torch(final_norm).float()
    vectors = exact.pooled(norm)
    return {
        place: float((1 - torch.cosine_similarity(vectors, states.pooled(norm))).mean())
        for place, states in disturbed.items()
    }


def allocate(
    effects: Effects, config: ModelConfig, low: Format, high: Format, budget: float
) -> dict[str, Format]:
    """The format of every linear, within a budget.

    Args:
        effects: Of every stage in the lower format.
        config: The model's shape.
        low: The format of most linears.
        high: The format of those that matter more.
        budget: Bits per weight of all linears together, everything that is stored counted.

    Raises:
        InputError: The lower format alone takes more.
    """
    shapes = config.linears()

    def bits(form: Format, linears: Iterable[str]) -> int:
        specs = [spec for name in linears for spec in form.specs(*shapes[name]).values()]
        return 8 * sum(spec.nbytes for spec in specs)

    left = budget * config.linear_weights - config.num_hidden_layers * bits(low, shapes)
    if left < 0:
        least = math.ceil(1e4 * (budget - left / config.linear_weights)) / 1e4
        raise InputError(f"--bits must be at least {least:g} for this model, got {budget:g}")
    costs = {stage: bits(high, stage) - bits(low, stage) for stage in STAGES}
    chosen = set()
    for place in sorted(effects, key=lambda place: -effects[place] / costs[place[1]]):
        if costs[place[1]] <= left:
            chosen.add(place)
            left -= costs[place[1]]
    return {
        f"layers.{index}.{linear}": high if (index, stage) in chosen else low
        for index, stage in effects
        for linear in stage
    }


def _given(weights: Mapping[Stage, Tensor]) -> Weigh:
    return lambda stage, inputs: weights[stage]


def _quantized(layer: LayerWeights, stage: Stage, form: Format) -> Tensor:
    """A stage's weights after a way through a format, stacked, float32."""
    stored = {}
    for linear in stage:
        weights = layer.linears[linear]
        place = f"layers.{layer.index}.{linear}"
        parts = quantize(to_torch(weights.tensors["weight"]), form, place)
        stored[linear] = LinearWeights(form, weights.out_features, weights.in_features, parts)
    return stacked(stored, stage)
