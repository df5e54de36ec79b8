import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.config_file import config_json, parse_config
from lowmem.artifact.latent_attention import LatentAttentionConfig
from lowmem.errors import BundleError
from tests.bidirectional import nvembed_config

# https://huggingface.co/intfloat/e5-mistral-7b-instruct/blob/main/config.json
E5_MISTRAL: dict[str, Any] = {
    "_name_or_path": "mistralai/Mistral-7B-v0.1",
    "architectures": ["MistralModel"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.34.0",
    "use_cache": False,
    "vocab_size": 32000,
}
MISTRAL_7B = ModelConfig(
    model_type="mistral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=32768,
    sliding_window=4096,
)

# https://huggingface.co/GritLM/GritLM-7B/blob/main/config.json, which is a Mistral's beside this.
GRITLM_CODE = {
    "AutoModel": "modeling_gritlm7b.MistralModel",
    "AutoModelForCausalLM": "modeling_gritlm7b.MistralForCausalLM",
}
# https://huggingface.co/nvidia/NV-Embed-v2/blob/main/config.json leaves its shape to the defaults.
NV_EMBED = nvembed_config(E5_MISTRAL) | {
    "latent_attention_config": {"model_type": "latent_attention"}
}


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in E5_MISTRAL.items() if key not in keys}


def test_the_config_of_a_real_model_is_read() -> None:
    assert parse_config(E5_MISTRAL, "config.json") == MISTRAL_7B


def test_sizes_of_the_7b_body_are_the_published_ones() -> None:
    norms = (2 * 32 + 1) * 4096
    assert MISTRAL_7B.linear_weights == 6_979_321_856
    assert MISTRAL_7B.linear_weights + 32000 * 4096 + norms == 7_110_660_096


def test_no_text_is_longer_than_the_positions_or_the_window() -> None:
    assert MISTRAL_7B.longest_sequence == 4096
    assert replace(MISTRAL_7B, sliding_window=None).longest_sequence == 32768


def test_a_window_that_is_not_named_is_the_one_that_transformers_takes() -> None:
    value = config_json(MISTRAL_7B, "float16")
    assert parse_config({**value, "sliding_window": None}, "config.json").sliding_window is None
    del value["sliding_window"]
    theirs = AutoConfig.for_model(**value).sliding_window
    assert parse_config(value, "config.json").sliding_window == theirs == 4096


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig])
def test_what_transformers_saves_is_read(kind: type[Any]) -> None:
    saved = kind(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=5000.0,
        architectures=[kind.__name__.replace("Config", "Model")],
    )
    config = parse_config(saved.to_diff_dict(), "config.json")
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (32, 5000.0, 1e-6)
    assert config.num_key_value_heads == 2
    assert config.sliding_window == getattr(saved, "sliding_window", None)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_what_is_written_is_read_and_means_the_same_to_transformers(model_type: str) -> None:
    config = replace(
        MISTRAL_7B,
        model_type=model_type,
        head_dim=64,
        rope_theta=5e5,
        sliding_window=4096 if model_type == "mistral" else None,
    )
    written = config_json(config, "bfloat16")
    assert parse_config(written, "config.json") == config
    theirs = AutoConfig.for_model(**written)
    for name in ModelConfig.__dataclass_fields__.keys() - {"is_stock"}:
        assert getattr(theirs, name, None) == getattr(config, name), name
    assert not theirs.tie_word_embeddings


def test_key_value_heads_and_head_dim_have_the_defaults_of_the_architecture() -> None:
    config = parse_config(without("num_key_value_heads"), "config.json")
    assert (config.num_key_value_heads, config.head_dim) == (32, 128)


