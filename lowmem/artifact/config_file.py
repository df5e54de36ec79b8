"""``config.json``: a model's shape read from it, strictly, and written to it.

Every key is either part of the maths (read here), must hold its neutral value (refused by name
otherwise), is known to be inert, or is an error: a key that nobody looked at may be the one that
makes every vector wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lowmem.artifact.config import MAX_SIZE, ModelConfig
from lowmem.artifact.config_keys import refuse_other_maths
from lowmem.artifact.latent_attention import KEY as LATENT_ATTENTION
from lowmem.artifact.latent_attention import parse_latent_attention
from lowmem.errors import BundleError

ARCHITECTURES = {
    "llama": ("LlamaModel", "LlamaForCausalLM"),
    "mistral": ("MistralModel", "MistralForCausalLM"),
}
_ROPE_KEYS = {"rope_type", "type", "factor", "rope_theta", "partial_rotary_factor"}
_STOCK_WINDOWS = {"mistral": 4096}  # what transformers takes where the key is missing
# Written where stock code of the same weights would compute causal attention: no loader knows
# these types, so none gives another vector without a word.
_BIDIRECTIONAL = {name: f"lowmem-bidirectional-{name}" for name in ARCHITECTURES}

_NVEMBED = "nvembed"
_NVEMBED_BODY = "bidir_mistral"
_NVEMBED_ARCHITECTURES = ("MistralModel", "BidirectionalMistralModel")
# Its values that say how tokens become a vector; the contract says the same.
_NVEMBED_RULES = {
    "padding_side": "right",
    "is_mask_instruction": True,
    "add_eos": True,
    "mask_type": "b",
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_READ = frozenset(
    (
        *_SIZES,
        "model_type",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_parameters",
        "rope_scaling",
        "max_position_embeddings",
        "sliding_window",
        "quantization_config",
    )
)
_MOST_LAYERS = 1024


def parse_config(value: dict[str, Any], place: str) -> ModelConfig:
    """Reads a model's shape from the object in ``config.json``.

    Args:
        value: The parsed object. ``quantization_config`` is not looked at here.
        place: The file's name, for messages.

    Raises:
        BundleError: The architecture is unknown, a key is missing or of a wrong kind, a key that
            changes the maths has a value that is not supported, or a key is unknown. All problems
            are listed at once.
    """
    problems: list[str] = []
    written = value.get("model_type")
    stored_latents = value.get(LATENT_ATTENTION)
    if written == _NVEMBED:
        model_type, value = "mistral", _nvembed_body(value, problems)
    else:
        model_type = _body_type(written, place)
    # Before transformers 5 stock code reads no is_causal, and would compute causal attention.
    is_stock = written in ARCHITECTURES and value.get("is_causal") is not False
    is_ours = written in _BIDIRECTIONAL.values()
    _check_architectures(value, written, problems)

    numbers: dict[str, int] = {}
    for key in _SIZES:
        numbers[key] = _size(value, key, problems)
    numbers["num_key_value_heads"] = _size(
        value, "num_key_value_heads", problems, default=numbers["num_attention_heads"]
    )
    heads = max(numbers["num_attention_heads"], 1)
    numbers["head_dim"] = _size(
        value, "head_dim", problems, default=numbers["hidden_size"] // heads
    )
    numbers["max_position_embeddings"] = _size(value, "max_position_embeddings", problems)
    window = value.get("sliding_window", _STOCK_WINDOWS.get(model_type))
    if window is not None:
        window = _size(value, "sliding_window", problems, default=window)
    if numbers["num_attention_heads"] % max(numbers["num_key_value_heads"], 1):
        problems.append(
            "num_key_value_heads must divide num_attention_heads, got "
            f"{numbers['num_key_value_heads']} and {numbers['num_attention_heads']}"
        )
    if numbers["head_dim"] < 2 or numbers["head_dim"] % 2:
        problems.append(f"head_dim must be even and positive, got {numbers['head_dim']}")
    if numbers["num_hidden_layers"] > _MOST_LAYERS:
        problems.append(
            f"num_hidden_layers must be at most {_MOST_LAYERS}, got {numbers['num_hidden_layers']}"
        )
    eps = _number(value, "rms_norm_eps", problems)
    theta = _rope_theta(value, problems)
    latents = None
    if written == _NVEMBED or (is_ours and stored_latents is not None):
        latents = parse_latent_attention(stored_latents, numbers["hidden_size"], problems)
    read = {*_READ, LATENT_ATTENTION} if is_ours else _READ
    refuse_other_maths(value, read, problems)

    if problems:
        raise BundleError(f"{place} cannot be served: " + "; ".join(problems))
    return ModelConfig(
        model_type=model_type,
        rms_norm_eps=eps,
        rope_theta=theta,
        sliding_window=window,
        is_stock=is_stock,
        latent_attention=latents,
        **numbers,
    )


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The object that is written as ``config.json`` of a variant, without its quantization.

    Theta stands under both of its names: older readers know only ``rope_theta``, newer ones
    prefer ``rope_parameters``.

    Args:
        config: The model's shape.
        dtype: ``float16`` or ``bfloat16``: what the unquantized tensors are stored in.
    """
    stock = {
        "architectures": [ARCHITECTURES[config.model_type][0]],
        "model_type": config.model_type,
    }
    value: dict[str, Any] = {
        **(stock if config.is_stock else {"model_type": _BIDIRECTIONAL[config.model_type]}),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position_embeddings,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if config.model_type == "mistral":
        value["sliding_window"] = config.sliding_window
    else:
        value["attention_bias"] = False
        value["mlp_bias"] = False
    if config.latent_attention is not None:
        assert not config.is_stock, "a stock loader would leave the latents out"
        value[LATENT_ATTENTION] = config.latent_attention.to_json(config.hidden_size)
    return value


def _body_type(written: Any, place: str) -> str:
    """``llama`` or ``mistral``, by the ``model_type`` of a directory that is not NV-Embed's."""
    for model_type, own in _BIDIRECTIONAL.items():
        if written in (model_type, own):
            return model_type
    known = ", ".join([*sorted(ARCHITECTURES), _NVEMBED])
    raise BundleError(f"model_type must be one of {known}, got {written!r} ({place})")


def _nvembed_body(value: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Checks NV-Embed's outer config, and returns the decoder's, which is nested in it."""
    for key, rule in _NVEMBED_RULES.items():
        if value.get(key, rule) != rule:
            problems.append(f"{key} must be {rule!r} for {_NVEMBED}, got {value[key]!r}")
    if value.get("architectures") not in (None, ["NVEmbedModel"]):
        problems.append(f"architectures must be ['NVEmbedModel'], got {value['architectures']!r}")
    read = {"model_type", "hidden_size", "text_config", "add_pad_token", LATENT_ATTENTION}
    refuse_other_maths(value, {*read, *_NVEMBED_RULES}, problems)
    body = value.get("text_config")
    if not isinstance(body, dict):
        problems.append(f"text_config must be an object, got {body!r}")
        return {}
    if body.get("model_type") != _NVEMBED_BODY:
        problems.append(
            f"model_type of text_config must be {_NVEMBED_BODY!r}, got {body.get('model_type')!r}"
        )
    if value.get("hidden_size", body.get("hidden_size")) != body.get("hidden_size"):
        problems.append(
            f"hidden_size must be that of text_config, got {value['hidden_size']!r} "
            f"and {body.get('hidden_size')!r}"
        )
    return body


def _check_architectures(value: dict[str, Any], written: Any, problems: list[str]) -> None:
    allowed = _NVEMBED_ARCHITECTURES if written == _NVEMBED else ARCHITECTURES.get(written, ())
    names = value.get("architectures") or []
    if not isinstance(names, list) or any(name not in allowed for name in names):
        problems.append(f"architectures must be among {list(allowed)}, got {names!r}")


def _size(value: dict[str, Any], key: str, problems: list[str], default: int | None = None) -> int:
    number = value.get(key)
    if number is None and default is not None:
        return default
    if type(number) is not int or not 0 < number < MAX_SIZE:
        problems.append(f"{key} must be a positive integer below 2^31, got {number!r}")
        return 1
    return number


def _number(value: dict[str, Any], key: str, problems: list[str]) -> float:
    number: Any = value.get(key)
    if type(number) not in (int, float) or not math.isfinite(number) or number <= 0:
        problems.append(f"{key} must be a positive number, got {number!r}")
        return 1.0
    return float(number)


def _rope_theta(value: dict[str, Any], problems: list[str]) -> float:
    """Theta from either of its two homes; neither, or two that disagree, is an error."""
    found: dict[str, float] = {}
    if "rope_theta" in value:
        found["rope_theta"] = _number(value, "rope_theta", problems)
    for key in ("rope_parameters", "rope_scaling"):
        parameters = value.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict) or not _is_plain_rope(parameters):
            problems.append(f"{key}={parameters!r} changes the maths and is not supported")
        elif "rope_theta" in parameters:
            found[key] = _number(parameters, "rope_theta", problems)
    if not found:
        problems.append(
            "rope_theta is missing: it stands neither at the top nor in rope_parameters"
        )
        return 1.0
    if len(set(found.values())) > 1:
        problems.append(f"rope_theta and rope_parameters disagree: {found}")
    return next(iter(found.values()))


def _is_plain_rope(parameters: Mapping[str, Any]) -> bool:
    """Whether rotary positions are those of the first paper: not scaled, in all features."""
    kinds = [parameters[key] for key in ("rope_type", "type") if key in parameters]
    factor = parameters.get("factor", None if "linear" in kinds else 1.0)
    return (
        set(parameters) <= _ROPE_KEYS
        and all(kind in ("default", "linear") for kind in kinds)
        and factor == 1.0
        and parameters.get("partial_rotary_factor", 1.0) == 1.0
    )
