"""What export reads from: a checkpoint as a stream of plain tensors with a tokenizer.

A source gives one tensor at a time under Hugging Face's name, whatever its file calls it, so that
no later step knows where the weights came from and none needs more than a layer of them at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from export.sources.gguf import GgufFile
from export.sources.huggingface import HuggingFaceDirectory
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.tensors import RawTensor
from lowmem.errors import InputError

__all__ = ["GgufFile", "HuggingFaceDirectory", "Source", "open_source"]


class Source(Protocol):
    """A checkpoint that has been opened and found to be whole."""

    @property
    def name(self) -> str:
        """What the manifest calls it: the base name of its directory or file."""

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


def open_source(path: Path) -> Source:
    """Opens a checkpoint.

    Args:
        path: A Hugging Face model directory, or a ``.gguf`` file.

    Raises:
        InputError: The path is neither of these, or is a kind of checkpoint that is not exported.
        BundleError: A file is missing or damaged, or holds a model that is not supported.
        BackendError: The path is a ``.gguf`` file, and the package gguf is not installed.
    """
    if path.is_dir():
        return HuggingFaceDirectory(path)
    if path.is_file() and path.suffix == ".gguf":
        return GgufFile(path)
    if path.exists():
        raise InputError(f"a source must be a model directory or a .gguf file, got {path}")
    if len(path.parts) == 2 and not path.is_absolute() and path.suffix != ".gguf":
        raise InputError(
            f"there is no directory {path}, and hub ids are not supported yet: download it with "
            f"`hf download {path} --local-dir DIR` and give the directory"
        )
    raise InputError(f"a source must be a model directory or a .gguf file; there is no {path}")
