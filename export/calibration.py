"""Calibration: texts go through the full-precision model and each variant side by side.

Each stage of a layer sees the inputs that the stages before it, as stored, give it, rounded where
8-bit compute will round them, and is fitted to what the full-precision model has at that place
(``quantizers/gptq.py``). So what is lost in one place is made up for in the next. What a token's
error counts is what the pooled vectors see of it (``sensitivities.py``).

Memory holds the second moments of one stage and its weights; hidden states lie in scratch files.
Products come from one library whatever is fastest here: the same inputs, threads and kind of
processor give the same bytes. Layers that a killed export has finished are gone through as they
were stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from export.folds import Folds, fold
from export.hidden_states import (
    ATTENTION,
    BEFORE_ATTENTION,
    BEFORE_MLP,
    MLP,
    OUTPUT,
    STAGES,
    HiddenStates,
    Inputs,
    Stage,
    Texts,
    Weigh,
)
from export.quantizers.gptq import quantize_outputs
from export.quantizers.grids import grid_of, pack
from export.quantizers.moments import Moments, second_moments
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import Format, Int8Channel
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.weights import LayerWeights, LinearWeights
from lowmem.compute.operations.dequantize import dequantize_into
from lowmem.compute.operations.linear import Linear, to_torch
from lowmem.errors import BundleError

SENSITIVITY_POWER, LEAST_SENSITIVITY = 0.5, 0.01
"""What a token's error counts: its sensitivity over the mean one, and a little, to this power.

