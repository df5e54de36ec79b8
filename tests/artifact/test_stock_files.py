import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizerFast

from lowmem.artifact.stock_files import check, render
from lowmem.errors import BundleError, InputError
from tests.mistral import mistral_tokenizer
from tests.stock_directories import (
    CONFIG,
    CONTRACT,
    Files,
    byte_level_tokenizer,
    config_for,
    expected_ids,
    write,
)

MESSY = Path(__file__).parents[2] / "../shared/data/messy/texts.jsonl"
TEXTS = [
    "hello world",
    "In 2024, 1234567 people; ١٢٣ ④ ½",
    "Größe, naïve café, e\u0301 ÅÅ",
    "最初の原子力発電所は何ですか？ Who invented 한글?",
    "👩‍👩‍👧 \u200b\u202e zero\u00a0width",
    "def f(x):\n\treturn x ** 2  # code\n\n",
    " leading and trailing ",
    "  two  spaces  ",
    "\n",
    "</s>",
    "a</s>b <s> <unk> <|im_end|> </s",
    "<s> [INST] <<SYS>> Instruct: x\nQuery: ",
    "ﾊﾝｶｸ ｆｕｌｌ ﬁ",
]

# It has no annotations.
load_tokenizer: Callable[..., Any] = AutoTokenizer.from_pretrained


SOURCES: dict[str, Callable[[], Files]] = {
    "mistral": lambda: mistral_tokenizer(legacy=True),
    "mistral-not-legacy": lambda: mistral_tokenizer(legacy=False),
    "byte-level": byte_level_tokenizer,
    "byte-level-prefix-space": lambda: byte_level_tokenizer(prefix_space=True),
    "byte-level-loose": lambda: byte_level_tokenizer(loose=True),
}


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> Files:
    return SOURCES[request.param]()


@pytest.fixture
def tiny() -> Files:
    return byte_level_tokenizer()


@pytest.mark.parametrize("bos", [1, None])
@pytest.mark.parametrize("eos", [2, None])
def test_stock_ids_are_those_of_the_contract(
    tmp_path: Path, source: Files, bos: int | None, eos: int | None
) -> None:
    contract = replace(CONTRACT, bos_token_id=bos, eos_token_id=eos)
    config = config_for(source)
    directory = write(tmp_path, render(config, contract, source), config)
    stock = load_tokenizer(directory)
    assert stock(TEXTS)["input_ids"] == expected_ids(source, contract, TEXTS)
    assert len(stock) == config.vocab_size


def test_stock_ids_of_messy_texts_are_those_of_the_contract(tmp_path: Path, source: Files) -> None:
    if not MESSY.exists():
        pytest.skip(f"needs the shared texts, {MESSY}")
    texts = [json.loads(line)["text"] for line in MESSY.read_text().splitlines()]
    config = config_for(source)
    files = render(config, replace(CONTRACT, max_seq_length=256), source)
    stock = load_tokenizer(write(tmp_path, files, config))
    assert len(texts) > 500
    assert stock(texts)["input_ids"] == expected_ids(source, CONTRACT, texts)


@pytest.mark.parametrize(("bos", "eos"), [(1, 2), (1, None), (None, 2)])
def test_a_class_that_follows_the_flags_gives_the_same_ids(
    tmp_path: Path, bos: int | None, eos: int | None
) -> None:
    source = mistral_tokenizer(legacy=True)
    contract = replace(CONTRACT, bos_token_id=bos, eos_token_id=eos)
    directory = write(tmp_path, render(config_for(source), contract, source))
    stock = LlamaTokenizerFast.from_pretrained(directory)
    assert stock(TEXTS)["input_ids"] == expected_ids(source, contract, TEXTS)


def test_the_post_processor_alone_gives_the_same_ids(source: Files) -> None:
    files = render(config_for(source), CONTRACT, source)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    ids = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]
    assert ids == expected_ids(source, CONTRACT, TEXTS)


