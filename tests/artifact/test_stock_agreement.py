"""A directory whose files disagree with its contract is refused, and the files are named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem.artifact.latent_attention import LatentAttentionConfig
from lowmem.artifact.stock_files import check, render
from lowmem.errors import BundleError, InputError
from tests.stock_directories import CONFIG, CONTRACT, MEAN, Files, byte_level_tokenizer, write


@pytest.fixture
def tiny() -> Files:
    return byte_level_tokenizer()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pooling": "mean"},
        {"pooling": "mean", "query_template": MEAN.query_template},
        {"is_causal": False},
    ],
)
@pytest.mark.parametrize("eos", [2, None])
def test_what_was_rendered_fits_its_contract(
    tmp_path: Path, tiny: Files, change: dict[str, Any], eos: int | None
) -> None:
    contract = replace(CONTRACT, eos_token_id=eos, **change)
    config = replace(CONFIG, is_stock=contract.is_causal)
    check(write(tmp_path, render(config, contract, tiny), config), config, contract)


def edit(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        value = json.loads((directory / name).read_text())
        change(value)
        (directory / name).write_text(json.dumps(value))

    return apply


def lose_eos(value: Any) -> None:
    value["post_processor"]["single"].pop()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (edit("tokenizer.json", lose_eos), "tokenizer.json has a post_processor that does not"),
        (
            edit("tokenizer.json", lambda value: value.pop("post_processor")),
            "tokenizer.json lacks post_processor=",
        ),
        (
            edit("tokenizer.json", lambda value: value.update(truncation={"max_length": 9})),
            "tokenizer.json",
        ),
        (
            edit("tokenizer_config.json", lambda value: value.update(add_eos_token=False)),
            "tokenizer_config.json must have add_eos_token=true, got false",
        ),
        (
            edit("tokenizer_config.json", lambda value: value.pop("add_bos_token")),
            "tokenizer_config.json lacks add_bos_token=true",
        ),
        (
            edit("tokenizer_config.json", lambda value: value.update(tokenizer_class="Llama")),
            'must have tokenizer_class="PreTrainedTokenizerFast", got "Llama"',
        ),
        (
            edit("tokenizer_config.json", lambda value: value.update(split_special_tokens=True)),
            "tokenizer_config.json must not have split_special_tokens=true",
        ),
        (
            edit("1_Pooling/config.json", lambda value: value.update(pooling_mode_lasttoken=False)),
            "1_Pooling/config.json must have pooling_mode_lasttoken=true, got false",
        ),
        (
            edit("1_Pooling/config.json", lambda value: value.update(word_embedding_dimension=9)),
            "1_Pooling/config.json must have word_embedding_dimension=32, got 9",
        ),
        (edit("modules.json", lambda value: value.pop()), r"modules.json must be \[.*, got \["),
        (
            edit("sentence_bert_config.json", lambda value: value.update(max_seq_length=512)),
            "sentence_bert_config.json must have max_seq_length=128, got 512",
        ),
        (
            edit("config_sentence_transformers.json", lambda value: value["prompts"].pop("query")),
            "config_sentence_transformers.json must have prompts=",
        ),
        (lambda directory: (directory / "modules.json").unlink(), "modules.json is missing"),
        (
            lambda directory: (directory / "modules.json").write_text("[1"),
            "modules.json is not JSON",
        ),
        (
            lambda directory: (directory / "tokenizer.json").write_text("[]"),
            "tokenizer.json must hold a JSON object",
        ),
        (
            lambda directory: (directory / "tokenizer_config.json").unlink(),
            "tokenizer_config.json cannot be read: No such file",
        ),
    ],
)
def test_a_file_that_disagrees_with_the_contract_is_named(
    tmp_path: Path, tiny: Files, damage: Callable[[Path], object], problem: str
) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    damage(directory)
    with pytest.raises(BundleError, match=problem) as caught:
        check(directory, CONFIG, CONTRACT)
    assert "\n" not in str(caught.value)


def test_every_disagreement_is_listed_at_once(tmp_path: Path, tiny: Files) -> None:
    directory = write(tmp_path, render(CONFIG, replace(MEAN, pooling="lasttoken"), tiny))
    changed = replace(MEAN, bos_token_id=None, max_seq_length=64, normalize_embeddings=False)
    with pytest.raises(BundleError) as caught:
        check(directory, CONFIG, changed)
    for problem in (
        "tokenizer.json has a post_processor that does not add the contract's BOS and EOS",
        "tokenizer_config.json must have add_bos_token=false, got true",
        "tokenizer_config.json must have model_max_length=64, got 128",
        "modules.json must be",
        "1_Pooling/config.json must have include_prompt=false, got true",
        "1_Pooling/config.json must have pooling_mode_mean_tokens=true, got false",
        "sentence_bert_config.json must have max_seq_length=64, got 128",
    ):
        assert problem in str(caught.value)


def test_a_contract_of_another_tokenizer_is_refused(tmp_path: Path, tiny: Files) -> None:
    directory = write(tmp_path, render(CONFIG, CONTRACT, tiny))
    with pytest.raises(BundleError, match="does not fit its contract: eos_token_id must be one of"):
        check(directory, CONFIG, replace(CONTRACT, eos_token_id=9))


@pytest.mark.parametrize(
    ("is_stock", "problem"),
    [
        (True, "config.json must have a model_type that stock code refuses"),
        (False, "config.json has the model_type of bidirectional attention"),
    ],
)
def test_a_model_type_of_other_attention_is_refused(
    tmp_path: Path, tiny: Files, is_stock: bool, problem: str
) -> None:
    contract, config = replace(CONTRACT, is_causal=not is_stock), replace(CONFIG, is_stock=is_stock)
    directory = write(tmp_path, render(config, contract, tiny), config)
    with pytest.raises(BundleError, match=problem):
        check(directory, config, contract)


def test_latent_attention_needs_a_model_that_has_its_weights(tiny: Files) -> None:
    pooled = replace(CONTRACT, is_causal=False, pooling="latent_attention")
    with pytest.raises(InputError, match="got latent_attention and a model with no weights for it"):
        render(CONFIG, pooled, tiny)
    latents = replace(CONFIG, is_stock=False, latent_attention=LatentAttentionConfig(8, 2, 16))
    assert render(latents, pooled, tiny).keys() == {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(InputError, match="got mean and a model with weights for it"):
        render(latents, replace(pooled, pooling="mean"), tiny)
