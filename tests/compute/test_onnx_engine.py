"""The engine on ONNX Runtime: what must not change a vector, and how it fails."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from export.graph import write_graphs
from lowmem.artifact.formats import Format, Int8Channel, IntGrouped, Plain
from lowmem.compute.onnx_engine import _FREE_CELLS, OnnxEngine, _alike
from lowmem.errors import BackendError, BundleError, CapacityError
from lowmem.text.batching import EncodedText, PackedBatch, Section, pack
from tests.models import CONTRACT, VOCAB_SIZE, tiny_checkpoint
from tests.tolerances import INVARIANCE, ONNX_ROUNDED_COSINE
from tests.variants import write_variant

Vectors = NDArray[np.float32]
MEAN = replace(CONTRACT, pooling="mean")
LENGTHS = (1, 60, 2, 1, 33, 7, 7, 30, 3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source")).path


@pytest.fixture(scope="module")
def variants(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("variants")
    forms: dict[str, Format] = {
        "fp16": Plain("F16"),
        "int4": IntGrouped(4, 32),
        "int8": Int8Channel(),
    }
    found = {name: write_variant(source, folder / name, form) for name, form in forms.items()}
    for directory in found.values():
        write_graphs(directory, CONTRACT)
    return found


def engine(directory: Path, graph: str = "model.onnx") -> OnnxEngine:
    return OnnxEngine(directory, graph, CONTRACT, "cpu", 1)


def encoded(pooled_from: int = 0) -> list[EncodedText]:
    random = np.random.default_rng(0)
    return [
        EncodedText(random.integers(4, VOCAB_SIZE, size), 0, min(pooled_from, size - 1))
        for size in LENGTHS
    ]


def vectors(model: OnnxEngine, batches: list[PackedBatch]) -> Vectors:
    """The vectors of all texts, in their order."""
    rows = np.concatenate([batch.rows for batch in batches])
    result = np.empty((len(rows), model.hidden_size), np.float32)
    result[rows] = np.concatenate(model.embed(batches))
    return result


def distances(left: Vectors, right: Vectors) -> NDArray[np.float64]:
    """1 - cosine of each pair of rows, in float64: float32 lengths are 1 only within 1e-7."""
    first, second = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: NDArray[np.float64] = np.einsum("ij,ij->i", first, second) / lengths
    return np.subtract(1, cosines, dtype=np.float64)


@pytest.mark.parametrize("name", ["fp16", "int4", "int8"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_batches_do_not_change_a_vector(
    variants: dict[str, Path], name: str, batch_tokens: int
) -> None:
    model, texts = engine(variants[name]), encoded()
    alone = np.concatenate([model.embed(pack([text], 4096))[0] for text in texts])
    together = distances(alone, vectors(model, pack(texts, batch_tokens)))
    assert np.median(together) < INVARIANCE
    assert together.max() < (ONNX_ROUNDED_COSINE if name == "int8" else INVARIANCE)


def test_vectors_stand_in_the_order_of_the_batch(variants: dict[str, Path]) -> None:
    model = engine(variants["fp16"])
    (batch,) = pack(encoded(), 4096)
    (together,) = model.embed([batch])
    assert together.shape == (batch.texts, model.hidden_size)
    texts = encoded()
    for row, vector in zip(batch.rows, together, strict=True):
        (alone,) = model.embed(pack([texts[row]], 4096))
        assert distances(alone, vector[None]).max() < INVARIANCE


def test_a_prefix_is_put_back(variants: dict[str, Path]) -> None:
    model = engine(variants["fp16"])
    whole = [
        EncodedText(np.concatenate([np.arange(5, 15), text.input_ids]), 0, 0) for text in encoded()
    ]
    (batch,) = pack(whole, 4096)
    cuts = batch.cu_seqlens - 10 * np.arange(batch.texts + 1)
    own = np.ones(len(batch.input_ids), np.bool_)
    for start in batch.cu_seqlens[:-1]:
        own[start : start + 10] = False
    apart = PackedBatch(
        batch.input_ids[own],
        batch.position_ids[own],
        cuts,
        batch.pooling_mask[own],
        batch.rows,
        (Section(np.arange(5, 15), batch.texts),),
    )
    (expected,), (got,) = model.embed([batch]), model.embed([apart])
    np.testing.assert_array_equal(expected, got)


def test_a_mean_leaves_out_the_instruction(tmp_path: Path, source: Path) -> None:
    variant = write_variant(source, tmp_path / "fp16", Plain("F16"))
    write_graphs(variant, MEAN)
    model = OnnxEngine(variant, "model.onnx", MEAN, "cpu", 1)
    found = {
        pooled_from: vectors(model, pack(encoded(pooled_from), 4096, pooling="mean"))
        for pooled_from in (0, 3)
    }
    apart = distances(found[0], found[3])
    one_token = np.array(LENGTHS) == 1
    assert apart[one_token].max() < INVARIANCE
    assert apart[~one_token].min() > INVARIANCE


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
def test_padding_at_most_doubles_tokens_and_what_attention_costs(sizes: list[int]) -> None:
    lengths = np.array(sizes, np.int64)
    groups = list(_alike(lengths))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(sizes)))
    for group in groups:
        longest = int(lengths[group].max())
        assert len(group) * longest <= 2 * int(lengths[group].sum())
        cells = len(group) * longest**2
        assert cells <= max(2 * int((lengths[group] ** 2).sum()), _FREE_CELLS) or len(group) == 1


class Session:
    """Runs like the session it wraps, until there are too many texts."""

    def __init__(self, wrapped: Any, most_texts: int, error: Exception) -> None:
        self.wrapped, self.most_texts, self.error = wrapped, most_texts, error

    def run(self, outputs: None, feeds: dict[str, Any], options: Any) -> list[Any]:
        if len(feeds["input_ids"]) > self.most_texts:
            raise self.error
        return list(self.wrapped.run(outputs, feeds, options))


OUT_OF_MEMORY: list[Callable[[], Exception]] = [
    MemoryError,
    lambda: RuntimeError("std::bad_alloc"),
    lambda: RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 9"),
    lambda: RuntimeError("CUDA failure 2: out of memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_split(
    variants: dict[str, Path], error: Callable[[], Exception]
) -> None:
    model = engine(variants["fp16"])
    batches = pack(encoded(), 4096)
    expected = vectors(model, batches)
    model._session = Session(model._session, 2, error())
    assert distances(vectors(model, batches), expected).max() < INVARIANCE


def test_a_single_text_that_does_not_fit_is_an_error(variants: dict[str, Path]) -> None:
    model = engine(variants["fp16"])
    model._session = Session(model._session, 0, MemoryError())
    with pytest.raises(CapacityError, match="a text of 60 tokens does not fit the memory of cpu"):
        model.embed(pack(encoded(), 4096))


def test_a_failure_is_one_line(variants: dict[str, Path]) -> None:
    model = engine(variants["fp16"])
    model._session = Session(model._session, 0, RuntimeError("node x\nfailed"))
    with pytest.raises(BackendError, match=r"^onnxruntime failed: node x failed$"):
        model.embed(pack(encoded(), 4096))


def test_a_missing_package_names_the_extra(
    variants: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"an onnxruntime plan .*pip install 'lowmem\[cpu\]'"):
        engine(variants["fp16"])


def test_a_build_without_the_provider_names_those_it_has(
    variants: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"has CPUExecutionProvider.*lowmem\[cuda\]"):
        OnnxEngine(variants["fp16"], "model_fp16.onnx", CONTRACT, "cuda", 1)


def test_a_damaged_graph_is_an_error(tmp_path: Path, source: Path) -> None:
    variant = write_variant(source, tmp_path / "fp16", Plain("F16"))
    (variant / "model.onnx").write_bytes(b"no graph at all")
    with pytest.raises(BackendError, match=r"onnxruntime cannot open .*model\.onnx") as caught:
        engine(variant)
    assert "\n" not in str(caught.value)


def test_a_graph_of_another_contract_is_refused(variants: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match="takes attention_mask, input_ids, pooling_mask"):
        OnnxEngine(variants["fp16"], "model.onnx", MEAN, "cpu", 1)