As it is, few tokens would be all that a stage is fitted to.
"""
_SMALLEST_SQUARE = 1e-12
_SAMPLE_TOKENS = 2048

Tensors = dict[str, RawTensor]
Formats = Mapping[str, Format]
"""Linear within a layer, ``self_attn.q_proj``, to format."""


def states_scratch_bytes(config: ModelConfig, tokens: int, variants: int) -> int:
    """What calibration of some variants takes of the disk, what the texts themselves do left out.

    Full precision's hidden states behind a layer, before and within it, and each variant's.
    """
    return 4 * tokens * (3 + variants) * config.hidden_size


class Calibration:
    """The calibration texts in front of a layer, in full precision and in each variant.

    Attributes:
        errors: Variant to module, ``layers.0.self_attn`` or ``layers.0.mlp``, to how far the
            residual stream behind it is from the full-precision one, relative to each token's
            length: the root of the mean square.
    """

    def __init__(
        self,
        texts: Texts,
        sensitivities: Tensor,
        embedding: RawTensor,
        variants: Mapping[str, int | None],
    ) -> None:
        """Looks up the embeddings.

        Args:
            texts: The texts, and what computes.
            sensitivities: Of the pooled vectors to what each stage gives each token, squared,
                ``[layers, stages, tokens]``.
            embedding: The token embeddings.
            variants: Those to be calibrated, and about how many tokens suffice each; None for all.

        Raises:
            CapacityError: The disk is full.
        """
        self.errors: dict[str, dict[str, float]] = {name: {} for name in variants}
        self._texts = texts
        self._sensitivities = sensitivities
        self._full = HiddenStates(self._texts, embedding)
        self._before = texts.scratch(texts.config.hidden_size)
        self._middle = texts.scratch(texts.config.hidden_size)
        self._variants = {
            name: HiddenStates(self._texts.part(enough), embedding)
            for name, enough in variants.items()
        }

    def states(self, variant: str | None = None) -> Tensor:
        """Hidden states before the next layer, ``[tokens, hidden_size]``, longest texts first.

        Args:
            variant: A variant's, or None for those in full precision.
        """
        return (self._full if variant is None else self._variants[variant]).hidden

    @torch.inference_mode()
    def full_precision(self, layer: LayerWeights, *, with_folds: bool) -> FullLayer:
        """Takes the full-precision model through the next layer.

        Args:
            layer: Its weights as the source has them, in 16 bits.
            with_folds: Whether a variant will round its inputs.
        """
        full = self._full
        self._before.copy_(full.hidden)
        result = FullLayer(layer, self._texts.device)

        def weigh(stage: Stage, inputs: Inputs) -> Tensor:
            if stage == MLP:
                self._middle.copy_(full.hidden)
            return result.weights(stage)

        full.advance(result.norms, weigh)
        if with_folds:
            norms, folds = fold(
                layer.norms,
                lambda stage: self._sample(stage, result),
                result.weights,
                self._texts.config,
            )
            folded = LayerWeights(layer.index, layer.linears, norms)
            result.folded = FullLayer(folded, self._texts.device, folds)
        return result

    def _sample(self, stage: Stage, layer: FullLayer) -> Tensor:
        """Some of the inputs that a stage has just had in full precision, weighted.

        Those of ``o_proj`` and ``down_proj`` still lie in the scratch that all paths share.
        """
        if stage in (ATTENTION, MLP):
            inputs = self._normed(stage, layer.norms, self._texts)
        else:
            states = self._texts.mixed if stage == OUTPUT else self._texts.gated
            inputs = self._texts.brought(states)
        step = -(-self._texts.tokens // _SAMPLE_TOKENS)
        weights = self._token_weights(layer.index, stage, self._texts)
        return torch.cat(
            [
                rows[::step] * weight[::step].sqrt()
                for rows, weight in zip(inputs, weights, strict=True)
            ]
        )

    @torch.inference_mode()
    def quantize(self, name: str, layer: FullLayer, formats: Formats) -> Tensors:
        """Takes a variant through the next layer, and quantizes the layer on the way.

        Args:
            name: The variant.
            layer: The layer in full precision.
            formats: Format of each of its linears.

        Returns:
            Tensor name within the layer to tensor: norms and what the formats store.

        Raises:
            BundleError: A scale does not fit its format.
        """
        states, config = self._variants[name], self._texts.config
        rounded = rounded_linears(formats)
        folded = layer.folded if rounded else layer
        assert folded is not None, "with_folds was not asked for"
        tensors = {f"{norm}.weight": raw for norm, raw in folded.stored_norms.items()}

        def wanted(stage: Stage) -> Iterator[Tensor]:
            """The full-precision model's inputs of a stage that reads a norm, else its sums."""
            if stage in (ATTENTION, MLP):
                yield from self._normed(stage, folded.norms, states.texts)
            else:
                sums = self._middle if stage == OUTPUT else self._full.hidden
                for rows in states.texts.rows:
                    yield (sums[rows] - states.hidden[rows]).to(states.texts.device)

        def weigh(stage: Stage, inputs: Inputs) -> Tensor:
            weight = folded.weights(stage)
            form = formats[stage[0]]
            assert all(formats[linear] == form for linear in stage), stage
            weights = self._token_weights(layer.index, stage, states.texts)
            seen, crossed = second_moments(inputs, wanted(stage), weights)
            moments = Moments(seen, weight @ crossed if stage in (ATTENTION, MLP) else crossed)
            try:
                values, scales = quantize_outputs(weight, moments, grid_of(form, len(seen)))
            except BundleError as error:
                raise BundleError(f"{error} ({stage[0]})") from None
            stored = {}
            begin = 0
            for linear in stage:
                out_features, in_features = config.linears()[linear]
                rows = slice(begin, begin := begin + out_features)
                parts = pack(form, values[rows].cpu(), scales[rows].cpu())
                stored[linear] = LinearWeights(form, out_features, in_features, parts)
                tensors.update({f"{linear}.{suffix}": raw for suffix, raw in parts.items()})
            return stacked(stored, stage, self._texts.device)

        self._advance(name, layer.index, folded.norms, weigh, rounded)
        return tensors

    def _normed(self, stage: Stage, norms: Mapping[str, Tensor], texts: Texts) -> Iterator[Tensor]:
        """What a stage that reads a norm had in full precision, with that norm's weight."""
        if stage == ATTENTION:
            return texts.normed(self._before, norms[BEFORE_ATTENTION])
        return texts.normed(self._middle, norms[BEFORE_MLP])

    def _token_weights(self, index: int, stage: Stage, texts: Texts) -> Iterator[Tensor]:
        """What each token's squared error counts in a stage, ``[rows, 1]``, batch by batch.

        It is taken relative to the token: the first one's states are hundreds of times as long as
        those of others, and counted as they are its errors would be all that a layer is fitted to.
        """
        sensitivities = self._sensitivities[index, STAGES.index(stage)]
        squares = [
            self._full.hidden[rows].square().mean(dim=-1).clamp_min_(_SMALLEST_SQUARE)
            for rows in texts.rows
        ]
        relative = [
            sensitivities[rows] * square for rows, square in zip(texts.rows, squares, strict=True)
        ]
        mean = torch.cat(relative).mean().clamp_min_(_SMALLEST_SQUARE)
        for counts, square in zip(relative, squares, strict=True):
            weights = (counts / mean + LEAST_SENSITIVITY) ** SENSITIVITY_POWER / square
            yield weights[:, None].to(texts.device)

    @torch.inference_mode()
    def replay(self, name: str, layer: LayerWeights) -> None:
        """Takes a variant through a layer that has been quantized already.

        Args:
            name: The variant.
            layer: The layer as it is stored.
        """
        device = self._texts.device
        norms = {norm: to_torch(raw, device).float() for norm, raw in layer.norms.items()}
        rounded = rounded_linears({name: linear.format for name, linear in layer.linears.items()})

        def weigh(stage: Stage, inputs: Inputs) -> Tensor:
            return stacked(layer.linears, stage, device)

        self._advance(name, layer.index, norms, weigh, rounded)

    def _advance(
        self,
        name: str,
        index: int,
        norms: Mapping[str, Tensor],
        weigh: Weigh,
        rounded: frozenset[str],
    ) -> None:
        """Takes a variant through a layer, and notes its errors."""

        def weigh_and_note(stage: Stage, inputs: Inputs) -> Tensor:
            if stage == MLP:
                self._note_error(name, index, "self_attn", self._middle)
            return weigh(stage, inputs)

        self._variants[name].advance(norms, weigh_and_note, rounded)
        self._note_error(name, index, "mlp", self._full.hidden)

    def _note_error(self, name: str, index: int, module: str, exact: Tensor) -> None:
        states, total = self._variants[name], 0.0
        for rows in states.texts.rows:
            lengths = exact[rows].square().sum(dim=-1).clamp_min_(_SMALLEST_SQUARE)
            missed = (states.hidden[rows] - exact[rows]).square_().sum(dim=-1)
            total += float((missed / lengths).sum())
        tokens = sum(rows.stop - rows.start for rows in states.texts.rows)
        self.errors[name][f"layers.{index}.{module}"] = math.sqrt(total / tokens)


