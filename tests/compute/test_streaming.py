import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lowmem.artifact.manifest import Bundle
from lowmem.artifact.tensors import StoredTensor
from lowmem.artifact.variants import VARIANTS
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.decoder import DecoderLayer
from lowmem.compute.layers import load_layer
from lowmem.compute.operations.linear import to_torch
from lowmem.compute.streaming import LayerStream, kept_indices
from lowmem.errors import BundleError


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def tensors(layer: DecoderLayer) -> list[torch.Tensor]:
    linears = (layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down)
    stored = [tensor for linear in linears for _, tensor in sorted(linear.tensors.items())]
    return [layer.input_norm, layer.mlp_norm, *stored]


@pytest.mark.parametrize("kept", range(4))
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_come_in_order_with_their_own_weights_each_time(
    bundle: Bundle, variant: str, kept: int
) -> None:
    checkpoint = Checkpoint(bundle.directory(variant))
    stream = LayerStream(checkpoint, "cpu", kept)
    for _ in range(2):
        seen = 0
        for layer in stream:
            expected = load_layer(checkpoint.layer(layer.index), to_torch)
            assert layer.index == seen
            assert all(map(torch.equal, tensors(layer), tensors(expected)))
            seen += 1
        assert seen == checkpoint.config.num_hidden_layers


def test_the_next_layer_is_read_while_one_is_at_work(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []
    plain = StoredTensor.read_into

    def watched(stored: StoredTensor, data: NDArray[np.uint8]) -> None:
        readers.append(threading.current_thread().name)
        plain(stored, data)

    monkeypatch.setattr(StoredTensor, "read_into", watched)
    layers = iter(LayerStream(Checkpoint(bundle.directory("fp16")), "cpu"))
    next(layers)
    deadline = time.monotonic() + 10
    while len(readers) < 2 * (7 + 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(readers) == 2 * (7 + 2)
    assert all(name.startswith("lowmem-stream") for name in readers)
    layers.close()


def test_what_was_read_is_dropped_from_the_page_cache_only_where_it_would_not_stay(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(bundle.directory("int4"))
    dropped: list[StoredTensor] = []
    monkeypatch.setattr(StoredTensor, "drop_cached", lambda stored: dropped.append(stored))
    list(LayerStream(checkpoint, "cpu", kept_layers=1))
    assert not dropped
    list(LayerStream(checkpoint, "cpu", kept_layers=1, drops_cache=True))
    (kept,) = kept_indices(checkpoint.config.num_hidden_layers, 1)
    assert {stored.offset for stored in dropped} == {
        stored.offset
        for name, stored in checkpoint.tensors.items()
        if name.startswith("layers.") and not name.startswith(f"layers.{kept}.")
    }


def test_waiting_for_a_slow_disk_is_counted(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(bundle.directory("fp16"))
    resident = LayerStream(checkpoint, "cpu", checkpoint.config.num_hidden_layers)
    list(resident)
    assert resident.waited_seconds == 0
    plain = StoredTensor.read_into

    def slow(stored: StoredTensor, data: NDArray[np.uint8]) -> None:
        time.sleep(0.005)
        plain(stored, data)

    monkeypatch.setattr(StoredTensor, "read_into", slow)
    stream = LayerStream(checkpoint, "cpu")
    list(stream)
    assert stream.waited_seconds >= 0.005 * (7 + 2)


def test_two_buffers_serve_all_layers(bundle: Bundle) -> None:
    stream = LayerStream(Checkpoint(bundle.directory("int4")), "cpu")
    places = [layer.input_norm.untyped_storage().data_ptr() for _ in (0, 1) for layer in stream]
    assert len(set(places)) == 2


def test_a_pass_that_is_given_up_leaves_no_thread_and_the_next_one_is_whole(
    bundle: Bundle,
) -> None:
    checkpoint = Checkpoint(bundle.directory("fp16"))
    stream = LayerStream(checkpoint, "cpu")
    layers = iter(stream)
    next(layers)
    layers.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("lowmem-stream")]
    assert [layer.index for layer in stream] == list(range(checkpoint.config.num_hidden_layers))


def test_a_file_that_shrinks_is_the_readers_error(bundle: Bundle, tmp_path: Path) -> None:
    for file in bundle.directory("fp16").iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    stream = LayerStream(Checkpoint(tmp_path), "cpu")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000])
    with pytest.raises(BundleError, match="has changed since it was opened"):
        list(stream)


@pytest.mark.parametrize("layers", [1, 3, 32])
def test_kept_layers_stand_evenly_between_the_others(layers: int) -> None:
    assert kept_indices(layers, 0) == []
    for kept in range(1, layers + 1):
        indices = kept_indices(layers, kept)
        assert len(indices) == kept
        assert np.diff([-1, *indices]).max() <= -(-layers // kept)
