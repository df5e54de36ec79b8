"""Which known model a checkpoint is: certain, undecided or unknown, and never by a directory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub._local_folder import write_download_metadata

from export.detection import detect
from lowmem.artifact.models import known_models
from lowmem.errors import BundleError

MODELS = known_models()
MISTRAL = ("e5-mistral", "linq", "sfr", "sfr-2")
LINQ = MODELS["linq"]
[LINQ_COMMIT, *_] = sorted(LINQ.revisions)
# As in e5, Linq and SFR, whose own configs name the model that they were tuned from.
CONFIG = {
    "_name_or_path": "intfloat/e5-mistral-7b-instruct",
    "architectures": ["MistralModel"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
}
LAST_TOKEN = {"word_embedding_dimension": 4096, "pooling_mode_lasttoken": True}
E5_PROMPTS = {
    "web_search_query": "Instruct: Given a web search query, retrieve relevant passages that "
    "answer the query\nQuery: ",
    "sts_query": "Instruct: Retrieve semantically similar text.\nQuery: ",
    "summarization_query": "Instruct: Given a news summary, retrieve other semantically similar "
    "summaries\nQuery: ",
    "bitext_query": "Instruct: Retrieve parallel sentences.\nQuery: ",
}


def checkpoint(path: Path, config: dict[str, Any], **files: Any) -> Path:
    """A directory with the JSON files that detection looks at, and a file in the weights' place."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "model.safetensors").write_bytes(b"weights")
    for name, value in files.items():
        file = path / (name.replace("__", "/") + ".json")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(value))
    return path


def record(path: Path, commits: dict[str, str]) -> None:
    """What ``hf download --local-dir`` notes."""
    for name, commit in commits.items():
        write_download_metadata(path, name, commit, "etag")


@pytest.mark.parametrize("name", MODELS)
def test_an_exact_hub_id_is_certain(tmp_path: Path, name: str) -> None:
    assert detect(tmp_path / "nowhere", MODELS[name].hub_id) == (name,)
    assert detect(checkpoint(tmp_path, {}), MODELS[name].hub_id) == (name,)


@pytest.mark.parametrize(
    "hub_id", ["Linq-Embed-Mistral", "someone/Linq-Embed-Mistral", "linq-ai-research/linq", ""]
)
def test_another_hub_id_names_no_model(tmp_path: Path, hub_id: str) -> None:
    assert detect(tmp_path / "nowhere", hub_id) == ()
    assert detect(checkpoint(tmp_path, {}), hub_id) == MISTRAL


def test_linq_and_sfr_have_the_same_files(tmp_path: Path) -> None:
    path = checkpoint(
        tmp_path,
        {},
        **{"1_Pooling__config": LAST_TOKEN, "config_sentence_transformers": {"prompts": {}}},
    )
    assert detect(path) == MISTRAL


def test_the_name_of_a_directory_counts_for_nothing(tmp_path: Path) -> None:
    named = tmp_path / "models--Linq-AI-Research--Linq-Embed-Mistral" / "Linq-Embed-Mistral"
    assert detect(checkpoint(named, {})) == MISTRAL


@pytest.mark.parametrize("name", MISTRAL)
def test_a_parents_name_in_the_config_decides_nothing(tmp_path: Path, name: str) -> None:
    assert detect(checkpoint(tmp_path, {"_name_or_path": MODELS[name].hub_id})) == MISTRAL


def test_e5_is_known_by_its_prompts(tmp_path: Path) -> None:
    files = {
        "1_Pooling__config": LAST_TOKEN,
        "config_sentence_transformers": {"prompts": E5_PROMPTS},
    }
    assert detect(checkpoint(tmp_path, {}, **files)) == ("e5-mistral",)
    for other in (dict.fromkeys(E5_PROMPTS, "query: "), dict(list(E5_PROMPTS.items())[:3])):
        files["config_sentence_transformers"] = {"prompts": other}
        assert detect(checkpoint(tmp_path, {}, **files)) == MISTRAL


def test_a_vector_of_several_poolings_is_no_known_model(tmp_path: Path) -> None:
    both = {"1_Pooling__config": {"pooling_mode": ["lasttoken", "mean"]}}
    assert detect(checkpoint(tmp_path, {}, **both)) == ()


def test_gritlm_is_known_by_the_code_that_it_names(tmp_path: Path) -> None:
    config = {
        "_name_or_path": "/data/runs/m7",
        "architectures": ["MistralForCausalLM"],
        "auto_map": {"AutoModel": "modeling_gritlm7b.MistralModel"},
    }
    assert detect(checkpoint(tmp_path, config)) == ("gritlm",)


@pytest.mark.parametrize("name", ["nv-embed-v1", "nv-embed-v2"])
def test_nv_embed_is_known_by_the_repository_that_its_config_names(
    tmp_path: Path, name: str
) -> None:
    config = {"architectures": ["NVEmbedModel"], "_name_or_path": MODELS[name].hub_id}
    assert detect(checkpoint(tmp_path, config)) == (name,)


def test_the_versions_of_nv_embed_are_undecided_without_that_name(tmp_path: Path) -> None:
    config = {"architectures": ["NVEmbedModel"], "_name_or_path": "/models/mine"}
    assert detect(checkpoint(tmp_path, config)) == ("nv-embed-v1", "nv-embed-v2")


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaModel"]},
        {"architectures": None},
        {"architectures": [["MistralModel"]]},
        {"hidden_size": 128},
        {"num_hidden_layers": 28},
    ],
)
def test_a_model_of_another_kind_is_unknown(tmp_path: Path, config: dict[str, Any]) -> None:
    assert detect(checkpoint(tmp_path, config)) == ()


def test_a_mistral_that_pools_by_the_mean_is_unknown(tmp_path: Path) -> None:
    pooling = {"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}
    assert detect(checkpoint(tmp_path, {}, **{"1_Pooling__config": pooling})) == ()


def test_a_file_that_is_no_directory_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "linq.gguf").write_bytes(b"GGUF")
    assert detect(tmp_path / "linq.gguf") == ()


def test_a_download_is_known_by_its_commit(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {})
    record(path, {"config.json": LINQ_COMMIT, "model.safetensors": LINQ_COMMIT})
    assert detect(path) == ("linq",)


@pytest.mark.parametrize(
    "commits",
    [
        {"config.json": LINQ_COMMIT},
        {"model.safetensors": LINQ_COMMIT},
        {"config.json": LINQ_COMMIT, "model.safetensors": "0" * 40},
        {"config.json": "0" * 40, "model.safetensors": "0" * 40},
    ],
)
def test_a_download_of_which_a_part_is_not_known_is_undecided(
    tmp_path: Path, commits: dict[str, str]
) -> None:
    path = checkpoint(tmp_path, {})
    record(path, commits)
    assert detect(path) == MISTRAL


def test_a_download_that_was_changed_is_undecided(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {})
    record(path, {"config.json": LINQ_COMMIT, "model.safetensors": LINQ_COMMIT})
    weights = path / "model.safetensors"
    later = weights.stat().st_mtime + 60
    os.utime(weights, (later, later))
    assert detect(path) == MISTRAL


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {})
    record(path, {"config.json": LINQ_COMMIT, "model.safetensors": LINQ_COMMIT})
    (path / ".cache/huggingface/download/config.json.metadata").write_text("nonsense")
    assert detect(path) == MISTRAL


def test_a_damaged_config_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BundleError, match=r"config\.json is not JSON"):
        detect(tmp_path)
