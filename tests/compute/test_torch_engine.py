"""The torch engine: what must not change a vector, and what it does when it cannot go on."""

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lowmem.artifact.manifest import Bundle
from lowmem.artifact.tensors import RawTensor, StoredTensor
from lowmem.artifact.variants import VARIANTS
from lowmem.artifact.weights import Checkpoint
from lowmem.compute import engine as engine_module
from lowmem.compute import torch_engine
from lowmem.compute.engine import Runner, shortest_prefix, unit_length
from lowmem.compute.operations import products
from lowmem.compute.plan import Plan
from lowmem.compute.torch_engine import TorchEngine
from lowmem.errors import BackendError, BundleError
from lowmem.text.batching import EncodedText, PackedBatch, arrange, pack
from tests.models import CONTRACT, LAYERS
from tests.runners import Vectors, cosine_distances, encoded, runner
from tests.tolerances import INVARIANCE, ROUNDED_INVARIANCE_FACTOR, gamma


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def shuffled(model: Runner, texts: Sequence[EncodedText]) -> Vectors:
    order = np.random.default_rng(0).permutation(len(texts))
    vectors = np.empty((len(texts), model.hidden_size), np.float32)
    vectors[order] = model.embed([texts[row] for row in order], normalize=True)
    return vectors


def alone(model: Runner, texts: Sequence[EncodedText]) -> Vectors:
    return np.concatenate([model.embed([text], normalize=True) for text in texts])


NEIGHBOURS: dict[str, Callable[[Bundle, str, str, Sequence[EncodedText]], Vectors]] = {
    "shuffled": lambda bundle, variant, compute, texts: shuffled(
        runner(bundle, variant, compute), texts
    ),
    "alone": lambda bundle, variant, compute, texts: alone(runner(bundle, variant, compute), texts),
    "in small batches": lambda bundle, variant, compute, texts: runner(
        bundle, variant, compute, batch_tokens=40
    ).embed(texts, normalize=True),
    "three at a time": lambda bundle, variant, compute, texts: runner(
        bundle, variant, compute
    ).embed(texts, normalize=True, batch_size=3),
}


@pytest.mark.parametrize("variant", ["fp16", "int4", "bnb-nf4"])
@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_neighbours_do_not_change_a_vector(bundle: Bundle, variant: str, neighbours: str) -> None:
    model = runner(bundle, variant)
    texts = encoded(model)
    together = model.embed(texts, normalize=True)
    others = NEIGHBOURS[neighbours](bundle, variant, "fp32", texts)
    assert cosine_distances(together, others).max() < INVARIANCE


@pytest.mark.parametrize(
    ("variant", "compute"), [("fp16", "bf16"), ("fp16", "int8"), ("int8", "int8")]
)
@pytest.mark.parametrize("neighbours", NEIGHBOURS)
def test_neighbours_change_a_rounded_vector_by_no_more_than_rounding_does(
    bundle: Bundle, variant: str, compute: str, neighbours: str
) -> None:
    model = runner(bundle, variant, compute)
    texts = encoded(model)
    together = model.embed(texts, normalize=True)
    exact = runner(bundle, variant).embed(texts, normalize=True)
    moved = cosine_distances(together, NEIGHBOURS[neighbours](bundle, variant, compute, texts))
    rounding = cosine_distances(together, exact).max()
    assert moved.max() <= ROUNDED_INVARIANCE_FACTOR * rounding + INVARIANCE
    if compute == "int8":  # scales are each token's own, so most texts meet no boundary at all
        assert np.median(moved) < INVARIANCE


@pytest.mark.parametrize(
    ("variant", "compute"),
    [*((variant, "fp32") for variant in VARIANTS), ("fp16", "fp16"), ("int8", "int8")],
)
def test_streamed_vectors_are_the_resident_ones(bundle: Bundle, variant: str, compute: str) -> None:
    resident, streamed = (
        runner(bundle, variant, compute, schedule=schedule, batch_tokens=60)
        for schedule in ("resident", "streamed")
    )
    texts = encoded(resident)
    expected = resident.embed(texts, normalize=False)
    assert np.array_equal(streamed.embed(texts, normalize=False), expected)


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_the_size_of_a_window_does_not_change_a_vector(bundle: Bundle, schedule: str) -> None:
    one, all_of_them = (
        runner(bundle, schedule=schedule, batch_tokens=40, window_tokens=tokens)
        for tokens in (1, 10**6)
    )
    texts = encoded(one)
    expected = one.embed(texts, normalize=False)
    assert np.array_equal(all_of_them.embed(texts, normalize=False), expected)


@pytest.mark.parametrize(("window_tokens", "passes"), [(10**6, 1), (1, 5)])
def test_a_streamed_plan_reads_each_layer_once_for_a_window(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, window_tokens: int, passes: int
) -> None:
    reads: list[StoredTensor] = []
    plain = StoredTensor.read_into

    def counted(stored: StoredTensor, data: NDArray[np.uint8]) -> None:
        reads.append(stored)
        plain(stored, data)

    monkeypatch.setattr(StoredTensor, "read_into", counted)
    model = runner(bundle, schedule="streamed", window_tokens=window_tokens)
    texts = encoded(model)[:5]
    model.embed(texts, normalize=True, batch_size=1)
    assert len(reads) == passes * LAYERS * (7 + 2)


