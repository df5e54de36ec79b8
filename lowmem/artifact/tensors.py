"""safetensors files, read by memory map and written with the header first.

The safetensors library copies what it loads into the heap, hides where a tensor lies, and cannot
write a file piece by piece. This runtime needs all three: mapped weights are page cache and not
memory of the process, ONNX graphs point at offsets, and export holds one tensor at a time. The
format itself is eight bytes of header length, a JSON header, and the data without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact import strict_json
from lowmem.errors import BundleError

# numpy has no bfloat16: its bytes travel as uint16 beside the dtype's name.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 2**20
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**40
_PAGE_GROUP_BYTES = 2 * 2**20  # Linux's largest folio of a file where pages have 4 KiB


@dataclass(frozen=True)
class RawTensor:
    """A tensor between rooms: an array and the name of its dtype (BF16 lies in uint16)."""

    dtype: str
    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.array.nbytes

    def float32(self) -> NDArray[np.float32]:
        """The values as float32; a copy unless they are float32 already."""
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32, copy=False)


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is before it has bytes."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``offset`` counts bytes from the start of ``path``.

    With a ``version``, which ``read_header`` gives, the bytes are read from that very file or not
    at all: an export may put another one in its place while a streamed plan runs.
    """

    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    version: tuple[int, int] | None = None

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape alone."""
        return TensorSpec(self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.spec.nbytes

    def map(self) -> RawTensor:
        """The tensor as a private memory map of its file: no heap, no copy.

        Raises:
            BundleError: The file has vanished, or is not the one that it was.
        """
        dtype = DTYPES[self.dtype]
        try:
            if not self.nbytes:
                return RawTensor(self.dtype, np.empty(self.shape, dtype))
            # Mode "c" marks the pages copy-on-write: torch warns about arrays it may not write.
            with self._open() as file:
                data = np.memmap(file, np.uint8, "c", self.offset, (self.nbytes,))
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.path} cannot be mapped: {error}") from error
        array = np.asarray(data)
        if self.offset % dtype.itemsize:
            array = array.copy()
        return RawTensor(self.dtype, array.view(dtype).reshape(self.shape))

    def read(self) -> RawTensor:
        """The tensor copied from disk into fresh memory.

        Raises:
            BundleError: The file has vanished, or is not the one that it was.
        """
        array = np.empty(self.shape, DTYPES[self.dtype])
        if array.nbytes:
            self.read_into(array.reshape(-1).view(np.uint8))
        return RawTensor(self.dtype, array)

    def read_into(self, data: NDArray[np.uint8]) -> None:
        """Copies the tensor's bytes from disk into memory that is there, uint8 ``[nbytes]``.

        Raises:
            BundleError: The file has vanished, or is not the one that it was.
        """
        view = data.data
        try:
            with self._open() as file:
                done = 0
                while done < len(view):
                    got = os.preadv(file.fileno(), [view[done:]], self.offset + done)
                    if not got:
                        raise BundleError(f"{self.path} ends before byte {self.offset + len(view)}")
                    done += got
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read: {error}") from error

    def drop_cached(self) -> None:
        """Lets the tensor's bytes go from the page cache.

        The system keeps pages in groups, and a group stays that is not in the range as a whole.
        So the range begins where the group may that the tensor's first byte is in; the last group
        goes with the tensor behind this one.

        Raises:
            BundleError: The file has vanished, or is not the one that it was.
        """
        begin = self.offset - self.offset % _PAGE_GROUP_BYTES
        length = self.offset + self.nbytes - begin
        try:
            with self._open() as file:
                os.posix_fadvise(file.fileno(), begin, length, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise BundleError(f"{self.path} cannot be read: {error}") from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[io.FileIO]:
        with self.path.open("rb", buffering=0) as file:
            if self.version is not None and _version(file.fileno()) != self.version:
                raise BundleError(f"{self.path} has changed since it was opened: load it again")
            yield file


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of one safetensors file.

    Raises:
        BundleError: The file is missing or truncated, or its header breaks the format: an unknown
            dtype, a shape that does not fit its bytes, gaps, overlaps or bytes past the end.
    """
    try:
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # to open a pipe would wait for a writer
            raise BundleError(f"{path} must be a regular file")
        with path.open("rb") as file:
            size, _ = version = _version(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise BundleError(
                    f"{path} is truncated or no safetensors file: {size} bytes, "
                    f"header of {length} bytes"
                )
            header = strict_json.loads(file.read(length), str(path), max_bytes=_MAX_HEADER_BYTES)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise BundleError(f"the header of {path} must be an object")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        spec, begin = _entry(entry, f"{path}, tensor {name}")
        if begin != end:
            raise BundleError(f"tensors must lie without gaps or overlaps ({path}, tensor {name})")
        end = begin + spec.nbytes
        tensors[name] = StoredTensor(spec.dtype, spec.shape, path, start + begin, version)
    if start + end != size:
        raise BundleError(
            f"{path} must be {start + end} bytes long by its header, got {size}: "
            + ("it is truncated" if size < start + end else "bytes follow the last tensor")
        )
    return tensors


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Finds every tensor of a Hugging Face model directory, single file or sharded.

    Raises:
        BundleError: There is no safetensors file, the index and the shards disagree, a shard name
            leaves the directory, or a file breaks the format.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise BundleError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_weight_map(index)
    shards = {shard: read_header(directory / shard) for shard in sorted({*weight_map.values()})}
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    if sum(map(len, shards.values())) != len(tensors):
        raise BundleError(f"a tensor stands in more than one shard ({index})")
    wrong = [
        name
        for name in tensors.keys() | weight_map.keys()
        if name not in shards.get(weight_map.get(name, ""), {})
    ]
    if wrong:
        raise BundleError(f"{index} and its shards disagree about {some_names(wrong)}")
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """Reads which shard each tensor is in.

    Args:
        index: ``model.safetensors.index.json``.

    Raises:
        BundleError: It is no index, or a shard's name leaves its directory.
    """
    weight_map = strict_json.read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BundleError(f"weight_map must be an object that is not empty ({index})")
    for shard in sorted({*map(str, weight_map.values())}):
        plain = PurePosixPath(shard).name == shard and "\0" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise BundleError(
                f"a shard must be a .safetensors file beside its index, got {shard!r} ({index})"
            )
    return {name: str(shard) for name, shard in weight_map.items()}


def header_bytes(specs: Mapping[str, TensorSpec]) -> bytes:
    """The head of a safetensors file whose tensors lie in the order given.

    The JSON is padded with spaces to 64 bytes, so that data of 16-bit and wider tensors is
    aligned as long as the sizes before it are. ``format: pt`` is what transformers asks for.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, spec in specs.items():
        end = begin + spec.nbytes
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = strict_json.canonical(entries)
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def some_names(names: Iterable[str], most: int = 5) -> str:
    """The first few of some names, sorted, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def _version(descriptor: int) -> tuple[int, int]:
    """Size and time of a file: on some file systems its inode changes while it does not."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _offsets(entry: Any) -> tuple[int, int]:
    """For sorting: an empty tensor lies before the one that begins at the same byte."""
    try:
        begin, end = entry["data_offsets"]
        return int(begin), int(end)
    except (TypeError, KeyError, ValueError):
        return -1, -1


def _entry(entry: Any, place: str) -> tuple[TensorSpec, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BundleError(f"a tensor needs dtype, shape and data_offsets alone ({place})")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPES:
        raise BundleError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r} ({place})")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or any(type(size) is not int or not 0 <= size <= _MAX_ELEMENTS for size in shape)
        or math.prod(shape) > _MAX_ELEMENTS
    ):
        shown = f"{shape!r:.200}"
        raise BundleError(f"shape must be a list of sizes, got {shown} ({place})")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int or offset < 0 for offset in offsets)
    ):
        raise BundleError(f"data_offsets must be two byte offsets, got {offsets!r} ({place})")
    spec = TensorSpec(dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise BundleError(
            f"{dtype} of shape {shape} takes {spec.nbytes} bytes, "
            f"got data_offsets {offsets} ({place})"
        )
    return spec, offsets[0]
