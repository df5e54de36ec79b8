"""The engine on ONNX Runtime: what must not change a vector, what it holds, and how it fails."""

import json
import subprocess
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
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.compute import onnx_selftest
from lowmem.compute.engine import Runner
from lowmem.compute.onnx_engine import _FREE_CELLS, OnnxEngine, _alike
from lowmem.compute.plan import Plan
from lowmem.errors import BackendError, BundleError, CapacityError
from lowmem.hardware import probe
from lowmem.planner.memory import ONNX_BASE_BYTES, predict
from lowmem.text.batching import EncodedText, PackedBatch, Section, pack
from tests.bidirectional import NVEMBED, put_own_config, tiny_nvembed
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


_MEASURE = """
import json, os, sys, threading
from pathlib import Path
import numpy as np
import onnxruntime
from lowmem.artifact.contract import Contract
from lowmem.compute.onnx_engine import OnnxEngine
from lowmem.text.batching import EncodedText, pack

def held():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem"))

directory, contract = Path(sys.argv[1]), Contract(**json.loads(sys.argv[2]))
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())
base = held()
watcher = threading.Thread(target=watch)
watcher.start()
model = OnnxEngine(directory, "model.onnx", contract, "cpu", 1)
random = np.random.default_rng(0)
for _ in range(2):
    for size in (8, 5, 3, 8):
        texts = [EncodedText(random.integers(4, 300, size), 0, 0) for _ in range(4)]
        model.embed(pack(texts, 4096))
done.set()
watcher.join()
print(json.dumps({"bytes": peak - base, "torch": "torch" in sys.modules}))
"""

_WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "layers": 3, "tied": True}
_LARGEST_MATRIX_BYTES = 4 * 1024 * 4096
_SMALL_BYTES = 24 * 2**20  # the session itself, and activations of 32 tokens


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    "form", [Plain("F16"), Plain("BF16"), IntGrouped(4, 64), Int8Channel()], ids=str
)
def test_a_session_holds_its_packed_weights_one_matrix_and_little_else(
    tmp_path: Path, form: Format
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "source", **_WIDE)  # type: ignore[arg-type]
    variant = write_variant(checkpoint.path, tmp_path / "variant", form)
    write_graphs(variant, CONTRACT)
    command = [sys.executable, "-c", _MEASURE, str(variant), json.dumps(CONTRACT.to_json())]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(shown.stdout)
    opened = Checkpoint(variant)
    weights = opened.config.linear_weights
    packed = 0 if isinstance(form, Plain) else opened.linear_bytes()
    if isinstance(form, IntGrouped):
        packed += 2 * weights // form.group_size  # float16 scales become float32
    unsigned = weights if isinstance(form, Int8Channel) and not probe().has_vnni else 0
    allowed = packed + max(unsigned, _LARGEST_MATRIX_BYTES) + _SMALL_BYTES
    assert allowed < 4 * weights, "a float32 copy of the weights would show"
    assert measured["bytes"] < allowed
    assert not measured["torch"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("form", [Plain("F16"), IntGrouped(4, 64), Int8Channel()], ids=str)
def test_a_session_with_latent_attention_holds_what_is_predicted(
    tmp_path: Path, form: Format
) -> None:
    source = tiny_nvembed(tmp_path / "source", hidden_size=1024, intermediate_size=4096).path
    put_own_config(source)
    variant = write_variant(source, tmp_path / "variant", form)
    write_graphs(variant, NVEMBED)
    command = [sys.executable, "-c", _MEASURE, str(variant), json.dumps(NVEMBED.to_json())]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    opened = Checkpoint(variant)
    plan = Plan("", "onnxruntime", "cpu", "fp32", "resident", batch_tokens=32)
    has_vnni = probe().has_vnni
    host, _ = predict(plan, opened.config, "F16", opened.formats, has_vnni=has_vnni)
    predicted = host - ONNX_BASE_BYTES
    measured = json.loads(shown.stdout)["bytes"]
    assert 0.7 * predicted < measured < predicted + _SMALL_BYTES


def test_selftests_notice_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saturating:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self, _: None, feeds: dict[str, Any]) -> list[Any]:
            return [np.full((len(feeds["input"]), 37), 32767, np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Saturating)
    assert not onnx_selftest.matmul_integer_is_exact(1)
    assert not onnx_selftest.matmul_nbits_is_exact(4, 64, 1)
    assert not onnx_selftest.is_exact([Int8Channel()], 1)
    assert not onnx_selftest.is_exact([Plain("F16"), IntGrouped()], 1)
    assert onnx_selftest.is_exact([Plain("F16")], 1)


def test_no_plan_runs_on_products_that_are_not_exact(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_selftest, "is_exact", lambda *_: False)
    bundle, plan = Bundle(tiny_bundle), Plan("int8", "onnxruntime", "cpu", "int8", "resident")
    with pytest.raises(BackendError, match="8-bit products of onnxruntime are not exact"):
        Runner(bundle, plan)
    Runner(bundle, replace(plan, variant="fp16", compute="fp32"))


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_four_bit_products_of_rounded_inputs_are_exact(group_size: int) -> None:
    assert onnx_selftest.matmul_nbits_is_exact(4, group_size, 1)


def test_eight_bit_products_are_exact_with_and_without_vnni() -> None:
    assert onnx_selftest.matmul_integer_is_exact(1)
    assert all(onnx_selftest.matmul_nbits_is_exact(8, size, 1) for size in (32, 64, 128))


_MEASURE_LAYERS = """
import os
import sys
import time
from pathlib import Path
import numpy as np
from lowmem.artifact.contract import read_contract
from lowmem.compute.onnx_engine import OnnxEngine
from lowmem.measure import MemoryPeak
from lowmem.text.batching import EncodedText, pack
directory = Path(sys.argv[1])
engine = OnnxEngine(directory, "model.onnx", read_contract(Path(sys.argv[2])), "cpu", 1)
ids = np.full(128, 5)
with MemoryPeak(os.getpid()) as peak:
    time.sleep(0.05)
    before = peak.bytes
    batches = pack([EncodedText(np.append(ids[1:], row + 6), 0, 0) for row in range(32)], 4096)
    engine.embed(batches)
    time.sleep(0.05)
print(peak.bytes - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_activations_of_a_pass_do_not_grow_with_the_layers(tmp_path: Path) -> None:
    contract = tmp_path / "contract.json"
    contract.write_text(json.dumps(CONTRACT.to_json()))
    grown = []
    for layers in (2, 12):
        source = tiny_checkpoint(tmp_path / f"{layers}", layers=layers, num_key_value_heads=6)
        variant = write_variant(source.path, tmp_path / f"{layers}-int4", IntGrouped(4, 64))
        write_graphs(variant, CONTRACT)
        command = [sys.executable, "-c", _MEASURE_LAYERS, str(variant), str(contract)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown.append(int(done.stdout))
    a_layers_keys_and_values = 2 * 4096 * 4 * 6 * 32
    assert grown[1] - grown[0] < 3 * a_layers_keys_and_values