def test_prefixes_count_in_a_window(bundle: Bundle) -> None:
    model = runner(bundle, schedule="streamed", batch_tokens=300, window_tokens=900)
    texts = [text for number in range(40) for text in instructed(model, f"task {number} " * 5)]
    batches = arrange(texts, np.arange(len(texts)), 300, shortest_prefix=1)
    windows = model._windows(batches)
    assert [batch for window in windows for batch in window] == batches
    for window in windows:
        held = {section.prefix.tobytes(): section.prefix for b in window for section in b.sections}
        tokens = sum(batch.tokens for batch in window) + 2 * sum(map(len, held.values()))
        assert tokens <= 900 or len(window) == 1
    assert len(windows) > sum(batch.tokens for batch in batches) / 900 * 2


def instructed(model: Runner, task: str) -> list[EncodedText]:
    prompt = model.contract.prompt("query", task)
    return model.tokenizer.encode(["a", "the fox"], [prompt] * 2)


def test_equal_texts_are_computed_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = runner(bundle)
    rows: list[int] = []
    plain = model._engine.embed

    def counted(batches: Any) -> Any:
        rows.extend(row for batch in batches for row in batch.rows.tolist())
        return plain(batches)

    monkeypatch.setattr(model._engine, "embed", counted)
    texts = encoded(model)[:2]
    vectors = model.embed([texts[0], texts[1], texts[0], texts[0]], normalize=True)
    assert sorted(rows) == [0, 1]
    assert np.array_equal(vectors[[2, 3]], vectors[[0, 0]])


@pytest.mark.parametrize(
    ("variant", "fills"), [("int8", False), ("bnb-int8", False), ("int4", True), ("fp16", True)]
)
def test_batches_are_filled_where_8_bit_compute_has_no_8_bit_codes(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, variant: str, fills: bool
) -> None:
    asked = []

    def filled(batch: PackedBatch, tokens: int) -> PackedBatch:
        asked.append(tokens)
        return batch

    monkeypatch.setattr(PackedBatch, "filled", filled)
    monkeypatch.setattr(torch_engine.int8, "is_exact_and_faster", lambda threads: True)
    monkeypatch.setattr(torch_engine, "keeps_code", lambda dtype, weights: True)
    model = runner(bundle, variant, compute="int8")
    model.embed(encoded(model), normalize=True)
    assert bool(asked) == fills


def test_progress_counts_every_text(bundle: Bundle) -> None:
    model = runner(bundle, batch_tokens=30)
    texts = encoded(model)
    steps: list[int] = []
    model.embed([*texts, *texts], normalize=True, on_texts=steps.append)
    assert len(steps) > 1
    assert sum(steps) == 2 * len(texts)


def test_no_texts_give_no_vectors(bundle: Bundle) -> None:
    assert runner(bundle).embed([], normalize=True).shape == (0, 128)


def test_an_observer_sees_every_batch_once_by_its_number(bundle: Bundle) -> None:
    model = runner(bundle)
    checkpoint = Checkpoint(bundle.directory("fp16"))
    batches = pack(encoded(model), 50, shortest_prefix=1)
    for schedule in ("resident", "streamed"):
        engine = TorchEngine(checkpoint, CONTRACT, schedule=schedule, threads=1)
        seen: list[tuple[int, int, int]] = []
        engine.embed(
            batches,
            on_layer=lambda layer, batch, hidden, seen=seen: seen.append(
                (layer, batch, len(hidden))
            ),
        )
        assert seen == [
            (layer, number, batch.tokens)  # a prefix is computed apart
            for layer in range(LAYERS)
            for number, batch in enumerate(batches)
        ]


def test_cuda_without_a_device_is_a_backend_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="needs a CUDA device that torch can use"):
        TorchEngine(Checkpoint(bundle.directory("fp16")), CONTRACT, device="cuda")


