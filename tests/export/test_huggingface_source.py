import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.sources import HuggingFaceDirectory, open_source
from lowmem.artifact.tensors import INDEX_FILE, SINGLE_FILE
from lowmem.errors import BundleError, InputError
from tests.bidirectional import tiny_gritlm, tiny_nvembed

CONFIG: dict[str, Any] = {
    "architectures": ["MistralModel"],
    "model_type": "mistral",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "sliding_window": None,
    "torch_dtype": "float16",
}
SHAPES: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj": (16, 8),
    "self_attn.k_proj": (8, 8),
    "self_attn.v_proj": (8, 8),
    "self_attn.o_proj": (8, 16),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
    "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
}
Tensors = dict[str, torch.Tensor]


def random_tensors(dtype: torch.dtype = torch.float16) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": (20, 8), "norm.weight": (8,)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def write(
    directory: Path,
    tensors: Tensors | None = None,
    config: dict[str, Any] | None = None,
    prefix: str = "",
    shards: int = 1,
) -> Path:
    """Writes a checkpoint as the hub has them."""
    directory.mkdir(exist_ok=True)
    named = {prefix + name: value for name, value in (tensors or random_tensors()).items()}
    (directory / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    if shards == 1:
        save_file(named, directory / SINGLE_FILE)
        return directory
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(named.items())[shard::shards])
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")],
)
def test_tensors_come_as_they_are_stored(
    tmp_path: Path, prefix: str, shards: int, dtype: torch.dtype, name: str
) -> None:
    tensors = random_tensors(dtype)
    source = open_source(write(tmp_path / "m", tensors, prefix=prefix, shards=shards))
    assert isinstance(source, HuggingFaceDirectory)
    assert source.dtype == name
    for key, expected in tensors.items():
        raw = source.tensor(key)
        assert raw.dtype == name
        assert np.array_equal(raw.float32(), expected.float().numpy()), key


def test_tensors_of_several_dtypes_come_exactly_in_float32(tmp_path: Path) -> None:
    tensors = random_tensors(torch.bfloat16)
    tensors["norm.weight"] = torch.randn(8)
    source = HuggingFaceDirectory(write(tmp_path / "m", tensors))
    assert source.dtype == "F32"
    assert source.shards is None
    for key, expected in tensors.items():
        assert source.tensor(key).dtype == "F32"
        assert np.array_equal(source.tensor(key).array, expected.float().numpy()), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 2])
