"""What export writes, loaded by the libraries it is written for."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, CompressedTensorsConfig, PreTrainedModel

from export import pipeline
from export.pipeline import export
from export.sources import open_source
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import Format, Int8Channel, IntGrouped, Plain, int_grouped
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import VARIANTS
from lowmem.artifact.weights import Checkpoint, module_shapes
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.text.batching import EncodedText
from tests.models import CONTRACT, TEXTS, tiny_checkpoint
from tests.tolerances import (
    BF16_VECTORS,
    BITSANDBYTES_INT8_CONSTANT,
    FP16_VECTORS,
    PARITY_COSINE,
    PARITY_HIDDEN_STATES,
    ROUNDED_VECTORS,
    gamma,
)

# torch 2.13 says so of itself when bitsandbytes and compressed-tensors make it script functions.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"
)

Vectors = NDArray[np.float32]
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"architecture": "mistral", "prefix": True},
    "llama": {"architecture": "llama", "prefix": False, "shards": 2},
}
CONTRACTS = {"mistral": CONTRACT, "llama": replace(CONTRACT, document_template="passage: {text}")}
# What stock loaders compute with, where it is not float32.
COMPUTES = {"int8": "int8", "bnb-int8": "int8"}


class Exported:
    """A bundle, opened by both sides."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.loaded = cache(lambda variant: load(bundle.directory(variant)))

    def ours(
        self,
        variant: str,
        compute: str = "fp32",
        input_type: str = "document",
        *,
        normalize: bool = False,
    ) -> Vectors:
        runner = Runner(self.bundle, Plan(variant, "torch", "cpu", compute, "resident"))
        return runner.embed(self.encoded(variant, input_type), normalize=normalize)

    def encoded(self, variant: str, input_type: str = "document") -> list[EncodedText]:
        """No prefix apart: stock loaders round the activations of BOS like any other."""
        tokenizer = Runner(self.bundle, Plan(variant, "torch", "cpu", "fp32", "resident")).tokenizer
        prompts = [self.bundle.contract.prompt(input_type)] * len(TEXTS)
        return [replace(text, prefix_tokens=0) for text in tokenizer.encode(TEXTS, prompts)]

    def theirs(self, variant: str) -> Vectors:
        """The last tokens' hidden states, float32 ``[texts, hidden_size]``."""
        return last_tokens(self.loaded(variant), self.encoded(variant))

    def checkpoint(self, variant: str) -> Checkpoint:
        return Checkpoint(self.bundle.directory(variant))


def load(directory: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(directory, dtype=torch.float32, **options)
    return model.eval()


def last_tokens(model: PreTrainedModel, texts: list[EncodedText]) -> Vectors:
    with torch.inference_mode():
        states = [model(torch.from_numpy(text.input_ids)[None])[0][0, -1] for text in texts]
    return torch.stack(states).float().numpy()


def distance(found: Vectors, expected: Vectors) -> float:
    """The largest Euclidean distance between two vectors, in lengths of the expected one."""
    lengths = np.linalg.norm(expected, axis=1)
    return float((np.linalg.norm(found - expected, axis=1) / lengths).max())


@pytest.fixture(scope="module", params=list(MODELS))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exported]:
    path = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(path / "cache"))
        source = open_source(tiny_checkpoint(path / "source", **MODELS[request.param]).path)
        contract = CONTRACTS[request.param]
        export(source, path / "bundle", contract, variants=VARIANTS, onnx=False)
        yield Exported(Bundle(path / "bundle"))


