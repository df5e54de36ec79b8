"""Which graphs there are, what they are called, and that their weights are the stored bytes."""

import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.graph import write_graphs
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.config_file import config_json
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
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM, Checkpoint, module_shapes
from tests.graphs import (
    BIDIRECTIONAL,
    EXACT_FORMATS,
    MEAN,
    external,
    pad,
    run,
    session,
    texts,
)
from tests.models import CONTRACT, LAYERS, tiny_checkpoint
from tests.variants import write_sparse, write_variant


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
