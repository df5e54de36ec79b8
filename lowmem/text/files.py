"""Texts out of files and vectors into files.

A row is read as it stands or refused with its line number: an empty text, a broken character or a
misspelt ``input_type`` would otherwise become a vector that looks like any other.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact import strict_json
from lowmem.cache import replacing
from lowmem.data import Row
from lowmem.errors import CapacityError, InputError, missing_extra
from lowmem.scratch import NO_ROOM

_INPUT_TYPES = ("query", "document")
_OWN_KEYS = ("id", "input_type", "task", "lang")
_MOST_LISTED = 10
_PART_ROWS = 4096
_EMPTY = "is empty: every row needs a text"


@dataclass(frozen=True, slots=True)
class InputRow(Row):
    """A row and where it starts: its line, or its number in a .parquet file, both from 1."""

    line: int = field(kw_only=True)


def read_rows(
    path: Path, *, column: str = "text", input_type: str = "document", task: str | None = None
) -> list[InputRow]:
    r"""Reads the texts of a file, in its order; a file without rows gives an empty list.

    ``.txt`` has one text a line, ``.jsonl`` one object a line; only "\n" and "\r\n" end a line.
    ``.csv`` has a header, ``.parquet`` named columns. Where a row has ``id``, ``input_type`` or
    ``task``, neither null nor an empty cell, they hold for that row; a row without ``id`` has its
    line number for one. ``lang`` names the group of languages that a report puts a row in. Other
    keys and columns are ignored.

    Args:
        path: The file, in UTF-8, with or without a byte order mark.
        column: The key or column with the text; without meaning for ``.txt``.
        input_type: "query" or "document", for rows that do not say.
        task: The instruction, for rows that have none of their own and do not say that they are
            documents.

    Raises:
        InputError: The file cannot be read, its suffix is unknown, an option is wrong, or rows
            are; of those the first ten are listed and the others counted.
        BackendError: pyarrow is needed and not installed.
    """
    if problem := _instruction_problem(input_type, task):
        raise InputError(problem)
    read = _READERS[_suffix(path, "an input file", _READERS)]
    rows = []
    problems = _Problems(path)
    try:
        for line, fields in read(path, column, problems):
            try:
                rows.append(_row(line, fields, column, input_type, task))
            except ValueError as error:
                problems.add(line, str(error))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error
    if problems.count:
        raise problems.error()
    if task is not None and rows and all(row.input_type == "document" for row in rows):
        raise InputError(f"a task is for queries, and {path} has none: say that they are queries")
    return rows


def read_records(path: Path, column: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Reads the objects of a ``.jsonl`` file, or the rows of a ``.csv`` with a header, as they are.

    Args:
        path: The file, in UTF-8.
        column: One that a ``.csv`` must have; the caller checks the others.

    Returns:
        Line number, from 1, and fields of each; an empty cell of a ``.csv`` is None.

    Raises:
        InputError: The file cannot be read, ends in neither suffix, or a line is damaged.
    """
    readers = {suffix: _READERS[suffix] for suffix in (".jsonl", ".csv")}
    read = readers[_suffix(path, "a file of records", readers)]
    problems = _Problems(path)
    try:
        records = list(read(path, column, problems))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}") from error
    if problems.count:
        raise problems.error()
    return records


