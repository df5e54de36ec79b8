import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.artifact.contract import Contract, parse_contract, read_contract
from lowmem.errors import BundleError, InputError

LINQ = Contract(
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
SMOLLM2 = Path(__file__).parents[2] / "benchmarks" / "smollm2.json"


def test_a_query_prompt_is_the_one_on_the_model_card() -> None:
    expected = (
        "Instruct: Given a question, retrieve Wikipedia passages that answer the question\nQuery: "
    )
    assert LINQ.prompt("query", "NQ") == expected
    assert LINQ.prompt("query") == expected
    assert LINQ.prompt("query", LINQ.tasks["NQ"]) == expected


def test_an_instruction_is_taken_as_it_stands() -> None:
    assert LINQ.prompt("query", "Find {text} {task}") == "Instruct: Find {text} {task}\nQuery: "


def test_an_empty_task_is_no_prompt_at_all() -> None:
    assert LINQ.prompt("query", "") == ""


def test_an_empty_task_is_what_stands_before_a_document() -> None:
    contract = replace(
        LINQ,
        query_template="<|user|>\n{task}\n<|embed|>\n{text}",
        document_template="<|embed|>\n{text}",
    )
    assert contract.prompt("query", "") == contract.prompt("document") == "<|embed|>\n"
    assert replace(contract, document_template="{task}: {text}").prompt("query", "") == ""


def test_a_document_has_the_prompt_of_its_own_template() -> None:
    assert LINQ.prompt("document") == ""
    assert replace(LINQ, document_template="passage: {text}").prompt("document") == "passage: "


def test_a_query_without_a_task_is_refused_where_there_is_no_default() -> None:
    contract = replace(LINQ, default_task=None)
    with pytest.raises(InputError, match=r"needs a task .* \(known: NQ\)"):
        contract.prompt("query")


def test_a_name_but_for_its_capitals_is_no_instruction() -> None:
    with pytest.raises(InputError, match="has no task ' NQ': its name is 'NQ'"):
        replace(LINQ, default_task=None).prompt("query", " NQ")
    with pytest.raises(InputError, match="has no task 'nq': its name is 'NQ'"):
        LINQ.prompt("query", "nq")


def test_another_input_type_is_refused() -> None:
    with pytest.raises(InputError, match="input_type must be query or document, got 'passage'"):
        LINQ.prompt("passage")


def test_what_is_written_is_read() -> None:
    assert parse_contract(json.loads(json.dumps(LINQ.to_json())), "here") == LINQ


def test_special_tokens_are_counted() -> None:
    assert LINQ.special_tokens == 2
    assert replace(LINQ, eos_token_id=None).special_tokens == 1
    assert replace(LINQ, bos_token_id=None, eos_token_id=None).special_tokens == 0


def test_length_is_bounded_by_the_model() -> None:
    assert LINQ.bounded(512) == replace(LINQ, max_seq_length=512)
    assert LINQ.bounded(4096) is LINQ


def test_a_contract_without_tasks_is_read() -> None:
    value = {key: item for key, item in LINQ.to_json().items() if "task" not in key}
    assert parse_contract(value, "here") == replace(LINQ, tasks={}, default_task=None)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"query_template": "Query: "}, "query_template must be a string that ends with {text}"),
        ({"document_template": None}, "document_template must be a string that ends with"),
        ({"query_template": "{text} {text}"}, "query_template may name {task} and {text} once"),
        ({"query_template": "{task} {task} {text}"}, "query_template may name {task} and {text}"),
        ({"query_template": "{query}{text}"}, "query_template may name {task} and {text} once"),
        ({"bos_token_id": True}, "bos_token_id must be a token id or null, got True"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id or null, got -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or null, got '</s>'"),
        ({"is_causal": 1}, "is_causal must be true or false, got 1"),
        ({"normalize_embeddings": None}, "normalize_embeddings must be true or false, got None"),
        ({"pooling": "cls"}, "pooling must be one of lasttoken, mean, latent_attention, got 'cls'"),
        (
            {"pooling": ["mean"]},
            "pooling must be one of lasttoken, mean, latent_attention, got ['mean']",
        ),
        (
            {"pooling": "latent_attention"},
            "pooling by latent_attention needs is_causal=false",
        ),
        ({"max_seq_length": 3}, "max_seq_length must be an integer of at least 4, got 3"),
        ({"max_seq_length": 512.0}, "max_seq_length must be an integer of at least 4, got 512.0"),
        ({"tasks": ["NQ"]}, "tasks must map names to instructions"),
        ({"tasks": {"NQ": None}}, "tasks must map names to instructions"),
        ({"default_task": "nq"}, "default_task must be a name in tasks, got 'nq'"),
        ({"default_task": ["NQ"]}, "default_task must be a name in tasks, got ['NQ']"),
        ({"tasks": {"NQ": "x", "query": "y"}}, "a task must not be named 'query'"),
        ({"pooling_mode": "mean"}, "unknown key 'pooling_mode'"),
    ],
)
def test_a_contract_that_breaks_a_rule_is_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_contract(LINQ.to_json() | change, "some/lowmem.json")
    assert problem in str(caught.value)
    assert str(caught.value).startswith("the contract in some/lowmem.json is not valid: ")


def test_a_missing_key_is_not_guessed() -> None:
    for key in LINQ.to_json().keys() - {"tasks", "default_task"}:
        value = {name: item for name, item in LINQ.to_json().items() if name != key}
        with pytest.raises(BundleError, match=f"missing key '{key}'"):
            parse_contract(value, "here")


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(BundleError) as caught:
        parse_contract(LINQ.to_json() | {"pooling": "cls", "max_seq_length": 0}, "here")
    assert "pooling must be" in str(caught.value)
    assert "max_seq_length must be" in str(caught.value)


def test_a_contract_must_be_an_object(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a contract must be a JSON object, got list"):
        parse_contract([], "here")
    path = tmp_path / "contract.json"
    path.write_text('{"pooling": "mean", "pooling": "lasttoken"}')
    with pytest.raises(BundleError, match="repeats the key 'pooling'"):
        read_contract(path)


def test_the_contract_of_the_demo_model_is_valid() -> None:
    contract = read_contract(SMOLLM2)
    assert (contract.bos_token_id, contract.eos_token_id) == (1, 2)
    assert contract.prompt("query") == (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query: "
    )
    assert contract.prompt("document") == ""


def test_a_task_is_refused_where_there_is_no_place_for_it() -> None:
    contract = replace(LINQ, query_template="query: {text}", tasks={}, default_task=None)
    assert not contract.takes_tasks
    assert contract.prompt("query") == contract.prompt("query", "") == "query: "
    for made, input_type in ((contract, "query"), (LINQ, "document")):
        with pytest.raises(InputError, match=f"takes a {input_type} without a task, got 'Find'"):
            made.prompt(input_type, "Find")
