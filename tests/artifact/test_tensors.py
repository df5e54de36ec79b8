import contextlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file
from safetensors.torch import save_file

from lowmem.artifact.tensors import (
    INDEX_FILE,
    SINGLE_FILE,
    RawTensor,
    StoredTensor,
    TensorSpec,
    header_bytes,
    read_directory,
    read_header,
    some_names,
)
from lowmem.errors import BundleError
from tests.disk import cached_file, read_bytes

ONE = {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def shards(directory: Path, weight_map: Mapping[str, Any], **files: Any) -> Path:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, header in files.items():
        write(directory / f"{name}.safetensors", header, b"\0" * 4)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as the safetensors library writes it."""
    torch.manual_seed(0)
    tensors = {
        "f32": torch.randn(3, 5),
        "f16": torch.randn(7).half(),
        "bf16": torch.randn(2, 2).bfloat16(),
        "u8": torch.arange(11, dtype=torch.uint8),
        "i8": torch.arange(-5, 5, dtype=torch.int8),
        "i32": torch.arange(4, dtype=torch.int32),
        "i64": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path_factory.mktemp("saved") / SINGLE_FILE
    save_file(tensors, path, metadata={"format": "pt"})
    return path, tensors


@pytest.mark.parametrize("way", [StoredTensor.map, StoredTensor.read])
def test_what_the_library_saves_is_read(
    saved: tuple[Path, dict[str, torch.Tensor]], way: Any
) -> None:
    path, tensors = saved
    stored = read_header(path)
    assert stored.keys() == tensors.keys()
    for name, expected in tensors.items():
        raw = way(stored[name])
        assert raw.shape == tuple(expected.shape)
        assert raw.nbytes == expected.nbytes == stored[name].spec.nbytes
        assert np.array_equal(raw.float32(), expected.float().numpy()), name


def test_what_is_written_is_read_by_the_library(tmp_path: Path) -> None:
    values: dict[str, NDArray[Any]] = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.arange(3, dtype=np.int8),
    }
    specs = {"b": TensorSpec("F16", (2, 3)), "a": TensorSpec("I8", (3,))}
    head = header_bytes(specs)
    assert len(head) % 64 == 0
    path = tmp_path / SINGLE_FILE
    path.write_bytes(head + b"".join(value.tobytes() for value in values.values()))
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert np.array_equal(loaded[name], value)
        assert np.array_equal(read_header(path)[name].map().array, value)


@given(st.integers(0, 0xFFFF))
def test_bfloat16_becomes_the_float32_that_it_is(bits: int) -> None:
    raw = RawTensor("BF16", np.array([bits], np.uint16))
    expected = torch.tensor([bits], dtype=torch.uint16).view(torch.bfloat16).float().numpy()
    assert raw.float32().tobytes() == expected.tobytes()


def test_a_mapped_tensor_is_neither_in_memory_nor_tied_to_its_file(
    saved: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, _ = saved
    before = path.read_bytes()
    array = read_header(path)["f32"].map().array
    base = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert isinstance(base, mmap.mmap)
    array[:] = 0
    assert path.read_bytes() == before


def test_a_tensor_at_an_odd_offset_is_read(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0], np.float16)
    header = {"a": entry([1], 0, 1), "b": entry([2], 1, 5, "F16")}
    stored = read_header(write(tmp_path / "odd", header, b"\1" + values.tobytes()))
    assert stored["b"].offset % 2 != stored["a"].offset % 2
    assert np.array_equal(stored["b"].map().array, values)
    assert np.array_equal(stored["b"].read().array, values)


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_an_empty_tensor_may_share_an_offset(tmp_path: Path, names: str) -> None:
    entries = {"a": entry([0, 2], 0, 0), "b": entry([1], 0, 1)}
    stored = read_header(write(tmp_path / "x", {name: entries[name] for name in names}, b"\7"))
    assert stored["a"].map().shape == stored["a"].read().shape == (0, 2)
    assert stored["b"].map().array.tolist() == [7]


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"a": entry([8192], 0, 8192)}, b"\0" * 8192)
    stored = replace(read_header(path)["a"], version=None)
    os.truncate(path, 4000)
    with pytest.raises(BundleError, match=r"x cannot be mapped"):
        stored.map()
    with pytest.raises(BundleError, match=r"x ends before byte"):
        stored.read()
    path.unlink()
    with pytest.raises(BundleError, match=r"x cannot be mapped"):
        stored.map()
    with pytest.raises(BundleError, match=r"x cannot be read"):
        stored.read()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "truncated or no safetensors file: 0 bytes"),
        (b"\1\2", "truncated or no safetensors file: 2 bytes"),
        (b"\xff" * 8 + b"{}", "truncated or no safetensors file: 10 bytes, header of 1844674407"),
        (b"\3" + b"\0" * 7 + b"{}", "truncated or no safetensors file: 10 bytes, header of 3"),
        (b"\2" + b"\0" * 7 + b"[]", "the header of .* must be an object"),
        (b"\2" + b"\0" * 7 + b"{]", "is not JSON"),
        (b"\2" + b"\0" * 7 + b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=problem):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        (ONE, 3, "must be .* bytes long by its header, got .*: it is truncated"),
        (ONE, 5, "bytes follow the last tensor"),
        ({"a": entry([2], 0, 2), "b": entry([2], 3, 5)}, 5, "without gaps or overlaps .* b"),
        ({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, 3, "without gaps or overlaps .* b"),
        ({"a": entry([2], 1, 3)}, 3, "without gaps or overlaps .* a"),
        ({"a": entry([2], 0, 2), "b": entry([2], 0, 2)}, 2, "without gaps or overlaps"),
        ({"a": entry([2], 0, 3)}, 3, "U8 of shape .2. takes 2 bytes, got data_offsets .0, 3."),
        ({"a": entry([2], 2, 0)}, 2, "takes 2 bytes, got data_offsets .2, 0."),
        ({"a": entry([-2], 0, 2)}, 2, "shape must be a list of sizes"),
        ({"a": entry([True], 0, 1)}, 1, "shape must be a list of sizes"),
        ({"a": entry([2**20] * 3, 0, 1)}, 1, "shape must be a list of sizes"),
        ({"a": {**entry([1], 0, 1), "shape": 1}}, 1, "shape must be a list of sizes, got 1"),
        ({"a": {**entry([1], 0, 1), "shape": [1.0]}}, 1, "shape must be a list of sizes"),
        ({"a": entry([1], 0, 1, "F8_E4M3")}, 1, "dtype must be one of F32, .* got 'F8_E4M3'"),
        ({"a": {**entry([1], 0, 1), "data_offsets": [0]}}, 1, "must be two byte offsets"),
        ({"a": {**entry([1], 0, 1), "data_offsets": [0.0, 1.0]}}, 1, "must be two byte offsets"),
        ({"a": {**entry([1], 0, 1), "data_offsets": [-1, 0]}}, 1, "must be two byte offsets"),
        ({"a": {**entry([1], 0, 1), "data_offsets": "01"}}, 1, "must be two byte offsets"),
        ({"a": {**entry([1], 0, 1), "x": 1}}, 1, "needs dtype, shape and data_offsets alone"),
        ({"a": []}, 1, "needs dtype, shape and data_offsets alone"),
        (b'{"a": 1, "a": 2}', 1, "repeats the key 'a'"),
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 1, "nested deeper"),
        (b'{"a": NaN}', 1, "holds NaN"),
    ],
)
def test_a_header_that_breaks_the_format_is_refused(
    tmp_path: Path, header: Any, data: int, problem: str
) -> None:
    with pytest.raises(BundleError, match=problem):
        read_header(write(tmp_path / "x", header, b"\0" * data))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_no_damage_gives_another_error(tmp_path: Path, data: st.DataObject) -> None:
    header = json.dumps({"a": entry([2], 0, 2), "b": entry([1, 3], 2, 5)}).encode()
    whole = bytearray(len(header).to_bytes(8, "little") + header + bytes(5))
    for position in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=3)):
        whole[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(BundleError):
        for tensor in read_header(path).values():
            assert tensor.read().array.tobytes() == tensor.map().array.tobytes()


def test_a_single_file_or_shards_are_found(tmp_path: Path) -> None:
    first, second = {"a": entry([4], 0, 4)}, {"b": entry([4], 0, 4)}
    shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=first, two=second)
    found = read_directory(tmp_path)
    assert {name: tensor.path.name for name, tensor in found.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }
    write(tmp_path / SINGLE_FILE, {"c": entry([4], 0, 4)}, b"\0" * 4)
    assert read_directory(tmp_path).keys() == {"c"}


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors",
        "/one.safetensors",
        "sub/one.safetensors",
        "..",
        "",
        "one.bin",
        "\0.safetensors",
        ["one.safetensors"],
        None,
    ],
)
def test_a_shard_outside_the_directory_is_refused(tmp_path: Path, name: Any) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    write(tmp_path / "one.safetensors", {"a": entry([4], 0, 4)}, b"\0" * 4)
    with pytest.raises(BundleError, match=r"a shard must be a \.safetensors file beside its index"):
        read_directory(shards(directory, {"a": name}))


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({"a": "one.safetensors"}, "index.json and its shards disagree about extra"),
        (
            {"a": "one.safetensors", "extra": "one.safetensors", "b": "one.safetensors"},
            "index.json and its shards disagree about b",
        ),
        (
            {"a": "one.safetensors", "extra": "two.safetensors", "b": "two.safetensors"},
            "index.json and its shards disagree about extra",
        ),
        (
            {"a": "one.safetensors", "extra": "one.safetensors", "c": "three.safetensors"},
            "three.safetensors cannot be read",
        ),
        ({"a": "one.safetensors", "d": "copy.safetensors"}, "stands in more than one shard"),
        ({}, "weight_map must be an object that is not empty"),
        (["one.safetensors"], "weight_map must be an object that is not empty"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, weight_map: Any, problem: str
) -> None:
    one = {"a": entry([1], 0, 1), "extra": entry([3], 1, 4)}
    files = {"one": one, "two": {"b": entry([4], 0, 4)}, "copy": {"a": entry([4], 0, 4)}}
    with pytest.raises(BundleError, match=problem):
        read_directory(shards(tmp_path, weight_map, **files))


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"holds neither model\.safetensors nor model\.safe"):
        read_directory(tmp_path)
    with pytest.raises(BundleError, match="x cannot be read: No such file"):
        read_header(tmp_path / "x")
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(BundleError, match=r"model\.safetensors cannot be read: Is a directory"):
        read_directory(tmp_path)


def test_dropped_bytes_are_read_from_the_disk_again_and_no_others(tmp_path: Path) -> None:
    size = 2**22
    file = cached_file(tmp_path, 2 * size)
    dropped = StoredTensor("U8", (size,), file, 100)
    kept = StoredTensor("U8", (size // 4,), file, size + size // 2)
    dropped.drop_cached()
    before = read_bytes()
    kept.read()
    assert read_bytes() == before
    dropped.read()
    # The system keeps and reads pages in groups, of which those at the ends may stay.
    assert size / 2 < read_bytes() - before < 1.5 * size


def test_of_tensors_dropped_one_after_another_nothing_stays(tmp_path: Path) -> None:
    sizes = [3_000_001, 2_500_000, 2_888_607]  # the pages that they share lie in large groups
    file = cached_file(tmp_path, sum(sizes))
    tensors = [
        StoredTensor("U8", (size,), file, sum(sizes[:place])) for place, size in enumerate(sizes)
    ]
    for stored in tensors:
        stored.drop_cached()
    before = read_bytes()
    for stored in tensors:
        stored.read()
    assert read_bytes() - before >= sum(sizes)


def test_a_file_that_has_vanished_cannot_be_dropped(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="gone cannot be read"):
        StoredTensor("U8", (1,), tmp_path / "gone", 0).drop_cached()


@pytest.mark.parametrize("way", [StoredTensor.map, StoredTensor.read, StoredTensor.drop_cached])
def test_a_file_that_another_has_taken_the_place_of_is_not_read(
    tmp_path: Path, way: Callable[[StoredTensor], object]
) -> None:
    path, other = tmp_path / SINGLE_FILE, tmp_path / "other"
    for file in (path, other):
        file.write_bytes(header_bytes({"a": TensorSpec("U8", (3,))}) + b"abc")
    stored = read_header(path)["a"]
    way(stored)
    os.utime(other, ns=(0, path.stat().st_mtime_ns + 1))
    other.replace(path)
    with pytest.raises(BundleError, match="has changed since it was opened: load it again"):
        way(stored)


def test_few_names_stand_for_many() -> None:
    assert some_names(["b", "a"]) == "a, b"
    assert some_names(map(str, range(9)), most=2) == "0, 1 and 7 more"


@pytest.mark.parametrize("shape", [[1] * 9, [10**19] * 40_000, [10**15 + 1]])
def test_a_shape_of_too_many_or_too_large_sizes_is_refused_at_once(
    tmp_path: Path, shape: list[int]
) -> None:
    with pytest.raises(BundleError, match="shape must be a list of sizes") as caught:
        read_header(write(tmp_path / "x.safetensors", {"a": entry(shape, 0, 1)}, b"0"))
    assert len(str(caught.value)) < 500


def test_a_pipe_is_no_safetensors_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(BundleError, match=r"model\.safetensors must be a regular file"):
        read_header(tmp_path / "model.safetensors")
