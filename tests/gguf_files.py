"""Tiny GGUF files, as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

LAYERS, HIDDEN, INNER, HEADS, KEY_VALUE_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 32
CONTROL, USER_DEFINED = ["<|end|>", "<|start|>"], ["<think>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["h e", "Ġ t", "Ġt he", "1 2"]
TOKENS = [*CONTROL, *USER_DEFINED, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
TYPES = [3, 3, 4] + [1] * (len(TOKENS) - 3)
KEYS: dict[str, Any] = {
    "block_count": LAYERS,
    "context_length": 256,
    "embedding_length": HIDDEN,
    "feed_forward_length": INNER,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KEY_VALUE_HEADS,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5000.0,
    "rope.dimension_count": HEAD_DIM,
    "vocab_size": len(TOKENS),
}
INSIDE = {
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KEY_VALUE_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
}

Tensors = dict[str, NDArray[np.float32]]


def random_tensors() -> Tensors:
    """What llama.cpp's converter writes, by its names."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (len(TOKENS), HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in INSIDE.items()}
    return {
        name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }


def write_gguf(
    path: Path,
    *,
    tensors: Tensors | None = None,
    keys: dict[str, Any] | None = None,
    top: dict[str, Any] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Writes a tiny model; ``keys`` are under ``llama.``, a key of None is left out."""
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.license": "mit",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }
    metadata |= {f"llama.{key}": value for key, value in (KEYS | (keys or {})).items()}
    metadata |= top or {}
    writer = gguf.GGUFWriter(path, str(metadata.pop("general.architecture")))
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, value in (random_tensors() if tensors is None else tensors).items():
        if value.ndim == 1:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