@pytest.mark.parametrize(
    "homes",
    [
        {"rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6}},
    ],
)
def test_theta_is_read_from_either_home(homes: dict[str, Any]) -> None:
    assert parse_config(without("rope_theta") | homes, "config.json").rope_theta == 1e6


@pytest.mark.parametrize(
    ("homes", "problem"),
    [
        ({}, "rope_theta is missing"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta and rope_parameters disagree",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "linear"}},
            "rope_parameters=.*'linear'} changes the maths",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}},
            "rope_parameters=.* changes the maths",
        ),
        ({"rope_parameters": [1e4]}, "changes the maths"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number, got nan"),
    ],
)
def test_an_unclear_theta_is_refused(homes: dict[str, Any], problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        parse_config(without("rope_theta") | homes, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": [], "factor": 1.0}),
        ("hidden_act", "gelu"),
        ("use_bidirectional_attention", True),
        ("is_causal", "no"),
        ("partial_rotary_factor", 0.5),
        ("pretraining_tp", 2),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_a_key_that_changes_the_maths_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(BundleError, match=f"{key}=.* changes the maths"):
        parse_config(E5_MISTRAL | {key: value}, "config.json")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"type": "default"},
        {"type": "linear", "factor": 1.0},
        {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4},
    ],
)
def test_positions_that_are_scaled_by_nothing_are_read(rope: dict[str, Any]) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        assert parse_config(E5_MISTRAL | {key: rope}, "config.json") == MISTRAL_7B
    whole = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0}
    assert parse_config(E5_MISTRAL | {"rope_parameters": whole}, "config.json") == MISTRAL_7B


def test_attention_that_says_it_is_not_causal_is_not_what_all_stock_loaders_compute() -> None:
    config = parse_config(E5_MISTRAL | {"is_causal": False}, "config.json")
    assert config == replace(MISTRAL_7B, is_stock=False)


def test_what_tuning_libraries_note_of_themselves_changes_nothing() -> None:
    value = E5_MISTRAL | {"unsloth_version": "2026.1", "unsloth_fixed": True}
    assert parse_config(value, "config.json") == MISTRAL_7B


@pytest.mark.parametrize("kinds", [["sliding_attention"] * 32, "sliding_attention", {}])
def test_layers_of_another_attention_are_refused(kinds: object) -> None:
    with pytest.raises(BundleError, match="layer_types other than full_attention"):
        parse_config(E5_MISTRAL | {"layer_types": kinds or [{}]}, "config.json")


def test_layers_that_are_all_of_full_attention_are_read() -> None:
    value = E5_MISTRAL | {"layer_types": ["full_attention"] * 32}
    assert parse_config(value, "config.json") == MISTRAL_7B


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(BundleError, match="unknown key 'attn_logit_softcapping'"):
        parse_config(E5_MISTRAL | {"attn_logit_softcapping": 50.0}, "config.json")


@pytest.mark.parametrize("model_type", ["qwen2", None, ["mistral"], {}])
def test_another_architecture_is_refused_by_name(model_type: object) -> None:
    with pytest.raises(BundleError, match="model_type must be one of llama, mistral, nvembed, got"):
        parse_config(E5_MISTRAL | {"model_type": model_type}, "config.json")


@pytest.mark.parametrize("names", [["BidirectionalMistralModel"], "MistralModel", [["x"]]])
def test_another_class_of_model_is_refused(names: object) -> None:
    with pytest.raises(BundleError, match="architectures must be among"):
        parse_config(E5_MISTRAL | {"architectures": names}, "config.json")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "sliding_window", "head_dim"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 1.0, "32", True, [32]])
