"""A GGUF file as a source: its weights, and the models that are refused."""

import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from export.sources import GgufFile, open_source
from export.sources.gguf import _BLOCK_BYTES
from export.sources.gguf_header import read_header
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.weights import module_shapes
from lowmem.errors import BackendError, BundleError, InputError
from tests.gguf_files import (
    HEADS,
    HIDDEN,
    INNER,
    KEY_VALUE_HEADS,
    LAYERS,
    TOKENS,
    Tensors,
    random_tensors,
    write_gguf,
)


def permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of q or k as convert_hf_to_gguf.py of llama.cpp orders them (``permute``)."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def assert_same_weights(path: Path) -> None:
    """Compares every tensor with what transformers makes of the file, rounded to F16."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model_class: Any = LlamaForCausalLM  # has no annotations
    read: Any = load_gguf_checkpoint
    with torch.device("meta"):
        empty = model_class(config)
    theirs = read(path, return_tensors=True, model_to_load=empty)["tensors"]
    theirs.pop("lm_head.weight", None)
    source = GgufFile(path)
    layers = source.config.num_hidden_layers
    assert len(theirs) == 2 + 2 * layers + len(module_shapes(source.config))
    for name, weight in theirs.items():
        raw = source.tensor(name.removeprefix("model."))
        assert raw.dtype == "F16"
        assert np.array_equal(raw.array, weight.numpy().astype(np.float16)), name


def test_smollm2_has_its_published_shape(smollm2: GgufFile) -> None:
    assert smollm2.config == ModelConfig(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        max_position_embeddings=8192,
        sliding_window=None,
    )
    assert smollm2.licence == "apache-2.0"
    assert smollm2.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert smollm2.dtype == "F16"
    assert smollm2.shards is None


@pytest.mark.slow
def test_smollm2_weights_are_those_that_transformers_reads(smollm2_path: Path) -> None:
    assert_same_weights(smollm2_path)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1", "Q8_0"])
def test_weights_are_those_that_transformers_reads(tmp_path: Path, kind: str) -> None:
    assert_same_weights(write_gguf(tmp_path / "x.gguf", kind=gguf.GGMLQuantizationType[kind]))


def test_tensors_have_hugging_face_names_and_row_order(tmp_path: Path) -> None:
    original = random_tensors()
    stored = original | {
        f"blk.{layer}.attn_{name}.weight": permuted(
            original[f"blk.{layer}.attn_{name}.weight"], heads
        )
        for layer in range(LAYERS)
        for name, heads in (("q", HEADS), ("k", KEY_VALUE_HEADS))
    }
    source = open_source(write_gguf(tmp_path / "x.gguf", tensors=stored))
    names = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
        "layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
        "layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
    }
    for name, stored_as in names.items():
        assert np.array_equal(source.tensor(name).array, original[stored_as].astype(np.float16)), (
            name
        )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_a_quantized_tensor_is_dequantized_and_rounded_once(tmp_path: Path, kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    original = random_tensors()
    source = GgufFile(write_gguf(tmp_path / "x.gguf", tensors=original, kind=number))
    stored = gguf.quantize(original["blk.0.ffn_down.weight"], number)
    expected = gguf.dequantize(stored, number).astype(np.float16)
    assert np.array_equal(source.tensor("layers.0.mlp.down_proj.weight").array, expected)


def test_blocks_do_not_change_a_tensor(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "layers.0.self_attn.q_proj.weight"
    whole = GgufFile(tiny_gguf).tensor(name).array
    monkeypatch.setattr("export.sources.gguf._BLOCK_BYTES", 1000)
    assert np.array_equal(GgufFile(tiny_gguf).tensor(name).array, whole)


def test_a_tensor_is_never_whole_in_float32(smollm2: GgufFile) -> None:
    tracemalloc.start()
    try:
        raw = smollm2.tensor("embed_tokens.weight")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # A block is there as it was read, and in float32 as it is made, joined, and rounded.
    assert peak_bytes < raw.nbytes + 5 * _BLOCK_BYTES


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0])
def test_a_weight_that_f16_cannot_hold_is_refused(tmp_path: Path, value: float) -> None:
    tensors = random_tensors()
    tensors["blk.1.ffn_up.weight"][-1, -1] = value
    source = GgufFile(write_gguf(tmp_path / "x.gguf", tensors=tensors))
    source.tensor("layers.0.mlp.up_proj.weight")
    with pytest.raises(BundleError, match=r"must be finite and fit F16, got .*layers.1.mlp.up_pro"):
        source.tensor("layers.1.mlp.up_proj.weight")


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    at = read_header(path)[1]["blk.1.ffn_down.weight"].offset
    data = bytearray(path.read_bytes())
    data[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"must be finite and fit F16, got (inf|-inf|nan)"):
        GgufFile(path).tensor("layers.1.mlp.down_proj.weight")


def test_the_largest_f16_is_kept(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["blk.1.ffn_up.weight"][0, 0] = 65519.0
    source = GgufFile(write_gguf(tmp_path / "x.gguf", tensors=tensors))
    assert source.tensor("layers.1.mlp.up_proj.weight").array[0, 0] == 65504.0


def test_the_file_is_all_that_an_export_depends_on(tiny_gguf: Path) -> None:
    source = open_source(tiny_gguf)
    assert source.files() == [tiny_gguf]
    assert (source.name, source.licence) == ("tiny.gguf", "mit")


def test_a_licence_that_may_forbid_a_use_is_asked_about(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", top={"general.license": "llama3"})
    with pytest.raises(InputError, match=r"the licence of x\.gguf, 'llama3', may not permit every"):
        open_source(path)
    assert open_source(path, accepts_licence=lambda name: name == "llama3").licence == "llama3"


def test_rope_and_head_size_have_llama_cpp_defaults(tmp_path: Path) -> None:
    keys = {
        "attention.key_length": None,
        "attention.value_length": None,
        "rope.dimension_count": None,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
    }
    tensors = random_tensors()
    for layer in range(LAYERS):
        for name, rows in (("attn_q", 64), ("attn_k", 32), ("attn_v", 32)):
            tensors[f"blk.{layer}.{name}.weight"] = np.zeros((rows, HIDDEN), np.float32)
        tensors[f"blk.{layer}.attn_output.weight"] = np.zeros((HIDDEN, 64), np.float32)
    config = GgufFile(write_gguf(tmp_path / "x.gguf", keys=keys, tensors=tensors)).config
    assert config.head_dim == HIDDEN // 2


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"rope.scaling.type": "linear"}, "rope.scaling.type='linear' changes the maths"),
        ({"rope.scaling.factor": 4.0}, "rope.scaling.factor=4.0 changes the maths"),
        ({"attention.sliding_window": 4096}, "attention.sliding_window=4096 changes the maths"),
        ({"expert_count": 8}, "expert_count=8 changes the maths"),
        ({"attention.causal": False}, "attention.causal=False changes the maths"),
        ({"rope.dimension_count": 16}, "rope.dimension_count=16 changes the maths"),
        ({"attention.value_length": 16}, "attention.value_length=16 changes the maths"),
        ({"attention.scale": 0.5}, "attention.scale=0.5 changes the maths"),
        ({"vocab_size": 7}, "vocab_size=7 changes the maths"),
        ({"attention.head_count_kv": [2, 1]}, "num_key_value_heads must be a positive integer"),
        ({"attention.head_count_kv": 3}, "num_key_value_heads must divide"),
        ({"rope.freq_base": None}, "rope_theta must be a positive number, got None"),
        ({"block_count": 0}, "num_hidden_layers must be a positive integer"),
        ({"context_length": None}, "max_position_embeddings must be a positive integer"),
    ],
)
def test_what_changes_the_maths_is_refused_by_name(
    tmp_path: Path, keys: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BundleError, match=problem):
        GgufFile(write_gguf(tmp_path / "x.gguf", keys=keys))


def test_a_neutral_value_of_such_a_key_is_taken(tmp_path: Path) -> None:
    keys = {"rope.scaling.type": "none", "expert_count": 0, "attention.causal": True}
    assert GgufFile(write_gguf(tmp_path / "x.gguf", keys=keys)).config.rope_theta == 5000.0


@pytest.mark.parametrize(
    ("top", "problem"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture must be llama, got 'qwen2'"),
        ({"general.type": "adapter"}, "general.type must be model, got 'adapter'"),
        ({"split.count": 3}, "one part of a split model: merge the parts with gguf-split"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model must be gpt2, got 'llama'"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model must be gpt2, got None"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            "tokenizer.ggml.pre must be one of smollm, got 'tekken'",
        ),
        ({"tokenizer.ggml.pre": ["smollm"]}, "tokenizer.ggml.pre must be one of smollm, got "),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens must be a list of strings"),
        ({"tokenizer.ggml.tokens": ["a"] * len(TOKENS)}, "holds a token twice"),
        ({"tokenizer.ggml.tokens": TOKENS[:-1]}, "must give 1, 3, 4 or 5 for each of"),
        ({"tokenizer.ggml.token_type": None}, "must give 1, 3, 4 or 5 for each of"),
        ({"tokenizer.ggml.token_type": [6] * len(TOKENS)}, "must give 1, 3, 4 or 5 for each of"),
        ({"tokenizer.ggml.merges": ["x"]}, "tokenizer.ggml.merges do not fit the tokens"),
        ({"tokenizer.ggml.merges": ["he llo"]}, "tokenizer.ggml.merges do not fit the tokens"),
        ({"tokenizer.ggml.bos_token_id": 9999}, "tokenizer.ggml.bos_token_id must be below"),
        ({"general.alignment": 48}, "general.alignment must be a power of two, got 48"),
    ],
)
def test_another_kind_of_model_or_tokenizer_is_refused(
    tmp_path: Path, top: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BundleError, match=problem):
        GgufFile(write_gguf(tmp_path / "x.gguf", top=top))


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def with_extra(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without("blk.1.attn_v.weight"), "tensor blk.1.attn_v.weight is missing"),
        (without("output_norm.weight"), "tensor output_norm.weight is missing"),
        (with_extra("rope_freqs.weight", 16), "may change the maths: rope_freqs.weight"),
        (with_extra("blk.0.attn_q.bias", 128), "may change the maths: blk.0.attn_q.bias"),
        (with_extra("blk.2.ffn_up.weight", 4, 4), "may change the maths: blk.2.ffn_up.weight"),
        (
            with_extra("blk.0.ffn_up.weight", HIDDEN, INNER),
            r"blk.0.ffn_up.weight must have shape \(96, 64\), got \(64, 96\)",
        ),
        (
            with_extra("token_embd.weight", 100, HIDDEN),
            r"token_embd.weight must have shape \(\d+, 64\), got \(100, 64\)",
        ),
    ],
)
def test_tensors_other_than_the_models_are_refused(
    tmp_path: Path, change: Callable[[Tensors], object], problem: str
) -> None:
    tensors = random_tensors()
    change(tensors)
    with pytest.raises(BundleError, match=problem):
        GgufFile(write_gguf(tmp_path / "x.gguf", tensors=tensors))


def test_a_type_that_cannot_be_dequantized_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # behind the count of dimensions and these
    data[at : at + 4] = gguf.GGMLQuantizationType.I8.to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"blk\.0\.ffn_up\.weight is of ggml type 24, which"):
        GgufFile(path)


def test_a_file_that_shrinks_later_is_an_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf")
    source = GgufFile(path)
    os.truncate(path, 4096)
    with pytest.raises(BundleError, match=r"x\.gguf ends before byte \d+$"):
        source.tensor("norm.weight")


def test_without_the_package_the_error_says_how_to_get_it(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BackendError, match=r"reading \.gguf files needs the package gguf, .*\[exp"):
        GgufFile(tiny_gguf)
