"""Tiny checkpoints shaped like GritLM's and NV-Embed's, and what their published code computes.

The oracle is written from their papers (https://arxiv.org/abs/2402.09906,
https://arxiv.org/abs/2405.17428), one text at a time: no packing, no prefix, nothing folded.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from lowmem.artifact.config_file import config_json
from lowmem.artifact.weights import Checkpoint
from tests.models import BOS, CONTRACT, EOS, HIDDEN_SIZE, TinyCheckpoint, tiny_checkpoint

LATENTS, LATENT_HEADS, LATENT_HEAD_DIM = 7, 3, 20

GRITLM = replace(
    CONTRACT,
    query_template="<|user|>\n{task}\n<|embed|>\n{text}",
    document_template="<|embed|>\n{text}",
    eos_token_id=None,
    is_causal=False,
    pooling="mean",
)
NVEMBED = replace(CONTRACT, is_causal=False, pooling="latent_attention")


def tiny_gritlm(path: Path, **options: Any) -> TinyCheckpoint:
    """Saves a model as GritLM's repository has it: a Mistral with its head and ``auto_map``."""
    tiny_checkpoint(path, **options)
    config = _config(path)
    code = "modeling_gritlm7b.Mistral"
    config["auto_map"] = {"AutoModel": f"{code}Model", "AutoModelForCausalLM": f"{code}ForCausalLM"}
    (path / "config.json").write_text(json.dumps(config))
    return TinyCheckpoint(path, GRITLM)


