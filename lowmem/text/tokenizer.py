"""Text to token ids, by the contract.

``tokenizer.json`` turns text into pieces; BOS and EOS come from the contract and from nowhere
else, because tokenizers lose them without a word. A text that is too long is an error, or is cut
in front of its EOS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as PieceTokenizer

from lowmem.artifact.contract import Contract
from lowmem.data import Row
from lowmem.errors import BundleError, InputError
from lowmem.text.batching import EncodedText, Ids

_MOST_NAMED = 10
# The tokenizers library holds about 120 bytes a token until it is done with a call.
_CHARACTERS_AT_ONCE = 2**20


@dataclass(frozen=True)
class _Prompt:
    """What a prompt gives when it is tokenized by itself.

    Attributes:
        pooled_from: How many ids a mean leaves out: BOS and its own, but for those of a space at
            its end, which belongs to the first word of the text.
        prefix: BOS and its ids less the last, whose trailing space merges into the next word.
    """

    pooled_from: int
    prefix: Ids


class Tokenizer:
    """The tokenizer of one bundle."""

    def __init__(self, path: Path, contract: Contract, vocab_size: int) -> None:
        """Loads ``tokenizer.json``.

        Args:
            path: The file.
            contract: Special tokens and the length limit.
            vocab_size: Rows of the embedding table.

        Raises:
            BundleError: The file is missing or damaged, or names ids outside the vocabulary.
        """
        try:
            self._pieces = PieceTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{path} is not a tokenizer.json: {error}") from error
        self._path = path
        self._pieces.no_truncation()
        self._pieces.no_padding()
        self._contract = contract
        largest = max(
            [
                *self._pieces.get_vocab(with_added_tokens=True).values(),
                contract.bos_token_id or 0,
                contract.eos_token_id or 0,
            ]
        )
        if largest >= vocab_size:
            raise BundleError(
                f"token ids must be below vocab_size={vocab_size}, got {largest} ({path})"
            )

    def encode(
        self,
        texts: Sequence[str],
        prompts: Sequence[str],
        *,
        truncate: bool = False,
        names: Sequence[str] | None = None,
    ) -> list[EncodedText]:
        """Token ids of each text behind its prompt.

        Prompt and text are tokenized as one string, as the model saw them in training.

        Args:
            texts: The texts.
            prompts: What stands before each of them.
            truncate: Whether to cut texts that are too long, instead of refusing them.
            names: What to call each text in an error; its position by default.

        Raises:
            InputError: A text is empty, is not valid Unicode, or is over the limit; all such
                texts are named, up to ten. A prompt leaves no room for a text.
            BundleError: The tokenizer contradicts itself.
        """
        names = names or [f"text {row}" for row in range(len(texts))]
        bad = [
            name
            for name, text, prompt in zip(names, texts, prompts, strict=True)
            if not (_is_unicode(text) and _is_unicode(prompt))
        ]
        if bad:
            raise InputError(f"a text must be valid Unicode: {_named(bad)}")
        known = {prompt: self._prompt(prompt) for prompt in dict.fromkeys(prompts)}
        contract = self._contract
        room = contract.max_seq_length - contract.special_tokens
        encoded, empty, too_long = [], [], []
        pieces_of_all = self._pieces_of(texts, prompts)
        for text, prompt, name, pieces in zip(texts, prompts, names, pieces_of_all, strict=True):
            if not text.strip() or not pieces:
                empty.append(name)
                continue
            cut = max(0, len(pieces) - room)
            if cut and not truncate:
                too_long.append(f"{name} ({len(pieces) + contract.special_tokens} tokens)")
                continue
            ids = self._with_special_tokens(pieces[:room])
            prefix = known[prompt].prefix
            shared = len(prefix) < len(ids) and bool(np.array_equal(ids[: len(prefix)], prefix))
            # A word that the prompt's last piece has merged into may be the whole text.
            pooled_from = min(known[prompt].pooled_from, len(ids) - 1) if prompt else 0
            encoded.append(EncodedText(ids, len(prefix) if shared else 0, pooled_from, cut))
        if empty:
            raise InputError(f"a text must not be empty or blank: {_named(empty)}")
        if too_long:
            raise InputError(
                f"a text may have {contract.max_seq_length} tokens, prompt and special tokens "
                f"included: {_named(too_long)}; shorten them, or have them cut (--truncate)"
            )
        return encoded

    def encode_rows(self, rows: Sequence[Row]) -> list[EncodedText]:
        """Rows with the contract's prompts before them; those over the limit are cut.

        Where the contract has no place for instructions, those of the rows are left out.

        Raises:
            InputError: As ``encode``, or the contract has no such prompt.
        """
        takes_tasks = self._contract.takes_tasks
        prompts = [
            self._contract.prompt(row.input_type, row.task if takes_tasks else None) for row in rows
        ]
        return self.encode([row.text for row in rows], prompts, truncate=True)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of bare texts, without prompt, special tokens or limit."""
        return list(self._pieces_of(texts, [""] * len(texts)))

    def _pieces_of(self, texts: Sequence[str], prompts: Sequence[str]) -> Iterator[list[int]]:
        lengths = [len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True)]
        for part in _parts(lengths):
            whole = [prompt + text for prompt, text in zip(prompts[part], texts[part], strict=True)]
            for encoding in self._bare(self._pieces.encode_batch_fast, whole):
                yield encoding.ids

    def _bare(self, encode: Callable[..., Any], texts: str | list[str]) -> Any:
        """Without special tokens; parts that contradict each other show it only here."""
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{self._path} cannot encode a text: {error}") from error

    def _with_special_tokens(self, pieces: Sequence[int]) -> Ids:
        bos, eos = self._contract.bos_token_id, self._contract.eos_token_id
        before = [] if bos is None else [bos]
        behind = [] if eos is None else [eos]
        return np.array([*before, *pieces, *behind], np.int64)

    def _prompt(self, prompt: str) -> _Prompt:
        contract = self._contract
        pieces = self._bare(self._pieces.encode, prompt).ids
        if len(pieces) + contract.special_tokens >= contract.max_seq_length:
            raise InputError(
                f"the prompt leaves no room for a text within max_seq_length="
                f"{contract.max_seq_length}: {prompt!r:.60}"
            )
        before = [] if contract.bos_token_id is None else [contract.bos_token_id]
        instruction = self._bare(self._pieces.encode, prompt.rstrip(" ")).ids
        return _Prompt(len(before) + len(instruction), np.array([*before, *pieces[:-1]], np.int64))


def _parts(lengths: Sequence[int]) -> Iterator[slice]:
    """Cuts texts of these lengths into runs of about so many characters, a longer one by itself."""
    begin = characters = 0
    for row, length in enumerate(lengths):
        if characters and characters + length > _CHARACTERS_AT_ONCE:
            yield slice(begin, row)
            begin, characters = row, 0
        characters += length
    yield slice(begin, len(lengths))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