def check_output(path: Path, *, source: Path | None = None) -> None:
    """Refuses an output that could not be written, before anything is computed for it.

    Args:
        path: Where the vectors shall go; a file that is there will be replaced.
        source: The input, which the output must not replace.

    Raises:
        InputError: The suffix is none of .npy, .jsonl and .parquet, the directory is missing or
            cannot be written to, or ``path`` is ``source`` or no regular file.
        BackendError: pyarrow is needed and not installed.
    """
    if _suffix(path, "an output file", _WRITERS) == ".parquet":
        _pyarrow("writing")
    target = os.path.realpath(path)
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        raise InputError(f"the output's directory must exist, got {path}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"the output's directory must be writable, got {path}")
    if os.path.exists(target) and not os.path.isfile(target):
        raise InputError(f"the output must be a regular file, got {path}")
    if source is not None and os.path.exists(source) and os.path.exists(target):
        if os.path.samefile(source, target):
            raise InputError(f"the output must be another file than the input, got {path} for both")


def write_vectors(path: Path, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    """Writes vectors under a temporary name and renames it: the whole file appears, or none.

    ``.npy`` holds the array; ``.jsonl`` an object a row with ``id`` and ``embedding``, each number
    in the fewest digits that give the same float32; ``.parquet`` the columns ``id`` (string) and
    ``embedding`` (fixed-size list of float32).

    Args:
        path: As :func:`check_output` takes it.
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
    write = _WRITERS[_suffix(path, "an output file", _WRITERS)]
    try:
        with replacing(Path(os.path.realpath(path))) as file:
            write(file, rows, vectors)
    except OSError as error:
        kind = CapacityError if error.errno in NO_ROOM else InputError
        raise kind(f"{path} cannot be written: {_reason(error)}") from error


class _Problems:
    """What is wrong with the rows of one file: all are counted, the first are told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._unit = "row" if path.suffix.lower() == ".parquet" else "line"
        self._told: list[str] = []

    def add(self, line: int, problem: str) -> None:
        """Takes in a problem that reads on after the place, as in "is empty"."""
        self.count += 1
        if self.count <= _MOST_LISTED:
            file = "" if self._told else f" of {self.path}"
            self._told.append(f"{self._unit} {line}{file} {problem}")

    def error(self) -> InputError:
        """Returns the error that tells them."""
        more = self.count - len(self._told)
        return InputError("; ".join([*self._told, *([f"and {more} more"] if more else [])]))


def _row(
    line: int, fields: Mapping[str, Any], column: str, input_type: str, task: str | None
) -> InputRow:
    """Returns the row that ``fields`` describe, or raises ValueError for :meth:`_Problems.add`."""
    if column not in fields:
        raise ValueError(_no_column(column, fields))
    text = fields[column]
    if text is None or text == "" or (isinstance(text, str) and text.isspace()):
        raise ValueError(_EMPTY)
    if not isinstance(text, str):
        raise ValueError(f"must have a string in {column!r}, got {_short(text)}")
    own = {key: fields[key] for key in _OWN_KEYS if key != column and fields.get(key) is not None}
    row_id = own.get("id", line)
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        raise ValueError(f"must have a string or a whole number as id, got {_short(row_id)}")
    lang = own.get("lang", "")
    if not isinstance(lang, str):
        raise ValueError(f"must have a string as lang, got {_short(lang)}")
    if own.get("input_type") == "document":
        task = None
    input_type, task = own.get("input_type", input_type), own.get("task", task)
    if problem := _instruction_problem(input_type, task):
        raise ValueError(f"is refused: {problem}")
    if input_type == "document" and "task" in own and "input_type" not in own:
        raise ValueError("has a task and is a document, which has none: say that it is a query")
    return InputRow(
        id=str(row_id), text=text, input_type=input_type, task=task, lang=lang, line=line
    )


def _instruction_problem(input_type: object, task: object) -> str | None:
    if input_type not in _INPUT_TYPES:
        return f"input_type must be 'query' or 'document', got {_short(input_type)}"
    if task is not None and not (isinstance(task, str) and task.strip()):
        return f"task must be a text that is not empty, got {_short(task)}"
    return None


def _lines(path: Path, problems: _Problems, *, spanned: bool = False) -> Iterator[tuple[int, str]]:
    r"""Yields each line's number and text, with its "\n".

    Args:
        path: The file; a byte order mark at its start is left out.
        problems: Takes lines that are not UTF-8.
        spanned: One record may be several lines, so that nothing can be said after a bad one.

    Raises:
        InputError: A line is not UTF-8, and ``spanned``.
    """
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                problems.add(number, f"is not UTF-8, at byte {offset + error.start} of the file")
                if spanned:
                    raise problems.error() from error
            else:
                yield number, text.removeprefix("\ufeff") if number == 1 else text
            offset += len(raw)


def _without_end(line: str) -> str:
    return line[:-1].removesuffix("\r") if line.endswith("\n") else line


_Fields = Iterator[tuple[int, Mapping[str, Any]]]


def _read_txt(path: Path, column: str, problems: _Problems) -> _Fields:
    for number, line in _lines(path, problems):
        yield number, {column: _without_end(line)}


def _read_jsonl(path: Path, column: str, problems: _Problems) -> _Fields:
    for number, line in _lines(path, problems):
        if not line.strip():
            problems.add(number, "is empty: every line must hold a JSON object")
            continue
        try:
            value = strict_json.parse(_without_end(line))
        except json.JSONDecodeError as error:
            problems.add(number, f"is not JSON at column {error.colno}: {error.msg}")
        except ValueError as error:
            problems.add(number, str(error))
        else:
            if isinstance(value, dict):
                yield number, value
            else:
                problems.add(number, f"must hold an object, got {strict_json.type_name(value)}")


def _read_csv(path: Path, column: str, problems: _Problems) -> _Fields:
    records = csv.reader((line for _, line in _lines(path, problems, spanned=True)), strict=True)
    start = 1
    with _any_field_size():
        try:
            header = next(records, [])
            _check_columns(path, header, column)
            start = records.line_num + 1
            for cells in records:
                if not cells:
                    problems.add(start, _EMPTY)
                elif len(cells) != len(header):
                    problems.add(start, f"must have {len(header)} fields, got {len(cells)}")
                else:
                    filled = (cell or None for cell in cells)
                    yield start, dict(zip(header, filled, strict=True))
                start = records.line_num + 1
        except csv.Error as error:
            problems.add(start, f"is not CSV: {error}")
            raise problems.error() from error


@contextlib.contextmanager
def _any_field_size() -> Iterator[None]:
    """Lifts csv's limit of 128 KiB a field, which is the process's, not the reader's."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, column: str, problems: _Problems) -> _Fields:
    pyarrow = _pyarrow("reading")
    try:
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            _check_columns(path, names, column)
            wanted = [name for name in names if name in (column, *_OWN_KEYS)]
            batches = (batch.to_pylist() for batch in table.iter_batches(columns=wanted))
            yield from enumerate(itertools.chain.from_iterable(batches), 1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {_reason(error)}") from error


def _write_npy(file: BinaryIO, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    # Into a real file numpy writes with array.tofile, whose error on a full disk has no errno.
    np.save(types.SimpleNamespace(write=file.write), np.ascontiguousarray(vectors))


def _write_jsonl(file: BinaryIO, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    for row, vector in zip(rows, vectors, strict=True):
        numbers = ", ".join(map(str, vector))
        row_id = json.dumps(row.id, ensure_ascii=False)
        file.write(f'{{"id": {row_id}, "embedding": [{numbers}]}}\n'.encode())


def _write_parquet(file: BinaryIO, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
    pyarrow = _pyarrow("writing")
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


def _pyarrow(doing: str) -> Any:
    """Returns pyarrow with its parquet module, imported at first use only."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "files", f"{doing} a .parquet file") from error
    return pyarrow


def _check_columns(path: Path, names: Sequence[str], column: str) -> None:
    if column not in names:
        raise InputError(f"{path} {_no_column(column, names)}")
    if repeated := [name for name in (column, *_OWN_KEYS) if names.count(name) > 1]:
        raise InputError(f"{path} must have each column once, got several {repeated[0]!r}")


def _no_column(column: str, names: Iterable[str]) -> str:
    found = [_short(name) for name in names]
    more = [f"and {len(found) - _MOST_LISTED} more"] if len(found) > _MOST_LISTED else []
    return f"must have {column!r}, got {', '.join(found[:_MOST_LISTED] + more) or 'nothing'}"


def _suffix(path: Path, role: str, known: Mapping[str, object]) -> str:
    suffix = path.suffix.lower()
    if suffix not in known:
        *most, last = known
        raise InputError(f"{role} must end in {', '.join(most)} or {last}, got {path}")
    return suffix


def _short(value: object) -> str:
    return f"{value!r:.60}"


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split())


_READERS: dict[str, Callable[[Path, str, _Problems], _Fields]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
_WRITERS: dict[str, Callable[[BinaryIO, Sequence[Row], NDArray[np.float32]], None]] = {
    ".npy": _write_npy,
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
}
