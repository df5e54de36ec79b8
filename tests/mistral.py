"""Mistral's own tokenizer, as the hub's repositories of the family have it."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import processors
from transformers.convert_slow_tokenizer import LlamaConverter, generate_merges

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
Files = dict[str, bytes]

merges_by_score: Callable[..., list[Any]] = generate_merges  # it has no annotations


class Merges:
    """The order of merges by score, which transformers otherwise reads with sentencepiece."""

    def __init__(self, model: str) -> None:
        """Takes what the class that it stands for takes."""

    def extract(self, scores: list[tuple[str, float]]) -> tuple[dict[str, int], list[Any]]:
        pieces = {piece: number for number, (piece, _) in enumerate(scores)}
        return {}, merges_by_score(pieces, scores)


class MistralConverter(LlamaConverter):
    SpmExtractor: Any = Merges


def mistral_tokenizer(*, legacy: bool) -> Files:
    """Mistral's own v1 tokenizer, converted by transformers, as the hub's repositories have it."""
    spec = find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package mistral-common")
    convert: Callable[..., Any] = MistralConverter
    converted = convert(
        SimpleNamespace(
            vocab_file=Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1",
            legacy=legacy,
            add_prefix_space=True,
            convert_ids_to_tokens=SPECIAL_TOKENS.__getitem__,
        )
    ).converted()
    converted.add_special_tokens(["<unk>"])  # as saving it would
    # As in e5-mistral: the flag says EOS, the post-processor does not.
    converted.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_eos_token": True,
        "legacy": legacy,
        "pad_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "chat_template": "{{ messages }}",
        "model_max_length": int(1e30),
    }
    return {
        "tokenizer.json": converted.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
