"""Vectors into files, which appear whole or not at all."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lowmem import disk, outputs
from lowmem.cache import replacing
from lowmem.data import Row
from lowmem.errors import CapacityError, InputError, reason_of
from lowmem.text.suffixes import known_suffix, load_pyarrow

_PART_ROWS = 4096
_BYTES_PER_NUMBER = {".jsonl": 14}  # in text, with what separates them; elsewhere a float32


def check_vectors_output(path: Path, *, others: Iterable[Path] = ()) -> None:
    """Refuses an output that could not be written, before anything is computed for it.

    Args:
        path: Where the vectors shall go; a file that is there will be replaced.
        others: Files and directories of the same command, as in
            :func:`lowmem.outputs.check_output`.

    Raises:
        InputError: The suffix is none of .npy, .jsonl and .parquet, or what
            :func:`lowmem.outputs.check_output` refuses.
        BackendError: pyarrow is needed and not installed.
    """
    if known_suffix(path, "an output file", _WRITERS) == ".parquet":
        load_pyarrow("writing")
    outputs.check_output(path, others)


def check_room(path: Path, texts: int, dimensions: int) -> None:
    """Refuses to begin what the disk has no room for in the end.

    Args:
        path: As :func:`check_vectors_output` takes it.
        texts: How many vectors there will be.
        dimensions: Of each.

    Raises:
        CapacityError: The disk has not enough room.
    """
    suffix = known_suffix(path, "an output file", _WRITERS)
    needed = texts * dimensions * _BYTES_PER_NUMBER.get(suffix, 4)
    disk.check_room(Path(os.path.realpath(path)).parent, needed, path.name)


def write_vectors(path: Path, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    """Writes vectors under a temporary name and renames it: the whole file appears, or none.

    ``.npy`` holds the array; ``.jsonl`` an object a row with ``id`` and ``embedding``, each number
    in the fewest digits that give the same float32; ``.parquet`` the columns ``id`` (string) and
    ``embedding`` (fixed-size list of float32).

    Args:
        path: As :func:`check_vectors_output` takes it.
        rows: Whose vectors these are.
        vectors: float32 [rows, dim], finite.

    Raises:
        InputError: The vectors are of another shape or type, the suffix is unknown, or the file
            cannot be written.
        CapacityError: The disk is full, or a quota or size limit is reached.
        BackendError: pyarrow is needed and not installed.
    """
    is_fit = vectors.ndim == 2 and len(vectors) == len(rows) and vectors.dtype == np.float32
    if not is_fit or not all(np.isfinite(vectors[part]).all() for part in _parts(vectors)):
        raise InputError(
            f"vectors must be finite float32 [{len(rows)}, dim], "
            f"got {vectors.dtype} {list(vectors.shape)} for {path}"
        )
    write = _WRITERS[known_suffix(path, "an output file", _WRITERS)]
    try:
        with replacing(Path(os.path.realpath(path))) as file:
            write(file, rows, vectors)
    except OSError as error:
        kind = CapacityError if error.errno in disk.NO_ROOM else InputError
        raise kind(f"{path} cannot be written: {reason_of(error)}") from error


def _write_npy(file: BinaryIO, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    # Into a real file numpy writes with array.tofile, whose error on a full disk has no errno.
    np.save(types.SimpleNamespace(write=file.write), np.ascontiguousarray(vectors))


def _write_jsonl(file: BinaryIO, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    for row, vector in zip(rows, vectors, strict=True):
        numbers = ", ".join(map(str, vector))
        row_id = json.dumps(row.id, ensure_ascii=False)
        file.write(f'{{"id": {row_id}, "embedding": [{numbers}]}}\n'.encode())


def _write_parquet(file: BinaryIO, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    pyarrow = load_pyarrow("writing")
    vector = pyarrow.list_(pyarrow.float32(), vectors.shape[1])
    schema = pyarrow.schema([("id", pyarrow.string()), ("embedding", vector)])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for part in _parts(vectors):
            flat = pyarrow.array(np.ascontiguousarray(vectors[part]).reshape(-1))
            columns = [
                pyarrow.array([row.id for row in rows[part]], pyarrow.string()),
                pyarrow.FixedSizeListArray.from_arrays(flat, type=vector),
            ]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))


def _parts(vectors: NDArray[np.float32]) -> Iterator[slice]:
    """Rows that are looked at together, of vectors that may lie on the disk."""
    for begin in range(0, len(vectors), _PART_ROWS):
        yield slice(begin, begin + _PART_ROWS)


_WRITERS: dict[str, Callable[[BinaryIO, Sequence[Row], NDArray[np.float32]], None]] = {
    ".npy": _write_npy,
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
}
