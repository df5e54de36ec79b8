"""Optimum's traced export of a model, which took another way to ONNX, beside our graph of it."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from export.pipeline import export
from export.sources import open_source
from lowmem.compute.engine import unit_length
from tests.models import CONTRACT, EOS, VOCAB_SIZE, tiny_checkpoint
from tests.tolerances import PARITY_HIDDEN_STATES

LENGTHS = (9, 1, 5)


def padded() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask, padded on the right."""
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    ids = np.random.default_rng(0).integers(EOS + 2, VOCAB_SIZE, mask.shape) * mask
    return ids, mask


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the tracer, about code that is not ours
def test_optimums_graph_gives_our_vectors(tmp_path: Path) -> None:
    from optimum.exporters.onnx import main_export  # it warns

    source = tiny_checkpoint(tmp_path / "source").path
    with torch.inference_mode(False):
        main_export(
            str(source),
            output=tmp_path / "optimum",
            task="feature-extraction",
            dtype="fp32",
            do_validation=False,
        )
    export(open_source(source), tmp_path / "bundle", CONTRACT, variants=["fp16"])
    ids, mask = padded()
    positions = np.arange(ids.shape[1])[None].repeat(len(ids), axis=0)
    feeds = {"input_ids": ids, "attention_mask": mask}
    theirs = onnxruntime.InferenceSession(tmp_path / "optimum" / "model.onnx")
    (states,) = theirs.run(["last_hidden_state"], {**feeds, "position_ids": positions})
    ours = onnxruntime.InferenceSession(tmp_path / "bundle" / "fp16" / "model.onnx")
    (vectors,) = ours.run(None, feeds)
    last = unit_length(states[np.arange(len(ids)), np.array(LENGTHS) - 1])
    assert np.linalg.norm(vectors - last, axis=1).max() < PARITY_HIDDEN_STATES
