"""Text to ids by the contract, on a tiny byte-level tokenizer and on SmolLM2's own."""

import time
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as PieceTokenizer
from tokenizers import models, normalizers
from transformers import PreTrainedTokenizerFast

from export.sources import open_source
from lowmem import data
from lowmem.artifact.contract import Contract
from lowmem.errors import BundleError, InputError
from lowmem.text.batching import EncodedText
from lowmem.text.tokenizer import Tokenizer
from tests.models import BOS, CONTRACT, EOS, VOCAB_SIZE, save_tokenizer

QUERY = "Query: "
LONGEST = CONTRACT.max_seq_length


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path, CONTRACT, VOCAB_SIZE)


@pytest.fixture(scope="module")
def stock(path: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def with_contract(path: Path, **changes: Any) -> Tokenizer:
    return Tokenizer(path, replace(CONTRACT, **changes), VOCAB_SIZE)


def one(tokenizer: Tokenizer, text: str, prompt: str = "", **options: Any) -> EncodedText:
    (encoded,) = tokenizer.encode([text], [prompt], **options)
    return encoded


def stock_ids(stock: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = stock(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize(
    ("changes", "before", "behind"),
    [
        ({}, [BOS], [EOS]),
        ({"bos_token_id": None}, [], [EOS]),
        ({"eos_token_id": None}, [BOS], []),
        ({"bos_token_id": None, "eos_token_id": None}, [], []),
    ],
)
def test_ids_are_bos_the_pieces_of_prompt_and_text_and_eos(
    path: Path,
    stock: PreTrainedTokenizerFast,
    changes: dict[str, None],
    before: list[int],
    behind: list[int],
) -> None:
    encoded = one(with_contract(path, **changes), "the fox", QUERY)
    assert encoded.input_ids.tolist() == [*before, *stock_ids(stock, "Query: the fox"), *behind]
    assert encoded.cut_tokens == 0


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=40).filter(lambda text: bool(text.strip())),
    prompt=st.sampled_from(["", QUERY, "a th", "\n"]),
)
def test_ids_are_those_of_the_stock_tokenizer(
    tokenizer: Tokenizer, stock: PreTrainedTokenizerFast, text: str, prompt: str
) -> None:
    expected = [BOS, *stock_ids(stock, prompt + text), EOS]
    if len(expected) <= LONGEST:
        assert one(tokenizer, text, prompt).input_ids.tolist() == expected
    cut = one(tokenizer, text, prompt, truncate=True).input_ids.tolist()
    assert cut == [*expected[:-1][: LONGEST - 1], EOS]


@pytest.mark.parametrize("text", ["</s>", "<s>", "the</s> end", "<s><s></s>", "<pad> <unk>"])
def test_what_looks_like_a_special_token_is_what_the_stock_tokenizer_makes_of_it(
    tokenizer: Tokenizer, stock: PreTrainedTokenizerFast, text: str
) -> None:
    assert one(tokenizer, text).input_ids.tolist() == [BOS, *stock_ids(stock, text), EOS]


@pytest.mark.parametrize("eos", [EOS, None])
def test_a_cut_text_keeps_its_beginning_and_its_eos(
    path: Path, stock: PreTrainedTokenizerFast, eos: int | None
) -> None:
    text = "x" * 100 + "y" * 200
    encoded = one(with_contract(path, eos_token_id=eos), text, truncate=True)
    behind = [] if eos is None else [eos]
    room = LONGEST - 1 - len(behind)
    assert encoded.input_ids.tolist() == [BOS, *stock_ids(stock, text)[:room], *behind]
    assert encoded.cut_tokens == 300 - room


def test_a_text_of_just_the_most_tokens_is_served(tokenizer: Tokenizer) -> None:
    encoded = one(tokenizer, "x" * (LONGEST - 2))
    assert len(encoded.input_ids) == LONGEST
    assert encoded.cut_tokens == 0
    with pytest.raises(InputError, match=rf"text 0 \({LONGEST + 1} tokens\)"):
        one(tokenizer, "x" * (LONGEST - 1))


def test_texts_that_are_too_long_are_named(tokenizer: Tokenizer) -> None:
    texts = ["fine", "x" * 200, "fine", "x" * 300]
    with pytest.raises(InputError) as caught:
        tokenizer.encode(texts, [""] * 4, names=["line 1", "line 2", "line 3", "line 4"])
    assert str(caught.value) == (
        "a text may have 128 tokens, prompt and special tokens included: line 2 (202 tokens), "
        "line 4 (302 tokens); shorten them, or have them cut (--truncate)"
    )


def test_at_most_ten_texts_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"text 9 \(202 tokens\) and 4 more; shorten"):
        tokenizer.encode(["x" * 200] * 14, [""] * 14)


