"""A padding token that is EOS, as in the checkpoints of the family, reaches no vector."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from export.pipeline import export
from export.sources import open_source
from lowmem.artifact.manifest import Bundle
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.embedder import Embedder
from tests.models import CONTRACT, EOS, tiny_checkpoint
from tests.tolerances import PARITY_COSINE

# Of several lengths; some end in what the tokenizer takes for EOS.
TEXTS = ["a", "the quick fox </s>", "</s>", "the question of the quest and the answer to it, too"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padding")
    source = tiny_checkpoint(folder / "tiny").path
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(folder / "cache"))
        export(open_source(source), folder / "bundle", CONTRACT, variants=["fp16"])
    return folder / "bundle"


@pytest.fixture(scope="module")
def alone(bundle: Path) -> np.ndarray:
    """Vectors of the texts one by one, where there is nothing to pad."""
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident", threads=1)
    model = Embedder(Runner(Bundle(bundle), plan))
    return np.concatenate([model.encode([text]) for text in TEXTS])


def assert_alike(found: np.ndarray, expected: np.ndarray) -> None:
    cosines = np.einsum("ij,ij->i", found, expected, dtype=np.float64)
    assert (1 - cosines).max() < PARITY_COSINE


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_texts_of_several_lengths_have_the_vectors_of_each_alone(
    bundle: Path, alone: np.ndarray, engine: str
) -> None:
    plan = Plan("fp16", engine, "cpu", "fp32", "resident", threads=1)
    assert_alike(Embedder(Runner(Bundle(bundle), plan)).encode(TEXTS), alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_graph_tells_eos_from_padding_by_the_mask(
    bundle: Path, alone: np.ndarray, side: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundle / "fp16", padding_side=side)
    batch = tokenizer(TEXTS, padding=True, return_tensors="np")
    assert tokenizer.pad_token_id == EOS
    assert (batch["input_ids"][0] == EOS).sum() > 1
    session = onnxruntime.InferenceSession(bundle / "fp16" / "model.onnx")
    inputs = {name: values.astype(np.int64) for name, values in batch.items()}
    assert_alike(session.run(None, inputs)[0], alone)


def test_sentence_transformers_gives_the_same_vectors(bundle: Path, alone: np.ndarray) -> None:
    model = SentenceTransformer(
        str(bundle / "fp16"), device="cpu", model_kwargs={"dtype": "float32"}
    )
    assert_alike(model.encode(TEXTS), alone)