def test_16_bit_shards_can_be_linked(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    tensors = random_tensors(dtype) | {"lm_head.weight": torch.zeros(20, 8, dtype=dtype)}
    source = HuggingFaceDirectory(write(tmp_path / "m", tensors, shards=shards))
    assert source.shards == tuple(sorted((tmp_path / "m").glob("*.safetensors")))
    assert len(source.shards) == shards


def test_shards_with_another_dtype_in_them_cannot_be_linked(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    source = HuggingFaceDirectory(write(tmp_path / "m", tensors))
    assert source.dtype == "F16"
    assert source.shards is None
    assert HuggingFaceDirectory(write(tmp_path / "n", random_tensors(torch.float32))).shards is None


def test_every_file_that_matters_is_named(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", shards=2)
    for name in ("tokenizer_config.json", "README.md", "unrelated.txt", "pytorch_model.bin"):
        (directory / name).write_text("{}")
    source = HuggingFaceDirectory(directory)
    assert [path.name for path in source.files()] == [
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert source.tokenizer_files() == {
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
    }
    assert source.name == "m"


def test_an_index_beside_a_single_file_does_not_matter(tmp_path: Path) -> None:
    directory = write(tmp_path / "m")
    (directory / INDEX_FILE).write_text("{}")
    assert [path.name for path in HuggingFaceDirectory(directory).files()] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: cc-by-nc-4.0\n---\n# Linq", "cc-by-nc-4.0"),
        ('---\r\ntags:\r\n- mteb\r\nlicense: "mit" # free\r\n---\r\n', "mit"),
        ("\ufeff---\nlicense: other\nlicense_name: llama3\nlanguage: en\n---\n", "llama3"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n- apache-2.0\ntags: [x]\n---\n", "mit, apache-2.0"),
        ("---\nlicense:\n---\n", None),
        ("---\ntags:\n- license: mit\n  license: mit\n---\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_card(
    tmp_path: Path, card: str | None, licence: str | None
) -> None:
    directory = write(tmp_path / "m")
    if card is not None:
        (directory / "README.md").write_bytes(card.encode())
    assert HuggingFaceDirectory(directory).licence == licence


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(InputError, match=r"m is quantized already \(quant_method 'gptq'\): export"):
        open_source(write(tmp_path / "m", config=config))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "m")
    (directory / SINGLE_FILE).rename(directory / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"must be in safetensors, got pytorch_model\.bin"):
        open_source(directory)


def test_a_source_without_tokenizer_json_is_told_how_to_make_it(tmp_path: Path) -> None:
    directory = write(tmp_path / "m")
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    with pytest.raises(InputError, match=r"must have a tokenizer\.json, .*save_pretrained"):
        open_source(directory)


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (drop("embed_tokens.weight"), "tensor embed_tokens.weight is missing"),
        (drop("norm.weight"), "tensor norm.weight is missing"),
        (drop("layers.1.mlp.up_proj.weight"), "tensor layers.1.mlp.up_proj.weight is missing"),
        (drop("layers.0.input_layernorm.weight"), "layers.0.input_layernorm.weight is missing"),
        (
            put("layers.0.mlp.up_proj.weight", torch.zeros(8, 12).half()),
            r"layers.0.mlp.up_proj.weight must have shape \(12, 8\), got \(8, 12\)",
        ),
        (
            put("layers.0.mlp.up_proj.weight", torch.zeros(12, 8).to(torch.int8)),
            "layers.0.mlp.up_proj.weight must be F16, got I8",
        ),
        (
            put("embed_tokens.weight", torch.zeros(20, 8).to(torch.uint8)),
            "embed_tokens.weight must be one of F16, BF16, F32, got U8",
        ),
        (
            put("layers.0.self_attn.q_proj.bias", torch.zeros(16).half()),
            "unexpected tensors: layers.0.self_attn.q_proj.bias",
        ),
        (
            put("layers.2.mlp.up_proj.weight", torch.zeros(12, 8).half()),
            "unexpected tensors: layers.2.mlp.up_proj.weight",
        ),
        (
            put("score.weight", torch.zeros(2, 8).half()),
            "unexpected tensors: score.weight",
        ),
    ],
)
def test_tensors_other_than_the_models_are_refused(
    tmp_path: Path, change: Callable[[Tensors], object], problem: str
) -> None:
    tensors = random_tensors()
    change(tensors)
    with pytest.raises(BundleError, match=problem):
        open_source(write(tmp_path / "m", tensors))


def test_a_tensor_under_both_of_its_names_is_refused(tmp_path: Path) -> None:
    tensors = {f"model.{name}": value for name, value in random_tensors().items()}
    tensors["norm.weight"] = torch.zeros(8).half()
    with pytest.raises(BundleError, match=r"a tensor stands with and without model\."):
        open_source(write(tmp_path / "m", tensors))


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", shards=2)
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model-00002-of-00002\.safetensors must .*truncated"):
        open_source(directory)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "qwen2", "architectures": ["Qwen2Model"]}
    with pytest.raises(
        BundleError, match="model_type must be one of llama, mistral, nvembed, got 'qwen2'"
    ):
        open_source(write(tmp_path / "m", config=config))


def test_what_is_no_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"a \.gguf file or a hub id, got the file model\.onnx"):
        open_source(Path("model.onnx"))
    for name in ("model.gguf", "folder/model.gguf", "./folder/model", "a/b/c"):
        with pytest.raises(InputError, match=rf"a hub id ORG/NAME; there is no {Path(name)}"):
            open_source(name)
    with pytest.raises(BundleError, match=r"config\.json cannot be read: No such file"):
        open_source(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_nv_embed_is_read_under_the_names_of_its_parts(tmp_path: Path, shards: int) -> None:
    source = open_source(tiny_nvembed(tmp_path, shards=shards).path)
    stored = {
        name: tensor
        for file in tmp_path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    for name, key in (
        ("embed_tokens.weight", "embedding_model.embed_tokens.weight"),
        ("latent_attention_model.latents", "latent_attention_model.latents"),
    ):
        np.testing.assert_array_equal(source.tensor(name).array, stored[key].numpy())
    assert source.shards is not None
    assert len(source.shards) == shards


def test_gritlm_is_read_as_the_mistral_that_it_is(tmp_path: Path) -> None:
    source = open_source(tiny_gritlm(tmp_path).path)
    assert (source.config.model_type, source.config.latent_attention) == ("mistral", None)


LATENT = "latent_attention_model.cross_attend_blocks"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda tensors: tensors.pop("latent_attention_model.latents"),
            "tensor latent_attention_model.latents is missing",
        ),
        (
            lambda tensors: tensors.pop(f"{LATENT}.1.fn.net.0.bias"),
            rf"tensor {LATENT}\.1\.fn\.net\.0\.bias is missing",
        ),
        (
            lambda tensors: tensors.update({f"{LATENT}.0.fn.to_q.bias": torch.zeros(60).half()}),
            rf"unexpected tensors: {LATENT}\.0\.fn\.to_q\.bias",
        ),
        (
            lambda tensors: tensors.update({f"{LATENT}.0.fn.to_kv.weight": torch.zeros(2, 128)}),
            rf"{LATENT}\.0\.fn\.to_kv\.weight must have shape \(120, 128\), got \(2, 128\)",
        ),
        (
            lambda tensors: tensors.update({f"{LATENT}.0.norm.bias": torch.zeros(128).int()}),
            rf"{LATENT}\.0\.norm\.bias must be F16, got I32",
        ),
    ],
)
def test_latents_that_are_not_those_of_the_config_are_refused(
    tmp_path: Path, change: Callable[[Tensors], object], problem: str
) -> None:
    path = tiny_nvembed(tmp_path).path / SINGLE_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BundleError, match=problem):
        open_source(tmp_path)


def test_latents_beside_a_config_without_them_are_refused(tmp_path: Path) -> None:
    path = tiny_nvembed(tmp_path).path / "config.json"
    body = json.loads(path.read_text())["text_config"] | {"model_type": "mistral"}
    path.write_text(json.dumps(body))
    with pytest.raises(BundleError, match="unexpected tensors: latent_attention_model"):
        open_source(tmp_path)


def test_a_card_that_cannot_be_read_is_not_taken_for_one_without_a_licence(tmp_path: Path) -> None:
    directory = write(tmp_path / "m")
    card = directory / "README.md"
    card.symlink_to(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"README\.md cannot be read: No such file"):
        HuggingFaceDirectory(directory)
    card.unlink()
    card.write_text("---\nlicense: other\n" + "# model-index\n" * 2**21)
    with pytest.raises(BundleError, match=r"README\.md must be at most 16777216 bytes long"):
        HuggingFaceDirectory(directory)