@pytest.mark.parametrize("text", ["", " ", "\n\t \u2003"])
def test_empty_and_blank_texts_are_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InputError, match=r"must not be empty or blank: text 1, text 2$"):
        tokenizer.encode(["fine", text, text], [QUERY] * 3)


def test_a_text_that_the_tokenizer_makes_nothing_of_is_refused(path: Path, tmp_path: Path) -> None:
    pieces = PieceTokenizer.from_file(str(path))
    pieces.normalizer = normalizers.Replace("\u200b", "")
    pieces.save(str(tmp_path / "tokenizer.json"))
    tokenizer = with_contract(
        tmp_path / "tokenizer.json", bos_token_id=None, eos_token_id=None, pooling="mean"
    )
    with pytest.raises(InputError, match=r"must not be empty or blank: text 0$"):
        one(tokenizer, "\u200b\u200b")


@pytest.mark.parametrize("surrogate", ["\ud800", "a\udfffb", "\udc00\ud800"])
def test_texts_that_are_not_unicode_are_named(tokenizer: Tokenizer, surrogate: str) -> None:
    with pytest.raises(InputError, match=r"must be valid Unicode: text 1$"):
        tokenizer.encode(["fine", surrogate], ["", ""])
    with pytest.raises(InputError, match=r"must be valid Unicode: text 0$"):
        one(tokenizer, "fine", surrogate)


@pytest.mark.parametrize("truncate", [True, False])
def test_a_prompt_that_leaves_no_room_is_refused(path: Path, truncate: bool) -> None:
    tokenizer = with_contract(path, max_seq_length=8)
    assert len(one(tokenizer, "z", "xxxxx").input_ids) == 8
    with pytest.raises(InputError, match=r"no room for a text within max_seq_length=8: 'xxxxxx'"):
        one(tokenizer, "z", "xxxxxx", truncate=truncate)


def test_the_prefix_is_bos_and_the_prompt_less_its_last_piece(
    tokenizer: Tokenizer, stock: PreTrainedTokenizerFast
) -> None:
    pieces = stock_ids(stock, QUERY)
    for text in ("the fox", "fox", QUERY, QUERY + QUERY, "\nfox", "☃"):
        encoded = one(tokenizer, text, QUERY)
        assert encoded.prefix_tokens == len(pieces)
        assert encoded.input_ids[: len(pieces)].tolist() == [BOS, *pieces[:-1]]


def test_a_first_word_that_takes_up_the_prompts_space_still_has_the_prefix(
    tokenizer: Tokenizer, stock: PreTrainedTokenizerFast
) -> None:
    pieces, whole = stock_ids(stock, QUERY), stock_ids(stock, QUERY + "the")
    assert whole[: len(pieces)] != pieces
    assert one(tokenizer, "the", QUERY).prefix_tokens == len(pieces)


def test_a_text_that_changes_more_of_the_prompt_has_no_prefix(
    tokenizer: Tokenizer, stock: PreTrainedTokenizerFast
) -> None:
    assert len(stock_ids(stock, "x th")) == 3  # x, space and t, h
    assert len(stock_ids(stock, "x the")) == 2  # x, the
    assert one(tokenizer, "e fox", "x th").prefix_tokens == 0
    assert one(tokenizer, "x fox", "x th").prefix_tokens == 3


def test_without_a_prompt_the_prefix_is_bos(path: Path) -> None:
    assert one(with_contract(path), "fox").prefix_tokens == 1
    assert one(with_contract(path, bos_token_id=None), "fox").prefix_tokens == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["the fox", "e fox", QUERY, "fox", "x" * 200]), max_size=6))