class FullLayer:
    """A layer in full precision.

    Attributes:
        index: Position in the stack, from 0.
        norms: Weight of each norm, float32, on the device.
        stored_norms: The same as they are stored.
        folded: The same layer with inputs that lose less when they are rounded, if it was made.
    """

    def __init__(self, layer: LayerWeights, device: str, folds: Folds | None = None) -> None:
        """Takes the source's linears, and norms that go with the folds, on that device."""
        self.index = layer.index
        self.stored_norms: Mapping[str, RawTensor] = layer.norms
        self.norms = {norm: to_torch(raw, device).float() for norm, raw in layer.norms.items()}
        self.folded: FullLayer | None = None
        self._layer = layer
        self._device = device
        self._folds = folds

    def weights(self, stage: Stage) -> Tensor:
        """A stage's weights, stacked, float32 ``[out_features, in_features]``, on the device."""
        return torch.cat([self._weight(linear) for linear in stage])

    def _weight(self, linear: str) -> Tensor:
        raw = self._layer.linears[linear].tensors["weight"]
        weight = to_torch(raw, self._device).float()
        return weight if self._folds is None else self._folds.apply(linear, weight)


def rounded_linears(formats: Formats) -> frozenset[str]:
    """The linears whose inputs 8-bit compute rounds."""
    return frozenset(
        linear
        for linear, form in formats.items()
        if isinstance(form, Int8Channel) and form.rounds_activations
    )


def stacked(linears: Mapping[str, LinearWeights], stage: Stage, device: str) -> Tensor:
    """The weights of a stage as engines see them, float32, one above the other, on a device."""
    loaded = [Linear.load(linears[name], lambda raw: to_torch(raw, device)) for name in stage]
    rows = [linear.out_features for linear in loaded]
    stacked = torch.empty(sum(rows), loaded[0].in_features, dtype=torch.float32, device=device)
    for part, linear in zip(stacked.split(rows), loaded, strict=True):
        dequantize_into(part, linear)
    return stacked
