"""What export reads from: a checkpoint as a stream of plain tensors with a tokenizer.

A source gives one tensor at a time under Hugging Face's name, whatever its file calls it, so that
no later step knows where the weights came from and none needs more than a layer of them at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from export import licences
from export.sources.gguf import GgufFile
from export.sources.hub import fetch_description, open_hub_model
from export.sources.huggingface import HuggingFaceDirectory
from export.sources.stated import Stated
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.tensors import RawTensor
from lowmem.errors import InputError
from lowmem.hub import HubModel, parse_id
from lowmem.progress import Progress

__all__ = ["GgufFile", "HuggingFaceDirectory", "Source", "fetch_description", "open_source"]


class Source(Protocol):
    """A checkpoint that has been opened and found to be whole."""

    @property
    def name(self) -> str:
        """What the manifest calls it: the base name of its directory or file, or its hub id."""

    @property
    def revision(self) -> str | None:
        """Its commit on the hub, or None where it does not come from there."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def dtype(self) -> str:
        """Dtype of everything that ``tensor`` returns: F16, BF16 or F32."""

    @property
    def licence(self) -> str | None:
        """The licence that the source names, or None."""

    @property
    def stated(self) -> Stated:
        """How its own files would have it used."""

    @property
    def shards(self) -> tuple[Path, ...] | None:
        """safetensors files that a variant can hold as they are.

        That is, every tensor in them is a 16-bit float of the same dtype. None where the weights
        have to be written anew.
        """

    def tensor(self, name: str) -> RawTensor:
        """One tensor, of dtype ``dtype``.

        Args:
            name: Hugging Face's name without ``model.``, such as ``embed_tokens.weight`` or
                ``layers.0.self_attn.q_proj.weight``; NV-Embed's own tensors begin with
                ``latent_attention_model.``.

        Raises:
            BundleError: The bytes cannot be read, or do not fit ``dtype``.
        """

    def tokenizer_files(self) -> dict[str, bytes]:
        """File name to content: ``tokenizer.json``, and what else describes the tokenizer."""

    def files(self) -> list[Path]:
        """Every file that the export depends on, in a fixed order."""


def open_source(
    source: Path | str,
    *,
    accepts_licence: licences.Accepts = licences.accepts_none,
    progress: Progress = lambda what, done, total: None,
) -> Source:
    """Opens a checkpoint; from the hub it is downloaded first.

    Args:
        source: A Hugging Face model directory, a ``.gguf`` file, or a hub id, ``ORG/NAME`` or
            ``ORG/NAME@REVISION``. What is there on the disk is never looked for on the hub.
        accepts_licence: Asked about each licence that may not permit every use, before weights
            are downloaded.
        progress: Told what has been downloaded.

    Raises:
        InputError: It is none of these, is a kind of checkpoint that is not exported, has a
            licence that is not accepted, or is not on the hub for this user.
        BundleError: A file is missing or damaged, or holds a model that is not supported.
        CapacityError: The disk has no room for a download.
        BackendError: It is a ``.gguf`` file, and the package gguf is not installed; or the hub
            cannot be reached.
    """
    model = hub_model(source)
    if model is not None:
        return open_hub_model(model, accepts_licence, progress)
    path = Path(source)
    opened: Source = HuggingFaceDirectory(path) if path.is_dir() else GgufFile(path)
    licences.check(opened.licence, accepts_licence, opened.name)
    return opened


def hub_model(source: Path | str) -> HubModel | None:
    """The model on the hub that a source names, or None where it is a checkpoint on the disk.

    Raises:
        InputError: It is neither.
    """
    path = Path(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return None
    if path.exists():
        raise InputError(
            f"a source must be a model directory, a .gguf file or a hub id, got the file {path}"
        )
    model = parse_id(str(source))
    if model is None:
        raise InputError(
            "a source must be a model directory, a .gguf file or a hub id ORG/NAME; there is no "
            f"{path}"
        )
    return model