def test_a_text_is_encoded_alike_beside_any_others(
    tokenizer: Tokenizer, others: Sequence[str]
) -> None:
    def fields(encoded: EncodedText) -> tuple[list[int], int, int, int]:
        ids = encoded.input_ids.tolist()
        return ids, encoded.prefix_tokens, encoded.pooled_from, encoded.cut_tokens

    prompts = [QUERY, "x th", ""]
    texts = ["e fox" for _ in prompts] + list(others)
    beside = tokenizer.encode(texts, prompts + [QUERY] * len(others), truncate=True)
    for prompt, encoded in zip(prompts, beside, strict=False):
        assert fields(encoded) == fields(one(tokenizer, "e fox", prompt))


def test_a_mean_leaves_out_bos_and_the_prompt(
    tokenizer: Tokenizer, stock: PreTrainedTokenizerFast
) -> None:
    assert one(tokenizer, "fox", "a:\n").pooled_from == 1 + len(stock_ids(stock, "a:\n"))
    assert one(tokenizer, "fox").pooled_from == 0


def test_latent_attention_leaves_out_as_many_tokens_as_the_prompt_has_pieces(
    path: Path, stock: PreTrainedTokenizerFast
) -> None:
    """With BOS among them, the word that the prompt's last space merges into is taken in."""
    tokenizer = with_contract(path, is_causal=False, pooling="latent_attention")
    encoded = one(tokenizer, "fox", QUERY)
    assert encoded.pooled_from == len(stock_ids(stock, QUERY))
    before = [BOS, *stock_ids(stock, QUERY.rstrip())]
    assert encoded.input_ids[: encoded.pooled_from].tolist() == before
    assert one(tokenizer, "fox").pooled_from == 0


def test_a_space_at_the_end_of_the_prompt_belongs_to_the_mean(
    tokenizer: Tokenizer, stock: PreTrainedTokenizerFast
) -> None:
    for text in ("the fox", "fox", "☃"):
        encoded = one(tokenizer, text, QUERY)
        assert encoded.pooled_from == 1 + len(stock_ids(stock, "Query:"))


def test_a_mean_always_has_a_token(path: Path, stock: PreTrainedTokenizerFast) -> None:
    tokenizer = with_contract(path, eos_token_id=None, pooling="mean")
    encoded = one(tokenizer, "the", QUERY)  # one piece, together with the prompt's space
    assert len(encoded.input_ids) == 1 + len(stock_ids(stock, QUERY))
    assert encoded.pooled_from == len(encoded.input_ids) - 1


