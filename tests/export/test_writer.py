import errno
import hashlib
import os
import resource
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from export.layout import Layout
from export.writer import TensorWriter, holds
from lowmem.artifact.tensors import RawTensor, TensorSpec, header_bytes, read_header
from lowmem.errors import BundleError, CapacityError

SPECS = {
    "first": TensorSpec("F16", (3, 5)),
    "second": TensorSpec("U8", ()),
    "third": TensorSpec("F32", (2,)),
}
CONSTANT = RawTensor("F32", np.array([1.5, -2.0], np.float32))
FIRST = RawTensor("F16", np.arange(15, dtype=np.float16).reshape(3, 5))
SECOND = RawTensor("U8", np.array(7, np.uint8))


@pytest.fixture
def layout() -> Layout:
    header = header_bytes(SPECS)
    offsets, end = {}, len(header)
    for name, spec in SPECS.items():
        offsets[name] = end
        end += spec.nbytes
    return Layout(header, SPECS, offsets, {"third": CONSTANT}, end)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def write_all(path: Path, layout: Layout) -> None:
    with TensorWriter(path, layout) as writer:
        writer.write("second", SECOND)
        writer.write("first", FIRST)
        writer.finish()


def check(path: Path) -> None:
    stored = read_header(path)
    for name, raw in {"first": FIRST, "second": SECOND, "third": CONSTANT}.items():
        assert stored[name].dtype == raw.dtype
        np.testing.assert_array_equal(stored[name].read().array, raw.array, strict=True)


def test_tensors_may_be_written_in_any_order(path: Path, layout: Layout) -> None:
    write_all(path, layout)
    check(path)


def test_a_transposed_array_is_written_as_what_it_shows(path: Path, layout: Layout) -> None:
    with TensorWriter(path, layout) as writer:
        writer.write("first", RawTensor("F16", np.asfortranarray(FIRST.array)))
        writer.write("second", SECOND)
        writer.finish()
    check(path)


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_them(
    path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:7], at))
    write_all(path, layout)
    check(path)


@pytest.mark.parametrize(
    ("raw", "got"),
    [
        (RawTensor("F16", np.zeros((5, 3), np.float16)), "dtype='F16', shape=(5, 3)"),
        (RawTensor("BF16", np.zeros((3, 5), np.uint16)), "dtype='BF16', shape=(3, 5)"),
    ],
)
def test_a_tensor_other_than_planned_is_refused(
    raw: RawTensor, got: str, path: Path, layout: Layout
) -> None:
    with TensorWriter(path, layout) as writer, pytest.raises(BundleError) as caught:
        writer.write("first", raw)
    assert str(caught.value) == (
        f"first must be TensorSpec(dtype='F16', shape=(3, 5)), got TensorSpec({got})"
    )


def test_a_file_that_lacks_a_tensor_is_not_finished(path: Path, layout: Layout) -> None:
    with TensorWriter(path, layout) as writer:
        writer.write("first", FIRST)
        with pytest.raises(AssertionError, match="second"):
            writer.finish()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync"])
def test_a_full_disk_is_a_capacity_error(
    code: int, call: str, path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CapacityError) as caught:
        write_all(path, layout)
    assert str(caught.value) == f"the disk is full: {path} needs {layout.size} bytes"


def test_a_full_disk_is_a_capacity_error_in_the_middle_too(
    path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with TensorWriter(path, layout) as writer:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(CapacityError, match="the disk is full"):
            writer.write("first", FIRST)


def test_a_limit_on_the_size_of_files_is_a_capacity_error(path: Path, layout: Layout) -> None:
    size = 2**24
    large = Layout(layout.header, layout.specs, layout.offsets, layout.constants, size)
    with _largest_file(2**23), pytest.raises(CapacityError) as caught:
        TensorWriter(path, large)
    assert str(caught.value) == (
        f"a file of {size} bytes is over the limit of its disk or user ({path})"
    )


def test_another_failure_of_the_disk_is_passed_on(
    path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        TensorWriter(path, layout)
    assert caught.value.errno == errno.EIO


def test_what_is_written_is_told_with_its_checksums_once(path: Path, layout: Layout) -> None:
    with TensorWriter(path, layout) as writer:
        writer.write("first", FIRST)
        assert writer.written() == {
            "first": zlib.crc32(FIRST.array.tobytes()),
            "third": zlib.crc32(CONSTANT.array.tobytes()),
        }
        writer.write("second", SECOND)
        assert writer.written() == {"second": zlib.crc32(b"\7")}
        assert writer.written() == {}


def test_another_writer_adds_what_is_missing(path: Path, layout: Layout) -> None:
    with TensorWriter(path, layout) as writer:
        writer.write("first", FIRST)
        kept = writer.written()
    assert holds(path, layout, kept)
    with TensorWriter(path, layout, kept) as writer:
        writer.write("second", SECOND)
        assert writer.written().keys() == {"second"}
        writer.finish()
    check(path)


def test_a_file_is_hashed_while_it_is_written_and_by_whoever_goes_on_with_it(
    path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, read = os.preadv, []

    def reading(file: int, buffers: list[memoryview], begin: int) -> int:
        size = preadv(file, buffers, begin)
        read.append((begin, begin + size))
        return size

    monkeypatch.setattr(os, "preadv", reading)
    with TensorWriter(path, layout) as writer:
        writer.write("second", SECOND)
        writer.hash_written()
        assert read == []  # the first tensor is missing
        writer.write("first", FIRST)
        writer.hash_written()
        assert [end for _, end in read][-1] == layout.size
        kept = writer.written()
        count = len(read)
        assert writer.finish() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert len(read) == count
    with TensorWriter(path, layout, kept) as writer:
        assert writer.finish() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_holds_what_was_written_until_a_byte_changes(path: Path, layout: Layout) -> None:
    with TensorWriter(path, layout) as writer:
        writer.write("first", FIRST)
        kept = writer.written()
    whole = path.read_bytes()
    unwritten = layout.offsets["second"]
    for at in range(layout.size):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert holds(path, layout, kept) == (at == unwritten), at
    for other in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(other)
        assert not holds(path, layout, kept)


def test_a_link_a_directory_and_a_missing_file_hold_nothing(path: Path, layout: Layout) -> None:
    write_all(path, layout)
    assert holds(path, layout, {})
    link = path.with_name("link")
    link.symlink_to(path)
    assert not holds(link, layout, {})
    path.with_name("other").hardlink_to(path)
    assert not holds(path, layout, {})
    assert not holds(path.parent, layout, {})
    assert not holds(path.with_name("none"), layout, {})


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
