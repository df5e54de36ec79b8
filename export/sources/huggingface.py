"""A Hugging Face model directory as a source.

``Checkpoint`` has already checked names, shapes and dtypes when this opens; what is added here is
what an export needs besides: a single dtype, the licence, the tokenizer and the list of files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from export.sources.stated import Stated, refuse_other_vectors
from lowmem.artifact import strict_json
from lowmem.artifact.config import NORMS, ModelConfig
from lowmem.artifact.tensors import INDEX_FILE, SINGLE_FILE, RawTensor
from lowmem.artifact.weights import (
    EMBEDDING,
    FINAL_NORM,
    Checkpoint,
    latent_shapes,
    module_shapes,
)
from lowmem.disk import shown_name
from lowmem.errors import InputError

TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json")
CARD = "README.md"
_MOST_CARD_BYTES = 16 * 2**20


class HuggingFaceDirectory:
    """A directory with ``config.json``, safetensors and ``tokenizer.json``.

    Where the tensors are of several dtypes, all are given as F32, which holds each of them
    exactly; so a norm that was kept in F32 is rounded once, by whoever writes it.
    """

    def __init__(
        self, directory: Path, *, name: str | None = None, revision: str | None = None
    ) -> None:
        """Opens and checks the directory; no weight is read.

        Args:
            directory: The directory.
            name: What the manifest calls it, if not by the directory's name.
            revision: Its commit on the hub, where it comes from there.

        Raises:
            InputError: The weights are quantized already, are not in safetensors, or the tokenizer
                has no ``tokenizer.json``.
            BundleError: A file is missing or damaged, or holds a model that is not supported.
        """
        self._directory = directory
        refuse_quantized(directory)
        refuse_other_vectors(directory)
        _refuse_pickled(directory)
        self._checkpoint = Checkpoint(directory)
        if not (directory / TOKENIZER).is_file():
            raise InputError(
                f"a source must have a {TOKENIZER}, and {directory} has none: make it with "
                "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        self.name = name or shown_name(directory.resolve())
        self.revision = revision
        self.licence = card_licence(directory / CARD)
        self.stated = Stated.of_directory(directory)
        dtypes = {self._checkpoint.tensors[name].dtype for name in _names(self.config)}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else "F32"

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self._checkpoint.config

    @property
    def shards(self) -> tuple[Path, ...] | None:
        """The safetensors files, if all their tensors are F16 or all are BF16."""
        tensors = self._checkpoint.tensors.values()
        if self.dtype == "F32" or any(tensor.dtype != self.dtype for tensor in tensors):
            return None
        return tuple(sorted({tensor.path for tensor in tensors}))

    def tensor(self, name: str) -> RawTensor:
        """One tensor, read into memory: a map would kill the process if its file became shorter.

        Raises:
            BundleError: The file has vanished or has become shorter.
        """
        raw = self._checkpoint.tensors[name].read()
        return raw if raw.dtype == self.dtype else RawTensor("F32", raw.float32())

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files that describe the tokenizer, those of them that are there.

        Raises:
            BundleError: A file cannot be read.
        """
        return {
            path.name: strict_json.read_bytes(path) for path in self._existing(*TOKENIZER_FILES)
        }

    def files(self) -> list[Path]:
        """Configuration, weights, tokenizer and model card, sorted by path."""
        weights = {tensor.path for tensor in self._checkpoint.tensors.values()}
        index = [] if (self._directory / SINGLE_FILE).exists() else [INDEX_FILE]
        return sorted({*weights, *self._existing("config.json", *index, *TOKENIZER_FILES, CARD)})

    def _existing(self, *names: str) -> list[Path]:
        return [self._directory / name for name in names if (self._directory / name).is_file()]


def _names(config: ModelConfig) -> list[str]:
    """Every tensor that computes something."""
    names = [EMBEDDING, FINAL_NORM, *(f"{module}.weight" for module in module_shapes(config))]
    for index in range(config.num_hidden_layers):
        names += [f"layers.{index}.{norm}.weight" for norm in NORMS]
    return [*names, *latent_shapes(config)]


def refuse_quantized(directory: Path) -> None:
    """Checks that a directory's ``config.json``, all that is read, names no quantization.

    Raises:
        InputError: It does.
        BundleError: It cannot be read.
    """
    stanza = strict_json.read_object(directory / "config.json").get("quantization_config")
    if stanza is not None:
        method = stanza.get("quant_method") if isinstance(stanza, dict) else None
        raise InputError(
            f"a source must have 16 or 32-bit weights, and {directory} is quantized already "
            f"(quant_method {method!r}): export from the model that it was made of"
        )


def _refuse_pickled(directory: Path) -> None:
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    if pickled and not any(directory.glob("*.safetensors")):
        raise InputError(
            f"weights must be in safetensors, got {pickled[0]} ({directory}): pickled files run "
            "code when they are read; convert them where they came from"
        )


def card_licence(card: Path) -> str | None:
    """``license`` of the model card's front matter; its ``license_name`` where that is "other".

    Returns:
        The licence, or None where there is no card, or it names none.

    Raises:
        BundleError: The card cannot be read, or is too large: a licence that stands there must not
            be passed over.
    """
    if not os.path.lexists(card):
        return None
    text = strict_json.read_bytes(card, max_bytes=_MOST_CARD_BYTES).decode("utf-8-sig", "replace")
    front = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if front is None:
        return None
    licence = _field(front[1], "license")
    return _field(front[1], "license_name") or licence if licence == "other" else licence


def _field(front_matter: str, key: str) -> str | None:
    """A top-level scalar of YAML, or the items of its list; enough for what model cards hold."""
    found = re.search(rf"^{key}:(.*(?:\r?\n[ \t]*-[ \t].*)*)$", front_matter, re.MULTILINE)
    if found is None:
        return None
    items = re.split(r"\r?\n[ \t]*-[ \t]", found[1].rstrip())
    scalars = [re.sub(r"\s#.*$", "", item).strip().strip("\"'") for item in items]
    return ", ".join(scalar for scalar in scalars if scalar) or None
