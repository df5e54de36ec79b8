"""The small files by which stock transformers and sentence-transformers load a variant.

They repeat what the contract says, in other libraries' words, so they are rendered from the
contract and never edited: whoever loads a variant elsewhere gets the same ids and the same
pooling, or an error. Here are the tokenizer's; ``sentence_transformers_files`` has those that pool
and prompt.

The tokenizer's class is always ``PreTrainedTokenizerFast``, the one that takes ``tokenizer.json``
as it stands; transformers 5 rebuilds the others, and its ``LlamaTokenizer`` gives other ids for a
text that begins with a space. BOS and EOS are written down twice, because readers differ in where
they look: transformers 4 follows the post-processor for this class, transformers 5 and
``LlamaTokenizerFast`` rebuild it from the ``add_*_token`` flags.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from lowmem.artifact import sentence_transformers_files, strict_json
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.contract import Contract
from lowmem.errors import BundleError, InputError

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"


def render(
    config: ModelConfig, contract: Contract, tokenizer_files: Mapping[str, bytes]
) -> dict[str, bytes]:
    """The files, by path within the variant.

    What they hold depends on ``tokenizer_files`` only through ``tokenizer.json`` and the name of
    the padding token, so rendering from rendered files gives the same bytes.

    Args:
        config: The model's shape.
        contract: What the files have to say.
        tokenizer_files: File name to content, as the source or a variant has them:
            ``tokenizer.json``, and ``tokenizer_config.json`` or ``special_tokens_map.json`` where
            there is one.

    Raises:
        InputError: There is no ``tokenizer.json``, it has ids outside the vocabulary, BOS or EOS
            of the contract is not one of its special tokens, or the contract allows longer texts
            than the model or pools by weights that are not the model's.
        BundleError: A file is damaged.
    """
    if TOKENIZER not in tokenizer_files:
        raise InputError(f"the tokenizer must come as {TOKENIZER}, got {sorted(tokenizer_files)}")
    value = _object(tokenizer_files[TOKENIZER], TOKENIZER)
    pieces = _load(tokenizer_files[TOKENIZER], config.vocab_size)
    bos = _special(pieces, contract.bos_token_id, "bos_token_id")
    eos = _special(pieces, contract.eos_token_id, "eos_token_id")
    if contract.max_seq_length > config.longest_sequence:
        raise InputError(
            f"max_seq_length must be at most the model's {config.longest_sequence}, "
            f"got {contract.max_seq_length}"
        )
    if (contract.pooling == "latent_attention") != (config.latent_attention is not None):
        has = "no weights for it" if config.latent_attention is None else "weights for it"
        raise InputError(
            "pooling must be latent_attention for a model with weights for it and for no other, "
            f"got {contract.pooling} and a model with {has}"
        )
    value |= {"truncation": None, "padding": None, "post_processor": _template(contract, bos, eos)}
    pad = _padding(pieces, tokenizer_files) or eos or bos
    settings = _settings(contract, {"bos_token": bos, "eos_token": eos, "pad_token": pad})
    pre_tokenizer = value.get("pre_tokenizer") or {}
    if pre_tokenizer.get("type") == "ByteLevel":
        # Left out, transformers 4 sets it to false in the tokenizer that it loads.
        settings["add_prefix_space"] = pre_tokenizer.get("add_prefix_space", True)
    return {
        # The order of its keys is kept, and no white space: a vocabulary is long.
        TOKENIZER: json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n",
        TOKENIZER_CONFIG: strict_json.dumps(settings).encode(),
        **sentence_transformers_files.render(config, contract, pieces),
    }


def check(directory: Path, config: ModelConfig, contract: Contract) -> None:
    """Checks that a variant's files say what the contract says.

    Args:
        directory: The variant.
        config: Its model's shape.
        contract: The bundle's contract.

    Raises:
        BundleError: A file is missing, damaged, or disagrees; every difference is listed.
    """
    found = {
        name: strict_json.read_bytes(directory / name) for name in (TOKENIZER, TOKENIZER_CONFIG)
    }
    try:
        expected = render(config, contract, found)
    except (InputError, BundleError) as error:
        raise BundleError(f"{directory} does not fit its contract: {error}") from error
    problems = [
        problem
        for name, data in expected.items()
        for problem in _differences(name, strict_json.loads(data, name), directory)
    ]
    would = "take the mean over other tokens" if contract.is_causal else "compute causal attention"
    problems += [
        f"{name} must not be there: stock code would {would}"
        for name in sentence_transformers_files.FILES
        if name not in expected and (directory / name).exists()
    ]
    if config.is_stock and not contract.is_causal:
        problems.append(
            "config.json must have a model_type that stock code refuses: it would compute causal "
            "attention"
        )
    if not config.is_stock and contract.is_causal:
        problems.append("config.json has the model_type of bidirectional attention")
    if problems:
        raise BundleError(f"{directory} does not fit its contract: " + "; ".join(problems))


def _settings(contract: Contract, tokens: Mapping[str, AddedToken | None]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokens["bos_token"] is not None,
        "add_eos_token": tokens["eos_token"] is not None,
        **{name: token.content for name, token in tokens.items() if token is not None},
        "model_max_length": contract.max_seq_length,
        # Behind the text, padding changes neither positions nor, under causal attention, any
        # hidden state of the text, whatever a kernel makes of the mask.
        "padding_side": "right",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        # The default names token_type_ids too, which this family does not take.
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _template(contract: Contract, bos: AddedToken | None, eos: AddedToken | None) -> dict[str, Any]:
    """A post-processor that adds BOS and EOS, in the form that ``tokenizer.json`` has."""

    def special(token: AddedToken | None, segment: int) -> list[dict[str, Any]]:
        return [] if token is None else [_piece("SpecialToken", token.content, segment)]

    single = [*special(bos, 0), _piece("Sequence", "A", 0), *special(eos, 0)]
    pair = [*single, *special(bos, 1), _piece("Sequence", "B", 1), *special(eos, 1)]
    ids = ((bos, contract.bos_token_id), (eos, contract.eos_token_id))
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {
            token.content: {"id": token.content, "ids": [number], "tokens": [token.content]}
            for token, number in ids
            if token is not None
        },
    }


def _piece(kind: str, name: str, segment: int) -> dict[str, Any]:
    return {kind: {"id": name, "type_id": segment}}


def _load(data: bytes, vocab_size: int) -> Tokenizer:
    try:
        pieces = Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"{TOKENIZER} is not a tokenizer: {error}") from error
    ids = pieces.get_vocab(with_added_tokens=True)
    token = max(ids, key=ids.__getitem__, default=None)
    if token is None:
        raise BundleError(f"{TOKENIZER} holds no tokens")
    if ids[token] >= vocab_size:
        raise InputError(
            f"token ids must be below vocab_size={vocab_size}, got {ids[token]} for {token!r} "
            f"({TOKENIZER})"
        )
    pieces.no_truncation()
    pieces.no_padding()
    return pieces


def _special(pieces: Tokenizer, token_id: int | None, key: str) -> AddedToken | None:
    """The special token with an id.

    An ordinary piece is refused: stock loaders would turn it into a special token, and so tokenize
    every text that contains it in another way.
    """
    if token_id is None:
        return None
    token = pieces.get_added_tokens_decoder().get(token_id)
    if token is None or not token.special:
        ordinary = pieces.id_to_token(token_id)
        got = "no token at all" if ordinary is None else f"the ordinary piece {ordinary!r}"
        raise InputError(
            f"{key} must be one of the tokenizer's special tokens, got {token_id}, {got} "
            f"({TOKENIZER}, added_tokens)"
        )
    return token


def _padding(pieces: Tokenizer, tokenizer_files: Mapping[str, bytes]) -> AddedToken | None:
    """The padding token that the source names, if the tokenizer has it as a special token."""
    by_content = {
        token.content: token
        for token in pieces.get_added_tokens_decoder().values()
        if token.special
    }
    for name in (TOKENIZER_CONFIG, _SPECIAL_TOKENS):
        if name in tokenizer_files:
            named = tokenizer_settings(tokenizer_files[name], name).get("pad_token")
            content = named.get("content") if isinstance(named, dict) else named
            if isinstance(content, str) and content in by_content:
                return by_content[content]
    return None


def tokenizer_settings(data: bytes, place: str) -> dict[str, Any]:
    """What a source's ``tokenizer_config.json`` or ``special_tokens_map.json`` holds.

    They say "no limit" by an integer that is longer than ``strict_json`` takes.

    Args:
        data: The file.
        place: Its name, for the message.

    Raises:
        BundleError: It is not a JSON object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{place} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{place} must hold a JSON object, got {strict_json.type_name(value)}")
    return value


def _differences(name: str, expected: Any, directory: Path) -> Iterator[str]:
    path = directory / name
    if not path.exists():
        yield f"{name} is missing"
        return
    found = strict_json.read(path)
    if not isinstance(expected, dict) or not isinstance(found, dict):
        if found != expected:
            yield f"{name} must be {_short(expected)}, got {_short(found)}"
        return
    for key in sorted(expected.keys() | found.keys()):
        if key not in found:
            yield f"{name} lacks {key}={_short(expected[key])}"
        elif key not in expected:
            yield f"{name} must not have {key}={_short(found[key])}"
        elif found[key] != expected[key]:
            if key == "post_processor":
                yield f"{name} has a post_processor that does not add the contract's BOS and EOS"
            else:
                got = _short(found[key])
                yield f"{name} must have {key}={_short(expected[key])}, got {got}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _object(data: bytes, place: str) -> dict[str, Any]:
    value = strict_json.loads(data, place)
    if not isinstance(value, dict):
        raise BundleError(f"{place} must hold a JSON object, got {strict_json.type_name(value)}")
    return value
