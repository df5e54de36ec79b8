"""The manifest, ``lowmem.json``: what a bundle holds, hash by hash.

It names every file that export wrote and nothing about the machine that wrote it, so that the
same inputs give the same bytes. Sizes are checked whenever a variant is opened, hashes the first
time a machine opens it and whenever they are asked for.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lowmem import cache
from lowmem.artifact import strict_json
from lowmem.artifact.contract import Contract, parse_contract
from lowmem.errors import BundleError, InputError

MANIFEST = "lowmem.json"
FORMAT = 1
_KEYS = {"format", "source", "licence", "contract", "variants"}
_VARIANT_KEYS = {"recipe", "bits_per_weight", "modules", "graphs", "files"}


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Variant:
    """One stored form of the model.

    Attributes:
        name: Its directory's name.
        recipe: How it was made; equal recipes from equal sources give equal bytes.
        bits_per_weight: ``linears``, codes and scales counted, and ``model``, all that is stored.
        modules: ``layers.0.self_attn`` and so on to ``bits`` of its linears per weight and, where
            texts were at hand, ``error``: how far the residual stream behind it is from the
            full-precision one, relative to each token's length (root of the mean square), else
            None.
        graphs: ONNX file to the compute it stands for.
        files: Path within the variant to size and hash.
    """

    name: str
    recipe: Mapping[str, Any]
    bits_per_weight: Mapping[str, float]
    modules: Mapping[str, Mapping[str, float | None]]
    graphs: Mapping[str, str]
    files: Mapping[str, FileEntry]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(entry.size for entry in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """Its object in the manifest."""
        return {
            "recipe": dict(self.recipe),
            "bits_per_weight": dict(self.bits_per_weight),
            "modules": {name: dict(entry) for name, entry in self.modules.items()},
            "graphs": dict(self.graphs),
            "files": {path: vars(entry) for path, entry in sorted(self.files.items())},
        }


@dataclass(frozen=True)
class Manifest:
    """Everything that ``lowmem.json`` says.

    Attributes:
        source: Name, revision and sha256 of what was exported, and the known model it is.
        licence: The source's licence, or None where it names none.
        contract: The input contract.
        variants: By name.
    """

    source: Mapping[str, Any]
    licence: str | None
    contract: Contract
    variants: Mapping[str, Variant]

    def to_json(self) -> dict[str, Any]:
        """The object that is written."""
        return {
            "format": FORMAT,
            "source": dict(self.source),
            "licence": self.licence,
            "contract": self.contract.to_json(),
            "variants": {name: self.variants[name].to_json() for name in sorted(self.variants)},
        }


class Bundle:
    """An opened bundle.

    Attributes:
        path: The directory.
        manifest: What it says of itself.
    """

    def __init__(self, path: Path) -> None:
        """Reads the manifest; files are checked when their variant is opened.

        Raises:
            BundleError: There is no manifest, or it breaks a rule.
        """
        self.path = Path(path)
        file = self.path / MANIFEST
        if not os.path.lexists(self.path):
            raise BundleError(f"{path} is not there")
        if os.access(self.path, os.X_OK) and self.path.is_dir() and not file.exists():
            raise BundleError(f"{path} is no bundle: it has no {MANIFEST}; lowmem export makes one")
        self.manifest = parse_manifest(strict_json.read_object(file), str(file))

    @property
    def contract(self) -> Contract:
        """The input contract."""
        return self.manifest.contract

    def variant(self, name: str) -> Variant:
        """One variant.

        Raises:
            InputError: The bundle has no such variant.
        """
        found = self.manifest.variants.get(name)
        if found is None:
            there = ", ".join(sorted(self.manifest.variants))
            raise InputError(f"the bundle has no variant {name!r}; it has {there} ({self.path})")
        return found

    def artifact_sha256(self, variant: str) -> str:
        """Identity of one variant with its contract: what a fidelity report is bound to.

        Raises:
            InputError: The bundle has no such variant.
        """
        files = sorted(
            (f"{variant}/{path}", entry.size, entry.sha256)
            for path, entry in self.variant(variant).files.items()
        )
        content = {"files": files, "contract": self.contract.to_json()}
        return hashlib.sha256(strict_json.canonical(content)).hexdigest()

    def directory(self, variant: str) -> Path:
        """Where a variant lies."""
        return self.path / self.variant(variant).name

    def check(self, variant: str) -> None:
        """Checks a variant's sizes, and the hashes of files that this machine has not yet seen.

        Raises:
            BundleError: A file is missing, leaves the bundle, or is not the one that was exported;
                all such files are named.
        """
        problems = list(self._problems(variant, trust_cache=True))
        if problems:
            raise BundleError(f"{variant} is not what was exported: " + "; ".join(problems))

    def verify(self) -> tuple[list[str], list[str]]:
        """Hashes every file anew.

        Returns:
            What is wrong with the files that the manifest names, and the paths of strays: files in
            the bundle that it does not name.
        """
        problems = [
            problem
            for name in sorted(self.manifest.variants)
            for problem in self._problems(name, trust_cache=False)
        ]
        return problems, sorted(self._strays())

    def _problems(self, variant: str, *, trust_cache: bool) -> Iterator[str]:
        # A reader of the directory would take these for the variant's weights.
        for weights in sorted((self.path / variant).glob("*.safetensors*")):
            if weights.name not in self.variant(variant).files:
                yield f"{variant}/{weights.name} is not among the files that were exported"
        directory, root = self.path / variant, self.path.resolve()
        for name, entry in sorted(self.variant(variant).files.items()):
            path, shown = directory / name, f"{variant}/{name}"
            try:
                if not path.resolve().is_relative_to(root):
                    yield f"{shown} leads out of the bundle"
                    continue
                status = path.stat()
                if not stat.S_ISREG(status.st_mode):
                    yield f"{shown} must be a regular file"
                    continue
                if status.st_size != entry.size:
                    yield f"{shown} must have {entry.size} bytes, got {status.st_size}"
                    continue
                known = cache.verified_sha256(path) if trust_cache else None
                digest = known or file_sha256(path)
            except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
                yield f"{shown} cannot be read ({getattr(error, 'strerror', error)})"
                continue
            if digest != entry.sha256:
                yield f"{shown} is damaged: its sha256 is not that of the manifest"
            elif known is None:
                cache.remember_sha256(path, digest, before=status)

    def _strays(self) -> Iterator[str]:
        expected = {
            f"{name}/{file}"
            for name, variant in self.manifest.variants.items()
            for file in variant.files
        }
        for folder, _, files in os.walk(self.path):
            for file in files:
                path = (Path(folder) / file).relative_to(self.path).as_posix()
                if path == MANIFEST or path.split("/")[0] in ("reference", "reports"):
                    continue
                if path not in expected:
                    yield path


def parse_manifest(value: dict[str, Any], place: str) -> Manifest:
    """Reads a manifest from its JSON object.

    Raises:
        BundleError: A key is unknown or missing, the format is of another version, or a path is
            not confined to its variant.
    """
    if value.get("format") != FORMAT:
        raise BundleError(f"format must be {FORMAT}, got {value.get('format')!r} ({place})")
    _check_keys(value, _KEYS, place)
    variants = value["variants"]
    if not isinstance(variants, dict):
        raise BundleError(f"variants must be an object ({place})")
    if not isinstance(value["source"], dict):
        raise BundleError(f"source must be an object ({place})")
    for key in ("name", "sha256"):
        if not isinstance(value["source"].get(key), str):
            raise BundleError(f"source.{key} must be a string ({place})")
    for key in ("model", "revision"):
        if not isinstance(value["source"].get(key), str | None):
            raise BundleError(f"source.{key} must be a string or null ({place})")
    if value["licence"] is not None and not isinstance(value["licence"], str):
        raise BundleError(f"licence must be a string or null ({place})")
    return Manifest(
        value["source"],
        value["licence"],
        parse_contract(value["contract"], place),
        {name: _parse_variant(name, entry, place) for name, entry in variants.items()},
    )


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse_variant(name: str, value: Any, place: str) -> Variant:
    if not is_confined(name) or "/" in name or name in ("reference", "reports"):
        raise BundleError(
            f"a variant's name must be a plain directory name, got {name!r} ({place})"
        )
    where = f"{place}, variant {name}"
    if not isinstance(value, dict):
        raise BundleError(f"a variant must be an object ({where})")
    _check_keys(value, _VARIANT_KEYS, where)
    for key in _VARIANT_KEYS:
        if not isinstance(value[key], dict):
            raise BundleError(f"{key} must be an object ({where})")
    files = {}
    for path, entry in value["files"].items():
        if not is_confined(path):
            raise BundleError(f"a path must stay inside its variant, got {path!r} ({where})")
        if (
            not isinstance(entry, dict)
            or set(entry) != {"size", "sha256"}
            or type(entry["size"]) is not int
            or not isinstance(entry["sha256"], str)
        ):
            raise BundleError(f"a file needs size and sha256 alone ({where}, file {path})")
        files[path] = FileEntry(**entry)
    for graph, compute in value["graphs"].items():
        if graph not in files:
            raise BundleError(f"graphs may name the variant's own files, got {graph!r} ({where})")
        if not isinstance(compute, str):
            raise BundleError(f"a graph's compute must be a string, got {compute!r} ({where})")
    bits = value["bits_per_weight"]
    if set(bits) != {"linears", "model"} or not all(map(strict_json.is_number, bits.values())):
        raise BundleError(f"bits_per_weight must be numbers for linears and model ({where})")
    for module, about in value["modules"].items():
        if not isinstance(about, dict) or set(about) != {"bits", "error"}:
            raise BundleError(f"a module needs bits and error alone ({where}, module {module})")
        if not strict_json.is_number(about["bits"]) or not (
            about["error"] is None or strict_json.is_number(about["error"])
        ):
            raise BundleError(f"bits and error must be numbers ({where}, module {module})")
    return Variant(
        name,
        value["recipe"],
        value["bits_per_weight"],
        value["modules"],
        value["graphs"],
        files,
    )


def _check_keys(value: dict[str, Any], keys: set[str], place: str) -> None:
    unknown, missing = sorted(set(value) - keys), sorted(keys - set(value))
    if unknown or missing:
        problems = [f"unknown key {key!r}" for key in unknown]
        problems += [f"missing key {key!r}" for key in missing]
        raise BundleError(f"{'; '.join(problems)} ({place})")


def is_confined(path: str) -> bool:
    """Whether a path from a file can only lead to a place below its directory."""
    pure = PurePosixPath(path)
    return (
        path == str(pure)
        and not pure.is_absolute()
        and path not in ("", ".")
        and not {"..", "\\", "\0"} & {*pure.parts, *path}
    )
