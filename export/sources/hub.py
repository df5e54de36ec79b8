"""A model on the Hugging Face hub as a source.

The revision is pinned to its commit first. Then come the model card and the configuration, and
whatever they decide is decided before the weights are downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from export import licences
from export.sources.huggingface import (
    CARD,
    TOKENIZER,
    TOKENIZER_FILES,
    HuggingFaceDirectory,
    card_licence,
    refuse_quantized,
)
from export.sources.stated import refuse_adapter, refuse_other_vectors
from lowmem import hub
from lowmem.artifact import strict_json
from lowmem.artifact.config_file import parse_config
from lowmem.artifact.sentence_transformers_files import MODULES, POOLING, PROMPTS, SETTINGS
from lowmem.artifact.tensors import INDEX_FILE, SINGLE_FILE, read_weight_map
from lowmem.errors import BundleError, InputError
from lowmem.hub import HubModel
from lowmem.progress import Progress

_CONFIG = "config.json"
# How sentence-transformers pools and prompts; the weights of its modules are not among them.
_MODULES = re.compile(
    r"modules\.json|sentence_bert_config\.json|config_sentence_transformers\.json"
    r"|[0-9]+_[A-Za-z]+/config\.json"
)


def open_hub_model(
    model: HubModel,
    accepts_licence: licences.Accepts,
    progress: Progress,
) -> HuggingFaceDirectory:
    """Downloads what an export needs of a model, and opens it.

    Args:
        model: The model.
        accepts_licence: Asked about each licence that may not permit every use.
        progress: Told what has been downloaded.

    Raises:
        InputError: There is no such model or revision for this user, its licence is not accepted,
            it is quantized already, or it lacks safetensors or ``tokenizer.json``.
        BundleError: A file is damaged, or holds a model that is not supported.
        CapacityError: The disk has not enough room.
        BackendError: The hub cannot be reached.
    """
    listing = hub.listing(model)
    _check_files(model, listing.sizes)
    pinned = HubModel(model.name, listing.commit)
    for file in (CARD, MODULES, SETTINGS, _CONFIG):
        if file in listing.sizes:
            path = hub.fetch(pinned, file)
    directory = path.parent
    licences.check(card_licence(directory / CARD), accepts_licence, model.name)
    refuse_quantized(directory)
    refuse_other_vectors(directory)
    parse_config(strict_json.read_object(path), str(path))
    small = [file for file in listing.sizes if file in TOKENIZER_FILES or _MODULES.fullmatch(file)]
    if SINGLE_FILE in listing.sizes:
        weights = [SINGLE_FILE]
    else:
        small.append(INDEX_FILE)
        weights = _shards(hub.fetch(pinned, INDEX_FILE), listing.sizes)
    hub.check_room(pinned, listing, (*small, *weights))
    files = sorted(small) + weights
    for done, file in enumerate(files):
        progress(f"downloading {model.name}", done, len(files))
        hub.fetch(pinned, file)
    return HuggingFaceDirectory(directory, name=model.name, revision=listing.commit)


def fetch_description(model: HubModel) -> Path:
    """Downloads what tells known models apart: configuration, and pooling and prompts if named.

    Returns:
        The directory in the hub's cache.

    Raises:
        InputError: There is no such model or revision for this user, or it is no source.
        CapacityError: The disk is full.
        BackendError: The hub cannot be reached.
    """
    listing = hub.listing(model)
    _check_files(model, listing.sizes)
    pinned = HubModel(model.name, listing.commit)
    for file in {POOLING, PROMPTS} & listing.sizes.keys():
        hub.fetch(pinned, file)
    return hub.fetch(pinned, _CONFIG).parent


def _check_files(model: HubModel, files: Collection[str]) -> None:
    """Refuses, by the names of its files alone, what is no source."""
    refuse_adapter(files, f"{model} on the hub")
    if _CONFIG not in files:
        raise InputError(f"a source must have a {_CONFIG}, and {model} on the hub has none")
    if SINGLE_FILE not in files and INDEX_FILE not in files:
        raise InputError(
            f"weights must be in safetensors, and {model} on the hub has neither {SINGLE_FILE} "
            f"nor {INDEX_FILE}: convert them where they came from, and give the directory"
        )
    if TOKENIZER not in files:
        raise InputError(
            f"a source must have a {TOKENIZER}, and {model} on the hub has none: download the "
            "model, make it with transformers' AutoTokenizer.from_pretrained(DIR)"
            ".save_pretrained(DIR), and give the directory"
        )


def _shards(index: Path, files: Collection[str]) -> list[str]:
    """The shards that an index names, if the hub has them beside it."""
    shards = sorted({*read_weight_map(index).values()})
    for shard in shards:
        if shard not in files:
            raise BundleError(
                f"a shard must be a .safetensors file beside its index, got {shard!r} ({index})"
            )
    return shards
