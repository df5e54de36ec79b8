"""Room on disks, and arrays in files without a name."""

import os
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lowmem.disk import check_room, mapped, shown_name
from lowmem.errors import CapacityError
from lowmem.hardware.peak import MemoryPeak


def test_a_name_that_is_not_utf8_can_be_written_to_json() -> None:
    path = Path(os.fsdecode(b"a/caf\xe9.txt"))
    assert shown_name(path) == "caf\\xe9.txt"
    assert shown_name(Path("a/café.txt")) == "café.txt"


def test_room_is_asked_of_the_nearest_directory_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=99)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    place = tmp_path / "not" / "there"
    check_room(place, 99, "a test")
    with pytest.raises(CapacityError) as caught:
        check_room(place, 100, "a test", "use less")
    assert asked == [tmp_path] * 2
    assert str(caught.value) == (
        f"a test needs 100 bytes of disk, 99 are free ({place}): make room, or use less"
    )


def test_an_array_is_zeros_that_can_be_written_and_leaves_no_file(tmp_path: Path) -> None:
    array = mapped(tmp_path, (3, 5), "a test")
    assert array.dtype == np.float32
    assert array.shape == (3, 5)
    assert not array.any()
    array[1] = 7
    assert array.sum() == 35
    assert not list(tmp_path.iterdir())


def test_what_lies_in_the_file_is_no_memory_of_the_process(tmp_path: Path) -> None:
    with MemoryPeak(os.getpid()) as peak:
        while not peak.bytes:
            time.sleep(0.01)
        before = peak.bytes
        array = mapped(tmp_path, (32, 2**20), "a test")  # 128 MiB
        for row in array:
            row[:] = 1
            time.sleep(0.01)
    assert peak.bytes - before < 2**25


def test_a_file_that_has_no_room_is_one_clear_error(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CapacityError, match=r"^the disk is full: a test needs 4000000 bytes"):
            mapped(tmp_path, (1000, 1000), "a test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
