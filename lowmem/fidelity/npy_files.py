"""Vectors as bytes of a ``.npy`` file, and what such a file says of itself."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from lowmem.fidelity.directions import Vectors


def npy_bytes(vectors: Vectors) -> bytes:
    """A ``.npy`` file's bytes, the same for the same vectors."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(vectors, np.float32))
    return buffer.getvalue()


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a ``.npy`` file, before room for its array is taken.

    Raises:
        ValueError: It is none.
    """
    read: dict[tuple[int, int], Callable[..., Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    read_magic: Callable[..., Any] = np.lib.format.read_magic  # has no types of its own
    version = read_magic(file)
    if version not in read:
        raise ValueError(f"version {version} is unknown")
    shape, _, dtype = read[version](file)
    return shape, dtype
