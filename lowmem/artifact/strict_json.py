"""Reading JSON that may be damaged or hostile, and writing it so that equal values are equal bytes.

Python's reader keeps the last of two equal keys, takes NaN, and lets a deep or long enough input
raise errors of its own. Here each of these is refused with a reason, since what stands in a
manifest or a config decides which vector comes out.
"""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from lowmem.errors import BundleError

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64
MAX_DIGITS = 20

_TOO_DEEP = f"is nested deeper than {MAX_DEPTH} levels"


def parse(text: str) -> object:
    """Returns the one JSON value that ``text`` holds; who calls this knows the place.

    Raises:
        json.JSONDecodeError: The syntax is wrong, or something follows the value.
        ValueError: A key is repeated, a number is not finite or an integer has more than 20
            digits, a string holds half of a surrogate pair, or the value is nested deeper than
            64. The message reads on after the place: "repeats the key 'a'".
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check(value)
    return value


def loads(data: bytes | str, place: str, *, max_bytes: int = MAX_BYTES) -> object:
    """Returns the one JSON value that ``data`` holds.

    Args:
        data: UTF-8 without a byte order mark, or text.
        place: What ``data`` is called in errors, such as a path.
        max_bytes: The most that is read.

    Raises:
        BundleError: ``data`` is too large, not UTF-8, or not JSON as :func:`parse` takes it.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    _check_size(raw, place, max_bytes)
    try:
        return parse(raw.decode())
    except UnicodeDecodeError as error:
        raise BundleError(f"{place} is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise BundleError(
            f"{place} is not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except ValueError as error:
        raise BundleError(f"{place} {error}") from error


def read(path: Path, *, max_bytes: int = MAX_BYTES) -> object:
    """Returns the one JSON value that a file holds; else as :func:`read_object`."""
    return loads(read_bytes(path, max_bytes=max_bytes), str(path), max_bytes=max_bytes)


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Args:
        path: A regular file, or a link to one.
        max_bytes: The most that is read.

    Raises:
        BundleError: The file is missing, not a regular file, cannot be read, or does not hold one
            object as :func:`loads` takes it.
    """
    value = read(path, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise BundleError(f"{path} must hold a JSON object, got {type_name(value)}")
    return value


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns what a small file holds.

    Args:
        path: A regular file, or a link to one.
        max_bytes: The most that is read.

    Raises:
        BundleError: The file is missing, not a regular file, too large, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BundleError(f"{path} must be a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error
    _check_size(data, str(path), max_bytes)
    return data


def dumps(value: object) -> str:
    """Returns JSON for people: sorted keys, two spaces a level, a newline at the end.

    Raises:
        ValueError: A number is not finite.
    """
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def canonical(value: object) -> bytes:
    """Returns JSON for hashing: UTF-8, sorted keys, no white space.

    Raises:
        ValueError: A number is not finite, or a string is not valid Unicode.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def type_name(value: object) -> str:
    """Returns what JSON calls a value, with its article, as in "got a string"."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _check(value: object) -> None:
    """Refuses what the decoder lets pass: depth, and strings that have no UTF-8 form."""
    pending: list[tuple[object, int]] = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, str):
            _check_unicode(item)
            continue
        inside: Iterable[object]
        if isinstance(item, dict):
            for key in item:
                _check_unicode(key)
            inside = item.values()
        elif isinstance(item, list):
            inside = item
        else:
            continue
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        pending.extend((child, depth + 1) for child in inside)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise ValueError(f"holds half of a surrogate pair, {half}, in a string") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"repeats the key {_short(repeated)!r}")
    return value


def _int(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"holds an integer of more than {MAX_DIGITS} digits, {_short(digits)}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"holds a number that is too large, {_short(digits)}")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which is not JSON")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_constant
)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value that was read is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_size(data: bytes, place: str, max_bytes: int) -> None:
    if len(data) > max_bytes:
        raise BundleError(f"{place} must be at most {max_bytes} bytes long, and is longer")
