"""The decoder against transformers, layer by layer, on random models of every kind it serves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from lowmem.artifact.weights import Checkpoint
from lowmem.compute.torch_engine import TorchEngine
from lowmem.text.batching import EncodedText, PackedBatch, pack
from tests.models import CONTRACT, VOCAB_SIZE, tiny_checkpoint
from tests.tolerances import PARITY_COSINE, PARITY_HIDDEN_STATES

MODELS: dict[str, dict[str, Any]] = {
    "mistral-fp16": {},
    "mistral-bare-bf16-two-shards": {"prefix": False, "shards": 2, "dtype": torch.bfloat16},
    "mistral-window-one-key-head": {"sliding_window": 200, "num_key_value_heads": 1},
    "llama-head-fp32": {"architecture": "llama", "dtype": torch.float32},
    "llama-tied-bf16": {"architecture": "llama", "tied": True, "dtype": torch.bfloat16},
    "llama-bare-three-shards-all-key-heads": {
        "architecture": "llama",
        "prefix": False,
        "shards": 3,
        "num_key_value_heads": 6,
    },
}
PREFIX_TOKENS = 9
LENGTHS = (1, 1, 2, 7, 7, 7, 12, 31, 64, 100)  # behind the prefix, where there is one


@dataclass(frozen=True)
class States:
    """What transformers computes of one text.

    Attributes:
        layers: Output of each layer, float32 ``[layers, tokens, hidden]``.
        final: Output of the last norm, float32 ``[tokens, hidden]``.
    """

    layers: Tensor
    final: Tensor


class Model:
    """A checkpoint, opened by both sides."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        torch.set_num_threads(1)  # tiny products cost more to share out than to compute
        tiny_checkpoint(path, **options)
        self.checkpoint = Checkpoint(path)
        self._oracle: PreTrainedModel = AutoModel.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.states = cache(self._states)

    def engine(self, **contract: Any) -> TorchEngine:
        return TorchEngine(self.checkpoint, replace(CONTRACT, **contract), threads=1)

    def _states(self, ids: tuple[int, ...], is_causal: bool) -> States:
        size = len(ids)
        hidden_from = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)
        mask = hidden_from if is_causal else torch.zeros(size, size)
        with torch.inference_mode(), _layer_outputs(self._oracle) as layers:
            output = self._oracle(
                input_ids=torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False
            )
        return States(torch.stack(layers), output.last_hidden_state[0])


