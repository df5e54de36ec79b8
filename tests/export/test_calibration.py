"""Calibration beside the engine's own arithmetic, and what it gains over weights alone."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export import hidden_states
from export.calibration import LEAST_SENSITIVITY, SENSITIVITY_POWER, Calibration
from export.hidden_states import OUTPUT, STAGES, Texts
from export.pipeline import export
from export.sources import open_source
from lowmem import data
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.compute.torch_engine import TorchEngine
from lowmem.data import Row
from lowmem.errors import CapacityError, InputError
from lowmem.fidelity import metrics
from lowmem.progress import Progress
from lowmem.text.batching import EncodedText, PackedBatch, pack
from lowmem.text.tokenizer import Tokenizer
from tests.bundles import wait_until_recorded
from tests.models import CONTRACT, tiny_checkpoint
from tests.tolerances import PARITY_COSINE

VARIANTS = ("fp16", "int8", "int4", "bnb-int8", "bnb-nf4")
CALIBRATION = data.load("calibration")[:100]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny").path


@pytest.fixture(scope="module")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """One by weights alone, one calibrated."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, rows in (("data-free", ()), ("calibrated", CALIBRATION)):
        write(checkpoint, folder / name, rows)
    return {name: Bundle(folder / name) for name in ("data-free", "calibrated")}


def write(checkpoint: Path, bundle: Path, rows: Sequence[Row], **options: Any) -> None:
    options = {"variants": VARIANTS, "onnx": False, "copy": True} | options
    export(open_source(checkpoint), bundle, CONTRACT, calibration=rows, **options)


def tokenized(checkpoint: Path, rows: Sequence[Row]) -> list[EncodedText]:
    vocab_size = Checkpoint(checkpoint).config.vocab_size
    return Tokenizer(checkpoint / "tokenizer.json", CONTRACT, vocab_size).encode_rows(rows)


def begun(checkpoint: Path, encoded: Sequence[EncodedText], directory: Path) -> Calibration:
    """A calibration of ``int4``, before the first layer, by sensitivities without meaning."""
    opened = Checkpoint(checkpoint)
    texts = Texts(encoded, opened.config, CONTRACT, directory, "cpu")
    shape = (opened.config.num_hidden_layers, len(STAGES), texts.tokens)
    drawn = torch.from_numpy(np.random.RandomState(1).lognormal(0, 3, shape)).float()
    return Calibration(texts, drawn, opened.embedding(), {"int4": None})


def embed(bundle: Bundle, variant: str, compute: str) -> NDArray[np.float32]:
    plan = Plan(variant, "torch", "cpu", compute, "resident", threads=torch.get_num_threads())
    runner = Runner(bundle, plan)
    rows = data.load("quick")
    prompts = [CONTRACT.prompt(row.input_type, row.task) for row in rows]
    texts = runner.tokenizer.encode([row.text for row in rows], prompts, truncate=True)
    return runner.embed(texts, normalize=True)


@pytest.mark.parametrize(
    ("variant", "compute", "share"),
    [
        ("int4", "fp32", 0.5),
        ("bnb-nf4", "fp32", 0.5),
        ("int8", "int8", 0.7),
        ("bnb-int8", "fp32", 0.5),
    ],
)
def test_calibrated_vectors_of_other_texts_lose_less(
    bundles: dict[str, Bundle], variant: str, compute: str, share: float
) -> None:
    reference = embed(bundles["data-free"], "fp16", "fp32")
    lost = {
        name: 1 - metrics.cosines(reference, embed(bundle, variant, compute)).mean()
        for name, bundle in bundles.items()
    }
    assert lost["calibrated"] < share * lost["data-free"]


