"""GritLM's and NV-Embed's vectors, against a plain reading of their papers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from export.pipeline import export
from export.sources import open_source
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import VARIANTS
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.compute.torch_engine import TorchEngine
from lowmem.embedder import Embedder
from lowmem.errors import InputError
from lowmem.text.batching import EncodedText, pack
from tests.bidirectional import NVEMBED, Published, tiny_gritlm, tiny_nvembed
from tests.models import HIDDEN_SIZE, TEXTS, VOCAB_SIZE, TinyCheckpoint
from tests.tolerances import (
    BF16_VECTORS,
    ONNX_HALF_COSINE,
    ONNX_ROUNDED_COSINE,
    PARITY_COSINE,
    ROUNDED_VECTORS,
)

Vectors = NDArray[np.float32]

MAKERS: dict[str, Callable[..., TinyCheckpoint]] = {"gritlm": tiny_gritlm, "nvembed": tiny_nvembed}
STORED: dict[str, dict[str, Any]] = {
    "fp16": {},
    "bf16-three-shards": {"dtype": torch.bfloat16, "shards": 3},
    "fp32": {"dtype": torch.float32},
}


@pytest.fixture(scope="module", params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(name: str, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return MAKERS[name](tmp_path_factory.mktemp(name) / "source")


@pytest.fixture(scope="module")
def bundle(source: TinyCheckpoint) -> Bundle:
    path = source.path.parent / "bundle"
    export(open_source(source.path), path, source.contract, variants=VARIANTS)
    return Bundle(path)


def encoded() -> list[EncodedText]:
    """Ids of one token and of many, with nothing, some and all but the last token left out."""
    random = np.random.default_rng(0)
    lengths = (1, 1, 2, 7, 7, 7, 12, 31, 64, 100)
    left_out = (0, 0, 1, 0, 3, 6, 11, 5, 1, 40)
    return [
        EncodedText(random.integers(4, VOCAB_SIZE, length), 0, first)
        for length, first in zip(lengths, left_out, strict=True)
    ]


def vectors(engine: Any, texts: list[EncodedText], pooling: str) -> Vectors:
    found = np.zeros((len(texts), HIDDEN_SIZE), np.float32)
    batches = pack(texts, 150, pooling=pooling)
    assert len(batches) > 1
    for batch, embedded in zip(batches, engine.embed(batches), strict=True):
        found[batch.rows] = embedded
    return found


def distances(got: Vectors, expected: Vectors) -> NDArray[np.float64]:
    """1 - cosine of each pair of rows, in float64."""
    left, right = got.astype(np.float64), expected.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: NDArray[np.float64] = np.einsum("ij,ij->i", left, right) / lengths
    return 1.0 - cosines


def of_ids(oracle: Published, texts: list[EncodedText]) -> Vectors:
    return np.stack([oracle.embed_ids(t.input_ids.tolist(), t.pooled_from).numpy() for t in texts])


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_vectors_of_a_checkpoint_are_those_of_its_paper(
    name: str, tmp_path: Path, stored: str, schedule: str
) -> None:
    source = MAKERS[name](tmp_path, **STORED[stored])
    engine = TorchEngine(Checkpoint(source.path), source.contract, threads=1, schedule=schedule)
    got = vectors(engine, encoded(), source.contract.pooling)
    assert distances(got, of_ids(Published(source.path), encoded())).max() < PARITY_COSINE


def test_attention_to_earlier_tokens_alone_gives_other_vectors(source: TinyCheckpoint) -> None:
    contract = replace(source.contract, is_causal=True)
    engine = TorchEngine(Checkpoint(source.path), contract, threads=1)
    got = vectors(engine, encoded(), contract.pooling)
    apart = distances(got, of_ids(Published(source.path), encoded()))
    many = [row for row, text in enumerate(encoded()) if len(text.input_ids) > 1]
    assert apart[many].min() > 1e-3


def runner(bundle: Bundle, variant: str, engine: str = "torch", compute: str = "fp32") -> Runner:
    return Runner(bundle, Plan(variant, engine, "cpu", compute, "resident", threads=1))


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_texts_are_embedded_as_published(
    bundle: Bundle, source: TinyCheckpoint, engine: str
) -> None:
    """The last texts are one piece together with the space that a prompt may end with."""
    oracle, model = Published(source.path), Embedder(runner(bundle, "fp16", engine))
    texts = [*TEXTS, "the", "x"]
    for input_type, got in (
        ("query", model.encode_query(texts)),
        ("document", model.encode_document(texts)),
    ):
        prompt = source.contract.prompt(input_type)
        expected = np.stack([oracle.embed(prompt, text).numpy() for text in texts])
        assert distances(got, expected).max() < PARITY_COSINE


PLANS = {
    ("fp16", "torch", "bf16"): BF16_VECTORS**2 / 2,
    ("int8", "torch", "fp32"): PARITY_COSINE,
    ("int8", "torch", "int8"): ROUNDED_VECTORS**2 / 2,
    ("int4", "torch", "fp32"): PARITY_COSINE,
    ("bnb-int8", "torch", "fp32"): PARITY_COSINE,
    ("bnb-nf4", "torch", "fp32"): PARITY_COSINE,
    ("fp16", "onnxruntime", "fp16"): ONNX_HALF_COSINE,
    ("int8", "onnxruntime", "int8"): ONNX_ROUNDED_COSINE,
    ("int4", "onnxruntime", "fp32"): PARITY_COSINE,
    ("int4", "onnxruntime", "int8"): ONNX_ROUNDED_COSINE,
}


@pytest.mark.parametrize("plan", PLANS, ids="-".join)
def test_vectors_of_every_variant_are_those_of_its_own_weights(
    bundle: Bundle, source: TinyCheckpoint, plan: tuple[str, str, str]
) -> None:
    variant, engine, compute = plan
    got = runner(bundle, variant, engine, compute).embed(encoded(), normalize=True)
    oracle = Published(source.path)
    oracle.dequantize(Checkpoint(bundle.directory(variant)))
    assert distances(got, of_ids(oracle, encoded())).max() < PLANS[plan]


@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_loaders_refuse_every_variant(bundle: Bundle, variant: str) -> None:
    directory = bundle.directory(variant)
    for remote in (False, True):
        for loader in (AutoConfig, AutoModel, AutoModelForCausalLM):
            with pytest.raises(ValueError, match="does not recognize this architecture"):
                loader.from_pretrained(directory, trust_remote_code=remote)
        with pytest.raises(ValueError, match="does not recognize this architecture"):
            SentenceTransformer(str(directory), device="cpu", trust_remote_code=remote)


def test_bits_of_a_model_count_the_weights_of_its_pooling(bundle: Bundle) -> None:
    """A GritLM's head computes no embedding, but stands in the shards that ``fp16`` links."""
    bits = bundle.variant("fp16").bits_per_weight
    head = 0 if bundle.contract.pooling == "latent_attention" else VOCAB_SIZE * HIDDEN_SIZE
    stored = sum(tensor.nbytes for tensor in Checkpoint(bundle.directory("fp16")).tensors.values())
    assert bits["linears"] == 16
    assert bits["model"] == pytest.approx(16 * stored / (stored - 2 * head), abs=1e-4)


