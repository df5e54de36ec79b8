"""Short passes recorded and replayed, beside the same passes run each time."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.compute import recorded_passes, torch_engine
from lowmem.compute.kernels.packed_attention import Kernel, Layout
from lowmem.compute.plan import MOST_RECORDED, RECORDED_TOKENS
from lowmem.compute.recorded_passes import Record, RecordedPasses
from lowmem.compute.torch_engine import TorchEngine
from lowmem.text.batching import PREFIX_TOKENS, EncodedText, pack
from tests import plain_cuda
from tests.models import CONTRACT
from tests.pretend_device import DEVICE, PretendDevice
from tests.recorded_operations import Recorder

PREFIX = [1, 5, 6]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with PretendDevice() as pretended, torch.inference_mode():
        yield pretended


def query(tokens: int, seed: int, prefix: list[int] = PREFIX) -> EncodedText:
    ids = np.random.default_rng(seed).integers(7, 300, tokens - 1)
    return EncodedText(np.array([*prefix, *ids, 2]), len(prefix), len(prefix))


def packed(query: Tensor, key: Tensor, value: Tensor, layout: Layout, causal: bool) -> Tensor:
    """All scores at once, masked by where the texts begin, which is read on the device."""
    share = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(share, 1).float() for states in (key, value))
    rows = torch.arange(len(query), device=DEVICE)[:, None]
    columns = torch.arange(len(key), device=DEVICE)
    text = torch.searchsorted(layout.queries[1:], rows, right=True)
    own = torch.searchsorted(layout.keys[1:], columns, right=True) == text
    behind = layout.keys[text + 1] - layout.queries[text + 1]
    visible = own & (columns <= rows + behind) if causal else own
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) / query.shape[2] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def engine(
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    record: Record | None,
    *,
    variant: str = "fp16",
    compute: str = "fp16",
    kernel: Kernel | None = None,
) -> TorchEngine:
    ops = plain_cuda.operations(compute)
    ops._attention = kernel
    monkeypatch.setattr(torch_engine, "_operations", lambda *_: ops)
    passes = None if record is None else RecordedPasses(record)
    monkeypatch.setattr(torch_engine, "_records", lambda *_: passes)
    return TorchEngine(Checkpoint(Bundle(bundle).directory(variant)), CONTRACT, device=DEVICE)


def embed(model: TorchEngine, text: EncodedText) -> np.ndarray:
    (vectors,) = model.embed(pack([text], 4096, shortest_prefix=1))
    return vectors


@pytest.mark.parametrize("kernel", [None, packed])
@pytest.mark.parametrize(
    ("variant", "compute"),
    [("fp16", "fp16"), ("int4", "fp16"), ("int8", "int8"), ("int4", "int8"), ("bnb-nf4", "fp32")],
)
def test_replays_give_what_the_passes_give(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    compute: str,
    kernel: Kernel | None,
) -> None:
    recorder = Recorder()
    plan: dict[str, Any] = {"variant": variant, "compute": compute, "kernel": kernel}
    plain = engine(tiny_bundle, monkeypatch, None, **plan)
    model = engine(tiny_bundle, monkeypatch, recorder, **plan)
    for seed in range(5):
        for tokens in (1, 9, RECORDED_TOKENS):
            text = query(tokens, seed)
            assert np.array_equal(embed(model, text), embed(plain, text))
    assert recorder.recorded == 3
    assert recorder.replayed == 3 * (2 + 3)  # two to see that it is right


def test_only_single_short_texts_are_recorded(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    model = engine(tiny_bundle, monkeypatch, recorder)
    for seed in range(3):
        embed(model, query(RECORDED_TOKENS + 1, seed))
        model.embed(pack([query(4, seed), query(4, seed + 9)], 4096, shortest_prefix=1))
    assert recorder.recorded == 0


@pytest.mark.parametrize("kernel", [None, packed])
def test_a_recording_ends_with_the_prefix_that_it_reads(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel | None
) -> None:
    recorder = Recorder()
    plain = engine(tiny_bundle, monkeypatch, None, kernel=kernel)
    model = engine(tiny_bundle, monkeypatch, recorder, kernel=kernel)
    for seed in range(3):
        embed(model, query(9, seed))
    assert recorder.recorded == 1
    for other in range(2):  # so that the prefix is not kept for others any more
        longest = [1, *range(7 + other, 7 + other + PREFIX_TOKENS - 1)]
        embed(model, query(5, 0, longest))
    assert model._prefixes.get(np.array(PREFIX).tobytes()) is None
    replayed = recorder.replayed
    for seed in range(3):
        text = query(9, seed)
        assert np.array_equal(embed(model, text), embed(plain, text))
    assert recorder.recorded == 2
    assert recorder.replayed == replayed + 2 + 1  # known again, recorded, replayed


def test_a_prefix_in_use_is_kept(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    model = engine(tiny_bundle, monkeypatch, recorder)
    for other in range(3):
        for seed in range(3):
            embed(model, query(9, seed))
        embed(model, query(5, 0, [1, *range(7 + other, 7 + other + PREFIX_TOKENS - 4)]))
    assert recorder.recorded == 1


def test_a_prefix_that_is_not_kept_is_not_recorded(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    plain = engine(tiny_bundle, monkeypatch, None)
    model = engine(tiny_bundle, monkeypatch, recorder)
    too_long = [1, *range(7, 7 + PREFIX_TOKENS)]
    for seed in range(3):
        text = query(5, seed, too_long)
        assert np.array_equal(embed(model, text), embed(plain, text))
    assert recorder.recorded == 0


def test_of_more_shapes_than_are_recorded_some_stay(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_passes, "_LONG_UNUSED", 60)
    recorder = Recorder()
    model = engine(tiny_bundle, monkeypatch, recorder)
    for seed in range(3):
        for tokens in range(1, MOST_RECORDED + 3):
            embed(model, query(tokens, seed))
    assert recorder.recorded == MOST_RECORDED
    assert recorder.replayed == 3 * MOST_RECORDED
    for seed in range(60):
        embed(model, query(1, seed))
    for seed in range(3):
        embed(model, query(MOST_RECORDED + 2, seed))
    assert recorder.recorded == MOST_RECORDED + 1
    assert model._recorded is not None
    assert len(model._recorded._recorded) == MOST_RECORDED


def test_what_runs_out_of_memory_lets_go_of_recordings(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    model = engine(tiny_bundle, monkeypatch, recorder)
    for seed in range(2):
        embed(model, query(9, seed))
    assert model._recorded is not None
    assert len(model._recorded._recorded) == 1
    model._ran_out(1000)
    assert not model._recorded._recorded


def fails(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing")


def runs_out(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    raise torch.OutOfMemoryError("CUDA out of memory")


def repeats_itself(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Gives the vectors of the texts that it was recorded with, whatever comes."""
    return (lambda: None), run()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (fails, "not permitted"),
        (runs_out, "memory is short"),
        (repeats_itself, "gives other vectors on this card"),
    ],
)
def test_without_recordings_passes_run_each_time(
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    record: Record,
    words: str,
) -> None:
    calls = []

    def counted(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        calls.append(run)
        return record(run)

    plain = engine(tiny_bundle, monkeypatch, None)
    model = engine(tiny_bundle, monkeypatch, counted)
    with caplog.at_level(logging.INFO, logger="lowmem"):
        for seed in range(4):
            text = query(9, seed)
            assert np.array_equal(embed(model, text), embed(plain, text))
    assert len(calls) == 1
    assert words in caplog.text


def test_after_one_wrong_recording_none_is_used(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    plain = engine(tiny_bundle, monkeypatch, None)
    model = engine(
        tiny_bundle,
        monkeypatch,
        lambda run: (repeats_itself if recorder.recorded else recorder)(run),
    )
    for tokens in (9, 10):
        for seed in range(2):
            embed(model, query(tokens, seed))
    replayed = recorder.replayed
    for tokens in (9, 10):
        assert np.array_equal(embed(model, query(tokens, 5)), embed(plain, query(tokens, 5)))
    assert (recorder.recorded, recorder.replayed) == (1, replayed)


def test_a_pass_that_the_host_takes_part_in_cannot_be_recorded() -> None:
    recorder = Recorder()
    there = torch.ones(3, 4).to(DEVICE)
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder(lambda: there[there.sum(dim=1) > 0])
    with pytest.raises(RuntimeError, match="not permitted"):
        recorder(lambda: there + torch.ones(3, 4).to(DEVICE))
    read = [there + 1]
    launch, result = recorder(lambda: read[0] * 2)
    read[0].copy_(there)
    launch()
    assert float(result.cpu().sum()) == 24
    read.clear()
    with pytest.raises(AssertionError, match="let go"):
        launch()


@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_what_is_recorded_where(
    pooling: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "cuda_graphs", lambda: fails)
    contract = replace(CONTRACT, pooling=pooling)
    is_recorded = pooling == "lasttoken" and schedule == "resident"
    assert (torch_engine._records("cuda", schedule, contract) is not None) == is_recorded
    assert torch_engine._records("cpu", schedule, contract) is None