def test_hidden_states_are_those_of_the_engine(checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint(checkpoint)
    texts = tokenized(checkpoint, data.load("quick")[:12])
    seen: list[torch.Tensor] = []
    batches = pack(texts, 2048, pooling=CONTRACT.pooling)
    TorchEngine(opened, CONTRACT).embed(batches, on_layer=lambda *step: seen.append(step[2]))
    calibration = begun(checkpoint, texts, tmp_path)
    for index in range(opened.config.num_hidden_layers):
        layer = opened.layer(index)
        calibration.full_precision(layer, with_folds=False)
        calibration.replay("int4", layer)
    expected = torch.cat(seen[-len(batches) :])
    for states in (calibration.states(), calibration.states("int4")):
        cosines = torch.cosine_similarity(states.double(), expected.double())
        assert float(1 - cosines.min()) < PARITY_COSINE


def test_a_token_counts_by_its_own_length_and_by_what_the_vector_sees_of_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    calibration = begun(checkpoint, tokenized(checkpoint, CALIBRATION[:40]), tmp_path)
    texts = calibration._texts
    squares = calibration.states().double().square().mean(dim=-1)
    sensitivities = calibration._sensitivities[1, 1].double() * squares
    relative = sensitivities / sensitivities.mean()
    expected = (relative + LEAST_SENSITIVITY) ** SENSITIVITY_POWER / squares
    weights = torch.cat(list(calibration._token_weights(1, OUTPUT, texts)))[:, 0]
    assert torch.allclose(weights.double(), expected, rtol=1e-4)


@pytest.mark.parametrize(("share", "batches"), [(0.0, 1), (0.5, 5), (0.7, 7), (3.0, 10)])
def test_a_part_of_the_texts_is_from_everywhere(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    batches: int,
) -> None:
    monkeypatch.setattr(hidden_states, "pack", in_ten_batches)
    texts = begun(checkpoint, tokenized(checkpoint, CALIBRATION[:40]), tmp_path)._texts
    part = texts.part(round(share * texts.tokens))
    starts = [batch.rows.start for batch in texts.batches]
    chosen = [starts.index(batch.rows.start) for batch in part.batches]
    assert len(starts) == 10
    assert len(chosen) == batches
    assert set(np.diff(chosen)) <= {10 // batches, -(-10 // batches)}
    assert [len(ids) for ids in part._ids] == [rows.stop - rows.start for rows in part.rows]


def in_ten_batches(texts: Sequence[EncodedText], tokens: int, **options: Any) -> list[PackedBatch]:
    return [batch for i in range(10) for batch in pack(texts[i::10], tokens, **options)]


def test_the_manifest_tells_how_far_the_residual_stream_is_off(
    bundles: dict[str, Bundle],
) -> None:
    bundle = bundles["calibrated"]
    states = {name: _states(bundle, name) for name in ("fp16", "int4")}
    modules = bundle.variant("int4").modules
    for index, (exact, quantized) in enumerate(zip(*states.values(), strict=True)):
        missed = (quantized - exact).square().sum(-1) / exact.square().sum(-1)
        about = modules[f"layers.{index}.mlp"]
        assert about["error"] == pytest.approx(float(missed.mean().sqrt()), rel=1e-3)
        assert about["bits"] == 4.5
    in_order = [modules[f"layers.0.{part}"]["error"] for part in ("self_attn", "mlp")]
    assert None not in in_order
    data_free = bundles["data-free"].variant("int4").modules
    assert {about["error"] for about in data_free.values()} == {None}


def _states(bundle: Bundle, variant: str) -> list[torch.Tensor]:
    """Hidden states of all calibration tokens after each layer, float64."""
    opened = Checkpoint(bundle.directory(variant))
    batches = pack(tokenized(opened.directory, CALIBRATION), 2048, pooling=CONTRACT.pooling)
    seen: list[torch.Tensor] = []
    TorchEngine(opened, CONTRACT).embed(batches, on_layer=lambda *step: seen.append(step[2]))
    step = len(batches)
    return [torch.cat(seen[begin : begin + step]).double() for begin in range(0, len(seen), step)]


def test_scratch_files_have_no_name(checkpoint: Path, tmp_path: Path) -> None:
    begun(checkpoint, tokenized(checkpoint, CALIBRATION[:1]), tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_recipe_names_the_texts_by_their_hash(bundles: dict[str, Bundle]) -> None:
    variants = bundles["calibrated"].manifest.variants
    for name in VARIANTS[1:]:
        assert variants[name].recipe["calibration"] == data.sha256(CALIBRATION)
    assert "calibration" not in variants["fp16"].recipe


def test_the_same_texts_give_the_same_bytes_and_are_left_as_they_are(
    bundles: dict[str, Bundle], checkpoint: Path, tmp_path: Path
) -> None:
    write(checkpoint, tmp_path / "again", CALIBRATION)
    again = Bundle(tmp_path / "again").manifest
    assert again == bundles["calibrated"].manifest
    write(checkpoint, tmp_path / "again", CALIBRATION)
    assert Bundle(tmp_path / "again").manifest == again


def test_other_texts_need_force(checkpoint: Path, tmp_path: Path) -> None:
    write(checkpoint, tmp_path / "bundle", (), variants=("int4",))
    with pytest.raises(InputError, match="int4 that was made otherwise: --force replaces it"):
        write(checkpoint, tmp_path / "bundle", CALIBRATION[:4], variants=("int4",))


@pytest.mark.parametrize("layer", [0, 2])
def test_an_export_that_is_killed_goes_on_at_its_layer(
    layer: int, bundles: dict[str, Bundle], checkpoint: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    steps = []

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("calibrating", layer + 1):
            wait_until_recorded(tmp_path / "never killed", layer + 1)
            shutil.copytree(tmp_path / "never killed", killed)

    def count(what: str, done: int, total: int) -> None:
        if what in ("calibrating", "going through finished layers"):
            steps.append((what, done))

    write(checkpoint, tmp_path / "never killed", CALIBRATION, progress=stop)
    write(checkpoint, killed, CALIBRATION, progress=count)
    finished = [("going through finished layers", done + 1) for done in range(layer)]
    assert steps[:layer] == finished
    assert steps[layer] == ("calibrating", layer + 1)
    assert Bundle(killed).manifest == bundles["calibrated"].manifest


def test_a_full_disk_is_one_error(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        if not os.fstat(descriptor).st_nlink:  # scratch, and not a variant's file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=r"^the disk is full: calibration needs \d+ bytes"):
        write(checkpoint, tmp_path / "bundle", CALIBRATION, variants=("int4",))
    assert not any((tmp_path / "bundle").iterdir())


def test_progress_is_told_of_each_layer(checkpoint: Path, tmp_path: Path) -> None:
    told = []
    progress: Progress = lambda what, done, total: told.append((what, done, total))  # noqa: E731
    write(checkpoint, tmp_path / "bundle", CALIBRATION[:4], variants=("int4",), progress=progress)
    assert [step for step in told if step[0] == "calibrating"] == [
        ("calibrating", done, 5) for done in (1, 2, 3)
    ]
