"""Graphs of tiny variants: texts, padding and sessions."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export.graph import write_graphs
from lowmem.artifact.formats import (
    Format,
    Int8Channel,
    IntGrouped,
    Plain,
)
from tests.models import CONTRACT, VOCAB_SIZE
from tests.variants import write_variant

Vectors = NDArray[np.float32]
Ids = list[int]

MEAN = replace(CONTRACT, pooling="mean")
BIDIRECTIONAL = replace(MEAN, is_causal=False)

EXACT_FORMATS: dict[str, Format] = {
    "f16": Plain("F16"),
    "bf16": Plain("BF16"),
    "4 bits, groups of 32": IntGrouped(4, 32),
    "4 bits, groups of 64": IntGrouped(4, 64),
    "8 bits, groups of 64": IntGrouped(8, 64),
    "8 bits by channel, inputs as they are": Int8Channel(rounds_activations=False),
}


def texts(seed: int = 0) -> list[Ids]:
    """Ids of one token and of many."""
    random = np.random.default_rng(seed)
    return [random.integers(4, VOCAB_SIZE, size).tolist() for size in (1, 2, 7, 7, 20, 33, 1)]


def write_variants(source: Path, folder: Path) -> dict[str, Path]:
    """A variant of each format with its graphs for last token pooling."""
    forms: dict[str, Format] = {**EXACT_FORMATS, "int8": Int8Channel()}
    directories = {
        name: write_variant(source, folder / str(number), form)
        for number, (name, form) in enumerate(forms.items())
    }
    for directory in directories.values():
        write_graphs(directory, CONTRACT)
    return directories


def session(directory: Path, graph: str = "model.onnx") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(
        directory / graph, options, providers=["CPUExecutionProvider"]
    )


def pad(rows: list[Ids], side: str, columns: int | None = None) -> dict[str, NDArray[np.int64]]:
    """Ids and mask of some texts; what stands in the padding is arbitrary."""
    width = columns or max(map(len, rows))
    random = np.random.default_rng(1)
    ids = random.integers(0, VOCAB_SIZE, (len(rows), width))
    mask = np.zeros_like(ids)
    for row, text in enumerate(rows):
        places = {
            "right": np.arange(len(text)),
            "left": np.arange(width - len(text), width),
            "anywhere": np.sort(random.choice(width, len(text), replace=False)),
        }[side]
        ids[row, places] = text
        mask[row, places] = 1
    return {"input_ids": ids, "attention_mask": mask}


def run(model: onnxruntime.InferenceSession, feeds: Mapping[str, NDArray[np.int64]]) -> Vectors:
    vectors: Vectors
    (vectors,) = model.run(["sentence_embedding"], dict(feeds))
    assert vectors.dtype == np.float32
    return vectors


def external(path: Path) -> Iterator[tuple[onnx.TensorProto, dict[str, str]]]:
    """Initializers that lie outside the graph, with their location, offset and length."""
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.external_data:
            yield tensor, {entry.key: entry.value for entry in tensor.external_data}
