"""The shape of NV-Embed's pooling: its numbers in ``config.json``, and its tensors.

Each token's final hidden state attends to a learned array of latents, goes through one gated MLP,
and only then is averaged (https://arxiv.org/abs/2405.17428, section 3.1). The tensors are kept in
16 bits by every variant, under the names of the published checkpoints.

Shape letters: H hidden_size, N num_latents_value, A = num_cross_heads * cross_dim_head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KEY = "latent_attention_config"
"""Where the shape stands in ``config.json``."""

PREFIX = "latent_attention_model."
LATENTS = f"{PREFIX}latents"
ATTENTION = f"{PREFIX}cross_attend_blocks.0."
MLP = f"{PREFIX}cross_attend_blocks.1."

LAYER_NORM_EPS = 1e-5
"""Of its three layer norms; no config holds it."""

_MLP_EXPANSION = 4
_MOST = 2**20
# What published configs leave out.
_DEFAULTS = {"num_latents_value": 512, "num_cross_heads": 8, "cross_dim_head": 4096}
_SAME_AS_HIDDEN = {"hidden_dim": 4096, "latent_dim": 4096}
_INERT = ("torch_dtype", "dtype", "transformers_version", "architectures", "_name_or_path")


@dataclass(frozen=True)
class LatentAttentionConfig:
    """The shape of one latent attention; names are those of the published configs.

    Attributes:
        num_latents_value: How many latents there are.
        num_cross_heads: Attention heads.
        cross_dim_head: Features of each head.
    """

    num_latents_value: int
    num_cross_heads: int
    cross_dim_head: int

    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Every tensor, in the order in which a file holds them, to its shape."""
        norm, inner = (hidden_size,), _MLP_EXPANSION * hidden_size
        heads = self.num_cross_heads * self.cross_dim_head
        return {
            LATENTS: (self.num_latents_value, hidden_size),
            f"{ATTENTION}norm.weight": norm,
            f"{ATTENTION}norm.bias": norm,
            f"{ATTENTION}norm_context.weight": norm,
            f"{ATTENTION}norm_context.bias": norm,
            f"{ATTENTION}fn.to_q.weight": (heads, hidden_size),
            f"{ATTENTION}fn.to_kv.weight": (2 * heads, hidden_size),
            f"{ATTENTION}fn.to_out.weight": (hidden_size, heads),
            f"{MLP}norm.weight": norm,
            f"{MLP}norm.bias": norm,
            f"{MLP}fn.net.0.weight": (2 * inner, hidden_size),
            f"{MLP}fn.net.0.bias": (2 * inner,),
            f"{MLP}fn.net.2.weight": (hidden_size, inner),
            f"{MLP}fn.net.2.bias": norm,
        }

    def inner_size(self, hidden_size: int) -> int:
        """Features between the two products of its MLP."""
        return _MLP_EXPANSION * hidden_size

    def folded_bytes(self, hidden_size: int) -> int:
        """Bytes of the latents' keys and values once they are float32 ``[heads * N, H]`` each."""
        return 2 * 4 * self.num_cross_heads * self.num_latents_value * hidden_size

    def to_json(self, hidden_size: int) -> dict[str, Any]:
        """The object that is written into ``config.json``, with nothing left to a default."""
        return {
            "model_type": "latent_attention",
            "num_latents_value": self.num_latents_value,
            "num_cross_heads": self.num_cross_heads,
            "cross_dim_head": self.cross_dim_head,
            "hidden_dim": hidden_size,
            "latent_dim": hidden_size,
            "output_normalize": True,
        }


def parse_latent_attention(
    value: Any, hidden_size: int, problems: list[str]
) -> LatentAttentionConfig:
    """Reads the object under ``latent_attention_config``.

    Args:
        value: The parsed object.
        hidden_size: That of the decoder, which latents and hidden states must share.
        problems: What is wrong is appended here.
    """
    if not isinstance(value, dict):
        problems.append(f"{KEY} must be an object, got {value!r}")
        return LatentAttentionConfig(**_DEFAULTS)
    if value.get("model_type") != "latent_attention":
        problems.append(
            f"model_type of {KEY} must be 'latent_attention', got {value.get('model_type')!r}"
        )
    numbers = {}
    for key, default in _DEFAULTS.items():
        number = numbers[key] = value.get(key, default)
        if type(number) is not int or not 0 < number <= _MOST:
            problems.append(f"{key} must be a positive integer up to {_MOST}, got {number!r}")
            numbers[key] = default
    for key, default in _SAME_AS_HIDDEN.items():
        if value.get(key, default) != hidden_size:
            problems.append(
                f"{key} must be hidden_size={hidden_size}, got {value.get(key, default)!r}"
            )
    if value.get("output_normalize", True) is not True:
        problems.append(
            f"output_normalize={value['output_normalize']!r} changes the maths and is not supported"
        )
    known = {"model_type", "output_normalize", *_DEFAULTS, *_SAME_AS_HIDDEN, *_INERT}
    problems += [
        f"unknown key {key!r} in {KEY}, which may change the maths"
        for key in value
        if key not in known
    ]
    return LatentAttentionConfig(**numbers)
