"""Texts out of files.

A row is read as it stands or refused with its line number: an empty text, a broken character or a
misspelt ``input_type`` would otherwise become a vector that looks like any other.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem.artifact import strict_json
from lowmem.data import Row
from lowmem.errors import InputError, reason_of
from lowmem.text.suffixes import known_suffix, load_pyarrow

_INPUT_TYPES = ("query", "document")
_INSTRUCTION_KEYS = ("input_type", "task")
_OWN_KEYS = ("id", *_INSTRUCTION_KEYS, "lang")
_MOST_LISTED = 10
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
    read = _READERS[known_suffix(path, "an input file", _READERS)]
    rows = []
    problems = _Problems(path)
    try:
        for line, fields in read(path, column, _INSTRUCTION_KEYS, problems):
            try:
                rows.append(_row(line, fields, column, input_type, task))
            except ValueError as error:
                problems.add(line, str(error))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from error
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
    read = readers[known_suffix(path, "a file of records", readers)]
    problems = _Problems(path)
    try:
        records = list(read(path, column, (), problems))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from error
    if problems.count:
        raise problems.error()
    return records


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
    input_type = own.get("input_type", input_type)
    task = own.get("task", None if input_type == "document" else task)
    if problem := _instruction_problem(input_type, task):
        raise ValueError(f"is refused: {problem}")
    if input_type == "document" and "task" in own:
        raise ValueError("has a task and is a document, which has none: say that it is a query")
    return InputRow(
        id=str(row_id), text=text, input_type=input_type, task=task, lang=lang, line=line
    )


def _misspelt(names: Iterable[str], column: str, own: Collection[str]) -> str | None:
    """Names a key that is one of ``own`` but for blanks or capitals, if there is one."""
    for name in names:
        plain = name.strip().casefold()
        if plain in own and name not in (plain, column):
            return f"has {_short(name)}, which counts for nothing: call it {plain!r}"
    return None


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


def _read_txt(path: Path, column: str, own: Collection[str], problems: _Problems) -> _Fields:
    for number, line in _lines(path, problems):
        yield number, {column: _without_end(line)}


def _read_jsonl(path: Path, column: str, own: Collection[str], problems: _Problems) -> _Fields:
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
            if not isinstance(value, dict):
                problems.add(number, f"must hold an object, got {strict_json.type_name(value)}")
            elif wrong := _misspelt(value, column, own):
                problems.add(number, wrong)
            else:
                yield number, value


def _read_csv(path: Path, column: str, own: Collection[str], problems: _Problems) -> _Fields:
    records = csv.reader((line for _, line in _lines(path, problems, spanned=True)), strict=True)
    start = 1
    with _any_field_size():
        try:
            header = next(records, [])
            _check_columns(path, header, column, own)
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


def _read_parquet(path: Path, column: str, own: Collection[str], problems: _Problems) -> _Fields:
    pyarrow = load_pyarrow("reading")
    try:
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            _check_columns(path, names, column, own)
            wanted = [name for name in names if name in (column, *_OWN_KEYS)]
            batches = (batch.to_pylist() for batch in table.iter_batches(columns=wanted))
            yield from enumerate(itertools.chain.from_iterable(batches), 1)
    except InputError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {reason_of(error)}") from error


def _check_columns(path: Path, names: Sequence[str], column: str, own: Collection[str]) -> None:
    if column not in names:
        raise InputError(f"{path} {_no_column(column, names)}")
    if repeated := [name for name in (column, *_OWN_KEYS) if names.count(name) > 1]:
        raise InputError(f"{path} must have each column once, got several {repeated[0]!r}")
    if wrong := _misspelt(names, column, own):
        raise InputError(f"{path} {wrong}")


def _no_column(column: str, names: Iterable[str]) -> str:
    found = [_short(name) for name in names]
    more = [f"and {len(found) - _MOST_LISTED} more"] if len(found) > _MOST_LISTED else []
    listed = ", ".join(found[:_MOST_LISTED] + more) or "nothing"
    return f"must have {column!r} (or what --column names), got {listed}"


def _short(value: object) -> str:
    return f"{value!r:.60}"


_READERS: dict[str, Callable[[Path, str, Collection[str], _Problems], _Fields]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
