"""Which of the known models a checkpoint is, by what the hub or its own files say.

A name is found only where nothing else would say the same: a hub id, a commit that the hub's client
noted beside a download, NV-Embed's config (which names its own repository), GritLM's (which names
its own code), e5's prompts. Linq and SFR have the files of their base model: ``_name_or_path``
names e5 in all of them, so it names a parent and never the model. The name of a directory and the
model card count for nothing; copies and tuned models keep both.
"""

from __future__ import annotations

import json
from pathlib import Path

from export.sources.stated import object_if_there, pooling_modes
from lowmem.artifact import strict_json
from lowmem.artifact.models import known_models
from lowmem.artifact.sentence_transformers_files import POOLING, PROMPTS

_MISTRAL = ("e5-mistral", "linq", "sfr", "sfr-2")
_NV_EMBED = ("nv-embed-v1", "nv-embed-v2")
_E5_PROMPTS = ("web_search_query", "sts_query", "summarization_query", "bitext_query")
_RECORDS = Path(".cache") / "huggingface" / "download"  # of `hf download --local-dir`


def detect(path: Path, hub_id: str | None = None) -> tuple[str, ...]:
    """Names of the models that a checkpoint may be.

    Args:
        path: A model directory, or another kind of source, of which nothing is known.
        hub_id: ``owner/name`` where the source came from the hub by that name.

    Returns:
        One name where it is certain, several where the files fit several models alike, none where
        they fit no model of the table.

    Raises:
        BundleError: ``config.json`` is missing or damaged.
    """
    models = known_models()
    exact = [name for name, model in models.items() if hub_id == model.hub_id]
    if exact or not path.is_dir():
        return tuple(exact)
    commit = _downloaded_commit(path)
    exact = [name for name, model in models.items() if commit in model.revisions]
    return tuple(exact) or _by_files(path)


def _by_files(path: Path) -> tuple[str, ...]:
    config = strict_json.read_object(path / "config.json")
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else None
    if kind == "NVEmbedModel":
        named = [
            name for name in _NV_EMBED if config.get("_name_or_path") == known_models()[name].hub_id
        ]
        return tuple(named) or _NV_EMBED
    is_seven_billion = (config.get("hidden_size"), config.get("num_hidden_layers")) == (4096, 32)
    if kind not in ("MistralModel", "MistralForCausalLM") or not is_seven_billion:
        return ()
    if "modeling_gritlm7b." in json.dumps(config.get("auto_map")):
        return ("gritlm",)
    pooling = object_if_there(path / POOLING)
    if pooling and pooling_modes(pooling) != ("lasttoken",):
        return ()
    contract = known_models()["e5-mistral"].contract
    e5_prompts = {name: contract.prompt("query", name) for name in _E5_PROMPTS}
    return (
        ("e5-mistral",)
        if object_if_there(path / PROMPTS).get("prompts") == e5_prompts
        else _MISTRAL
    )


def _downloaded_commit(path: Path) -> str | None:
    """The commit that config and weights were downloaded from, if they still are that download.

    The hub's client keeps ``<file>.metadata`` for each file: commit, etag, time, a line each.
    """
    weights = sorted(path.glob("*.safetensors"))
    commits = {_recorded_commit(path, file.name) for file in weights}
    commits.add(_recorded_commit(path, "config.json"))
    return commits.pop() if weights and len(commits) == 1 else None


def _recorded_commit(path: Path, name: str) -> str | None:
    try:
        commit, _, time = (path / _RECORDS / f"{name}.metadata").read_text().split()
        # As the client itself: a file may seem up to a second younger than its record.
        is_unchanged = (path / name).stat().st_mtime - 1 <= float(time)
    except (OSError, ValueError):
        return None
    return commit if is_unchanged else None
