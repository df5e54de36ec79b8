"""Texts that come out of files, and rows that are refused."""

import csv
import errno
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lowmem.errors import BackendError, InputError
from lowmem.text.reading import InputRow, read_records, read_rows


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file byte by byte as given, and returns its path."""

    def write(name: str, data: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return write


Written = Callable[[str, str | bytes], Path]


def texts(path: Path) -> list[str]:
    return [row.text for row in read_rows(path)]


def problem(path: Path, column: str = "text") -> str:
    """Returns the error, with the directory of ``path`` left out."""
    with pytest.raises(InputError) as caught:
        read_rows(path, column=column)
    return str(caught.value).replace(f"{path.parent}{os.sep}", "")


def test_a_text_file_has_one_text_a_line(written: Written) -> None:
    assert read_rows(written("x.txt", "one\n two \n")) == [
        InputRow("1", "one", line=1),
        InputRow("2", " two ", line=2),
    ]


@pytest.mark.parametrize("data", ["a\nb", "a\nb\n", "a\r\nb\r\n", "a\r\nb"])
def test_one_newline_at_the_end_makes_no_row(written: Written, data: str) -> None:
    assert texts(written("x.txt", data)) == ["a", "b"]


@pytest.mark.parametrize(
    "separator",
    ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\0", "\r\r"],
)
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_other_line_separators_are_text(written: Written, name: str, separator: str) -> None:
    text = f"a{separator}b"
    line = json.dumps({"text": text}, ensure_ascii=False) if name == "x.jsonl" else text
    assert texts(written(name, f"{line}\r\nc\r\n" if name == "x.txt" else line))[0] == text


def test_a_carriage_return_without_a_newline_is_text(written: Written) -> None:
    assert texts(written("x.txt", "a\r\r\nb\r")) == ["a\r", "b\r"]


@pytest.mark.parametrize(
    ("name", "line"), [("x.txt", "a\n"), ("x.jsonl", '{"text": "a"}\n'), ("x.csv", "text\na\n")]
)
def test_a_byte_order_mark_is_removed_at_the_start_only(
    written: Written, name: str, line: str
) -> None:
    assert texts(written(name, "\ufeff" + line)) == ["a"]
    assert texts(written("y.txt", "\ufeffa\n\ufeffb")) == ["a", "\ufeffb"]


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_a_file_of_no_bytes_has_no_rows(written: Written, name: str) -> None:
    assert read_rows(written(name, "")) == []


@pytest.mark.parametrize("blank", ["", " ", "\t\u3000", "\u2028", "\r"])
def test_a_blank_line_is_refused_with_its_number(written: Written, blank: str) -> None:
    path = written("x.txt", f"a\nb\n{blank}\nc\n")
    assert problem(path) == "line 3 of x.txt is empty: every row needs a text"


def test_the_first_ten_bad_rows_are_listed_and_the_others_counted(written: Written) -> None:
    message = problem(written("x.txt", "\n" * 12))
    assert message.startswith("line 1 of x.txt is empty: every row needs a text; line 2 is empty")
    assert message.endswith("; line 10 is empty: every row needs a text; and 2 more")


def test_a_line_that_is_not_utf8_is_named_with_its_byte_in_the_file(written: Written) -> None:
    path = written("x.txt", b"\xef\xbb\xbfab\nc\xe9d\n\nok\n")
    assert problem(path) == (
        "line 2 of x.txt is not UTF-8, at byte 7 of the file; "
        "line 3 is empty: every row needs a text"
    )


def test_a_utf16_file_is_refused(written: Written) -> None:
    message = problem(written("x.txt", "ab".encode("utf-16")))
    assert message == "line 1 of x.txt is not UTF-8, at byte 0 of the file"


def test_encoded_surrogates_are_not_utf8(written: Written) -> None:
    assert "is not UTF-8" in problem(written("x.txt", b"\xed\xa0\x80\n"))


def test_options_hold_for_every_row(written: Written) -> None:
    [row] = read_rows(written("x.txt", "a"), input_type="query", task="Find it")
    assert (row.input_type, row.task) == ("query", "Find it")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_type": "Query"}, "input_type must be 'query' or 'document', got 'Query'"),
        ({"task": " "}, "task must be a text that is not empty, got ' '"),
    ],
)
def test_a_wrong_option_is_refused(written: Written, options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        read_rows(written("x.txt", "a"), **options)


def test_a_suffix_in_capitals_is_known(written: Written) -> None:
    assert texts(written("x.TXT", "a")) == ["a"]


@pytest.mark.parametrize("name", ["x.tsv", "x", "txt"])
def test_an_unknown_suffix_names_the_known_ones(written: Written, name: str) -> None:
    message = f"an input file must end in .txt, .jsonl, .csv or .parquet, got {name}"
    assert problem(written(name, "a")) == message


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path, suffix: str) -> None:
    missing, directory = tmp_path / f"none{suffix}", tmp_path / f"directory{suffix}"
    directory.mkdir()
    assert problem(missing) == f"none{suffix} cannot be read: No such file or directory"
    assert problem(directory) == f"directory{suffix} cannot be read: Is a directory"


def test_a_file_without_permission_is_an_error(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = written("x.txt", "a")
    monkeypatch.setattr(Path, "open", denied)
    assert problem(path) == "x.txt cannot be read: Permission denied"


def test_own_keys_of_a_row_override_the_options(written: Written) -> None:
    lines = [
        {"text": "a"},
        {"text": "b", "input_type": "document", "id": "B", "lang": "de"},
        {"text": "c", "task": "Own", "id": 7, "input_type": "query"},
        {"text": "d", "task": None, "id": None, "input_type": None},
    ]
    path = written("x.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_rows(path, input_type="query", task="Given") == [
        InputRow("1", "a", "query", "Given", line=1),
        InputRow("B", "b", "document", None, lang="de", line=2),
        InputRow("7", "c", "query", "Own", line=3),
        InputRow("4", "d", "query", "Given", line=4),
    ]


def test_a_language_must_be_a_name(written: Written) -> None:
    path = written("x.jsonl", '{"text": "a", "lang": 5}')
    assert problem(path) == "line 1 of x.jsonl must have a string as lang, got 5"


def test_records_may_have_columns_of_any_name(written: Written) -> None:
    path = written("x.csv", "score,Task\n1,b\n")
    assert read_records(path, "score") == [(2, {"score": "1", "Task": "b"})]


def test_records_are_read_as_they_are(written: Written) -> None:
    path = written("x.jsonl", '{"a": 1}\n{"b": null}\n')
    assert read_records(path, "a") == [(1, {"a": 1}), (2, {"b": None})]
    path = written("x.csv", "a,b\n1,\n")
    assert read_records(path, "a") == [(2, {"a": "1", "b": None})]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", "a", "a file of records must end in .jsonl or .csv, got"),
        ("x.jsonl", "{", "line 1 of .* is not JSON"),
        ("x.csv", "b\n1\n", r"must have 'a' \(or what --column names\), got 'b'"),
    ],
)
def test_damaged_records_are_refused(written: Written, name: str, data: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_records(written(name, data), "a")


def test_the_text_is_in_the_named_column(written: Written) -> None:
    path = written("x.jsonl", '{"text": "no", "task": "yes"}')
    [row] = read_rows(path, column="task")
    assert (row.text, row.task) == ("yes", None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is empty: every line must hold a JSON object"),
        (" ", "is empty: every line must hold a JSON object"),
        ('{"text": "  "}', "is empty: every row needs a text"),
        ('{"text": null}', "is empty: every row needs a text"),
        ('{"text": ["a"]}', "must have a string in 'text', got ['a']"),
        ('{"body": "a", "id": 1}', "must have 'text' (or what --column names), got 'body', 'id'"),
        ("{}", "must have 'text' (or what --column names), got nothing"),
        ('"a"', "must hold an object, got a string"),
        ('{"text": "a"', "is not JSON at column 13: Expecting ',' delimiter"),
        ('{"text": "a"} {"text": "b"}', "is not JSON at column 15: Extra data"),
        ('{"text": "a", "text": "b"}', "repeats the key 'text'"),
        ('{"text": "a", "score": NaN}', "holds NaN, which is not JSON"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "holds an integer of more than 20 digits, "),
        ('{"text": ' + "[" * 100_000, "is nested deeper than 64 levels"),
        ('{"text": "\\ud800"}', "holds half of a surrogate pair, U+D800, in a string"),
        ('{"text": "a", "id": true}', "must have a string or a whole number as id, got True"),
        ('{"text": "a", "id": 1.5}', "must have a string or a whole number as id, got 1.5"),
        (
            '{"text": "a", "input_type": "passage"}',
            "is refused: input_type must be 'query' or 'document', got 'passage'",
        ),
        (
            '{"text": "a", "input_type": []}',
            "is refused: input_type must be 'query' or 'document', got []",
        ),
        ('{"text": "a", "task": 5}', "is refused: task must be a text that is not empty, got 5"),
        ('{"text": "a", "task": "b"}', "has a task and is a document, which has none: say"),
        (
            '{"text": "a", "task": "b", "input_type": "document"}',
            "has a task and is a document, which has none: say",
        ),
        ('{"text": "a", "task": ""}', "is refused: task must be a text that is not empty, got ''"),
        ('{"text": "a", "Task": "b"}', "has 'Task', which counts for nothing: call it 'task'"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(written: Written, line: str, message: str) -> None:
    found = problem(written("x.jsonl", f'{{"text": "good"}}\n{line}\n{{"text": "good"}}\n'))
    assert found.startswith(f"line 2 of x.jsonl {message}")
    assert ";" not in found


def test_of_many_keys_the_first_are_listed(written: Written) -> None:
    path = written("x.jsonl", json.dumps(dict.fromkeys(map(str, range(12)))))
    assert problem(path).endswith(
        "got '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', and 2 more"
    )


def test_a_csv_field_may_span_lines(written: Written) -> None:
    path = written("x.csv", 'id,text\r\na,"one\r\ntwo\nthree"\r\n,"say ""x"", y"\r\n')
    assert read_rows(path) == [
        InputRow("a", "one\r\ntwo\nthree", line=2),
        InputRow("5", 'say "x", y', line=5),
    ]


def test_csv_columns_override_the_options_where_they_are_filled(written: Written) -> None:
    path = written("x.csv", "input_type,task,body\nquery,Own,a\n,,b\n")
    assert read_rows(path, column="body", task="Given") == [
        InputRow("2", "a", "query", "Own", line=2),
        InputRow("3", "b", "document", None, line=3),
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\x0c", "\0"])
def test_other_line_separators_are_text_in_csv(written: Written, separator: str) -> None:
    assert texts(written("x.csv", f"text\na{separator}b\n")) == [f"a{separator}b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "x.csv must have 'text' (or what --column names), got nothing"),
        ("id,body\n1,a\n", "x.csv must have 'text' (or what --column names), got 'id', 'body'"),
        ("text,id,text\na,1,b\n", "x.csv must have each column once, got several 'text'"),
        ("text\na\n\n", "line 3 of x.csv is empty: every row needs a text"),
        ('text\n" "\n', "line 2 of x.csv is empty: every row needs a text"),
        ("text,n\na\nb,2\n", "line 2 of x.csv must have 2 fields, got 1"),
        ('text\n"a\nb"c\n', "line 2 of x.csv is not CSV: ',' expected after '\"'"),
        ('text\nok\n"a\nb\n', "line 3 of x.csv is not CSV: unexpected end of data"),
        (
            "text, input_type, task\na, query, b\n",
            "x.csv has ' input_type', which counts for nothing: call it 'input_type'",
        ),
        (b"text\na\n\xff\n", "line 3 of x.csv is not UTF-8, at byte 7 of the file"),
    ],
)
def test_a_bad_csv_is_refused(written: Written, data: str | bytes, message: str) -> None:
    assert problem(written("x.csv", data)) == message


def test_a_csv_with_only_a_header_has_no_rows(written: Written) -> None:
    assert read_rows(written("x.csv", "text\n")) == []


def test_the_csv_field_limit_of_the_process_is_restored(written: Written) -> None:
    before = csv.field_size_limit()
    assert len(texts(written("x.csv", f"text\n{'a' * 1_000_000}\n"))[0]) == 1_000_000
    problem(written("x.csv", "none\n"))
    assert csv.field_size_limit() == before


def parquet(path: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "x.parquet",
        text=["a", "b\n", "c"],
        id=[5, None, 7],
        input_type=["query", None, "document"],
        other=[[1], [2], [3]],
    )
    assert read_rows(path) == [
        InputRow("5", "a", "query", line=1),
        InputRow("2", "b\n", line=2),
        InputRow("7", "c", line=3),
    ]


def test_bad_rows_of_a_parquet_file_are_listed(tmp_path: Path) -> None:
    assert problem(parquet(tmp_path / "x.parquet", text=["a", None, "c", ""])) == (
        "row 2 of x.parquet is empty: every row needs a text; "
        "row 4 is empty: every row needs a text"
    )
    assert problem(parquet(tmp_path / "x.parquet", text=[5])) == (
        "row 1 of x.parquet must have a string in 'text', got 5"
    )


def test_a_missing_column_of_a_parquet_file_lists_the_others(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", body=["a"], id=["b"])
    assert problem(path) == "x.parquet must have 'text' (or what --column names), got 'body', 'id'"


@pytest.mark.parametrize("data", [b"", b"text\na\n", b"PAR1" + b"\xff" * 40 + b"PAR1"])
def test_what_is_not_parquet_is_refused(written: Written, data: bytes) -> None:
    assert problem(written("x.parquet", data)).startswith("x.parquet cannot be read")


def test_text_of_a_parquet_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    array = pyarrow.array([b"\xff"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "x.parquet")
    assert "cannot be read as Parquet" in problem(tmp_path / "x.parquet")


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "x.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BackendError, match=r"reading a \.parquet file .* 'lowmem\[files\]'"):
        read_rows(path)


def test_many_rows_take_memory_for_their_texts_only(written: Written) -> None:
    path = written("x.jsonl", f'{{"text": "{"a" * 80}"}}\n' * 20_000)
    tracemalloc.start()
    try:
        rows = read_rows(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows) == 20_000
    assert peak < 20_000 * 600


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.csv"])
def test_a_text_of_a_million_characters_is_read(written: Written, name: str) -> None:
    text = "é" * 1_000_000
    lines = {"x.txt": text, "x.jsonl": json.dumps({"text": text}), "x.csv": f"text\n{text}"}
    assert texts(written(name, lines[name])) == [text]
