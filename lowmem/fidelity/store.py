"""Where reports and vectors are put: the bundle's ``reports/``, and a directory of the user's."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lowmem import cache
from lowmem.artifact import strict_json
from lowmem.artifact.manifest import Bundle
from lowmem.errors import InputError, reason_of
from lowmem.fidelity.reference import Reference
from lowmem.fidelity.report import Compared
from lowmem.outputs import check_apart, check_output

logger = logging.getLogger(__name__)

_TEXTS, _REFERENCE = "texts.jsonl", "reference.npy"
_LONGEST_LINE_BYTES = 2**24


def store(bundle: Bundle, compared: Sequence[Compared], pages: Mapping[str, str]) -> None:
    """Puts reports into the bundle; a read-only bundle is left as it is.

    Args:
        bundle: The bundle.
        compared: Reports on its own reference texts: no others may lie there.
        pages: Plan to its HTML page, as far as pages were made.
    """
    folder = bundle.path / "reports"
    try:
        folder.mkdir(exist_ok=True)
        for one in compared:
            plan = one.report["plan"]
            files = {f"{plan}.json": strict_json.dumps(one.report)}
            if plan in pages:
                files[f"{plan}.html"] = pages[plan]
            for name, text in files.items():
                with cache.replacing(folder / name) as file:
                    file.write(text.encode())
    except OSError as error:
        logger.warning("reports are not stored: %s cannot be written (%s)", folder, error.strerror)


def check_dump(directory: Path, given: Iterable[Path | None]) -> None:
    """Makes a directory for a dump, or refuses one where it would replace anything but a dump.

    Args:
        directory: Where :func:`dump` shall write; it need not exist.
        given: Input files and directories of the same command.

    Raises:
        InputError: It is no directory and cannot be made, or holds files of such names that are no
            dump's.
    """
    if os.path.lexists(directory) and not os.path.isdir(directory):
        raise InputError(f"--dump takes a directory, and {directory} is none")
    given = list(given)
    check_apart(directory, given)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory} cannot be made: {error.strerror}") from error
    texts = directory / _TEXTS
    for file in (texts, directory / _REFERENCE):
        check_output(file, given)
    if not _is_dump(texts) and (os.path.lexists(texts) or any(directory.glob("*.npy"))):
        raise InputError(
            f"{directory} has a {_TEXTS} or .npy files that no dump wrote: "
            "give --dump another directory"
        )


def _is_dump(texts: Path) -> bool:
    try:
        with texts.open("rb") as file:
            row = json.loads(file.readline(_LONGEST_LINE_BYTES))
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and set(row) == {"id", "text", "input_type", "task"}


def dump(directory: Path, compared: Sequence[Compared], reference: Reference) -> None:
    """Writes the texts, the reference's vectors and each plan's, as ``report --dump`` does.

    Vectors of an earlier dump go at last: they may be of other texts.

    Raises:
        InputError: The directory cannot be written.
    """
    lines = [
        strict_json.canonical(
            {"id": row.id, "text": row.text, "input_type": row.input_type, "task": row.task}
        )
        for row in reference.rows
    ]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with cache.replacing(directory / _TEXTS) as file:
            file.write(b"\n".join(lines) + b"\n")
        arrays = {_REFERENCE: reference.vectors}
        arrays |= {f"{one.report['plan']}.npy": one.vectors for one in compared}
        for name, vectors in arrays.items():
            with cache.replacing(directory / name) as file:
                np.save(file, vectors)
        for old in directory.glob("*.npy"):
            if old.name not in arrays:
                old.unlink()
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {reason_of(error)}") from error