def test_a_truncated_text_keeps_its_eos(tmp_path: Path, source: Files) -> None:
    config = config_for(source)
    stock = load_tokenizer(write(tmp_path, render(config, CONTRACT, source), config))
    text = "word " * 200
    ids = stock(text, truncation=True)["input_ids"]
    [whole] = expected_ids(source, CONTRACT, [text])
    assert ids == [*whole[:127], 2]


def test_a_batch_is_padded_behind_its_texts(tmp_path: Path, tiny: Files) -> None:
    stock = load_tokenizer(write(tmp_path, render(CONFIG, CONTRACT, tiny)))
    batch = stock(["he", "hehehe"], padding=True)
    assert batch["input_ids"][0] == [1, stock.convert_tokens_to_ids("he"), 2, 3, 3]
    assert batch["attention_mask"][0] == [1, 1, 1, 0, 0]
    assert batch.keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("settings", "eos", "pad"),
    [
        (b'{"pad_token": "<pad>"}', 2, "<pad>"),
        (b'{"pad_token": {"content": "<pad>", "lstrip": false}}', 2, "<pad>"),
        (b'{"pad_token": "[PAD]"}', 2, "</s>"),
        (b'{"pad_token": "he"}', 2, "</s>"),
        (b'{"pad_token": null}', 2, "</s>"),
        (b"{}", None, "<s>"),
    ],
)
def test_padding_is_a_special_token_that_exists(
    tiny: Files, settings: bytes, eos: int | None, pad: str
) -> None:
    contract = replace(CONTRACT, eos_token_id=eos)
    files = render(CONFIG, contract, tiny | {"tokenizer_config.json": settings})
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == pad


def test_padding_is_found_in_the_special_tokens_map(tiny: Files) -> None:
    tiny.pop("tokenizer_config.json")
    files = render(CONFIG, CONTRACT, tiny | {"special_tokens_map.json": b'{"pad_token": "<pad>"}'})
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == "<pad>"
    assert "special_tokens_map.json" not in files


def test_rendering_what_was_rendered_changes_no_byte(tmp_path: Path, source: Files) -> None:
    config = config_for(source)
    files = render(config, CONTRACT, source)
    assert render(config, CONTRACT, files) == files
    check(write(tmp_path, files), config, CONTRACT)


def test_nothing_else_of_the_tokenizer_changes(source: Files) -> None:
    before = json.loads(source["tokenizer.json"])
    after = json.loads(render(config_for(source), CONTRACT, source)["tokenizer.json"])
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed <= {"post_processor", "truncation", "padding"}
    assert after["truncation"] is after["padding"] is None
    assert list(after) == list(before)


def test_a_tokenizer_must_be_tokenizer_json(tiny: Files) -> None:
    with pytest.raises(
        InputError, match=r"must come as tokenizer\.json, got \['tokenizer\.model'\]"
    ):
        render(CONFIG, CONTRACT, {"tokenizer.model": b""})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[]", "tokenizer.json must hold a JSON object, got an array"),
        (b"{", "tokenizer.json is not JSON"),
        (b'{"version": "1.0"}', "tokenizer.json is not a tokenizer"),
        (
            b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}',
            "no",
        ),
    ],
)
def test_a_damaged_tokenizer_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        render(CONFIG, CONTRACT, {"tokenizer.json": data})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bos_token_id": 7}, "bos_token_id must be one of .* got 7, the ordinary piece '\\$'"),
        ({"eos_token_id": 310}, "eos_token_id must be one of .* got 310, no token at all"),
        ({"max_seq_length": 257}, "max_seq_length must be at most the model's 256, got 257"),
    ],
)
def test_a_contract_that_the_model_cannot_keep_is_refused(
    tiny: Files, change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        render(CONFIG, replace(CONTRACT, **change), tiny)


def test_ids_outside_the_embedding_are_refused(tiny: Files) -> None:
    with pytest.raises(InputError, match=r"must be below vocab_size=261, got 261 for 'Ġt'"):
        render(replace(CONFIG, vocab_size=261), CONTRACT, tiny)