def test_a_size_must_be_a_positive_integer(key: str, value: object) -> None:
    with pytest.raises(BundleError, match=f"{key} must be a positive integer below 2"):
        parse_config(E5_MISTRAL | {key: value}, "config.json")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_key_value_heads": 5}, "num_key_value_heads must divide num_attention_heads, got 5"),
        ({"head_dim": 63}, "head_dim must be even and positive, got 63"),
        ({"num_attention_heads": 8192}, "head_dim must be even and positive, got 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number, got None"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers must be at most 1024"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        parse_config(E5_MISTRAL | change, "config.json")


def test_all_problems_are_listed_at_once() -> None:
    value = without("vocab_size") | {"attention_bias": True, "surprise": 1}
    with pytest.raises(BundleError) as caught:
        parse_config(value, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json cannot be served: vocab_size must be")
    assert "attention_bias=True" in message
    assert "unknown key 'surprise'" in message
    assert "\n" not in message


@pytest.mark.parametrize("repository", ["", "GritLM/GritLM-7B--"])
def test_the_config_of_gritlm_is_read(repository: str) -> None:
    code = {name: repository + value for name, value in GRITLM_CODE.items()}
    value = E5_MISTRAL | {"architectures": ["MistralForCausalLM"], "auto_map": code}
    assert parse_config(value, "config.json") == MISTRAL_7B


@pytest.mark.parametrize(
    "code",
    [
        {"AutoModel": "modeling_other.MistralModel"},
        GRITLM_CODE | {"AutoConfig": "someone/model--modeling_mistral.Config"},
        {"AutoModel": ["modeling_gritlm7b.MistralModel"]},
        "modeling_gritlm7b.MistralModel",
    ],
)
def test_code_that_is_not_known_is_refused(code: object) -> None:
    with pytest.raises(BundleError, match="auto_map names code that may change the maths"):
        parse_config(E5_MISTRAL | {"auto_map": code}, "config.json")


def test_the_config_of_nv_embed_is_read() -> None:
    config = parse_config(NV_EMBED, "config.json")
    latents = config.latent_attention
    assert latents == LatentAttentionConfig(512, 8, 4096)
    assert config == replace(MISTRAL_7B, is_stock=False, latent_attention=latents)
    sizes = sum(math.prod(shape) for shape in latents.shapes(4096).values())
    assert sizes == 740_356_096  # what its 7,851,016,192 parameters have more than a Mistral


def nested(key: str, **changes: Any) -> dict[str, Any]:
    return NV_EMBED | {key: NV_EMBED[key] | changes}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (NV_EMBED | {"is_mask_instruction": False}, "is_mask_instruction must be True for nvembed"),
        (NV_EMBED | {"padding_side": "left"}, "padding_side must be 'right' for nvembed, got 'le"),
        (NV_EMBED | {"add_eos": False}, "add_eos must be True for nvembed, got False"),
        (NV_EMBED | {"mask_type": "c"}, "mask_type must be 'b' for nvembed, got 'c'"),
        (NV_EMBED | {"architectures": ["Other"]}, r"must be \['NVEmbedModel'\], got \['Other'\]"),
        (NV_EMBED | {"hidden_size": 2048}, "hidden_size must be that of text_config, got 2048"),
        (NV_EMBED | {"text_config": None}, "text_config must be an object, got None"),
        (NV_EMBED | {"surprise": 1}, "unknown key 'surprise', which may change the maths"),
        (nested("text_config", surprise=1), "unknown key 'surprise', which may change the maths"),
        (nested("text_config", model_type="mistral"), "of text_config must be 'bidir_mistral'"),
        (nested("text_config", architectures=["Other"]), "architectures must be among"),
        (nested("text_config", attention_bias=True), "attention_bias=True changes the maths"),
        (NV_EMBED | {"latent_attention_config": None}, "latent_attention_config must be an object"),
        (nested("latent_attention_config", model_type="x"), "must be 'latent_attention', got 'x'"),
        (
            nested("latent_attention_config", num_cross_heads=0),
            "num_cross_heads must be a positive",
        ),
        (nested("latent_attention_config", cross_dim_head=True), "cross_dim_head must be a positi"),
        (nested("latent_attention_config", num_latents_value=2**21), "num_latents_value must be"),
        (nested("latent_attention_config", latent_dim=512), "latent_dim must be hidden_size=4096"),
        (nested("latent_attention_config", output_normalize=False), "output_normalize=False chan"),
        (nested("latent_attention_config", depth=2), "unknown key 'depth' in latent_attention_co"),
    ],
)
def test_another_nv_embed_is_refused(value: dict[str, Any], problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        parse_config(value, "config.json")


def test_a_size_of_nv_embed_that_its_defaults_do_not_fit_is_refused() -> None:
    body = E5_MISTRAL | {"hidden_size": 2048, "head_dim": 64}
    value = nvembed_config(body) | {"latent_attention_config": {"model_type": "latent_attention"}}
    with pytest.raises(BundleError, match="latent_dim must be hidden_size=2048, got 4096"):
        parse_config(value, "config.json")


def test_latents_beside_a_stock_model_type_are_refused() -> None:
    value = E5_MISTRAL | {"latent_attention_config": {"model_type": "latent_attention"}}
    with pytest.raises(BundleError, match="unknown key 'latent_attention_config'"):
        parse_config(value, "config.json")


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("latents", [None, LatentAttentionConfig(16, 2, 24)])
def test_what_is_written_for_bidirectional_attention_is_read_here_and_not_by_stock_code(
    tmp_path: Path, model_type: str, latents: LatentAttentionConfig | None
) -> None:
    config = replace(
        MISTRAL_7B,
        model_type=model_type,
        sliding_window=None,
        is_stock=False,
        latent_attention=latents,
    )
    written = config_json(config, "float16")
    assert parse_config(written, "config.json") == config
    assert written["model_type"] == f"lowmem-bidirectional-{model_type}"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        AutoConfig.from_pretrained(tmp_path)
