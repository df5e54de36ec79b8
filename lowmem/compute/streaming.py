"""Layers that come in while their predecessors compute.

Two buffers take turns: one holds the layer at work, and a thread fills the other from disk. With a
CUDA device each has a pinned twin on the host, and a stream of its own copies, so that disk, bus
and arithmetic are busy at once. Layers that are kept stand evenly between those that are read, so
that their arithmetic hides reading, too. Where the layers that are read would not stay in the page
cache until their next turn, they are let go from it at once, and what is kept stays instead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from lowmem.artifact.tensors import DTYPES, RawTensor, StoredTensor
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.decoder import DecoderLayer
from lowmem.compute.layers import load_layer
from lowmem.compute.operations.linear import to_torch

_ALIGNMENT = 256


class LayerStream:
    """All layers of a variant, in order, as often as it is iterated over.

    A layer is whole until the next one is asked for; then its memory may be another's.

    Attributes:
        waited_seconds: How long layers were not there yet when they were asked for, in all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str,
        kept_layers: int = 0,
        *,
        drops_cache: bool = False,
    ) -> None:
        """Allocates the buffers and loads the layers that are kept.

        Args:
            checkpoint: The variant's directory, opened.
            device: ``cpu`` or ``cuda``.
            kept_layers: How many layers stay; on a CPU they are mapped.
            drops_cache: Whether what was read is let go from the page cache.
        """
        self.waited_seconds = 0.0
        layers = checkpoint.config.num_hidden_layers
        self._kept = {
            index: load_layer(checkpoint.layer(index), lambda raw: to_torch(raw, device))
            for index in kept_indices(layers, kept_layers)
        }
        self._streamed = [index for index in range(layers) if index not in self._kept]
        self._layers = layers
        size = _buffer_bytes(checkpoint)
        slot = _CudaSlot if device == "cuda" else _Slot
        self._slots = [slot(checkpoint, size, drops_cache) for _ in self._streamed[:2]]

    def __iter__(self) -> Generator[DecoderLayer]:
        """Yields the layers; closing the iterator waits for the read under way."""
        coming = iter(self._streamed)
        filling: deque[tuple[_Slot, Future[DecoderLayer]]] = deque()
        reader = ThreadPoolExecutor(1, thread_name_prefix="lowmem-stream")

        def fill(slot: _Slot) -> None:
            index = next(coming, None)
            if index is not None:
                filling.append((slot, reader.submit(slot.fill, index)))

        try:
            for slot in self._slots:
                fill(slot)
            for index in range(self._layers):
                if index in self._kept:
                    yield self._kept[index]
                    continue
                slot, coming_layer = filling.popleft()
                start = time.perf_counter()
                layer = coming_layer.result()
                self.waited_seconds += time.perf_counter() - start
                slot.begin()
                try:
                    yield layer
                finally:
                    slot.end()
                fill(slot)
        finally:
            reader.shutdown(cancel_futures=True)


def kept_indices(layers: int, kept: int) -> list[int]:
    """Which layers are kept, evenly between the others."""
    return [
        index for index in range(layers) if (index + 1) * kept // layers > index * kept // layers
    ]


class _Slot:
    """Memory for one layer on a CPU."""

    def __init__(self, checkpoint: Checkpoint, size: int, drops_cache: bool) -> None:
        self._checkpoint = checkpoint
        self._drops_cache = drops_cache
        self._bytes = self._allocate(size)
        self._read: list[StoredTensor] = []
        self._end = 0

    def fill(self, index: int) -> DecoderLayer:
        """Reads a layer from disk; whatever was here must not be in use any more."""
        self._end = 0
        self._read.clear()
        layer = load_layer(self._checkpoint.layer(index, self._read_tensor), self._place)
        if self._drops_cache:
            # In the order of the file: of two that share pages the second lets them go.
            for stored in sorted(self._read, key=lambda one: (one.path, one.offset)):
                stored.drop_cached()
        return layer

    def begin(self) -> None:
        """The layer's arithmetic begins."""

    def end(self) -> None:
        """All of the layer's arithmetic has been asked for."""

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def _read_tensor(self, stored: StoredTensor) -> RawTensor:
        begin = self._end
        self._end += _aligned(stored.nbytes)
        data = self._bytes[begin : begin + stored.nbytes].numpy()
        stored.read_into(data)
        self._read.append(stored)
        return RawTensor(stored.dtype, data.view(DTYPES[stored.dtype]).reshape(stored.shape))

    def _place(self, raw: RawTensor) -> Tensor:
        return to_torch(raw, "cpu")


class _CudaSlot(_Slot):
    """Memory for one layer on a CUDA device, and for its bytes on the host."""

    def __init__(self, checkpoint: Checkpoint, size: int, drops_cache: bool) -> None:
        super().__init__(checkpoint, size, drops_cache)
        with torch.inference_mode(False):  # the caller's would forbid the reader to write to it
            self._device_bytes = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._stream = torch.cuda.Stream()
        self._copied = torch.cuda.Event()
        self._used = torch.cuda.Event()
        # A copy that is under way when this is dropped must end before the memory is another's.
        self._device_bytes.record_stream(self._stream)
        self._used.record()

    def fill(self, index: int) -> DecoderLayer:
        """Reads a layer to the host, and asks for its copy behind the last use of this memory."""
        self._copied.synchronize()
        layer = super().fill(index)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used)
            self._device_bytes[: self._end].copy_(self._bytes[: self._end], non_blocking=True)
            self._copied.record(self._stream)
        return layer

    def begin(self) -> None:
        """Lets the arithmetic wait for the copy."""
        torch.cuda.current_stream().wait_event(self._copied)

    def end(self) -> None:
        """Marks the point after which this memory may be written."""
        self._used.record(torch.cuda.current_stream())

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def _place(self, raw: RawTensor) -> Tensor:
        """The device's view of what lies at the same place in the host's buffer."""
        host = to_torch(raw, "cpu")
        begin = host.data_ptr() - self._bytes.data_ptr()
        view = self._device_bytes[begin : begin + raw.nbytes]
        return view.view(host.dtype).view(host.shape)


def _buffer_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the largest layer, its tensors aligned."""
    sizes = [0] * checkpoint.config.num_hidden_layers
    for name, stored in checkpoint.tensors.items():
        if name.startswith("layers."):
            sizes[int(name.split(".")[1])] += _aligned(stored.nbytes)
    return max(sizes)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
