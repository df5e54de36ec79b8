"""Outputs that are refused before anything is computed for them."""

import os
from pathlib import Path

import numpy as np
import pytest

from lowmem.data import Row
from lowmem.errors import InputError
from lowmem.fidelity.neighbours import Neighbours
from lowmem.fidelity.reference import Reference
from lowmem.fidelity.report import Compared
from lowmem.fidelity.store import check_dump, dump
from lowmem.outputs import check_output, write_text

DUMPED = '{"id": "a", "input_type": "document", "task": null, "text": "b"}\n'


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name, why in {
        "none/out.json": "its directory does not exist",
        "folder": "an output must be a regular file",
        "loop": "an output must be a regular file",
        "pipe": "an output must be a regular file",
    }.items():
        with pytest.raises(InputError, match=f"{name} cannot be written: {why}"):
            check_output(tmp_path / name)


def test_an_output_must_be_none_of_the_commands_other_files(tmp_path: Path) -> None:
    other, missing = tmp_path / "other.json", tmp_path / "missing.json"
    other.write_text("")
    for given in (other, missing):
        with pytest.raises(InputError, match="the command names that file twice"):
            check_output(given, [None, given])
    check_output(missing, [None, other])


def test_an_output_lies_in_no_directory_of_the_commands_inputs(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    for place in ("bundle", "link"):
        with pytest.raises(InputError, match="which the command reads or writes otherwise"):
            check_output(tmp_path / place / "lowmem.json", [tmp_path / "bundle"])
    with pytest.raises(InputError, match="which the command reads or writes otherwise"):
        check_dump(tmp_path / "bundle" / "dump", [tmp_path / "bundle"])


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    check_output(tmp_path / "link")
    write_text(tmp_path / "link", "é")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "é"


def test_a_dump_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    check_dump(tmp_path / "new", [])
    (tmp_path / "new" / "int8-torch-cpu-fp32.npy").write_bytes(b"mine")
    with pytest.raises(InputError, match="npy files that no dump wrote"):
        check_dump(tmp_path / "new", [])
    check_dump(tmp_path, [])
    (tmp_path / "texts.jsonl").write_text(DUMPED)
    (tmp_path / "reference.npy").write_bytes(b"")
    check_dump(tmp_path, [])
    with pytest.raises(InputError, match="the command names that file twice"):
        check_dump(tmp_path, [tmp_path / "texts.jsonl"])
    for text in ("", "no JSON", '{"text": "mine"}\n'):
        (tmp_path / "texts.jsonl").write_text(text)
        with pytest.raises(InputError, match="that no dump wrote: give --dump another directory"):
            check_dump(tmp_path, [])
    with pytest.raises(InputError, match="--dump takes a directory"):
        check_dump(tmp_path / "texts.jsonl", [])


def test_a_dump_that_is_refused_leaves_no_directory(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(InputError, match="which the command reads or writes otherwise"):
        check_dump(tmp_path / "bundle" / "dump", [tmp_path / "bundle"])
    assert not list((tmp_path / "bundle").iterdir())


def test_a_dump_leaves_no_vectors_of_an_earlier_one(tmp_path: Path) -> None:
    vectors = np.ones((1, 4), np.float32)
    rows = (Row("a", "a text"),)
    for plan in ("int4-torch-cpu-fp32", "int8-torch-cpu-fp32"):
        one = Compared({"plan": plan}, np.ones(1), vectors, Neighbours(*[vectors] * 3))
        dump(tmp_path, [one], Reference("mine", rows, (3,), 0, vectors, ""))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"texts.jsonl", "reference.npy", "int8-torch-cpu-fp32.npy"}
