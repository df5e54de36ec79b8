import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem.artifact import strict_json
from lowmem.errors import BundleError

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20) + 1, 10**20 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(JSON_VALUES)
def test_what_is_written_is_read(value: object) -> None:
    assert strict_json.parse(strict_json.dumps(value)) == value
    assert strict_json.loads(strict_json.canonical(value), "here") == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "repeats the key 'c'"),
        ('{"a": 1, "\\u0061": 2}', "repeats the key 'a'"),
        ("[NaN]", "holds NaN, which is not JSON"),
        ("[Infinity]", "holds Infinity, which is not JSON"),
        ("-Infinity", "holds -Infinity, which is not JSON"),
        ("[1e999]", "holds a number that is too large, 1e999"),
        ("123456789012345678901", "holds an integer of more than 20 digits, 123456789012345678901"),
        ("-" + "9" * 5000, "holds an integer of more than 20 digits, -" + "9" * 39 + "…"),
        ("[" * 65 + "]" * 65, "is nested deeper than 64 levels"),
        ('{"a":' * 65 + "1" + "}" * 65, "is nested deeper than 64 levels"),
        ("[" * 1_000_000, "is nested deeper than 64 levels"),
        ('"\\ud800"', "holds half of a surrogate pair, U+D800, in a string"),
        ('[{"a": ["\\udc00\\ud800"]}]', "holds half of a surrogate pair, U+DC00, in a string"),
        ('{"\\udfff": 1}', "holds half of a surrogate pair, U+DFFF, in a string"),
    ],
)
def test_what_python_would_let_pass_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BundleError) as caught:
        strict_json.loads(text, "config.json")
    assert str(caught.value) == f"config.json {reason}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1, column 1: Expecting value"),
        ('{\n  "a": }', "line 2, column 8: Expecting value"),
        ("{} {}", "line 1, column 4: Extra data"),
        ('"a\nb"', "line 1, column 3: Invalid control character at"),
        ("\ufeff{}", "line 1, column 1: Expecting value"),
    ],
)
def test_wrong_syntax_is_named_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(BundleError) as caught:
        strict_json.loads(text, "config.json")
    assert str(caught.value) == f"config.json is not JSON at {reason}"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 64 + "]" * 64,
        "-12345678901234567890",
        '"\\ud83d\\ude00"',
        ' {"a": [1.5e300, true, null]} \n',
        '["\u2028\u0085\x7f"]',
    ],
)
def test_what_is_within_the_limits_is_read(text: str) -> None:
    assert strict_json.loads(text, "here") == json.loads(text)


def test_the_limit_is_in_bytes_for_text_too() -> None:
    assert strict_json.loads('"ééé"', "here", max_bytes=8) == "ééé"
    for data in ('"ééé"', '"ééé"'.encode()):
        with pytest.raises(BundleError, match="here must be at most 7 bytes long, and is longer"):
            strict_json.loads(data, "here", max_bytes=7)


@pytest.mark.parametrize("data", [b'{"a": "\xff"}', '{"a": "\ud800"}'])
def test_what_is_not_utf8_is_named_with_its_byte(data: bytes | str) -> None:
    with pytest.raises(BundleError, match="here is not UTF-8 at byte 7"):
        strict_json.loads(data, "here")


def test_an_object_is_read_from_a_file_or_a_link_to_it(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    link = tmp_path / "link"
    link.symlink_to(path)
    assert strict_json.read_object(path) == strict_json.read_object(link) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("null", "null"),
        ("true", "true"),
        ("false", "false"),
        ("0", "a number"),
        ("1.5", "a number"),
        ('"a"', "a string"),
        ("[]", "an array"),
    ],
)
def test_a_file_must_hold_an_object(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BundleError, match=rf"config\.json must hold a JSON object, got {found}"):
        strict_json.read_object(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.json cannot be read: No such file or directory"):
        strict_json.read_object(tmp_path / "none.json")


def test_what_is_not_a_regular_file_is_refused_unopened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(BundleError, match="must be a regular file"):
            strict_json.read_object(path)


def test_a_file_over_the_limit_is_refused_at_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BundleError, match=r"huge\.json must be at most 1000 bytes long"):
        strict_json.read_object(path, max_bytes=1000)


def test_written_json_is_sorted_indented_and_ends_with_a_newline() -> None:
    assert strict_json.dumps({"b": [1], "a": "ü"}) == '{\n  "a": "ü",\n  "b": [\n    1\n  ]\n}\n'


def test_canonical_json_is_sorted_utf8_without_white_space() -> None:
    assert strict_json.canonical({"b": [1, 2], "a": "ü"}) == b'{"a":"\xc3\xbc","b":[1,2]}'


def test_what_is_not_json_is_not_written() -> None:
    for write in (strict_json.dumps, strict_json.canonical):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write([float("nan")])


def test_bytes_are_those_of_a_regular_file_within_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert strict_json.read_bytes(file, max_bytes=5) == b"12345"
    with pytest.raises(BundleError, match="must be at most 4 bytes long, and is longer"):
        strict_json.read_bytes(file, max_bytes=4)
    os.truncate(file, 2**40)
    with pytest.raises(BundleError, match="must be at most 67108864 bytes long"):
        strict_json.read_bytes(file)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="pipe must be a regular file"):
        strict_json.read_bytes(tmp_path / "pipe")
