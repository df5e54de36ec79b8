"""The user's cache directory: timings, and the hashes of files that were verified.

A cache only saves time. One that cannot be read or written (a read-only home, a full disk, a
damaged file) is reported once in the log and treated as empty: never an error, never a wrong
value. Files are replaced whole, so processes that write at once may lose each other's additions
but leave a valid file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lowmem.errors import InputError

logger = logging.getLogger(__name__)

_VERIFIED = "verified"
_VERIFIED_LIMIT = 4096  # entries; of files that are long gone, the oldest are forgotten


def directory() -> Path:
    """Returns the cache directory, which need not exist.

    That is ``$LOWMEM_CACHE``, else ``$XDG_CACHE_HOME/lowmem``, else ``~/.cache/lowmem``; a variable
    that is empty counts as not set, and so does a relative XDG_CACHE_HOME, as its specification
    demands.

    Raises:
        InputError: The user has no home directory.
    """
    try:
        if own := os.environ.get("LOWMEM_CACHE"):
            return Path(own).expanduser()
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "lowmem"
    except RuntimeError as error:
        raise InputError(
            "the cache needs a home directory, and this user has none: set LOWMEM_CACHE"
        ) from error


def read_json(name: str) -> dict[str, Any] | None:
    """Returns the object stored under ``name``, or None where there is none that can be read.

    Args:
        name: Letters, digits, ".", "_" and "-", the first of them a letter or digit.

    Raises:
        InputError: ``name`` is not such a name.
    """
    _check_name(name)
    try:
        path = _path(name)
        value = json.loads(path.read_bytes(), parse_constant=_no_number)
    except FileNotFoundError:
        return None
    except (OSError, InputError) as error:
        _warn_once(f"the cache cannot be read: {error}")
        return None
    except (ValueError, RecursionError) as error:
        _warn_once(f"{path} is damaged and counts as empty: {error}")
        return None
    if not isinstance(value, dict):
        _warn_once(f"{path} is damaged and counts as empty: it must hold a JSON object")
        return None
    return value


def write_json(name: str, value: Mapping[str, Any]) -> None:
    """Stores a JSON object under ``name``, in place of what was there.

    Args:
        name: As in :func:`read_json`.
        value: Finite numbers, strings, lists and objects.

    Raises:
        InputError: ``name`` is not such a name.
    """
    _check_name(name)
    data = json.dumps(dict(value), allow_nan=False).encode()
    try:
        path = _path(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)
    except InputError as error:
        _warn_once(f"nothing can be cached: {error}")
    except OSError as error:  # its own text has the temporary name, another one each time
        _warn_once(f"nothing can be cached in {path.parent}: {error.strerror}")


def verified_sha256(path: Path) -> str | None:
    """Returns the sha256 that was remembered for a file, if the file has not changed since.

    A file is the same while its device, inode, size, and times of modification and of change are.
    The last cannot be set, unlike the time of modification, which archives restore.

    Args:
        path: The file; links are followed.

    Returns:
        64 hex digits, or None if it must be hashed again.
    """
    try:
        key = _version(path.stat())
    except OSError:
        return None
    sha256 = (read_json(_VERIFIED) or {}).get(key)
    is_sha256 = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
    return sha256 if is_sha256 else None


def remember_sha256(path: Path, sha256: str, *, before: os.stat_result | None = None) -> None:
    """Remembers the sha256 of a file as it is now.

    Args:
        path: The file; links are followed.
        sha256: 64 hex digits.
        before: The file's status from before it was hashed: a file that was changed meanwhile is
            not remembered.
    """
    try:
        key = _version(path.stat())
    except OSError:
        return
    if before is not None and key != _version(before):
        return
    known = read_json(_VERIFIED) or {}
    known.pop(key, None)
    kept = list(known.items())[-(_VERIFIED_LIMIT - 1) :]
    write_json(_VERIFIED, {**dict(kept), key: sha256})


def identity(status: os.stat_result) -> str:
    """Device, inode, size and time of a file: the same as long as nobody changes the file."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"


def _version(status: os.stat_result) -> str:
    """The same, and when the file was changed, which a new link to it counts as."""
    return f"{identity(status)}:{status.st_ctime_ns}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file that takes the place of ``path`` when the block ends well.

    The bytes go to a temporary name in the same directory, are synced to the disk, then renamed:
    a reader sees the old file or the new one. When the block fails the temporary is removed.

    Args:
        path: The file to replace or create. A link is replaced, not what it points to.

    Raises:
        OSError: The directory is missing or read-only, or the disk is full.
    """
    temporary = path.with_name(f".lowmem-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise InputError(
            'the name of a cached value must be 1 to 200 letters, digits, ".", "_" and "-", '
            f"the first a letter or digit, got {name!r}"
        )


def _path(name: str) -> Path:
    return directory() / f"{name}.json"


@functools.cache
def _warn_once(message: str) -> None:
    """Logs what would otherwise be said again for each file of a bundle."""
    logger.warning("%s", message)