def test_what_latent_attention_keeps_is_the_same_in_every_variant(tmp_path: Path) -> None:
    source = tiny_nvembed(tmp_path / "source", dtype=torch.bfloat16)
    export(open_source(source.path), tmp_path / "bundle", source.contract, variants=VARIANTS)
    expected = Checkpoint(source.path).latent_attention()
    assert len(expected) == 14
    for variant in VARIANTS:
        kept = Checkpoint(tmp_path / "bundle" / variant).latent_attention()
        assert kept.keys() == expected.keys()
        for tensor, raw in kept.items():
            assert raw.dtype == "BF16"
            np.testing.assert_array_equal(raw.array, expected[tensor].array)


def test_nv_embed_is_not_exported_with_another_pooling(tmp_path: Path) -> None:
    source = open_source(tiny_nvembed(tmp_path / "source").path)
    for pooling in ("mean", "lasttoken"):
        contract = replace(NVEMBED, pooling=pooling)
        with pytest.raises(InputError, match=f"got {pooling} and a model with weights for it"):
            export(source, tmp_path / "bundle", contract, variants=["fp16"])


def test_a_model_without_latents_is_not_exported_with_latent_attention(tmp_path: Path) -> None:
    source = open_source(tiny_gritlm(tmp_path / "source").path)
    with pytest.raises(InputError, match="got latent_attention and a model with no weights for it"):
        export(source, tmp_path / "bundle", NVEMBED, variants=["fp16"])