@contextmanager
def _layer_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what each layer gives, the last one before the final norm."""
    outputs: list[Tensor] = []

    def collect(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).view(-1, 128))

    handles = [layer.register_forward_hook(collect) for layer in model.layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp(request.param), MODELS[request.param])


def texts(*, with_prefix: bool, pooled_from: int = 0) -> list[EncodedText]:
    generator = np.random.default_rng(1)
    prefix = generator.integers(0, VOCAB_SIZE, PREFIX_TOKENS if with_prefix else 0)
    return [
        EncodedText(
            np.concatenate([prefix, generator.integers(0, VOCAB_SIZE, length)]),
            len(prefix),
            min(pooled_from, len(prefix) + length - 1),
        )
        for length in LENGTHS
    ]


def batches(
    encoded: Sequence[EncodedText], pooling: str = "lasttoken", share: bool = False
) -> list[PackedBatch]:
    packed = pack(encoded, 150, pooling=pooling, shortest_prefix=1 if share else None)
    assert len(packed) > 1
    assert all(bool(len(section.prefix)) == share for batch in packed for section in batch.sections)
    return packed


def pooled(state: States, text: EncodedText, pooling: str) -> Tensor:
    return state.final[-1] if pooling == "lasttoken" else state.final[text.pooled_from :].mean(0)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def cosine_distance(got: NDArray[np.float32], expected: Tensor) -> float:
    left, right = got.astype(np.float64), expected.double().numpy()
    return float(1 - left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_hidden_states_after_every_layer_are_those_of_transformers(
    model: Model, is_causal: bool
) -> None:
    encoded = texts(with_prefix=False)
    packed = batches(encoded)
    seen: dict[tuple[int, int], Tensor] = {}
    model.engine(is_causal=is_causal).embed(
        packed, on_layer=lambda layer, batch, hidden: seen.update({(layer, batch): hidden.clone()})
    )
    assert len(seen) == len(packed) * model.checkpoint.config.num_hidden_layers
    for (layer, number), hidden in seen.items():
        batch = packed[number]
        for row, begin, end in zip(
            batch.rows, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True
        ):
            expected = model.states(tuple(encoded[row].input_ids.tolist()), is_causal)
            error = relative_error(hidden[begin:end], expected.layers[layer])
            assert error < PARITY_HIDDEN_STATES, (layer, row)


def test_hidden_states_behind_a_shared_prefix_are_those_of_the_whole_text(model: Model) -> None:
    encoded = texts(with_prefix=True)
    packed = batches(encoded, share=True)
    seen: dict[tuple[int, int], Tensor] = {}
    model.engine().embed(
        packed, on_layer=lambda layer, batch, hidden: seen.update({(layer, batch): hidden.clone()})
    )
    for (layer, number), hidden in seen.items():
        batch = packed[number]
        for row, begin, end in zip(
            batch.rows, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True
        ):
            states = model.states(tuple(encoded[row].input_ids.tolist()), True).layers[layer]
            error = relative_error(hidden[begin:end], states[PREFIX_TOKENS:])
            assert error < PARITY_HIDDEN_STATES, (layer, row)


@pytest.mark.parametrize(
    ("pooling", "is_causal", "share"),
    [
        ("lasttoken", True, False),
        ("lasttoken", True, True),
        ("lasttoken", False, False),
        ("mean", True, False),
        ("mean", False, False),
    ],
)
def test_embeddings_are_those_of_transformers(
    model: Model, pooling: str, is_causal: bool, share: bool
) -> None:
    encoded = texts(with_prefix=share or pooling == "mean", pooled_from=PREFIX_TOKENS)
    packed = batches(encoded, pooling, share)
    vectors = model.engine(pooling=pooling, is_causal=is_causal).embed(packed)
    for batch, embedded in zip(packed, vectors, strict=True):
        for row, vector in zip(batch.rows, embedded, strict=True):
            state = model.states(tuple(encoded[row].input_ids.tolist()), is_causal)
            expected = pooled(state, encoded[row], pooling)
            assert cosine_distance(vector, expected) < PARITY_COSINE, row
            assert relative_error(torch.from_numpy(vector), expected) < PARITY_HIDDEN_STATES, row


def test_texts_behind_different_prefixes_share_a_pass(model: Model) -> None:
    generator = np.random.default_rng(2)
    prefixes = [generator.integers(0, VOCAB_SIZE, size) for size in (PREFIX_TOKENS, 0, 2)]
    encoded = [
        EncodedText(
            np.concatenate([prefix, generator.integers(0, VOCAB_SIZE, length)]), len(prefix), 0
        )
        for prefix in prefixes
        for length in LENGTHS
    ]
    (batch,) = pack(encoded, sum(LENGTHS) * len(prefixes), shortest_prefix=1)
    assert len(batch.sections) == len(prefixes)
    (vectors,) = model.engine().embed([batch])
    for row, vector in zip(batch.rows, vectors, strict=True):
        state = model.states(tuple(encoded[row].input_ids.tolist()), True)
        assert cosine_distance(vector, state.final[-1]) < PARITY_COSINE, row


def test_the_last_layer_for_pooled_tokens_alone_gives_the_same_vectors(model: Model) -> None:
    packed = batches(texts(with_prefix=True), share=True)
    engine = model.engine()
    whole = engine.embed(packed, on_layer=lambda layer, batch, hidden: None)
    for shortened, full in zip(engine.embed(packed), whole, strict=True):
        for got, expected in zip(shortened, full, strict=True):
            assert relative_error(torch.from_numpy(got), torch.from_numpy(expected)) < (
                PARITY_HIDDEN_STATES
            )


def test_causal_and_bidirectional_attention_differ(model: Model) -> None:
    packed = batches(texts(with_prefix=False), pooling="mean")
    causal, both = (
        model.engine(is_causal=is_causal, pooling="mean").embed(packed)[0][0]
        for is_causal in (True, False)
    )
    assert cosine_distance(causal, torch.from_numpy(both)) > 1e-3
