"""A checkpoint of random weights in the true shape: ``python benchmarks/random_checkpoint.py DIR``.

Weights have the spread of trained ones (normal, with a few input channels that are many times
larger), and are written shard by shard, so that any size needs the memory of one tensor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lowmem.artifact import strict_json
from lowmem.artifact.config import NORMS, ModelConfig
from lowmem.artifact.config_file import config_json
from lowmem.artifact.contract import Contract
from lowmem.artifact.tensors import INDEX_FILE, TensorSpec, header_bytes
from lowmem.artifact.weights import EMBEDDING, FINAL_NORM

SHAPES = {
    "tiny": ModelConfig("mistral", 384, 128, 192, 3, 6, 2, 32, 1e-5, 1e4, 32768, 4096),
    "2b": ModelConfig("mistral", 32000, 2048, 7168, 36, 16, 4, 128, 1e-5, 1e4, 32768, 4096),
    "7b": ModelConfig("mistral", 32000, 4096, 14336, 32, 32, 8, 128, 1e-5, 1e4, 32768, 4096),
}
CONTRACT = Contract(
    query_template="Instruct: {task}\nQuery: {text}",
    document_template="{text}",
    bos_token_id=1,
    eos_token_id=2,
    is_causal=True,
    pooling="lasttoken",
    max_seq_length=4096,
    normalize_embeddings=True,
    tasks={"NQ": "Given a question, retrieve Wikipedia passages that answer the question"},
    default_task="NQ",
)
_OUTLIERS, _OUTLIER_GAIN = 8, 8.0
# Characters that no text has, in a vocabulary.
_PRIVATE_USE, _LETTERS = 0xE000, 200


def ensure_checkpoint(directory: Path, config: ModelConfig, shards: int = 3) -> None:
    """Writes a checkpoint unless it is there; one that is there is whole."""
    if not directory.exists():
        new = directory.with_name(f"{directory.name}-new")
        shutil.rmtree(new, ignore_errors=True)
        write_checkpoint(new, config, shards)
        new.rename(directory)


def write_checkpoint(directory: Path, config: ModelConfig, shards: int = 3, seed: int = 0) -> None:
    """Writes config, tokenizer, contract (``contract.json``) and fp16 shards into a directory."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(strict_json.dumps(config_json(config, "float16")))
    (directory / "contract.json").write_text(strict_json.dumps(CONTRACT.to_json()))
    _write_tokenizer(directory, config.vocab_size)
    names = list(_specs(config).items())
    size = -(-len(names) // shards)
    weight_map = {}
    random = np.random.default_rng(seed)
    for number in range(shards):
        part = dict(names[number * size : (number + 1) * size])
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(part, name)
        with (directory / name).open("wb") as file:
            file.write(header_bytes(part))
            for spec in part.values():
                file.write(random_weights(spec, random).astype(np.float16).tobytes())
    (directory / INDEX_FILE).write_text(strict_json.dumps({"weight_map": weight_map}))


def _specs(config: ModelConfig) -> dict[str, TensorSpec]:
    specs = {EMBEDDING: TensorSpec("F16", (config.vocab_size, config.hidden_size))}
    for index in range(config.num_hidden_layers):
        for norm in NORMS:
            specs[f"layers.{index}.{norm}.weight"] = TensorSpec("F16", (config.hidden_size,))
        for linear, shape in config.linears().items():
            specs[f"layers.{index}.{linear}.weight"] = TensorSpec("F16", shape)
    return {**specs, FINAL_NORM: TensorSpec("F16", (config.hidden_size,))}


def random_weights(spec: TensorSpec, random: np.random.Generator) -> np.ndarray:
    """Weights with the spread of trained ones, float32; a vector is that of a norm."""
    if len(spec.shape) == 1:
        return 1 + 0.1 * random.standard_normal(spec.shape, np.float32)
    weights = random.standard_normal(spec.shape, np.float32)
    weights *= spec.shape[1] ** -0.5
    weights[:, random.integers(0, spec.shape[1], _OUTLIERS)] *= _OUTLIER_GAIN
    return weights


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """One piece a byte turns any text into ids; merges that no text meets fill the vocabulary.

    So a tokenizer takes as much memory as a trained one.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *alphabet]
    letters = [chr(_PRIVATE_USE + number) for number in range(_LETTERS)][: vocab_size - len(pieces)]
    pieces += letters
    merges = list(itertools.islice(itertools.product(letters, letters), vocab_size - len(pieces)))
    pieces += ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    arguments = parser.parse_args()
    write_checkpoint(arguments.directory, SHAPES[arguments.shape])
