"""The head of a GGUF file: its metadata, and where its tensors lie.

The reader of the gguf package trusts every count in a file: a damaged one can make it loop without
end, and it keeps an array per token. Here each length is held against the size of the file before
anything is read. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lowmem.errors import BundleError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# Of known models a few million, most of them pieces of the tokenizer.
_MOST_HEAD_BYTES = 64 * 2**20
_MOST_DIMENSIONS = 4
_STRING, _ARRAY, _FLOAT32 = 8, 9, "f"
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))

T = TypeVar("T")


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        type: Number of its ggml type.
        shape: Sizes as numpy has them, the slowest dimension first; GGUF stores the reverse.
        offset: First byte, counted from the start of the file.
    """

    type: int
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Metadata and tensors, by name.

    Numbers come as int, float or bool, strings as str, and arrays as lists of these. A float32
    comes as its shortest decimal: 1e-5 and not 9.999999747378752e-06.

    Raises:
        BundleError: The file cannot be read, is no GGUF file of version 2 or 3, or its head breaks
            the format. That tensors lie inside the file is not checked here: it takes their types.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise BundleError(f"{path} is no GGUF file: it is shorter than the head of one")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, path).read()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """A position in the bytes, which never leaves them."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._bytes(4) != _MAGIC:
            raise BundleError(f"{self._path} is no GGUF file: it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            # A file for the other byte order shows a version of millions.
            raise BundleError(f"GGUF version must be 2 or 3, got {version} ({self._path})")
        tensors, keys = self._number("Q"), self._number("Q")
        metadata = self._named(keys, self._value)
        found = self._named(tensors, self._tensor)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment must be a power of two, got {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return metadata, {
            name: GgufTensor(kind, shape, start + offset)
            for name, (kind, shape, offset) in found.items()
        }

    def _named(self, count: int, read: Callable[[], T]) -> dict[str, T]:
        found: dict[str, T] = {}
        for _ in range(count):
            name = self._string()
            if name in found:
                raise self._damaged(f"{name!r} stands in it twice")
            found[name] = read()
        return found

    def _value(self) -> Any:
        kind = self._number("I")
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._damaged(f"a value has the unknown type {kind}")
        value = self._number(_SCALARS[kind])
        return float(str(np.float32(value))) if _SCALARS[kind] == _FLOAT32 else value

    def _array(self) -> list[Any]:
        kind, count = self._number("I"), self._number("Q")
        if kind == _STRING:
            return [self._string() for _ in range(self._fits(count, 8))]
        if kind not in _SCALARS:
            raise self._damaged(f"an array has items of the unsupported type {kind}")
        item = np.dtype(_SCALARS[kind]).newbyteorder("<")
        size = self._fits(count, item.itemsize) * item.itemsize
        return list(np.frombuffer(self._bytes(size), item).tolist())

    def _tensor(self) -> tuple[int, tuple[int, ...], int]:
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self._damaged(f"a tensor has {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        return self._number("I"), shape, self._number("Q")

    def _string(self) -> str:
        try:
            return self._bytes(self._number("Q")).decode()
        except UnicodeDecodeError:
            raise self._damaged("a string is not UTF-8") from None

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _bytes(self, count: int) -> bytes:
        self._fits(count, 1)
        self._at += count
        return self._data[self._at - count : self._at]

    def _fits(self, count: int, item_bytes: int) -> int:
        """``count``, if that many items can follow in the file, and a head be so large."""
        if count * item_bytes > len(self._data) - self._at:
            raise BundleError(f"{self._path} is truncated or damaged: its head goes past its end")
        if self._at + count * item_bytes > _MOST_HEAD_BYTES:
            raise self._damaged(f"its head is larger than {_MOST_HEAD_BYTES} bytes")
        return count

    def _damaged(self, problem: str) -> BundleError:
        return BundleError(f"{self._path} is damaged: {problem}")
