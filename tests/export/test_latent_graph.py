"""Latent attention inside the graphs."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from export.graph import write_graphs
from lowmem.artifact.formats import Int8Channel, IntGrouped, Plain
from lowmem.artifact.tensors import read_header
from lowmem.artifact.weights import Checkpoint
from tests.bidirectional import (
    GRITLM,
    NVEMBED,
    Published,
    put_own_config,
    tiny_gritlm,
    tiny_nvembed,
)
from tests.models import HIDDEN_SIZE, VOCAB_SIZE
from tests.tolerances import INVARIANCE, PARITY_COSINE
from tests.variants import write_variant

FORMS = {"fp16": Plain("F16"), "int8": Int8Channel(), "int4": IntGrouped(4, 64)}
FOLDED = "latent_attention.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_nvembed(tmp_path_factory.mktemp("source")).path
    put_own_config(path)
    return path


@pytest.fixture(scope="module")
def variants(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("variants")
    written = {name: write_variant(source, folder / name, form) for name, form in FORMS.items()}
    for directory in written.values():
        write_graphs(directory, NVEMBED)
    return written


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def texts() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(4, VOCAB_SIZE, size).tolist() for size in (1, 2, 7, 7, 20, 33, 1)]


def feeds(left_out: int, side: str, columns: int = 40) -> dict[str, NDArray[np.int64]]:
    random = np.random.default_rng(1)
    ids = random.integers(0, VOCAB_SIZE, (len(texts()), columns))
    mask, pooled = np.zeros_like(ids), np.zeros_like(ids)
    for row, text in enumerate(texts()):
        places = {
            "right": np.arange(len(text)),
            "left": np.arange(columns - len(text), columns),
            "anywhere": np.sort(random.choice(columns, len(text), replace=False)),
        }[side]
        ids[row, places], mask[row, places] = text, 1
        pooled[row, places[min(left_out, len(text) - 1) :]] = 1
    return {"input_ids": ids, "attention_mask": mask, "pooling_mask": pooled}


def distances(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """1 - cosine of unit rows, by their difference: half its square."""
    apart: NDArray[np.float64] = np.square(left.astype(np.float64) - right).sum(axis=1) / 2
    return apart


@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
@pytest.mark.parametrize("left_out", [0, 3])
def test_vectors_are_those_of_the_paper_wherever_the_padding_is(
    variants: dict[str, Path], source: Path, side: str, left_out: int
) -> None:
    oracle = Published(source)
    expected = [oracle.embed_ids(ids, min(left_out, len(ids) - 1)).numpy() for ids in texts()]
    (got,) = session(variants["fp16"] / "model.onnx").run(None, feeds(left_out, side))
    assert distances(got, np.stack(expected)).max() < PARITY_COSINE


def test_a_text_without_pooled_tokens_gives_zeros_and_leaves_the_others_alone(
    variants: dict[str, Path],
) -> None:
    model = session(variants["fp16"] / "model.onnx")
    inputs = feeds(0, "right")
    (expected,) = model.run(None, inputs)
    inputs["pooling_mask"][2] = 0
    (got,) = model.run(None, inputs)
    assert not got[2].any()
    others = [0, 1, 3, 4, 5, 6]
    assert distances(got[others], expected[others]).max() < INVARIANCE


@pytest.mark.parametrize("graph", ["fp16/model_fp16.onnx", "int8/model.onnx", "int4/model.onnx"])
def test_the_layer_is_float32_and_has_operators_of_every_device(
    variants: dict[str, Path], graph: str
) -> None:
    model = onnx.load(variants["fp16"].parent / graph, load_external_data=False)
    nodes = [node for node in model.graph.node if "/latent_attention/" in node.name]
    assert {node.op_type for node in nodes} == {
        *(
            "LayerNormalization",
            "Gemm",
            "Reshape",
            "Softmax",
            "MatMul",
            "Add",
            "Gelu",
            "Mul",
            "Cast",
        )
    }
    casts = [node for node in nodes if node.op_type == "Cast"]
    assert all(node.attribute[0].i == onnx.TensorProto.FLOAT for node in casts)


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_the_stored_bytes_and_two_folded_matrices(
    variants: dict[str, Path], name: str
) -> None:
    directory = variants[name]
    stored = Checkpoint(directory).tensors
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    taken: dict[str, int] = {}
    for initializer in model.graph.initializer:
        entry = {item.key: item.value for item in initializer.external_data}
        if "latent_attention" not in initializer.name or not entry:
            continue
        offset, length = int(entry["offset"]), int(entry["length"])
        places = read_header(directory / entry["location"])
        name_of = next(
            tensor
            for tensor, place in places.items()
            if place.offset <= offset and offset + length <= place.offset + place.nbytes
        )
        taken[name_of] = taken.get(name_of, 0) + length
    folded_away = ("latents", "norm_context", "to_q", "to_kv", "to_out")
    expected = {
        tensor: place.nbytes
        for tensor, place in stored.items()
        if tensor.startswith("latent_attention_model.")
        and not any(part in tensor for part in folded_away)
    }
    folded = {tensor: place.nbytes for tensor, place in read_header(directory / FOLDED).items()}
    assert folded.keys() == {"keys", "values"}
    assert taken == expected | folded


def test_the_same_variant_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_graphs(write_variant(source, tmp_path / name, Plain("F16")), NVEMBED)
    for file in (FOLDED, "model.onnx", "model_fp16.onnx"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    shape = Checkpoint(source).config.latent_attention
    assert shape is not None
    size = (tmp_path / "first" / FOLDED).stat().st_size
    assert 0 < size - shape.folded_bytes(HIDDEN_SIZE) < 1024


def test_other_poolings_have_no_folded_file(tmp_path: Path) -> None:
    path = tiny_gritlm(tmp_path / "gritlm").path
    write_graphs(path, GRITLM)
    assert (path / "model.onnx").exists()
    assert not (path / FOLDED).exists()