def test_truncation_and_padding_inside_the_file_are_not_followed(
    path: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    pieces = PieceTokenizer.from_file(str(path))
    pieces.enable_truncation(3)
    pieces.enable_padding(length=40)
    pieces.save(str(tmp_path / "tokenizer.json"))
    texts = ["a longer text than three tokens", "a"]
    expected = tokenizer.encode(texts, ["", ""])
    got = with_contract(tmp_path / "tokenizer.json").encode(texts, ["", ""])
    assert [item.input_ids.tolist() for item in got] == [
        item.input_ids.tolist() for item in expected
    ]


@pytest.mark.parametrize(
    ("vocab_size", "changes", "largest"),
    [(200, {}, 276), (300, {"eos_token_id": 300}, 300), (300, {"bos_token_id": 4000}, 4000)],
)
def test_ids_outside_the_vocabulary_are_refused(
    path: Path, vocab_size: int, changes: dict[str, int], largest: int
) -> None:
    contract = replace(CONTRACT, **changes)
    with pytest.raises(BundleError, match=rf"below vocab_size={vocab_size}, got {largest} \("):
        Tokenizer(path, contract, vocab_size)


@pytest.mark.parametrize("content", [None, "", "{}", "not JSON"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer\.json: "):
        Tokenizer(path, CONTRACT, VOCAB_SIZE)


@pytest.mark.parametrize("characters", [1, 7, 40])
def test_texts_are_encoded_alike_in_parts(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    texts = ["one", "a longer text than that", "x", "yes", "no", "and one more of them"]
    whole = [text.input_ids.tolist() for text in tokenizer.encode(texts, [QUERY] * len(texts))]
    calls = []
    encode = PieceTokenizer.encode_batch_fast

    class Counted:
        def encode_batch_fast(self, part: Sequence[str], **options: Any) -> Any:
            calls.append(len(part))
            return encode(tokenizer._pieces, part, **options)

        def encode(self, *args: Any, **options: Any) -> Any:
            return tokenizer._pieces.encode(*args, **options)

    parts = copy(tokenizer)
    parts._pieces = Counted()  # type: ignore[assignment]
    monkeypatch.setattr("lowmem.text.tokenizer._CHARACTERS_AT_ONCE", characters)
    found = [text.input_ids.tolist() for text in parts.encode(texts, [QUERY] * len(texts))]
    assert found == whole
    assert calls == {1: [1] * 6, 7: [1] * 6, 40: [2, 3, 1]}[characters]


def test_no_texts_give_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode([], []) == []


def one_word_tokenizer(folder: Path) -> Path:
    """As Mistral's: spaces are ordinary characters, so that a whole text is a single word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "t", "h", "e", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = PieceTokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["byte-level", "one word"])
@pytest.mark.parametrize("text", ["the " * 250_000, "x" * 1_000_000], ids=["words", "no space"])
def test_a_million_characters_take_seconds_and_not_hours(
    path: Path, tmp_path: Path, kind: str, text: str
) -> None:
    tokenizer = with_contract(path if kind == "byte-level" else one_word_tokenizer(tmp_path))
    start = time.monotonic()
    encoded = one(tokenizer, text, truncate=True)
    assert time.monotonic() - start < 60  # anything quadratic takes hours
    assert len(encoded.input_ids) == LONGEST
    assert encoded.cut_tokens > 200_000


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "tokenizer.json"
    path.write_bytes(open_source(smollm2_path).tokenizer_files()["tokenizer.json"])
    return path


def smollm2_contract(**changes: Any) -> Contract:
    return replace(CONTRACT, max_seq_length=8192, **changes)


def test_smollm2_gets_bos_the_stock_ids_and_eos(smollm2: Path) -> None:
    stock = PreTrainedTokenizerFast(tokenizer_file=str(smollm2))
    tokenizer = Tokenizer(smollm2, smollm2_contract(), 49152)
    texts = [row.text for row in data.load("probe")]
    for text, encoded in zip(texts, tokenizer.encode(texts, [QUERY] * len(texts)), strict=True):
        assert encoded.input_ids.tolist() == [1, *stock_ids(stock, QUERY + text), 2]


def test_smollm2_texts_share_the_prefix_of_a_real_instruction(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2, smollm2_contract(), 49152)
    prompt = (
        "Instruct: Given a question, retrieve Wikipedia passages that answer the question\nQuery: "
    )
    rows = data.load("probe")
    encoded = tokenizer.encode([row.text for row in rows], [prompt] * len(rows))
    (prefix_tokens,) = {text.prefix_tokens for text in encoded}
    assert prefix_tokens > 15


def test_smollm2_digits_and_look_alikes_are_those_of_the_stock_tokenizer(smollm2: Path) -> None:
    stock = PreTrainedTokenizerFast(tokenizer_file=str(smollm2))
    tokenizer = Tokenizer(smollm2, smollm2_contract(), 49152)
    for text in ("In 1984 12,345.67", "<|im_start|>user\nhi<|im_end|>", "<|endoftext|>", "'s  \n"):
        assert one(tokenizer, text).input_ids.tolist() == [1, *stock_ids(stock, text), 2]


def test_a_tokenizer_that_contradicts_itself_is_an_error_of_the_bundle(tmp_path: Path) -> None:
    pieces = PieceTokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    pieces.save(str(tmp_path / "tokenizer.json"))
    contract = replace(CONTRACT, bos_token_id=0, eos_token_id=1)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", contract, 3)
    assert one(tokenizer, "a").input_ids.tolist() == [0, 2, 1]
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot encode a text: .*UNK"):
        tokenizer.encode(["b"], [""])
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot encode a text: .*UNK"):
        tokenizer.encode(["a"], ["b"])
