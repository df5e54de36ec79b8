"""Reference vectors in a bundle, ``reference/``: of built-in texts, bound to the ``fp16`` there."""

from __future__ import annotations

import hashlib
import io
import logging
import math
from pathlib import Path

import numpy as np

from lowmem import cache, data
from lowmem.artifact import strict_json
from lowmem.artifact.manifest import Bundle
from lowmem.errors import BundleError
from lowmem.fidelity.npy_files import npy_bytes, npy_header
from lowmem.fidelity.reference import Reference, has_fp16

logger = logging.getLogger(__name__)

FORMAT = 1
_NAMES = ("probe", "quick")


def keep(bundle: Bundle, reference: Reference) -> None:
    """As ``write``; a read-only bundle is left as it is."""
    try:
        write(bundle, reference)
    except OSError as error:
        logger.warning(
            "reference vectors are not stored: %s cannot be written (%s)",
            bundle.path / "reference",
            error.strerror,
        )


def write(bundle: Bundle, reference: Reference) -> None:
    """Stores reference vectors of built-in texts in the bundle, in place of any others."""
    folder = bundle.path / "reference"
    folder.mkdir(exist_ok=True)
    with cache.replacing(folder / f"{reference.name}.npy") as file:
        file.write(npy_bytes(reference.vectors))
    about = {
        "format": FORMAT,
        "texts": {
            "name": reference.name,
            "sha256": reference.texts_sha256,
            "tokens": list(reference.tokens),
            "truncated": reference.truncated,
        },
        "artifact_sha256": bundle.artifact_sha256("fp16"),
        "sha256": reference.sha256,
    }
    with cache.replacing(folder / f"{reference.name}.json") as file:
        file.write(strict_json.dumps(about).encode())
    # Those of another fp16 would be found first, and refused ever after.
    for other in (name for name in _NAMES if name != reference.name):
        for suffix in (".json", ".npy"):
            (folder / f"{other}{suffix}").unlink(missing_ok=True)


def read(bundle: Bundle) -> Reference | None:
    """The reference vectors in the bundle, ``probe`` before ``quick``, or None.

    Raises:
        BundleError: They are damaged, of other texts, or of another ``fp16``.
    """
    for name in _NAMES:
        path = bundle.path / "reference" / f"{name}.json"
        if path.exists():
            return _read(bundle, name, path)
    return None


def _read(bundle: Bundle, name: str, path: Path) -> Reference:
    about = strict_json.read_object(path)
    rows = data.load(name)
    if about.get("format") != FORMAT or set(about) != {
        "format",
        "texts",
        "artifact_sha256",
        "sha256",
    }:
        raise BundleError(f"format must be {FORMAT} with the keys of this version ({path})")
    texts = about["texts"]
    if (
        not isinstance(texts, dict)
        or not isinstance(texts.get("tokens"), list)
        or not all(type(count) is int for count in [*texts["tokens"], texts.get("truncated")])
    ):
        raise BundleError(f"texts must be an object with sha256, tokens and truncated ({path})")
    if texts.get("sha256") != data.sha256(rows):
        raise BundleError(
            f"reference vectors are of another version's {name} texts ({path}): export again"
        )
    if has_fp16(bundle) and about["artifact_sha256"] != bundle.artifact_sha256("fp16"):
        raise BundleError(f"reference vectors are of another fp16 ({path}): export again")
    file = path.with_suffix(".npy")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise BundleError(f"{file} is damaged: its sha256 is not the one beside it")
    stream = io.BytesIO(content)
    try:
        shape, dtype = npy_header(stream)
    except ValueError as error:
        raise BundleError(f"{file} is no .npy file: {error}") from error
    if (
        dtype != np.float32
        or len(shape) != 2
        or not shape[0] == len(texts["tokens"]) == len(rows)
        or len(content) != stream.tell() + math.prod(shape) * dtype.itemsize
    ):
        raise BundleError(f"{file} must hold {len(rows)} float32 vectors, got {dtype} {shape}")
    stream.seek(0)
    vectors = np.load(stream, allow_pickle=False)
    counts = tuple(texts["tokens"])
    return Reference(name, rows, counts, texts["truncated"], vectors, about["sha256"])