def broken_embedding(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    plain = Checkpoint.embedding

    def broken(checkpoint: Checkpoint) -> RawTensor:
        raw = plain(checkpoint)
        array = raw.array.copy()
        array[token] = np.nan
        return RawTensor(raw.dtype, array)

    monkeypatch.setattr(Checkpoint, "embedding", broken)


def test_vectors_that_are_not_finite_are_a_backend_error_that_names_rows_and_plan(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = 300
    broken_embedding(monkeypatch, token)
    model = runner(bundle)
    good = EncodedText(np.array([1, 5, 6, 2]), 0, 0)
    bad = EncodedText(np.array([1, 5, token, 2]), 0, 0)
    with pytest.raises(BackendError) as caught:
        model.embed([good, bad, good, bad], normalize=True)
    assert "the plan fp16-torch-cpu-fp32-resident" in str(caught.value)
    assert "not finite, for texts 1, 3: choose another compute" in str(caught.value)
    vectors = model.embed([good, bad], normalize=True, must_be_finite=False)
    assert np.isfinite(vectors).all(axis=1).tolist() == [True, False]


def test_at_most_ten_rows_that_are_not_finite_are_named(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_embedding(monkeypatch, 300)
    bad = EncodedText(np.array([1, 300, 2]), 0, 0)
    with pytest.raises(BackendError, match=r"texts 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more:"):
        runner(bundle).embed([bad] * 12, normalize=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 8),
        ({"compute": "bf16"}, 8),
        ({"compute": "int8"}, 1),
        ({"engine": "onnxruntime"}, None),
        ({"is_causal": False}, None),
        ({"pooling": "mean"}, None),
        ({"is_causal": False, "pooling": "latent_attention"}, None),
    ],
)
def test_a_prefix_is_computed_apart_only_where_that_is_sound(
    changes: dict[str, Any], expected: int | None
) -> None:
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident")
    contract = CONTRACT
    for name, value in changes.items():
        if name in ("engine", "compute"):
            plan = plan.with_(**{name: value})
        else:
            contract = replace(contract, **{name: value})
    assert shortest_prefix(plan, contract) == expected


def test_unit_vectors_have_length_one_and_zero_stays_zero() -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32)
    vectors *= np.logspace(-20, 20, 50)[:, None].astype(np.float32)
    vectors[7] = 0
    unit = unit_length(vectors)
    lengths = np.linalg.norm(unit.astype(np.float64), axis=1)
    assert unit.dtype == np.float32
    assert not unit[7].any()
    assert np.abs(np.delete(lengths, 7) - 1).max() < gamma(2)  # two roundings of each element


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_threads_that_share_an_engine_get_their_own_vectors(bundle: Bundle, schedule: str) -> None:
    model = runner(bundle, "int4", schedule=schedule)
    texts = encoded(model)
    halves = (texts[:3], texts[3:])
    expected = [model.embed(half, normalize=True) for half in halves]
    with ThreadPoolExecutor(2) as pool:
        rounds = [
            (number % 2, pool.submit(model.embed, halves[number % 2], normalize=True))
            for number in range(20)
        ]
    for half, found in rounds:
        assert cosine_distances(found.result(), expected[half]).max() < INVARIANCE


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_texts_of_all_lengths_bring_few_numbers_of_rows_to_onednn(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, compute: str
) -> None:
    """What it compiles for each would stay."""
    seen: set[int] = set()
    multiply = F.linear

    def noted(states: Tensor, weight: Tensor) -> Tensor:
        seen.add(len(states))
        return multiply(states, weight)

    library = noted if compute == "fp32" else multiply
    monkeypatch.setattr(products, "_fastest_float32", lambda threads, is_large: library)
    if compute != "fp32":
        monkeypatch.setattr(products.F, "linear", noted)
    monkeypatch.setattr(products, "_fused_is_faster", lambda threads: False)
    model = runner(bundle, compute=compute)
    ids = encoded(model)[0].input_ids
    expected = model.embed([EncodedText(ids, 0, 0)], normalize=True)
    for size in range(1, 90):
        text = EncodedText(np.append(np.resize(ids, size), ids[-1]), 0, 0)
        model.embed([text, EncodedText(ids, 0, 0)], normalize=True)
    assert seen <= set(range(16, 129, 16))
    again = model.embed([EncodedText(ids, 0, 0)], normalize=True)
    assert cosine_distances(again, expected).max() < INVARIANCE


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_a_forked_process_is_told_how_to_start_instead_of_hanging(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    model = Runner(Bundle(tiny_bundle), Plan("fp16", engine, "cpu", "fp32", "resident"))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(BackendError, match=r"do not survive a fork: .*\"spawn\""):
        model.embed(encoded(model), normalize=True)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_files_that_change_while_an_engine_opens_them_are_an_error(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    opens = engine_module._open_engine

    def slowly(*arguments: Any) -> Any:
        opened = opens(*arguments)
        (weights,) = (copy / "fp16").glob("*.safetensors")
        os.utime(weights, ns=(0, 1))
        return opened

    monkeypatch.setattr(engine_module, "_open_engine", slowly)
    with pytest.raises(BundleError, match="fp16 changed while it was opened"):
        Runner(Bundle(copy), Plan("fp16", engine, "cpu", "fp32", "resident"))


def test_vectors_that_are_not_finite_end_a_run_at_once_by_the_names_of_their_texts(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = 300
    broken_embedding(monkeypatch, token)
    model = runner(bundle, batch_tokens=4)
    bad = EncodedText(np.array([1, 5, token, 2]), 0, 0)
    texts = [bad, *(EncodedText(np.array([1, number, 2]), 0, 0) for number in range(5, 105))]
    done: list[int] = []
    names = [f"line {number}" for number in range(1, 102)]
    with pytest.raises(BackendError, match="not finite, for line 1: choose another compute"):
        model.embed(texts, normalize=True, names=names, on_texts=done.append)
    assert sum(done) < 100
