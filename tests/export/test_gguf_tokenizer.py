"""The tokenizer in a GGUF file: the pieces, ids and kinds of the published one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from export.sources import GgufFile
from lowmem.artifact.contract import read_contract
from lowmem.artifact.stock_files import render
from tests.gguf_files import TOKENS

# Of the tokenizer.json of https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
SMOLLM2_TOKENIZER_SHA256 = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"


def test_smollm2_tokenizer_is_the_published_file(smollm2: GgufFile) -> None:
    """Laid out as it was saved, with merges as strings, it has the same hash."""
    value = json.loads(smollm2.tokenizer_files()["tokenizer.json"])
    model = value["model"]
    vocab, merges = model.pop("vocab"), model.pop("merges")
    value["model"] = model | {"vocab": vocab, "merges": [" ".join(pair) for pair in merges]}
    text = json.dumps(value, indent=2, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == SMOLLM2_TOKENIZER_SHA256


def test_smollm2_splits_digits_one_by_one(smollm2: GgufFile) -> None:
    tokenizer = Tokenizer.from_str(smollm2.tokenizer_files()["tokenizer.json"].decode())
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode("hello world").ids == [28120, 905]
    assert tokenizer.encode("<|im_start|>x<|im_end|>").ids[0::2] == [1, 2]


def test_smollm2_ids_of_stock_transformers_are_those_of_its_contract(
    tmp_path: Path, smollm2: GgufFile
) -> None:
    contract = read_contract(Path(__file__).parents[2] / "benchmarks" / "smollm2.json")
    for name, data in render(smollm2.config, contract, smollm2.tokenizer_files()).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    load: Callable[..., Any] = AutoTokenizer.from_pretrained  # has no annotations
    pieces = Tokenizer.from_str(smollm2.tokenizer_files()["tokenizer.json"].decode())
    texts = [
        "hello world",
        "in 2024",
        " <|im_end|>x",
        "최초의 원자력 발전소는?",
        "x\n\n\ty  z",
        "½ ④",
    ]
    for text, ids in zip(texts, load(tmp_path)(texts)["input_ids"], strict=True):
        assert ids == [1, *pieces.encode(text).ids, 2]


def test_tokens_keep_their_ids_and_kinds(tiny_gguf: Path) -> None:
    files = GgufFile(tiny_gguf).tokenizer_files()
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.get_vocab(with_added_tokens=True) == {
        token: number for number, token in enumerate(TOKENS)
    }
    added = tokenizer.get_added_tokens_decoder()
    assert {number: (token.content, token.special) for number, token in added.items()} == {
        0: ("<|end|>", True),
        1: ("<|start|>", True),
        2: ("<think>", False),
    }
    assert tokenizer.encode("the 1212<think>").tokens == [
        *("t", "he", "Ġ", "1", "2", "1", "2"),
        "<think>",
    ]
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|start|>", "<|end|>")
    assert config["model_max_length"] == 256
