"""The files that sentence-transformers reads, and when there must be none."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import LlamaConfig, LlamaModel

from lowmem.artifact.config_file import config_json
from lowmem.artifact.contract import Contract
from lowmem.artifact.sentence_transformers_files import (
    lacks_query_prompt,
    mean_leaves_out_prompts,
)
from lowmem.artifact.stock_files import check, render
from lowmem.errors import BundleError
from tests.stock_directories import (
    CONFIG,
    CONTRACT,
    MEAN,
    Files,
    byte_level_tokenizer,
    expected_ids,
    write,
)

SENTENCE_TRANSFORMERS = {
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
}
# A few units in the last place of numbers up to 8: padding may change the order of sums.
FLOAT32_NOISE = 2e-6

# These have no annotations.
llama_config: Callable[..., Any] = LlamaConfig
llama_model: Callable[..., Any] = LlamaModel


@pytest.fixture
def tiny() -> Files:
    return byte_level_tokenizer()


def test_prompts_are_those_of_the_contract(tiny: Files) -> None:
    def settings(**change: Any) -> Any:
        files = render(CONFIG, replace(CONTRACT, **change), tiny)
        return json.loads(files["config_sentence_transformers.json"])

    query = "Instruct: Given a question, retrieve passages\nQuery: "
    tasks = {"NQ": query, "STS13": "Instruct: Retrieve similar text.\nQuery: "}
    assert settings() == {
        "prompts": {"document": "", "query": query, **tasks},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    assert settings(default_task=None)["prompts"] == {"document": "", **tasks}
    assert settings(query_template="query: {text}", tasks={}, default_task=None)["prompts"] == {
        "document": "",
        "query": "query: ",
    }
    assert settings(document_template="passage: {text}")["default_prompt_name"] == "document"


def test_a_query_without_a_prompt_is_one_that_needs_a_task(tiny: Files) -> None:
    def lacks(**change: Any) -> bool:
        return lacks_query_prompt(render(CONFIG, replace(CONTRACT, **change), tiny))

    assert lacks(default_task=None)
    assert not lacks()
    assert not lacks(default_task=None, query_template="query: {text}")
    assert not lacks(default_task=None, is_causal=False)  # nothing is there to be loaded


@pytest.mark.parametrize("contract", [CONTRACT, MEAN])
def test_the_first_key_that_is_true_is_the_pooling_mode(tiny: Files, contract: Contract) -> None:
    """As older releases of vLLM read it."""
    settings = json.loads(render(CONFIG, contract, tiny)["1_Pooling/config.json"])
    first = next(key for key, value in settings.items() if value is True)
    flags = {"lasttoken": "pooling_mode_lasttoken", "mean": "pooling_mode_mean_tokens"}
    assert first == flags[contract.pooling]
    assert list(settings)[-1] == "include_prompt"


def test_files_with_sorted_keys_still_fit_their_contract(tmp_path: Path, tiny: Files) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    path = directory / "1_Pooling" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    check(directory, CONFIG, CONTRACT)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"query_template": "query:{text}", "tasks": {}, "default_task": None},
        {"query_template": "{text}", "eos_token_id": None, "tasks": {}, "default_task": None},
        {"query_template": "{task} {text}", "tasks": {}, "default_task": None},
    ],
)
def test_a_mean_over_the_same_tokens_gets_all_files(
    tmp_path: Path, tiny: Files, change: dict[str, Any]
) -> None:
    contract = replace(MEAN, **change)
    files = render(CONFIG, contract, tiny)
    assert files.keys() > SENTENCE_TRANSFORMERS
    check(write(tmp_path, files), CONFIG, contract)


@pytest.mark.parametrize(
    "change",
    [
        {"query_template": "Instruct: {task}\nQuery: {text}"},
        {"document_template": "passage: {text}"},
        {"query_template": "Instruct: {task} {text}", "default_task": None},
        {"query_template": "Instruct: {task}\n{text}"},  # older releases strip it
        {"eos_token_id": None},  # older releases take one token off
    ],
)
def test_a_mean_over_other_tokens_is_refused_by_sentence_transformers(
    tmp_path: Path, tiny: Files, change: dict[str, Any]
) -> None:
    contract = replace(MEAN, **change)
    files = render(CONFIG, contract, tiny)
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json", "modules.json"}
    directory = write(tmp_path, files)
    check(directory, CONFIG, contract)
    # It needs no weights to find that there is no such pooling.
    llama_model(llama_config(**config_json(CONFIG, "float32"))).save_pretrained(directory)
    with pytest.raises(ImportError, match=r"MeanBehindPrompts"):
        SentenceTransformer(str(directory), device="cpu")
    assert render(CONFIG, replace(contract, pooling="lasttoken"), tiny).keys() > files.keys()


def test_sentence_transformers_files_beside_another_mean_are_refused(
    tmp_path: Path, tiny: Files
) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    with pytest.raises(
        BundleError, match=r"1_Pooling/config\.json must not be there: .* take the mean over"
    ):
        check(directory, CONFIG, replace(CONTRACT, pooling="mean"))


def test_attention_that_stock_code_cannot_compute_gets_the_tokenizer_alone(tiny: Files) -> None:
    files = render(CONFIG, replace(CONTRACT, is_causal=False), tiny)
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}


def test_sentence_transformers_files_beside_other_attention_are_refused(
    tmp_path: Path, tiny: Files
) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    with pytest.raises(BundleError, match=r"modules\.json must not be there: stock code would"):
        check(directory, CONFIG, replace(CONTRACT, is_causal=False))


@pytest.mark.parametrize("contract", [CONTRACT, MEAN])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_gives_the_vectors_of_the_contract(
    tmp_path: Path, tiny: Files, contract: Contract, normalize: bool
) -> None:
    contract = replace(contract, normalize_embeddings=normalize)
    torch.manual_seed(0)
    model = llama_model(llama_config(**config_json(CONFIG, "float32"))).eval()
    model.save_pretrained(tmp_path)
    write(tmp_path, render(CONFIG, contract, tiny))
    stock = SentenceTransformer(str(tmp_path), device="cpu")
    assert stock.max_seq_length == 128

    def expected(prompt: str, text: str) -> np.ndarray[Any, Any]:
        [ids] = expected_ids(tiny, contract, [prompt + text])
        [prompt_ids] = expected_ids(tiny, contract, [prompt])
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        first = len(prompt_ids) - 1 if prompt else 0  # BOS and the prompt, without its EOS
        vector = hidden[-1] if contract.pooling == "lasttoken" else hidden[first:].mean(0)
        vector = vector / vector.norm() if normalize else vector
        return np.asarray(vector.numpy())

    texts = ["he", "the distance between the earth and the moon is 384400 km"]
    for prompt, vectors in (
        (contract.prompt("query"), stock.encode_query(texts)),
        (contract.prompt("query", "STS13"), stock.encode(texts, prompt_name="STS13")),
        ("", stock.encode_document(texts)),
        ("", stock.encode(texts)),
    ):
        for text, vector in zip(texts, np.asarray(vectors), strict=True):
            np.testing.assert_allclose(vector, expected(prompt, text), rtol=0, atol=FLOAT32_NOISE)


def test_a_mean_behind_prompts_is_told_from_every_other_pooling() -> None:
    assert mean_leaves_out_prompts(MEAN)
    bare = {"query_template": "{text}", "tasks": {}, "default_task": None}
    assert not mean_leaves_out_prompts(replace(MEAN, **bare))
    assert not mean_leaves_out_prompts(replace(MEAN, is_causal=False))  # no stock code loads it
    assert not mean_leaves_out_prompts(CONTRACT)
