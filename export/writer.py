"""One safetensors file, written tensor by tensor into its layout, by one export or several."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import zlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np

from export.layout import Layout
from lowmem.artifact.tensors import RawTensor, StoredTensor, TensorSpec
from lowmem.disk import DISK_FULL
from lowmem.errors import BundleError, CapacityError

_BLOCK_BYTES = 2**20


class TensorWriter:
    """An open file; use it as a context manager, and call ``finish`` when all is written."""

    def __init__(self, path: Path, layout: Layout, kept: Collection[str] = ()) -> None:
        """Creates the file, reserves its space, and writes the header and the constants.

        Args:
            path: The file.
            layout: Its plan.
            kept: Tensors that an earlier export has written and ``holds`` has found there; with
                any, the file is opened as it is.

        Raises:
            CapacityError: The disk is full, or takes no file of this size.
        """
        self._path = path
        self._layout = layout
        self._missing = set(layout.specs) - set(kept)
        self._order = deque(layout.specs)
        self._digest, self._hashed_bytes = hashlib.sha256(), 0
        self._checksums: dict[str, int] = {}
        self._file = path.open("r+b" if kept else "x+b", buffering=0)
        if kept:
            return
        try:
            os.posix_fallocate(self._file.fileno(), 0, layout.size)
            self._put(layout.header, 0)
            for name, raw in layout.constants.items():
                self.write(name, raw)
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                self._raise(error)
            raise

    def write(self, name: str, raw: RawTensor) -> None:
        """Writes one tensor in its place.

        Raises:
            BundleError: Its dtype or shape is not the planned one.
            CapacityError: The disk is full.
        """
        planned, got = self._layout.specs[name], TensorSpec(raw.dtype, raw.shape)
        if got != planned:
            raise BundleError(f"{name} must be {planned}, got {got}")
        data = np.ascontiguousarray(raw.array).reshape(-1).view(np.uint8).data
        try:
            self._put(data, self._layout.offsets[name])
        except OSError as error:
            self._raise(error)
        self._checksums[name] = zlib.crc32(data)
        self._missing.discard(name)

    def read(self, name: str) -> RawTensor:
        """A tensor that has been written.

        Raises:
            BundleError: The file has become shorter.
        """
        spec = self._layout.specs[name]
        stored = StoredTensor(spec.dtype, spec.shape, self._path, self._layout.offsets[name])
        return stored.read()

    def written(self) -> dict[str, int]:
        """The CRC-32 of each tensor that was written since this was last asked."""
        checksums, self._checksums = self._checksums, {}
        return checksums

    def sync(self) -> None:
        """Brings what has been written to the disk; other tensors may be written meanwhile.

        Raises:
            CapacityError: The disk is full.
        """
        try:
            os.fdatasync(self._file.fileno())
        except OSError as error:
            self._raise(error)

    def hash_written(self) -> None:
        """Hashes the file as far as nothing is missing; other tensors may be written meanwhile.

        Raises:
            OSError: What was written cannot be read.
        """
        while self._order and self._order[0] not in self._missing:
            name = self._order.popleft()
            end = self._layout.offsets[name] + self._layout.specs[name].nbytes
            for block in _blocks(self._file.fileno(), self._hashed_bytes, end):
                self._digest.update(block)
            self._hashed_bytes = end

    def finish(self) -> str:
        """Syncs the file to the disk; every tensor must have been written.

        Returns:
            The file's sha256.

        Raises:
            CapacityError: The disk is full.
            OSError: What was written cannot be read.
        """
        assert not self._missing, sorted(self._missing)[:5]
        self.sync()
        self.hash_written()
        return self._digest.hexdigest()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file.fileno(), view, offset)
            view, offset = view[written:], offset + written

    def _raise(self, error: OSError) -> NoReturn:
        size = self._layout.size
        if error.errno in DISK_FULL:
            raise CapacityError(f"the disk is full: {self._path} needs {size} bytes") from error
        if error.errno == errno.EFBIG:
            raise CapacityError(
                f"a file of {size} bytes is over the limit of its disk or user ({self._path})"
            ) from error
        raise error


def holds(path: Path, layout: Layout, checksums: Mapping[str, int]) -> bool:
    """Whether a file has its layout's size and header, and tensors with these CRC-32.

    A link, or a file that has another name too, may be someone else's: it does not count.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                return False
            if status.st_size != layout.size or file.read(len(layout.header)) != layout.header:
                return False
            return all(
                _crc32(descriptor, layout.offsets[name], layout.specs[name].nbytes) == checksum
                for name, checksum in checksums.items()
            )
    except OSError:
        return False


def _crc32(descriptor: int, offset: int, size: int) -> int:
    checksum = 0
    for block in _blocks(descriptor, offset, offset + size):
        checksum = zlib.crc32(block, checksum)
    return checksum


def _blocks(descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes of a part of a file; each block lies where the one before it did.

    Raises:
        OSError: The file ends before, or cannot be read.
    """
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, end - begin)))
    while begin < end:
        size = os.preadv(descriptor, [buffer[: end - begin]], begin)
        if not size:
            raise OSError(errno.EIO, "the file ends too early")
        yield buffer[:size]
        begin += size
