"""What a directory's own files for sentence-transformers say, and what becomes of it."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export.disagreements import disagreements
from export.pipeline import export
from export.sources import HuggingFaceDirectory, open_source
from lowmem.artifact.contract import Contract
from lowmem.errors import BundleError, InputError, LowmemError
from tests.models import CONTRACT, tiny_checkpoint


def modules(*kinds: str) -> str:
    return json.dumps(
        [
            {"idx": index, "name": str(index), "path": "", "type": kind}
            for index, kind in enumerate(kinds)
        ]
    )


OLD, NEW = "sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"


@pytest.mark.parametrize(
    "kinds",
    [
        (f"{OLD}.Transformer", f"{OLD}.Pooling", f"{OLD}.Normalize"),
        (
            "sentence_transformers.base.modules.transformer.Transformer",
            f"{NEW}.pooling.Pooling",
            f"{NEW}.normalize.Normalize",
        ),
        (f"{OLD}.Transformer", f"{OLD}.Pooling"),
    ],
)
def test_the_usual_modules_are_accepted(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    directory = tiny_checkpoint(tmp_path / "m", layers=1).path
    (directory / "modules.json").write_text(modules(*kinds))
    assert HuggingFaceDirectory(directory).name == "m"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            modules(f"{OLD}.Transformer", f"{OLD}.Pooling", f"{OLD}.Dense"),
            r"computes Transformer, Pooling and Normalize only, got .*\.models\.Dense' \(",
        ),
        (modules("own.Normalize.Dense", "Twice"), "the module 'own.Normalize.Dense', 'Twice'"),
        ("[", r"modules\.json is not JSON at line 1"),
        ("{}", r"modules\.json must hold an array, got an object"),
        ("[1]", r"each module must have its type as a string \(.*modules\.json\)"),
        ('[{"type": null}]', "each module must have its type as a string"),
    ],
)
def test_modules_that_are_not_computed_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    directory = tiny_checkpoint(tmp_path / "m", layers=1).path
    (directory / "modules.json").write_text(text)
    with pytest.raises(BundleError, match=problem) as caught:
        open_source(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "modes"),
    [
        (None, ()),
        ({"word_embedding_dimension": 8}, ()),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, ("lasttoken",)),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, ("mean",)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, ("cls", "mean")),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, ("mean_sqrt_len",)),
        ({"pooling_mode": "lasttoken"}, ("lasttoken",)),
        ({"pooling_mode": ["cls", "mean"]}, ("cls", "mean")),
    ],
)
def test_pooling_modes_are_read_in_both_of_their_forms(
    tmp_path: Path, config: dict[str, Any] | None, modes: tuple[str, ...]
) -> None:
    directory = tiny_checkpoint(tmp_path / "m", layers=1).path
    if config is not None:
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert HuggingFaceDirectory(directory).stated.pooling_modes == modes


@pytest.mark.parametrize(
    ("change", "pooling", "warnings"),
    [
        ({}, "lasttoken", []),
        (
            {"default_task": None},
            "lasttoken",
            ["a query needs a task, and the contract has no default: stock sentence-transformers'"],
        ),
        ({}, "mean", ["1_Pooling/config.json pools by mean, and the contract by lasttoken"]),
    ],
)
def test_what_stock_code_would_do_otherwise_is_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, Any],
    pooling: str,
    warnings: list[str],
) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", layers=1).path
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    # The source's own tokenizer adds neither BOS nor EOS, which is another warning.
    with caplog.at_level(logging.WARNING):
        export(
            open_source(directory),
            tmp_path / "bundle",
            replace(CONTRACT, **change),
            variants=["fp16"],
            onnx=False,
        )
    own, *others = caplog.messages
    assert "tokenizer.json puts no BOS" in own
    assert len(others) == len(warnings)
    for message, warning in zip(others, warnings, strict=True):
        assert message.startswith(f"tiny: {warning}")
        assert "\n" not in message


PROMPTED = replace(
    CONTRACT,
    query_template="query: {text}",
    document_template="passage: {text}",
    tasks={},
    default_task=None,
    pooling="mean",
)


def disagreeing(directory: Path, contract: Contract) -> list[str]:
    source = HuggingFaceDirectory(directory)
    return list(disagreements(source.stated, source.tokenizer_files(), contract))[1:]


def put(directory: Path, name: str, value: Any) -> None:
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(value))


def test_a_mean_over_prompts_is_a_disagreement_where_there_are_prompts(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", layers=1).path
    bare = replace(PROMPTED, query_template="{text}", document_template="{text}")
    assert disagreeing(directory, PROMPTED) == []
    put(directory, "1_Pooling/config.json", {"pooling_mode": "mean"})
    (said,) = disagreeing(directory, PROMPTED)
    assert "takes the mean over prompt and text (include_prompt)" in said
    assert disagreeing(directory, bare) == []
    put(directory, "1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False})
    assert disagreeing(directory, PROMPTED) == []


def test_other_prompts_are_a_disagreement(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", layers=1).path
    name = "config_sentence_transformers.json"
    put(directory, name, {"prompts": {"query": "query: ", "document": "", "other": "x"}})
    assert disagreeing(directory, PROMPTED) == []
    put(directory, name, {"prompts": {"query": "Q: ", "document": "passage: "}})
    (said,) = disagreeing(directory, PROMPTED)
    assert said.startswith(f'{name} puts "Q: " before a query, and the contract "query: "')


def test_splitting_special_tokens_is_a_disagreement(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", layers=1).path
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(
        json.dumps(settings | {"split_special_tokens": True, "model_max_length": 10**30})
    )
    (said,) = disagreeing(directory, CONTRACT)
    assert "splits special tokens that stand in texts" in said


@pytest.mark.parametrize(
    ("name", "value", "error", "problem"),
    [
        ("adapter_config.json", {}, InputError, "merge the adapter into the weights"),
        ("sentence_bert_config.json", {"do_lower_case": True}, BundleError, "lower-cased before"),
    ],
)
def test_what_would_give_other_vectors_is_refused(
    tmp_path: Path, name: str, value: Any, error: type[LowmemError], problem: str
) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", layers=1).path
    put(directory, name, value)
    with pytest.raises(error, match=problem):
        open_source(directory)


def test_a_bidirectional_source_is_not_exported_as_causal(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "tiny", layers=1).path
    config = json.loads((directory / "config.json").read_text())
    put(directory, "config.json", config | {"is_causal": False})
    options: dict[str, Any] = {"variants": ["fp16"], "onnx": False}
    with pytest.raises(InputError, match="is bidirectional, as its config"):
        export(open_source(directory), tmp_path / "bundle", CONTRACT, **options)
    assert not (tmp_path / "bundle").exists()
    both_ways = replace(CONTRACT, is_causal=False)
    export(open_source(directory), tmp_path / "bundle", both_ways, **options)
    again = open_source(tmp_path / "bundle" / "fp16")
    with pytest.raises(InputError, match="the attention of fp16 is bidirectional"):
        export(again, tmp_path / "again", CONTRACT, **options)
