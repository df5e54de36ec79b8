"""``tokenizer.json`` from the metadata of a GGUF file.

GGUF stores the pieces and the merges, and for what stands before them (how text is cut before any
merge) only a name. The cut decides the ids, so a name that is not in the table below is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lowmem.artifact import strict_json
from lowmem.errors import BundleError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Digits one by one, then GPT-2's pattern over bytes, as in SmolLM2's own tokenizer.json."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {"smollm": _smollm}


def tokenizer_files(metadata: Mapping[str, Any], place: str) -> dict[str, bytes]:
    """``tokenizer.json`` and ``tokenizer_config.json``.

    Control tokens become special added tokens, user-defined ones added tokens that are not
    special; BOS and EOS are not added to any text here.

    Args:
        metadata: Of the file, by key.
        place: The file's name, for messages.

    Raises:
        BundleError: The tokenizer is of another kind, is incomplete, or contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise BundleError(
            f"tokenizer.ggml.model must be gpt2, got {kind!r} ({place}): export from the model's "
            "Hugging Face directory, which has its tokenizer.json"
        )
    pre = metadata.get("tokenizer.ggml.pre")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise BundleError(
            f"tokenizer.ggml.pre must be one of {known}, got {pre!r} ({place}): export from the "
            "model's Hugging Face directory, which has its tokenizer.json"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens", place)
    merges = [
        tuple(merge.split(" ")) for merge in _strings(metadata, "tokenizer.ggml.merges", place)
    ]
    types = metadata.get("tokenizer.ggml.token_type")
    if (
        not isinstance(types, list)
        or len(types) != len(tokens)
        or not set(types) <= {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}
    ):
        raise BundleError(
            f"tokenizer.ggml.token_type must give 1, 3, 4 or 5 for each of {len(tokens)} tokens "
            f"({place})"
        )
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise BundleError(f"tokenizer.ggml.tokens holds a token twice ({place})")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(
            f"tokenizer.ggml.merges do not fit the tokens: {error} ({place})"
        ) from error
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_added(tokens, types, _CONTROL))
    tokenizer.add_tokens(_added(tokens, types, _USER_DEFINED))
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": strict_json.dumps(_settings(metadata, tokens, place)).encode(),
    }


def _added(tokens: list[str], types: list[int], wanted: int) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind == wanted
    ]


def _settings(metadata: Mapping[str, Any], tokens: list[str], place: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata.get("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        key = f"tokenizer.ggml.{key}_token_id"
        number = metadata.get(key)
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise BundleError(f"{key} must be below {len(tokens)}, got {number!r} ({place})")
        settings[f"{name}_token"] = tokens[number]
    return settings


def _strings(metadata: Mapping[str, Any], key: str, place: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value) or not value:
        raise BundleError(f"{key} must be a list of strings that is not empty ({place})")
    return value
