"""Tiny checkpoints, as transformers saves them: real files of models too small to be of any use.

Sizes are chosen so that mistakes show. All heads together are wider than the hidden size, key and
value heads are fewer than query heads, rows are no multiple of the usual blocks, RoPE's theta and
the norms are not the defaults, and each layer changes the hidden states by about as much as they
are large: a lost layer, norm or position moves every vector.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
)

from lowmem.artifact.contract import Contract

VOCAB_SIZE = 384  # a few rows more than the tokenizer has tokens
HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 192
LAYERS = 3
HEADS = 6
KEY_VALUE_HEADS = 2
HEAD_DIM = 32
ROPE_THETA = 5000.0
RMS_NORM_EPS = 1e-5
BOS, EOS, PAD = 1, 2, 3
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
_MERGES = "Ġ t|h e|i n|Ġ a|Ġt he|r e|o n|Ġ q|u e|Ġq ue|s t|Ġ d|e r|Ġ w|a t|Ġw h|Ġwh at".split("|")

_CLASSES: dict[str, tuple[type, type[PreTrainedModel], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaModel, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralModel, MistralForCausalLM),
}

CONTRACT = Contract(
    query_template="Instruct: {task}\nQuery: {text}",
    document_template="{text}",
    bos_token_id=BOS,
    eos_token_id=EOS,
    is_causal=True,
    pooling="lasttoken",
    max_seq_length=128,
    normalize_embeddings=True,
    tasks={"retrieval": "Find what answers the question", "same": "Find the same text"},
    default_task="retrieval",
)

TEXTS = (
    "the quick brown fox",
    "what is the distance between the earth and the moon?",
    "a",
    "Wie spät ist es? 現在幾點？ ☃",
    "the question about the quest, and the answer\n\n\tof the same",
    "the quick brown fox",
    "at the end of a long day there is another, and then there is one more; and so on",
)


@dataclass(frozen=True)
class TinyCheckpoint:
    """A checkpoint on disk, and the contract to export it with."""

    path: Path
    contract: Contract


def tiny_checkpoint(
    path: Path,
    architecture: str = "mistral",
    *,
    prefix: bool = True,
    tied: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float16,
    sliding_window: int | None = None,
    layers: int = LAYERS,
    seed: int = 0,
    **config: object,
) -> TinyCheckpoint:
    """Saves a random model with its tokenizer; the same arguments give the same bytes.

    Args:
        path: The directory; made if it is not there.
        architecture: ``llama`` or ``mistral``.
        prefix: Whether it is the model with its language head, whose tensors are named
            ``model.…``, or the bare one.
        tied: Whether the head shares the embedding, so that no ``lm_head.weight`` is stored.
        shards: How many safetensors files; with more than one there is an index.
        dtype: Of the stored tensors.
        sliding_window: As in the config of ``mistral``.
        layers: How many layers.
        seed: Of the weights.
        config: Further keys of the config, in place of what stands here.
    """
    config_class, bare, with_head = _CLASSES[architecture]
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": 256,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": tied,
    }
    if architecture == "mistral":
        settings["sliding_window"] = sliding_window
    model = (with_head if prefix else bare)(config_class(**settings | config))
    _fill(model, seed)
    model = model.to(dtype)
    model.save_pretrained(path, max_shard_size=_shard_bytes(model, shards))
    save_tokenizer(path)
    return TinyCheckpoint(path, CONTRACT)


def save_tokenizer(path: Path) -> None:
    """Writes a byte-level ``tokenizer.json`` and the ``tokenizer_config.json`` of its class.

    As in the real ones, a space belongs to the word behind it: the ids of a prompt that ends with
    a space are no prefix of the ids of prompt and text together.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split(" ")) for merge in _MERGES]
    pieces = [*_SPECIAL_TOKENS, *alphabet, *(first + second for first, second in pairs)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _fill(model: PreTrainedModel, seed: int) -> None:
    """Draws weights under which every module matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("embed_tokens.weight"):
                weight.copy_(noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)


def _shard_bytes(model: PreTrainedModel, shards: int) -> int:
    """The least ``max_shard_size`` under which there are so many files."""
    state = model.state_dict()
    total = sum(weight.nbytes for weight in state.values())
    step = max(1, total // 256)
    for size in range(total // shards, total + step, step):
        split = split_torch_state_dict_into_shards(state, max_shard_size=size)
        if len(split.filename_to_tensors) == shards:
            return size
    raise AssertionError(f"no size of a shard gives {shards} shards")