@pytest.mark.parametrize("variant", ["fp16", "int4"])
def test_transformers_gives_our_vectors(exported: Exported, variant: str) -> None:
    found, expected = exported.theirs(variant), exported.ours(variant)
    assert distance(found, expected) < PARITY_HIDDEN_STATES


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_packs_codes_as_we_do(bits: int) -> None:
    from compressed_tensors.compressors.quantized_compressors import pack_quantized  # it warns

    codes = np.random.default_rng(0).integers(-(1 << (bits - 1)), 1 << (bits - 1), (5, 64), np.int8)
    packed = pack_quantized.pack_to_int32(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(int_grouped.pack(codes, bits), packed.numpy(), strict=True)


def test_compressed_tensors_rounds_the_inputs_of_int8_linears(exported: Exported) -> None:
    """Module by module, since rounding makes a whole model chaotic."""
    inputs = activations(128, 192)
    for weight, module in linears(exported, "int8"):
        states = inputs[weight.shape[1]]
        # Their scale is absmax / 127.5, and codes run from -128 to 127.
        scales = states.abs().amax(-1, keepdim=True) / 127.5
        rounded = (states / scales).round().clamp(-128, 127) * scales
        with torch.inference_mode():
            found = module(states)
        tolerance = gamma(weight.shape[1] + 2) * (rounded.abs() @ weight.abs().T)
        assert ((found - rounded @ weight.T).abs() <= tolerance).all()
        off = (found - states @ weight.T).abs() > tolerance
        assert off.float().mean() > 0.9


def test_bitsandbytes_computes_int8_linears_from_our_bytes(exported: Exported) -> None:
    inputs = activations(128, 192)
    for weight, module in linears(exported, "bnb-int8"):
        states = inputs[weight.shape[1]]
        halves = states.half()
        scales = halves.abs().amax(-1, keepdim=True).float() / 127
        rounded = (halves * (1 / scales)).round() * scales
        with torch.inference_mode():
            found = module(states)
        relative = gamma(weight.shape[1] + 5) + BITSANDBYTES_INT8_CONSTANT
        # A quotient beside the middle between two codes may have been rounded to the other one.
        ties = ((halves / scales).frac().abs() - 0.5).abs() < 127 * gamma(3)
        tolerance = relative * (rounded.abs() @ weight.abs().T)
        tolerance += (ties * scales) @ weight.abs().T
        assert ((found - rounded @ weight.T).abs() <= tolerance).all()
        off = (found - states @ weight.T).abs() > tolerance
        assert off.float().mean() > 0.9


@pytest.mark.parametrize("variant", ["int8", "bnb-int8"])
def test_loaders_that_round_activations_stay_near_our_int8_compute(
    exported: Exported, variant: str
) -> None:
    found = exported.theirs(variant)
    assert distance(found, exported.ours(variant, "int8")) < ROUNDED_VECTORS
    weight_only = exported.ours(variant)
    assert PARITY_HIDDEN_STATES < distance(found, weight_only) < ROUNDED_VECTORS


def test_bitsandbytes_restores_the_int8_weights_that_we_restore(exported: Exported) -> None:
    model = load(exported.bundle.directory("bnb-int8")).dequantize()
    found = last_tokens(model, exported.encoded("bnb-int8"))
    assert distance(found, exported.ours("bnb-int8")) < PARITY_HIDDEN_STATES


def test_bitsandbytes_restores_the_nf4_weights_that_we_restore(exported: Exported) -> None:
    model = load(exported.bundle.directory("bnb-nf4"))
    modules = dict(model.named_modules())
    checkpoint = exported.checkpoint("bnb-nf4")
    for layer in checkpoint.layers():
        for name, linear in layer.linears.items():
            module = modules[f"layers.{layer.index}.{name}"]
            found = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            expected = torch.from_numpy(linear.format.dequantize(linear.tensors))
            assert torch.equal(found, expected.to(found.dtype))
            assert found.dtype == torch.float16
    found = last_tokens(model.dequantize(), exported.encoded("bnb-nf4"))
    assert distance(found, exported.ours("bnb-nf4")) < FP16_VECTORS


def test_bitsandbytes_gives_our_nf4_vectors(exported: Exported) -> None:
    found, expected = exported.theirs("bnb-nf4"), exported.ours("bnb-nf4")
    assert distance(found, expected) < BF16_VECTORS


@pytest.mark.parametrize("variant", VARIANTS)
def test_sentence_transformers_gives_our_vectors(exported: Exported, variant: str) -> None:
    model = SentenceTransformer(
        str(exported.bundle.directory(variant)),
        device="cpu",
        model_kwargs={"dtype": torch.float32},
    )
    tolerance = {
        "int8": ROUNDED_VECTORS,
        "bnb-int8": ROUNDED_VECTORS,
        "bnb-nf4": BF16_VECTORS,
    }.get(variant, PARITY_HIDDEN_STATES)
    compute = COMPUTES.get(variant, "fp32")
    documents = exported.ours(variant, compute, normalize=True)
    queries = exported.ours(variant, compute, "query", normalize=True)
    texts = list(TEXTS)
    assert distance(documents, queries) > tolerance  # a lost prompt shows
    assert distance(model.encode(texts), documents) < tolerance
    assert distance(model.encode_document(texts), documents) < tolerance
    assert distance(model.encode(texts, prompt_name="query"), queries) < tolerance
    assert distance(model.encode_query(texts), queries) < tolerance
    task = model.encode(texts, prompt_name="retrieval", batch_size=3)
    assert distance(task, queries) < tolerance
    assert model.max_seq_length == exported.bundle.contract.max_seq_length
    similarity = model.similarity(queries, documents)
    np.testing.assert_allclose(similarity, queries @ documents.T, atol=PARITY_COSINE)


def test_sentence_transformers_takes_the_mean_that_we_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", str(tmp_path / "cache"))
    source = open_source(tiny_checkpoint(tmp_path / "source", layers=2).path)
    template = CONTRACT.query_template.replace(" {text}", "{text}")
    contract = replace(CONTRACT, pooling="mean", query_template=template)
    export(source, tmp_path / "bundle", contract, variants=["fp16"], onnx=False)
    exported = Exported(Bundle(tmp_path / "bundle"))
    model = SentenceTransformer(
        str(exported.bundle.directory("fp16")),
        device="cpu",
        model_kwargs={"dtype": torch.float32},
    )
    for name in ("document", "query"):
        expected = exported.ours("fp16", input_type=name, normalize=True)
        found = model.encode(list(TEXTS), prompt_name=name)
        assert distance(found, expected) < PARITY_HIDDEN_STATES


@pytest.mark.parametrize("variant", VARIANTS)
def test_autotokenizer_gives_our_ids(exported: Exported, variant: str) -> None:
    directory = exported.bundle.directory(variant)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for input_type in ("document", "query"):
        prompt = exported.bundle.contract.prompt(input_type)
        expected = [text.input_ids.tolist() for text in exported.encoded(variant, input_type)]
        assert tokenizer([prompt + text for text in TEXTS])["input_ids"] == expected
        assert [ids[0] for ids in expected] == [CONTRACT.bos_token_id] * len(TEXTS)
        assert [ids[-1] for ids in expected] == [CONTRACT.eos_token_id] * len(TEXTS)
    cut = tokenizer(" the" * 300, truncation=True)["input_ids"]
    assert len(cut) == tokenizer.model_max_length == exported.bundle.contract.max_seq_length
    assert cut[-1] == CONTRACT.eos_token_id


def test_transformers_loads_a_mixture_of_grouped_and_plain_linears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped = (IntGrouped(4, 64), IntGrouped(8, 64), IntGrouped(4, 32))
    mixed = export_mixture((*grouped, Plain("F16")), tmp_path, monkeypatch)
    assert distance(mixed.theirs("int4"), mixed.ours("int4")) < PARITY_HIDDEN_STATES


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_transformers_loads_a_mixture_with_channel_codes_if_it_decompresses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 4.57 with compressed-tensors 0.13 runs layouts compressed only one at a time."""
    forms = (Int8Channel(rounds_activations=False), IntGrouped(4, 64), Plain("F16"))
    mixed = export_mixture(forms, tmp_path, monkeypatch)
    directory = mixed.bundle.directory("int4")
    model = load(directory, quantization_config=CompressedTensorsConfig(run_compressed=False))
    found = last_tokens(model, mixed.encoded("int4"))
    assert distance(found, mixed.ours("int4")) < PARITY_HIDDEN_STATES


def export_mixture(
    forms: tuple[Format, ...], path: Path, monkeypatch: pytest.MonkeyPatch
) -> Exported:
    """A bundle whose ``int4`` gives its linears these formats in turn."""

    def mixture(variant: str, config: ModelConfig, dtype: str) -> dict[str, Format]:
        modules = module_shapes(config)
        return {module: forms[i % len(forms)] for i, module in enumerate(modules)}

    monkeypatch.setenv("LOWMEM_CACHE", str(path / "cache"))
    monkeypatch.setattr(pipeline, "formats_for", mixture)
    source = open_source(tiny_checkpoint(path / "source", layers=2).path)
    export(source, path / "bundle", CONTRACT, variants=["int4"], onnx=False)
    mixed = Exported(Bundle(path / "bundle"))
    assert set(mixed.checkpoint("int4").formats.values()) == set(forms)
    return mixed


def linears(exported: Exported, variant: str) -> Iterator[tuple[Tensor, torch.nn.Module]]:
    """Each linear's weight as we restore it, and the module that a stock loader made of it."""
    modules = dict(exported.loaded(variant).named_modules())
    for layer in exported.checkpoint(variant).layers():
        for name, linear in layer.linears.items():
            weight = torch.from_numpy(linear.format.dequantize(linear.tensors))
            yield weight, modules[f"layers.{layer.index}.{name}"]


def activations(*sizes: int) -> dict[int, Tensor]:
    """Rows of many sizes, each with a feature that stands out, by number of features."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for size in sizes:
        states = torch.randn(1, 9, size, generator=generator) * torch.logspace(-2, 1, 9)[:, None]
        states[..., 3] *= 5
        inputs[size] = states
    return inputs
