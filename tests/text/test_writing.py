"""Vectors that go into files, and outputs that cannot be written."""

import contextlib
import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lowmem.compute.engine import unit_length
from lowmem.data import Row
from lowmem.errors import BackendError, CapacityError, InputError
from lowmem.text.writing import check_room, check_vectors_output, write_vectors

ROWS = [Row("a", "x"), Row('b"\u2028', "y"), Row("3", "z")]
VECTORS = np.array([[0.1, -1e-8], [1.0, 3.4e38], [1 / 3, 0.0]], np.float32)
OUTPUTS = ["out.npy", "out.jsonl", "out.parquet"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_can_be_written_passes(tmp_path: Path, name: str) -> None:
    check_vectors_output(tmp_path / name, others=[tmp_path / "none.txt"])
    (tmp_path / name).touch()
    check_vectors_output(tmp_path / name, others=[tmp_path / "none.txt"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_output_in_the_working_directory_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_vectors_output(Path("out.npy"))


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "directory.npy").mkdir()
    for name, message in {
        "out.csv": r"must end in \.npy, \.parquet or \.jsonl",
        "none/out.npy": "its directory does not exist",
        "directory.npy": "an output must be a regular file",
    }.items():
        with pytest.raises(InputError, match=message):
            check_vectors_output(tmp_path / name)


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BackendError, match=r"writing a \.parquet file .* 'lowmem\[files\]'"):
        check_vectors_output(tmp_path / "out.parquet")


def test_vectors_are_not_written_to_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.npy, \.parquet or \.jsonl"):
        write_vectors(tmp_path / "out.csv", ROWS, VECTORS)


def test_an_output_in_a_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="its directory cannot be written to"):
        check_vectors_output(tmp_path / "out.npy")


def test_an_output_that_is_the_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_text("{}")
    link = source.with_name("link.jsonl")
    link.symlink_to(source)
    for output in (source, link):
        with pytest.raises(InputError, match="the command names that file twice"):
            check_vectors_output(output, others=[source])


def read_vectors(path: Path) -> tuple[list[str] | None, NDArray[np.float32]]:
    """Returns the ids, where the file has them, and the vectors."""
    if path.suffix == ".npy":
        return None, np.load(path)
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        vectors = np.array([line["embedding"] for line in lines], np.float32)
        return [line["id"] for line in lines], vectors
    table = pyarrow.parquet.read_table(path)
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 2)
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    return table["id"].to_pylist(), flat.reshape(-1, 2)


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("vectors", [VECTORS, np.asfortranarray(VECTORS), VECTORS[::-1]])
def test_vectors_are_read_as_they_were_written(
    tmp_path: Path, name: str, vectors: NDArray[np.float32]
) -> None:
    path = tmp_path / name
    path.write_text("what was there before")
    write_vectors(path, ROWS, vectors)
    ids, found = read_vectors(path)
    assert ids in (None, [row.id for row in ROWS])
    assert found.dtype == np.float32
    assert np.array_equal(found, vectors)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_rows_give_a_file_without_rows(tmp_path: Path, name: str) -> None:
    write_vectors(tmp_path / name, [], np.zeros((0, 2), np.float32))
    assert len(read_vectors(tmp_path / name)[1]) == 0


def test_numbers_in_jsonl_are_the_shortest(tmp_path: Path) -> None:
    write_vectors(tmp_path / "out.jsonl", ROWS[:1], np.array([[0.1, 1e-8]], np.float32))
    assert (tmp_path / "out.jsonl").read_text() == '{"id": "a", "embedding": [0.1, 1e-08]}\n'


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_every_float32_survives_jsonl(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[float]
) -> None:
    path = tmp_path_factory.mktemp("floats") / "out.jsonl"
    vectors = np.array([numbers], np.float32)
    write_vectors(path, ROWS[:1], vectors)
    found = np.array([json.loads(path.read_text())["embedding"]], np.float32)
    assert found.tobytes() == vectors.tobytes()


def test_the_permissions_of_an_output_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_vectors(tmp_path / "out.npy", ROWS, VECTORS)
    finally:
        os.umask(before)
    assert (tmp_path / "out.npy").stat().st_mode & 0o777 == 0o640


def test_an_output_behind_a_link_is_written_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "out.npy"
    link.symlink_to(tmp_path / "elsewhere" / "real.npy")
    write_vectors(link, ROWS, VECTORS)
    assert link.is_symlink()
    assert np.array_equal(np.load(tmp_path / "elsewhere" / "real.npy"), VECTORS)


@pytest.mark.parametrize(
    "vectors",
    [
        VECTORS.astype(np.float64),
        VECTORS[:2],
        VECTORS[0],
        np.array([[np.nan], [1], [1]], np.float32),
        np.array([[np.inf], [1], [1]], np.float32),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path: Path, vectors: NDArray[np.float32]) -> None:
    with pytest.raises(InputError, match=r"vectors must be finite float32 \[3, dim\], got float"):
        write_vectors(tmp_path / "out.npy", ROWS, vectors)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Lets this process write files of at most a thousand bytes, pytest's own output included."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", OUTPUTS)
def test_without_room_the_old_file_stays_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    vectors = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    refused = pytest.raises(CapacityError, match=rf"{name} cannot be written: File too large")
    with refused, small_files():
        write_vectors(tmp_path / name, ROWS, vectors)
    assert (tmp_path / name).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, CapacityError), (errno.EIO, InputError)]
)
def test_a_failing_disk_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind, match=f"cannot be written: {os.strerror(number)}"):
        write_vectors(tmp_path / "out.npy", ROWS, VECTORS)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_vectors(tmp_path / "out.npy", ROWS, VECTORS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("suffix", "bytes_each"), [(".npy", 4), (".parquet", 4), (".jsonl", 14)])
def test_an_output_that_the_disk_has_no_room_for_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, bytes_each: int
) -> None:
    needed = 10 * 8 * bytes_each
    usage = SimpleNamespace(free=needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_room(tmp_path / f"out{suffix}", 10, 8)
    usage.free -= 1
    with pytest.raises(CapacityError, match=f"needs {needed} bytes of disk, {needed - 1}"):
        check_room(tmp_path / f"out{suffix}", 10, 8)


def test_a_row_of_jsonl_takes_about_what_is_reserved_for_it(tmp_path: Path) -> None:
    vectors = unit_length(np.random.default_rng(0).standard_normal((50, 4096)).astype(np.float32))
    rows = [Row(str(number), "text") for number in range(50)]
    write_vectors(tmp_path / "out.jsonl", rows, vectors)
    assert 0.9 < (tmp_path / "out.jsonl").stat().st_size / (vectors.size * 14) < 1.05
