"""What the torch engine does when memory runs out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.artifact.manifest import Bundle
from lowmem.compute.operations.plain import PlainOperations
from lowmem.errors import CapacityError
from tests.runners import cosine_distances, encoded, runner
from tests.tolerances import INVARIANCE


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


def real_host_shortage() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def raise_device_shortage() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def raise_library_shortage() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def raise_numpy_shortage() -> None:
    raise MemoryError("Unable to allocate")


SHORTAGES = (
    real_host_shortage,
    raise_device_shortage,
    raise_library_shortage,
    raise_numpy_shortage,
)


def limit_tokens(monkeypatch: pytest.MonkeyPatch, most: int, fail: Callable[[], None]) -> list[int]:
    """Makes every product of more rows fail; returns the rows of those that did not."""
    sizes: list[int] = []
    plain = PlainOperations.gated_mlp

    def limited(ops: PlainOperations, hidden: Tensor, *rest: Any) -> Tensor:
        if len(hidden) > most:
            fail()
        sizes.append(len(hidden))
        return plain(ops, hidden, *rest)

    monkeypatch.setattr(PlainOperations, "gated_mlp", limited)
    return sizes


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
@pytest.mark.parametrize("shortage", SHORTAGES)
def test_batches_are_split_until_they_fit(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, schedule: str, shortage: Callable[[], None]
) -> None:
    model = runner(bundle, schedule=schedule)
    texts = encoded(model)
    longest = max(len(text.input_ids) for text in texts)
    expected = model.embed(texts, normalize=True)
    sizes = limit_tokens(monkeypatch, longest, shortage)
    vectors = model.embed(texts, normalize=True)
    assert max(sizes) <= longest
    assert cosine_distances(vectors, expected).max() < INVARIANCE


@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_from_the_second_shortage_on_passes_are_smaller(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    schedule: str,
) -> None:
    model = runner(bundle, schedule=schedule)
    texts = encoded(model)
    longest = max(len(text.input_ids) for text in texts)
    expected = model.embed(texts, normalize=True)
    attempts: list[int] = []

    def fail() -> None:
        attempts.append(1)
        raise_device_shortage()

    limit_tokens(monkeypatch, longest, fail)
    model.embed(texts, normalize=True)
    assert len(attempts) > 1
    assert "memory of the cpu device ran out again: a pass has at most" in caplog.text
    attempts.clear()
    assert cosine_distances(model.embed(texts, normalize=True), expected).max() < INVARIANCE
    assert not attempts


def test_a_text_that_does_not_fit_alone_is_a_capacity_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runner(bundle)
    limit_tokens(monkeypatch, 40, raise_device_shortage)
    texts = encoded(model)
    size = max(len(text.input_ids) for text in texts)
    with pytest.raises(CapacityError, match=rf"a text of {size} tokens does not fit the memory"):
        model.embed(texts, normalize=True)


def test_another_error_is_not_taken_for_a_lack_of_memory(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("expected scalar type")

    model = runner(bundle)
    sizes = limit_tokens(monkeypatch, 0, fail)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        model.embed(encoded(model), normalize=True)
    assert not sizes


def test_weights_that_do_not_fit_the_device_are_a_capacity_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lowmem.compute.streaming.load_layer", full)
    with pytest.raises(CapacityError, match=r"weights of int4 do not fit .* --schedule streamed"):
        runner(bundle, "int4")


def test_host_memory_that_runs_out_while_loading_is_a_capacity_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.compute.streaming._buffer_bytes", lambda checkpoint: 2**60)
    with pytest.raises(CapacityError, match="weights of fp16 do not fit the cpu device"):
        runner(bundle, schedule="streamed")


def test_texts_that_do_not_fit_alone_make_no_pass_smaller(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = runner(bundle)
    texts = encoded(model)
    longest = max(texts, key=lambda text: len(text.input_ids))
    with monkeypatch.context() as shortage:
        limit_tokens(shortage, 4, raise_device_shortage)
        for _ in range(3):
            with pytest.raises(CapacityError):
                model.embed([longest], normalize=True)
    assert "ran out again" not in caplog.text
    sizes = limit_tokens(monkeypatch, 10**6, raise_device_shortage)
    model.embed(texts, normalize=True)
    assert max(sizes) > len(longest.input_ids)