def tiny_nvembed(
    path: Path, *, shards: int = 1, dtype: torch.dtype = torch.float16, **options: Any
) -> TinyCheckpoint:
    """Saves a model as NV-Embed's repository has it: a nested config and two prefixes.

    Args:
        path: The directory.
        shards: How many safetensors files; with more than one there is an index.
        dtype: Of the stored tensors.
        options: As of ``tiny_checkpoint``.
    """
    tiny_checkpoint(path, prefix=False, dtype=dtype, **options)
    single = path / "model.safetensors"
    tensors = {f"embedding_model.{name}": tensor for name, tensor in load_file(single).items()}
    for name, tensor in random_latents(1, _config(path)["hidden_size"]).items():
        tensors[f"latent_attention_model.{name}"] = tensor.to(dtype)
    single.unlink()
    names = sorted(tensors)
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    files = [single.name] if shards == 1 else files
    for number, file in enumerate(files):
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: files[number % shards] for number, name in enumerate(names)}
        (path / f"{single.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(nvembed_config(_config(path))))
    return TinyCheckpoint(path, NVEMBED)


def put_own_config(path: Path) -> None:
    """Replaces a checkpoint's config by the one that export writes for bidirectional attention."""
    config = replace(Checkpoint(path).config, is_stock=False)
    (path / "config.json").write_text(json.dumps(config_json(config, "float16")))


def nvembed_config(body: Mapping[str, Any]) -> dict[str, Any]:
    """The nested config around that of a bare Mistral."""
    return {
        "_name_or_path": "nvidia/NV-Embed-v2",
        "add_eos": True,
        "add_pad_token": True,
        "architectures": ["NVEmbedModel"],
        "auto_map": {
            "AutoConfig": "configuration_nvembed.NVEmbedConfig",
            "AutoModel": "modeling_nvembed.NVEmbedModel",
        },
        "hidden_size": body["hidden_size"],
        "is_mask_instruction": True,
        "latent_attention_config": {
            "model_type": "latent_attention",
            "num_latents_value": LATENTS,
            "num_cross_heads": LATENT_HEADS,
            "cross_dim_head": LATENT_HEAD_DIM,
            "hidden_dim": body["hidden_size"],
            "latent_dim": body["hidden_size"],
        },
        "mask_type": "b",
        "model_type": "nvembed",
        "padding_side": "right",
        "text_config": {
            **body,
            "architectures": ["MistralModel"],
            "model_type": "bidir_mistral",
            "max_length": 20,
            "temperature": 1.0,
            "num_beams": 1,
        },
        "torch_dtype": "float16",
        "transformers_version": "4.42.4",
    }


def random_latents(seed: int, hidden: int = HIDDEN_SIZE) -> dict[str, Tensor]:
    """Tensors of a latent attention under which every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    heads = LATENT_HEADS * LATENT_HEAD_DIM

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def matrix(rows: int, columns: int) -> Tensor:
        return 1.5 * draw(rows, columns) / columns**0.5

    attention, mlp = "cross_attend_blocks.0", "cross_attend_blocks.1"
    norms = (f"{attention}.norm", f"{attention}.norm_context", f"{mlp}.norm")
    return {
        "latents": draw(LATENTS, hidden),
        **{f"{norm}.weight": 1 + 0.2 * draw(hidden) for norm in norms},
        **{f"{norm}.bias": 0.3 * draw(hidden) for norm in norms},
        f"{attention}.fn.to_q.weight": matrix(heads, hidden),
        f"{attention}.fn.to_kv.weight": matrix(2 * heads, hidden),
        f"{attention}.fn.to_out.weight": matrix(hidden, heads),
        f"{mlp}.fn.net.0.weight": matrix(8 * hidden, hidden),
        f"{mlp}.fn.net.0.bias": 0.3 * draw(8 * hidden),
        f"{mlp}.fn.net.2.weight": matrix(hidden, 4 * hidden),
        f"{mlp}.fn.net.2.bias": 0.3 * draw(hidden),
    }


def plain_latent_attention(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """What becomes of hidden states in front of the mean, ``[tokens, hidden]``.

    Args:
        weights: As ``random_latents`` gives them.
        hidden: Hidden states behind the last norm, ``[tokens, hidden]``.
    """

    def norm(states: Tensor, name: str) -> Tensor:
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def project(states: Tensor, name: str) -> Tensor:
        return states @ weights[f"{name}.weight"].T

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (LATENT_HEADS, LATENT_HEAD_DIM)).transpose(0, 1)

    attention, mlp = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    query = project(norm(hidden, f"{attention}norm"), f"{attention}fn.to_q")
    latents = norm(weights["latents"], f"{attention}norm_context")
    key, value = project(latents, f"{attention}fn.to_kv").chunk(2, -1)
    scores = heads(query) @ heads(key).transpose(1, 2) / LATENT_HEAD_DIM**0.5
    mixed = (scores.softmax(-1) @ heads(value)).transpose(0, 1).flatten(1)
    hidden = hidden + project(mixed, f"{attention}fn.to_out")
    raised, gate = (
        project(norm(hidden, f"{mlp}norm"), f"{mlp}fn.net.0") + weights[f"{mlp}fn.net.0.bias"]
    ).chunk(2, -1)
    gated = raised * F.gelu(gate)
    return hidden + project(gated, f"{mlp}fn.net.2") + weights[f"{mlp}fn.net.2.bias"]


class Published:
    """A checkpoint as its published code computes it, in float32."""

    def __init__(self, path: Path, *, is_causal: bool = False) -> None:
        tensors = {
            name: tensor.float()
            for file in sorted(path.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        config = _config(path)
        self.is_nvembed = "latent_attention_config" in config
        self.config = config.get("text_config", config)
        body = "embedding_model." if self.is_nvembed else "model."
        self.body = {name.removeprefix(body): tensor for name, tensor in tensors.items()}
        head = "latent_attention_model."
        self.head = {name.removeprefix(head): tensor for name, tensor in tensors.items()}
        self.is_causal = is_causal
        self.pieces = Tokenizer.from_file(str(path / "tokenizer.json"))

    def dequantize(self, variant: Checkpoint) -> None:
        """Puts a variant's linears, dequantized, in the place of the checkpoint's own."""
        for layer in variant.layers():
            for module, weights in layer.linears.items():
                weight = weights.format.dequantize(weights.tensors)
                self.body[f"layers.{layer.index}.{module}.weight"] = torch.from_numpy(weight.copy())

    def embed(self, instruction: str, text: str) -> Tensor:
        """The unit vector of a text behind its instruction."""
        return self.embed_ids(*self.encode(instruction, text))

    def encode(self, instruction: str, text: str) -> tuple[list[int], int]:
        """Ids, and how many of the first of them the mean leaves out.

        GritLM counts the instruction's tokens with BOS, and adds no EOS. NV-Embed counts them
        without BOS, and adds EOS.
        """
        ids, instructed = [BOS, *self._ids(instruction + text)], len(self._ids(instruction))
        if self.is_nvembed:
            return [*ids, EOS], instructed
        return ids, instructed + 1 if instruction else 0

    @torch.inference_mode()
    def embed_ids(self, ids: list[int], left_out: int) -> Tensor:
        """The unit vector of one text's ids."""
        hidden = self.hidden_states(ids)
        if self.is_nvembed:
            hidden = plain_latent_attention(self.head, hidden)
        mean = hidden[left_out:].mean(0)
        return mean / mean.norm()

    def hidden_states(self, ids: list[int]) -> Tensor:
        """Hidden states behind the last norm, ``[tokens, hidden]``."""
        hidden = self.body["embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            path = f"layers.{layer}."
            normed = self._rms_norm(hidden, f"{path}input_layernorm")
            hidden = hidden + self._self_attention(normed, f"{path}self_attn.")
            normed = self._rms_norm(hidden, f"{path}post_attention_layernorm")
            gate = F.silu(self._linear(normed, f"{path}mlp.gate_proj"))
            up = self._linear(normed, f"{path}mlp.up_proj")
            hidden = hidden + self._linear(gate * up, f"{path}mlp.down_proj")
        return self._rms_norm(hidden, "norm")

    def _self_attention(self, states: Tensor, path: str) -> Tensor:
        size = self.config["head_dim"]
        query, key, value = (
            self._linear(states, f"{path}{name}_proj").unflatten(-1, (-1, size)).transpose(0, 1)
            for name in "qkv"
        )  # [heads, tokens, head_dim]
        query, key = self._rotate(query), self._rotate(key)
        sharing = len(query) // len(key)
        key, value = (states.repeat_interleave(sharing, dim=0) for states in (key, value))
        scores = query @ key.transpose(1, 2) / size**0.5
        if self.is_causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        mixed = scores.softmax(-1) @ value
        return self._linear(mixed.transpose(0, 1).flatten(1), f"{path}o_proj")

    def _rotate(self, heads: Tensor) -> Tensor:
        size = heads.shape[-1]
        frequencies = self.config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(heads.shape[1])[:, None] * frequencies
        first, second = heads.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _rms_norm(self, states: Tensor, name: str) -> Tensor:
        variance = states.square().mean(-1, keepdim=True)
        eps = self.config["rms_norm_eps"]
        return self.body[f"{name}.weight"] * states / (variance + eps).sqrt()

    def _linear(self, states: Tensor, name: str) -> Tensor:
        return states @ self.body[f"{name}.weight"].T

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.pieces.encode(text, add_special_tokens=False).ids
        return ids


def _config(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((path / "config.json").read_text())
    return value
