"""Directories of stock files: small tokenizers, the contracts they keep, and what ids they give."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.config_file import config_json
from lowmem.artifact.contract import Contract
from tests.mistral import SPECIAL_TOKENS

Files = dict[str, bytes]

CONTRACT = Contract(
    query_template="Instruct: {task}\nQuery: {text}",
    document_template="{text}",
    bos_token_id=1,
    eos_token_id=2,
    is_causal=True,
    pooling="lasttoken",
    max_seq_length=128,
    normalize_embeddings=True,
    tasks={"NQ": "Given a question, retrieve passages", "STS13": "Retrieve similar text."},
    default_task="NQ",
)
# Its prompts end in no space, so sentence-transformers counts their tokens as we do.
MEAN = replace(CONTRACT, pooling="mean", query_template="Instruct: {task}\nQuery:{text}")
CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=256,
    sliding_window=None,
)


def byte_level_tokenizer(*, prefix_space: bool = False, loose: bool = False) -> Files:
    """A small tokenizer with everything that must not survive: truncation, padding, no EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS, *alphabet, "he", "Ġt"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=loose, lstrip=loose, rstrip=loose)
            for token in SPECIAL_TOKENS
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": b'{"pad_token": "<pad>", "padding_side": "left"}',
    }


def config_for(source: Files) -> ModelConfig:
    tokenizer = Tokenizer.from_str(source["tokenizer.json"].decode())
    return replace(CONFIG, vocab_size=tokenizer.get_vocab_size(with_added_tokens=True))


def write(directory: Path, files: Mapping[str, bytes], config: ModelConfig = CONFIG) -> Path:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / "config.json").write_text(json.dumps(config_json(config, "float16")))
    return directory


def expected_ids(source: Files, contract: Contract, texts: list[str]) -> list[list[int]]:
    """What the contract says, over the pieces of the source's own tokenizer."""
    tokenizer = Tokenizer.from_str(source["tokenizer.json"].decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    before = [] if contract.bos_token_id is None else [contract.bos_token_id]
    behind = [] if contract.eos_token_id is None else [contract.eos_token_id]
    return [
        [*before, *tokenizer.encode(text, add_special_tokens=False).ids, *behind] for text in texts
    ]
