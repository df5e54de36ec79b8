"""Files that a caller names for results: refused before anything is computed, written whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lowmem import cache
from lowmem.errors import InputError


def check_output(path: Path, others: Iterable[Path | None] = ()) -> None:
    """Refuses an output that could not be written, before anything is computed for it.

    Args:
        path: Where a result shall go; a file that is there will be replaced.
        others: Files and directories of the same command; it must not replace the ones, nor lie in
            the others.

    Raises:
        InputError: The directory is missing or cannot be written to, or ``path`` is no regular
            file, one of the others, or in one.
    """
    target = os.path.realpath(path)
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        raise InputError(f"{path} cannot be written: its directory does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: its directory cannot be written to")
    if os.path.islink(target) or (os.path.exists(target) and not os.path.isfile(target)):
        raise InputError(f"{path} cannot be written: an output must be a regular file")
    check_apart(path, others)


def check_apart(path: Path, others: Iterable[Path | None]) -> None:
    """Refuses an output that is, or lies in, a file or directory of the same command.

    Raises:
        InputError: It does.
    """
    target = os.path.realpath(path)
    for other in others:
        if other is None:
            continue
        is_there = os.path.exists(other) and os.path.exists(target)
        if os.path.realpath(other) == target or (is_there and os.path.samefile(other, target)):
            raise InputError(f"{path} cannot be written: the command names that file twice")
        if os.path.isdir(other) and Path(target).is_relative_to(os.path.realpath(other)):
            raise InputError(
                f"{path} cannot be written: it lies in {other}, which the command reads or writes "
                "otherwise: give a path outside of it"
            )


def write_text(path: Path, text: str) -> None:
    """Writes a file as UTF-8: all of it appears, or nothing.

    Raises:
        InputError: It cannot be written.
    """
    try:
        with cache.replacing(Path(os.path.realpath(path))) as file:
            file.write(text.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
