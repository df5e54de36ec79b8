"""What the suffix of a file asks for: a format that is known, and for .parquet a package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.errors import InputError, import_failure


def known_suffix(path: Path, role: str, known: Mapping[str, object]) -> str:
    """Returns a file's suffix, in small letters.

    Args:
        path: The file.
        role: What it is, as in "an input file".
        known: By the suffixes that it may have, in the order in which an error names them.

    Raises:
        InputError: It has another one, or none.
    """
    suffix = path.suffix.lower()
    if suffix not in known:
        *most, last = known
        raise InputError(f"{role} must end in {', '.join(most)} or {last}, got {path}")
    return suffix


def load_pyarrow(doing: str) -> Any:
    """Returns pyarrow with its parquet module, imported at first use only.

    Args:
        doing: What it is wanted for: "reading" or "writing".

    Raises:
        BackendError: It is not installed, or cannot be imported.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        purpose = f"{doing} a .parquet file"
        raise import_failure(error, "pyarrow", "pyarrow", "files", purpose) from error
    return pyarrow
