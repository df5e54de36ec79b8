"""Vectors of graphs are those of transformers."""

from dataclasses import replace
from pathlib import Path

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
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import (
    Format,
    IntGrouped,
    Plain,
)
from lowmem.artifact.weights import Checkpoint, LinearWeights, module_shapes
from tests.graphs import (
    BIDIRECTIONAL,
    EXACT_FORMATS,
    MEAN,
    Ids,
    Vectors,
    external,
    pad,
    run,
    session,
    texts,
)
from tests.models import CONTRACT, LAYERS, VOCAB_SIZE, tiny_checkpoint
from tests.tolerances import (
    INVARIANCE,
    ONNX_HALF_COSINE,
    ONNX_ROUNDED_COSINE,
    ONNX_ROUNDED_MEDIAN_COSINE,
    PARITY_COSINE,
)
from tests.variants import oracle, write_variant


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


def test_grouped_codes_may_differ_in_bits_and_group(tmp_path: Path, source: Path) -> None:
    modules = list(module_shapes(Checkpoint(source).config))
    forms: list[Format] = [IntGrouped(4, 32), IntGrouped(8, 64), IntGrouped(4, 64)]
    mixed = {module: forms[number % 3] for number, module in enumerate(modules)}
    variant = write_variant(source, tmp_path / "mixed", mixed)
    write_graphs(variant, CONTRACT)
    vectors = run(session(variant), pad(texts(), "right"))
    expected = last_tokens(oracle(source, variant), texts())
    assert distances(vectors, expected).max() < PARITY_COSINE
