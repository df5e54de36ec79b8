import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem import cache
from lowmem.errors import InputError

SHA256 = "0123456789abcdef" * 4
OTHER_SHA256 = "f" * 64


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("LOWMEM_CACHE", str(path))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def test_own_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.directory() == Path("/own")


@pytest.mark.parametrize("own", ["", None])
def test_xdg_comes_second(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    if own is None:
        monkeypatch.delenv("LOWMEM_CACHE", raising=False)
    else:
        monkeypatch.setenv("LOWMEM_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.directory() == Path("/xdg/lowmem")


@pytest.mark.parametrize("xdg", ["", "relative"])
def test_home_comes_last(monkeypatch: pytest.MonkeyPatch, xdg: str) -> None:
    monkeypatch.delenv("LOWMEM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.directory() == Path("/home/someone/.cache/lowmem")


def test_a_user_without_a_home_is_told_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LOWMEM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InputError, match="set LOWMEM_CACHE"):
        cache.directory()
    cache.write_json("timings", {})
    assert cache.read_json("timings") is None


@pytest.mark.usefixtures("directory")
def test_what_is_written_is_read() -> None:
    cache.write_json("timings", {"ü": [1, 2.5, None]})
    assert cache.read_json("timings") == {"ü": [1, 2.5, None]}


def test_a_write_leaves_one_file(directory: Path) -> None:
    cache.write_json("timings", {"a": 1})
    cache.write_json("timings", {"a": 2})
    assert [path.name for path in directory.iterdir()] == ["timings.json"]


def test_only_the_user_can_look_into_the_cache(directory: Path) -> None:
    cache.write_json("timings", {})
    assert directory.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("directory")
def test_a_missing_file_is_empty_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert cache.read_json("timings") is None
    assert caplog.records == []


@pytest.mark.parametrize(
    "data", [b"", b'{"a": 1', b"\xff\xfe", b"[1]", b"[" * 100_000, b'{"a": NaN}']
)
def test_a_damaged_file_is_empty_with_a_warning(
    directory: Path, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    directory.mkdir()
    (directory / "timings.json").write_bytes(data)
    assert cache.read_json("timings") is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_damaged_file_is_replaced_by_the_next_write(directory: Path) -> None:
    directory.mkdir()
    (directory / "timings.json").write_text("damaged")
    cache.write_json("timings", {"a": 1})
    assert cache.read_json("timings") == {"a": 1}


def test_a_cache_that_cannot_be_written_is_one_warning(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory.write_text("a file where the directory should be")
    cache.write_json("timings", {})
    cache.write_json("timings", {})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_full_disk_leaves_the_old_value_and_no_temporary_file(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache.write_json("timings", {"a": 1})
    monkeypatch.setattr(os, "fsync", full)
    cache.write_json("timings", {"a": 2})
    assert cache.read_json("timings") == {"a": 1}
    assert [path.name for path in directory.iterdir()] == ["timings.json"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", ".", ".hidden", "a\n", "é", "x" * 201])
def test_a_name_that_is_not_a_plain_file_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="the name of a cached value must be"):
        cache.read_json(name)
    with pytest.raises(InputError, match="the name of a cached value must be"):
        cache.write_json(name, {})


@pytest.mark.usefixtures("directory")
def test_a_value_that_is_not_json_is_the_callers_error() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        cache.write_json("timings", {"a": float("nan")})


@pytest.mark.usefixtures("directory")
def test_a_hash_is_remembered(model: Path) -> None:
    assert cache.verified_sha256(model) is None
    cache.remember_sha256(model, SHA256)
    assert cache.verified_sha256(model) == SHA256


@pytest.mark.usefixtures("directory")
def test_a_hash_is_found_through_another_name_of_the_same_file(model: Path) -> None:
    cache.remember_sha256(model, SHA256)
    link = model.with_name("link")
    link.symlink_to(model)
    assert cache.verified_sha256(link) == SHA256


@pytest.mark.usefixtures("directory")
def test_a_hash_is_forgotten_when_the_size_changes(model: Path) -> None:
    cache.remember_sha256(model, SHA256)
    status = model.stat()
    model.write_bytes(b"weights and more")
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache.verified_sha256(model) is None


@pytest.mark.usefixtures("directory")
def test_a_hash_is_forgotten_when_the_time_changes_by_a_nanosecond(model: Path) -> None:
    cache.remember_sha256(model, SHA256)
    status = model.stat()
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert cache.verified_sha256(model) is None


@pytest.mark.usefixtures("directory")
def test_a_hash_is_forgotten_when_the_file_is_written_and_its_time_put_back(model: Path) -> None:
    """As an archive that is unpacked over another one does, in the same inode."""
    cache.remember_sha256(model, SHA256)
    status = model.stat()
    model.write_bytes(model.read_bytes()[::-1])
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache.identity(model.stat()) == cache.identity(status)
    assert cache.verified_sha256(model) is None


@pytest.mark.usefixtures("directory")
def test_a_hash_is_forgotten_when_the_file_is_replaced(model: Path) -> None:
    cache.remember_sha256(model, SHA256)
    status = model.stat()
    replacement = model.with_name("replacement")
    replacement.write_bytes(b"WEIGHTS")
    os.utime(replacement, ns=(status.st_atime_ns, status.st_mtime_ns))
    replacement.replace(model)
    assert cache.verified_sha256(model) is None


@pytest.mark.usefixtures("directory")
def test_a_file_that_changed_while_it_was_hashed_is_not_remembered(model: Path) -> None:
    before = model.stat()
    model.write_bytes(b"other weights")
    cache.remember_sha256(model, SHA256, before=before)
    assert cache.verified_sha256(model) is None


@pytest.mark.usefixtures("directory")
def test_a_hash_of_the_same_file_is_replaced(model: Path) -> None:
    cache.remember_sha256(model, SHA256)
    cache.remember_sha256(model, OTHER_SHA256)
    assert cache.verified_sha256(model) == OTHER_SHA256


@pytest.mark.usefixtures("directory")
def test_a_missing_file_has_no_hash(tmp_path: Path) -> None:
    cache.remember_sha256(tmp_path / "none", SHA256)
    assert cache.verified_sha256(tmp_path / "none") is None
    assert cache.read_json("verified") is None


@pytest.mark.parametrize("value", [5, None, "0123", SHA256.upper(), SHA256 + "\n"])
def test_what_is_not_a_hash_is_not_believed(directory: Path, model: Path, value: object) -> None:
    cache.remember_sha256(model, SHA256)
    stored = directory / "verified.json"
    stored.write_text(json.dumps(dict.fromkeys(json.loads(stored.read_text()), value)))
    assert cache.verified_sha256(model) is None


@pytest.mark.usefixtures("directory")
def test_the_oldest_hashes_are_forgotten_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_VERIFIED_LIMIT", 2)
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text("x")
        cache.remember_sha256(file, SHA256)
    assert [cache.verified_sha256(file) for file in files] == [None, SHA256, SHA256]


def test_processes_that_write_at_once_leave_a_valid_file(directory: Path) -> None:
    program = (
        "import sys; from lowmem.cache import write_json\n"
        "for _ in range(50): write_json('timings', {'of': sys.argv[1:] * 5000})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, writer]) for writer in "01"]
    while any(writer.poll() is None for writer in writers):
        value = cache.read_json("timings") or {"of": ["0"] * 5000}
        assert value["of"] in (["0"] * 5000, ["1"] * 5000)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [path.name for path in directory.iterdir()] == ["timings.json"]
