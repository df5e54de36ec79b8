"""One safetensors file, written tensor by tensor into its layout."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np

from export.layout import Layout
from lowmem.artifact.tensors import RawTensor, TensorSpec
from lowmem.errors import BundleError, CapacityError


class TensorWriter:
    """An open file; use it as a context manager, and call ``finish`` when all is written."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Creates the file, reserves its space, and writes the header and the constants.

        Raises:
            CapacityError: The disk is full, or takes no file of this size.
        """
        self._path = path
        self._layout = layout
        self._missing = set(layout.specs)
        self._file = path.open("xb", buffering=0)
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
        try:
            self._put(
                np.ascontiguousarray(raw.array).reshape(-1).view(np.uint8).data,
                self._layout.offsets[name],
            )
        except OSError as error:
            self._raise(error)
        self._missing.discard(name)

    def finish(self) -> None:
        """Syncs the file to the disk; every tensor must have been written.

        Raises:
            CapacityError: The disk is full.
        """
        assert not self._missing, sorted(self._missing)[:5]
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._raise(error)

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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(f"the disk is full: {self._path} needs {size} bytes") from error
        if error.errno == errno.EFBIG:
            raise CapacityError(
                f"a file of {size} bytes is over the limit of its disk or user ({self._path})"
            ) from error
        raise error
