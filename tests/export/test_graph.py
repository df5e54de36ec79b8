"""Graphs: their vectors are those of transformers, and their weights are the stored bytes."""

import json
import os
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from export.graph import write_graphs
from export.graph.builder import Builder
from export.graph.linears import Rows
from lowmem.artifact.config import ModelConfig, config_json
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import (
    BnbInt8,
    Format,
    Int8Channel,
    IntGrouped,
    Plain,
    quantization_config,
)
from lowmem.artifact.tensors import TensorSpec
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM, Checkpoint, LinearWeights, module_shapes
from tests.models import CONTRACT, LAYERS, VOCAB_SIZE, tiny_checkpoint
from tests.tolerances import (
    INVARIANCE,
    ONNX_HALF_COSINE,
    ONNX_ROUNDED_COSINE,
    ONNX_ROUNDED_MEDIAN_COSINE,
    PARITY_COSINE,
)
from tests.variants import oracle, write_sparse, write_variant

Vectors = NDArray[np.float32]
Ids = list[int]

MEAN = replace(CONTRACT, pooling="mean")
BIDIRECTIONAL = replace(MEAN, is_causal=False)

EXACT_FORMATS: dict[str, Format] = {
    "f16": Plain("F16"),
    "bf16": Plain("BF16"),
    "4 bits, groups of 32": IntGrouped(4, 32),
    "4 bits, groups of 64": IntGrouped(4, 64),
    "8 bits, groups of 64": IntGrouped(8, 64),
    "8 bits by channel, inputs as they are": Int8Channel(rounds_activations=False),
}


