"""One safetensors file, written tensor by tensor into its layout, by one export or several."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Collection, Mapping
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
        self._checksums: dict[str, int] = {}
        self._file = path.open("r+b" if kept else "xb", buffering=0)
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

    def finish(self) -> None:
        """Syncs the file to the disk; every tensor must have been written.

        Raises:
            CapacityError: The disk is full.
        """
        assert not self._missing, sorted(self._missing)[:5]
        self.sync()

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
    checksum, end = 0, offset + size
    while offset < end:
        block = os.pread(descriptor, min(_BLOCK_BYTES, end - offset), offset)
        if not block:
            raise OSError(errno.EIO, "the file ends too early")
        checksum = zlib.crc32(block, checksum)
        offset += len(block)
    return checksum
