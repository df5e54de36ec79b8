"""GGUF files that end too early, or whose head is damaged or of another version."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.sources import GgufFile
from lowmem.errors import BundleError


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, tiny_gguf: Path) -> None:
    whole = tiny_gguf.read_bytes()
    path = tmp_path / "x.gguf"
    for size in [*range(0, 200, 7), *range(200, len(whole), len(whole) // 50), len(whole) - 64]:
        path.write_bytes(whole[:size])
        with pytest.raises(BundleError, match=r"no GGUF file|truncated") as caught:
            GgufFile(path)
        assert "\n" not in str(caught.value)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None
)
@given(st.data())
def test_no_damage_to_the_head_gives_another_error(
    tmp_path: Path, tiny_gguf: Path, data: st.DataObject
) -> None:
    whole = bytearray(tiny_gguf.read_bytes())
    head = whole.index(b"output.weight")
    for position in data.draw(st.lists(st.integers(0, head), min_size=1, max_size=3)):
        whole[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole)
    with contextlib.suppress(BundleError):
        GgufFile(path)


@pytest.mark.parametrize("length", [2**20, 2**62, 2**64 - 1])
def test_a_count_is_held_against_the_file_before_it_is_believed(
    tmp_path: Path, tiny_gguf: Path, length: int
) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    name = b"tokenizer.ggml.token_type"
    at = data.index(name) + len(name) + 4 + 4  # behind the types of the value and its items
    data[at : at + 8] = length.to_bytes(8, "little")
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(BundleError, match="truncated or damaged: its head goes past its end"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("at", "value", "problem"),
    [
        (0, b"GGML", "no GGUF file: it does not begin with GGUF"),
        (4, (1).to_bytes(4, "little"), "GGUF version must be 2 or 3, got 1"),
        (4, (3).to_bytes(4, "big"), "GGUF version must be 2 or 3, got 50331648"),
    ],
)
def test_another_format_or_version_is_refused(
    tmp_path: Path, tiny_gguf: Path, at: int, value: bytes, problem: str
) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    data[at : at + len(value)] = value
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=problem):
        GgufFile(path)


def test_a_head_is_not_believed_to_fill_a_large_file(tmp_path: Path, tiny_gguf: Path) -> None:
    data = bytearray(tiny_gguf.read_bytes())
    name = b"tokenizer.ggml.token_type"
    at = data.index(name) + len(name) + 4 + 4
    data[at : at + 8] = (2**31).to_bytes(8, "little")
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    os.truncate(path, 2**40)
    with pytest.raises(BundleError, match="is damaged: its head is larger than 67108864 bytes"):
        GgufFile(path)