def texts(seed: int = 0) -> list[Ids]:
    """Ids of one token and of many."""
    random = np.random.default_rng(seed)
    return [random.integers(4, VOCAB_SIZE, size).tolist() for size in (1, 2, 7, 7, 20, 33, 1)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source")).path


@pytest.fixture(scope="module")
def variants(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A variant of each format with its graphs for last token pooling."""
    folder = tmp_path_factory.mktemp("variants")
    forms: dict[str, Format] = {**EXACT_FORMATS, "int8": Int8Channel()}
    directories = {
        name: write_variant(source, folder / str(number), form)
        for number, (name, form) in enumerate(forms.items())
    }
    for directory in directories.values():
        write_graphs(directory, CONTRACT)
    return directories


def session(directory: Path, graph: str = "model.onnx") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(
        directory / graph, options, providers=["CPUExecutionProvider"]
    )


def pad(rows: list[Ids], side: str, columns: int | None = None) -> dict[str, NDArray[np.int64]]:
    """Ids and mask of some texts; what stands in the padding is arbitrary."""
    width = columns or max(map(len, rows))
    random = np.random.default_rng(1)
    ids = random.integers(0, VOCAB_SIZE, (len(rows), width))
    mask = np.zeros_like(ids)
    for row, text in enumerate(rows):
        places = {
            "right": np.arange(len(text)),
            "left": np.arange(width - len(text), width),
            "anywhere": np.sort(random.choice(width, len(text), replace=False)),
        }[side]
        ids[row, places] = text
        mask[row, places] = 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model: onnxruntime.InferenceSession, feeds: Mapping[str, NDArray[np.int64]]) -> Vectors:
    vectors: Vectors
    (vectors,) = model.run(["sentence_embedding"], dict(feeds))
    assert vectors.dtype == np.float32
    return vectors


def distances(left: Vectors, right: Vectors) -> NDArray[np.float64]:
    """1 - cosine of each pair of rows, in float64."""
    first, second = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: NDArray[np.float64] = np.einsum("ij,ij->i", first, second) / lengths
    return np.subtract(1, cosines, dtype=np.float64)


@torch.inference_mode()
def hidden_states(model: torch.nn.Module, ids: Ids, is_causal: bool = True) -> torch.Tensor:
    """Hidden states of one text behind the final norm, ``[tokens, hidden]``."""
    mask = None if is_causal else torch.zeros(1, 1, len(ids), len(ids))
    states: torch.Tensor = model(
        torch.tensor([ids]), attention_mask=mask, use_cache=False
    ).last_hidden_state
    return states[0]


def last_tokens(model: torch.nn.Module, rows: list[Ids]) -> Vectors:
    return np.stack([hidden_states(model, ids)[-1].numpy() for ids in rows])


def external(path: Path) -> Iterator[tuple[onnx.TensorProto, dict[str, str]]]:
    """Initializers that lie outside the graph, with their location, offset and length."""
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.external_data:
            yield tensor, {entry.key: entry.value for entry in tensor.external_data}


class RoundedLinear(torch.nn.Module):
    """Integer products of inputs rounded by row, as ``int8`` compute is defined."""

    def __init__(self, weights: LinearWeights) -> None:
        super().__init__()
        self.codes = weights.tensors["weight"].array.astype(np.int64)
        self.scales = weights.tensors["weight_scale"].float32()[:, 0]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        values = states.numpy().astype(np.float32)
        scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
        codes = np.rint(values / scales).astype(np.int64)
        products = (codes @ self.codes.T).astype(np.float32)
        return torch.from_numpy(products * self.scales * scales)


@pytest.mark.parametrize("name", EXACT_FORMATS)
def test_vectors_are_those_of_transformers(
    variants: dict[str, Path], source: Path, name: str
) -> None:
    vectors = run(session(variants[name]), pad(texts(), "right"))
    expected = last_tokens(oracle(source, variants[name]), texts())
    assert distances(vectors, expected).max() < PARITY_COSINE


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_vectors_are_those_of_transformers_whatever_tensors_and_files_are_called(
    tmp_path: Path, architecture: str, prefix: bool, shards: int
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", architecture, prefix=prefix)
    variant = write_variant(checkpoint.path, tmp_path / "int4", IntGrouped(4, 32), shards)
    write_graphs(variant, CONTRACT)
    vectors = run(session(variant), pad(texts(), "right"))
    expected = last_tokens(oracle(checkpoint.path, variant), texts())
    assert distances(vectors, expected).max() < PARITY_COSINE


def test_heads_need_not_share_keys_and_values(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", num_key_value_heads=6)
    for contract in (CONTRACT, BIDIRECTIONAL):
        write_graphs(checkpoint.path, contract)
        feeds = pad(texts(), "right")
        if contract.pooling == "mean":
            feeds["pooling_mask"] = feeds["attention_mask"]
        vectors = run(session(checkpoint.path), feeds)
        model = oracle(checkpoint.path, checkpoint.path)
        states = [hidden_states(model, ids, contract.is_causal) for ids in texts()]
        pooled = [s.mean(0) if contract.pooling == "mean" else s[-1] for s in states]
        assert distances(vectors, torch.stack(pooled).numpy()).max() < PARITY_COSINE


@pytest.mark.parametrize("contract", [MEAN, BIDIRECTIONAL], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_a_mean_leaves_out_what_the_mask_leaves_out(
    tmp_path: Path, source: Path, contract: Contract, side: str
) -> None:
    variant = write_variant(source, tmp_path / "fp16", Plain("F16"))
    write_graphs(variant, contract)
    feeds = pad(texts(), side, 40)
    pooled_from = [min(3, len(ids) - 1) for ids in texts()]
    counted = feeds["attention_mask"].cumsum(axis=1)
    feeds["pooling_mask"] = (counted > np.array(pooled_from)[:, None]).astype(np.int64)
    vectors = run(session(variant), feeds)
    model = oracle(source, variant)
    expected = [
        hidden_states(model, ids, contract.is_causal)[first:].mean(0).numpy()
        for ids, first in zip(texts(), pooled_from, strict=True)
    ]
    assert distances(vectors, np.stack(expected)).max() < PARITY_COSINE


def test_int8_vectors_are_those_of_rounded_rows(variants: dict[str, Path], source: Path) -> None:
    rows = [ids for seed in range(4) for ids in texts(seed)]
    vectors = run(session(variants["int8"]), pad(rows, "right"))
    expected = last_tokens(oracle(source, variants["int8"], RoundedLinear), rows)
    assert distances(vectors, expected).max() < ONNX_ROUNDED_COSINE
    assert np.median(distances(vectors, expected)) < ONNX_ROUNDED_MEDIAN_COSINE


@pytest.mark.parametrize(
    "name", ["4 bits, groups of 32", "4 bits, groups of 64", "8 bits, groups of 64"]
)
def test_inputs_rounded_by_group_stay_near_those_that_are_not(
    variants: dict[str, Path], name: str
) -> None:
    feeds = pad(texts(), "right")
    exact, rounded = (
        run(session(variants[name], graph), feeds) for graph in ("model.onnx", "model_int8.onnx")
    )
    between = distances(exact, rounded)
    assert between.max() < ONNX_ROUNDED_COSINE
    assert between.max() > INVARIANCE, "nothing was rounded"


def test_half_precision_graph_agrees_with_the_float32_one(variants: dict[str, Path]) -> None:
    feeds = pad(texts(), "left")
    exact, half = (
        run(session(variants["f16"], graph), feeds) for graph in ("model.onnx", "model_fp16.onnx")
    )
    assert distances(exact, half).max() < ONNX_HALF_COSINE


@pytest.mark.parametrize("contract", [CONTRACT, MEAN, BIDIRECTIONAL], ids=["last", "mean", "both"])
def test_half_precision_graph_keeps_the_residual_stream_in_float32_and_stays_on_the_gpu(
    tmp_path: Path, source: Path, contract: Contract
) -> None:
    variant = write_variant(source, tmp_path / "fp16", Plain("F16"))
    write_graphs(variant, contract)
    nodes = onnx.load(variant / "model_fp16.onnx", load_external_data=False).graph.node
    operators = {node.op_type for node in nodes}
    assert not operators & {"Shape", "Size", "Range", "LpNormalization"}
    makers = {output: node for node in nodes for output in node.output}
    stored = {tensor.name for tensor, _ in external(variant / "model_fp16.onnx")}
    products = [node for node in nodes if node.op_type == "Gemm"]
    assert len(products) == 7 * LAYERS
    for node in products:
        assert node.input[1] in stored, "a weight is multiplied as it is stored"
    for node in nodes:
        if node.op_type == "Add" and "/layers." in node.name:
            change = makers[node.input[1]]
            assert (change.op_type, change.attribute[0].i) == ("Cast", onnx.TensorProto.FLOAT)


@pytest.mark.parametrize("name", [*EXACT_FORMATS, "int8"])
@pytest.mark.parametrize("side", ["left", "anywhere", "right"])
def test_padding_does_not_change_a_vector(variants: dict[str, Path], name: str, side: str) -> None:
    model = session(variants[name])
    alone = np.concatenate([run(model, pad([ids], "right")) for ids in texts()])
    together = run(model, pad(texts(), side, 45))
    if name == "int8":
        assert distances(alone, together).max() < ONNX_ROUNDED_COSINE
        assert np.median(distances(alone, together)) < INVARIANCE
    else:
        assert distances(alone, together).max() < INVARIANCE


def test_rounded_texts_of_one_token_are_the_same_alone_and_in_a_batch(
    variants: dict[str, Path],
) -> None:
    model = session(variants["int8"])
    tokens = [[token] for token in range(4, 100)]
    long_text = np.random.default_rng(0).integers(4, VOCAB_SIZE, 60).tolist()
    together = run(model, pad([*tokens, long_text], "right"))[:-1]
    alone = np.concatenate([run(model, pad([ids], "right")) for ids in tokens])
    assert distances(alone, together).max() < INVARIANCE


def test_a_text_without_tokens_gives_zeros_and_leaves_the_others_alone(
    variants: dict[str, Path],
) -> None:
    model = session(variants["f16"])
    feeds = pad([[5, 6, 7], [8], [9, 10, 11]], "right")
    expected = run(model, feeds)
    for row in range(3):
        feeds["attention_mask"] = pad([[5, 6, 7], [8], [9, 10, 11]], "right")["attention_mask"]
        feeds["attention_mask"][row] = 0
        vectors = run(model, feeds)
        others = [other for other in range(3) if other != row]
        assert not vectors[row].any()
        assert distances(vectors[others], expected[others]).max() < INVARIANCE


def test_vectors_have_unit_length_where_the_contract_says_so(tmp_path: Path, source: Path) -> None:
    lengths = {}
    for normalizes in (True, False):
        contract = replace(CONTRACT, normalize_embeddings=normalizes)
        variant = write_variant(source, tmp_path / str(normalizes), Plain("F16"))
        write_graphs(variant, contract)
        vectors = run(session(variant), pad(texts(), "right"))
        lengths[normalizes] = np.linalg.norm(vectors.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths[True], 1, rtol=1e-6)
    assert (np.abs(lengths[False] - 1) > 0.1).all()


def test_rows_are_rounded_as_defined_and_a_row_of_zeros_stays_zero() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((50, 33)).astype(np.float32) * 10.0 ** random.integers(
        -20, 20, (50, 1)
    ).astype(np.float32)
    rows[7] = 0
    rows[8] = 0
    rows[8, 3] = -5e-39  # a subnormal
    rows[9] = np.arange(33) - 127  # scale 1: whole numbers stay
    rows[10] = np.arange(33) + 94.5  # scale 126.5 / 127
    rows[11, 1:] = np.arange(32) + 0.5  # with a scale of 1, ties go to even
    rows[11, 0] = 127
    builder = Builder()
    value = builder.input("x", ir.DataType.FLOAT, ("rows", 33))
    codes, scales = Rows(builder, "/rows", value).rounded()
    model = builder.model(codes)
    model.graph.outputs.append(scales)
    codes.dtype, scales.dtype = ir.DataType.UINT8, ir.DataType.FLOAT
    serialized = ir.to_proto(model).SerializeToString()
    engine = onnxruntime.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    got_codes, got_scales = engine.run(None, {"x": rows})
    usual = np.abs(rows).max(axis=1) >= 1e-30
    expected_scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(got_scales[usual], expected_scales[usual])
    expected_codes = np.rint(rows[usual] / expected_scales[usual])
    np.testing.assert_array_equal(got_codes[usual].astype(np.int64) - 128, expected_codes)
    assert (got_codes[[7, 8]] == 128).all()
    assert (got_scales > 0).all()
    assert got_codes.min() >= 1


@pytest.mark.parametrize("name", [*EXACT_FORMATS, "int8"])
def test_weights_are_the_stored_bytes(variants: dict[str, Path], name: str) -> None:
    directory = variants[name]
    tensors = Checkpoint(directory).tensors
    unread = {name for name in tensors if name.endswith("weight_shape") or "lm_head" in name}
    for graph in directory.glob("*.onnx"):
        seen = set()
        for initializer, entry in external(graph):
            stored = tensors[initializer.name]
            assert entry["location"] == stored.path.name
            assert int(entry["offset"]) == stored.offset
            assert int(entry["length"]) == stored.nbytes
            seen.add(initializer.name)
        assert seen == tensors.keys() - unread
        assert graph.stat().st_size < 100_000


def test_linears_that_share_an_input_share_its_rounding(variants: dict[str, Path]) -> None:
    nodes = onnx.load(variants["int8"] / "model.onnx", load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "QGemm"]
    assert len(products) == 7 * LAYERS
    assert len({node.input[0] for node in products}) == 4 * LAYERS


def test_nodes_are_named_after_their_place_in_the_model(variants: dict[str, Path]) -> None:
    names = {
        name: {
            node.name
            for node in onnx.load(
                variants[name] / "model.onnx", load_external_data=False
            ).graph.node
        }
        for name in ("f16", "4 bits, groups of 32")
    }
    assert "/model/layers.0/attn/q_proj/Gemm" in names["f16"]
    assert "/model/layers.1/mlp/down_proj/MatMulNBits" in names["4 bits, groups of 32"]


@pytest.mark.parametrize("form", [Plain("F16"), IntGrouped(4, 32), Int8Channel()])
def test_the_same_variant_gives_the_same_graphs(tmp_path: Path, source: Path, form: Format) -> None:
    first, second = (
        write_variant(source, tmp_path / name, form) for name in ("first", "another_place")
    )
    graphs = write_graphs(first, CONTRACT)
    assert graphs == write_graphs(second, CONTRACT)
    for graph in graphs:
        data = (first / graph).read_bytes()
        assert data == (second / graph).read_bytes()
        assert str(tmp_path).encode() not in data
        assert onnx.load_from_string(data).producer_name == "lowmem"


@pytest.mark.parametrize(
    ("form", "graphs"),
    [
        (Plain("F16"), {"model.onnx": "fp32", "model_fp16.onnx": "fp16"}),
        (Plain("BF16"), {"model.onnx": "fp32"}),
        (IntGrouped(4, 64), {"model.onnx": "fp32", "model_int8.onnx": "int8"}),
        (IntGrouped(8, 32), {"model.onnx": "fp32", "model_int8.onnx": "int8"}),
        (IntGrouped(4, 8), {}),
        (Int8Channel(), {"model.onnx": "int8"}),
        (Int8Channel(rounds_activations=False), {"model.onnx": "fp32"}),
    ],
)
def test_formats_say_which_graphs_there_are(
    tmp_path: Path, source: Path, form: Format, graphs: dict[str, str]
) -> None:
    variant = write_variant(source, tmp_path / "variant", form)
    assert write_graphs(variant, CONTRACT) == graphs
    assert {path.name for path in variant.glob("*.onnx*")} == graphs.keys()


@pytest.mark.parametrize(
    ("contract", "head_dim", "has_graphs"),
    [(CONTRACT, 24, False), (MEAN, 24, False), (BIDIRECTIONAL, 24, True), (CONTRACT, 48, True)],
)
def test_causal_heads_have_graphs_where_onnx_runtime_takes_their_size(
    tmp_path: Path, contract: Contract, head_dim: int, has_graphs: bool
) -> None:
    variant = tiny_checkpoint(tmp_path / "source", head_dim=head_dim).path
    graphs = write_graphs(variant, contract)
    assert {path.name for path in variant.glob("*.onnx*")} == graphs.keys()
    assert bool(graphs) == has_graphs
    if has_graphs:
        feeds = pad(texts(), "right")
        if contract.pooling == "mean":
            feeds["pooling_mask"] = feeds["attention_mask"]
        assert np.isfinite(run(session(variant), feeds)).all()


def test_mixed_and_foreign_formats_have_no_graph(tmp_path: Path, source: Path) -> None:
    modules = list(module_shapes(Checkpoint(source).config))
    mixed: dict[str, Format] = dict.fromkeys(modules, IntGrouped(4, 32))
    mixed[modules[-1]] = Plain("F16")
    assert write_graphs(write_variant(source, tmp_path / "mixed", mixed), CONTRACT) == {}
    config = Checkpoint(source).config
    directory = sparse_variant(tmp_path / "foreign", config, BnbInt8())
    assert write_graphs(directory, CONTRACT) == {}


def test_grouped_codes_may_differ_in_bits_and_group(tmp_path: Path, source: Path) -> None:
    modules = list(module_shapes(Checkpoint(source).config))
    forms: list[Format] = [IntGrouped(4, 32), IntGrouped(8, 64), IntGrouped(4, 64)]
    mixed = {module: forms[number % 3] for number, module in enumerate(modules)}
    variant = write_variant(source, tmp_path / "mixed", mixed)
    write_graphs(variant, CONTRACT)
    vectors = run(session(variant), pad(texts(), "right"))
    expected = last_tokens(oracle(source, variant), texts())
    assert distances(vectors, expected).max() < PARITY_COSINE


def test_weights_may_have_several_hard_links(tmp_path: Path, source: Path) -> None:
    variant = write_variant(source, tmp_path / "int8", Int8Channel())
    os.link(variant / "model.safetensors", tmp_path / "second.safetensors")
    write_graphs(variant, CONTRACT)
    assert np.isfinite(run(session(variant), pad(texts(), "right"))).all()


@pytest.mark.parametrize("form", [Plain("F16"), IntGrouped(4, 128), Int8Channel()])
def test_graphs_of_a_7b_model_are_small_and_no_weight_is_read(tmp_path: Path, form: Format) -> None:
    config = ModelConfig("mistral", 32000, 4096, 14336, 32, 32, 8, 128, 1e-5, 10000.0, 32768, 4096)
    directory = sparse_variant(tmp_path / "variant", config, form)
    tracemalloc.start()
    try:
        graphs = write_graphs(directory, replace(CONTRACT, max_seq_length=4096))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 96 * 2**20, "less than the smallest of the large matrices"
    assert all((directory / graph).stat().st_size < 2 * 2**20 for graph in graphs)


def sparse_variant(directory: Path, config: ModelConfig, form: Format) -> Path:
    """A variant of any size whose weights are holes in a file."""
    directory.mkdir()
    specs = {EMBEDDING: TensorSpec("F16", (config.vocab_size, config.hidden_size))}
    for layer in range(config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            specs[f"layers.{layer}.{norm}.weight"] = TensorSpec("F16", (config.hidden_size,))
    specs[FINAL_NORM] = TensorSpec("F16", (config.hidden_size,))
    modules = module_shapes(config)
    for module, shape in modules.items():
        for suffix, spec in form.specs(*shape).items():
            specs[f"{module}.{suffix}"] = spec
    value: dict[str, Any] = config_json(config, "float16")
    value["quantization_config"] = quantization_config(dict.fromkeys(modules, form))
    (directory / "config.json").write_text(json.dumps(value))
    write_sparse(directory, specs)
    return directory
