"""Where reports and vectors are put: the bundle's ``reports/``, and a directory of the user's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lowmem import cache
from lowmem.artifact import strict_json
from lowmem.artifact.manifest import Bundle
from lowmem.errors import InputError
from lowmem.fidelity.reference import Reference
from lowmem.fidelity.report import Compared

logger = logging.getLogger(__name__)


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


def dump(directory: Path, compared: Sequence[Compared], reference: Reference) -> None:
    """Writes the texts, the reference's vectors and each plan's, as ``report --dump`` does.

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
        with cache.replacing(directory / "texts.jsonl") as file:
            file.write(b"\n".join(lines) + b"\n")
        arrays = {"reference": reference.vectors}
        arrays |= {str(one.report["plan"]): one.vectors for one in compared}
        for name, vectors in arrays.items():
            with cache.replacing(directory / f"{name}.npy") as file:
                np.save(file, vectors)
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror}") from error
