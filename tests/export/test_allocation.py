"""Where a budget of bits goes: effects beside whole exports, and the budget kept to the byte."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export import pipeline
from export.allocation import allocate, pooled_effects, some_texts
from export.hidden_states import DOWN, MLP, STAGES
from export.pipeline import export
from export.sources import open_source
from lowmem import data
from lowmem.artifact.config import ModelConfig
from lowmem.artifact.contract import Contract
from lowmem.artifact.formats import Format
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import HIGH, LOW, formats_for
from lowmem.artifact.weights import Checkpoint
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.errors import CapacityError, InputError
from lowmem.text.batching import EncodedText
from tests.models import CONTRACT, tiny_checkpoint

CALIBRATION = data.load("calibration")[:60]
COMPUTED_ALIKE = 2e-6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny").path


@pytest.fixture(scope="module")
def mixed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("mixed") / "bundle"
    variants = ["fp16", "int4", "int4-6"]
    export(open_source(checkpoint), path, CONTRACT, variants=variants, calibration=CALIBRATION)
    return Bundle(path)


def embed(
    bundle: Bundle, variant: str, rows: list[EncodedText], engine: str = "torch"
) -> NDArray[np.float64]:
    plan = Plan(variant, engine, "cpu", "fp32", "resident", threads=1)
    return Runner(bundle, plan).embed(rows, normalize=True).astype(np.float64)


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_effects_are_those_of_models_with_one_stage_quantized(
    pooling: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = replace(CONTRACT, pooling=pooling)
    source = open_source(checkpoint)
    export(source, tmp_path / "fp16", contract, variants=["fp16"], onnx=False)
    exact = Bundle(tmp_path / "fp16")
    texts = some_texts(_encoded(exact, contract))[:12]
    effects = pooled_effects(source, contract, "F16", texts, tmp_path)
    config = source.config
    assert set(effects) == {(i, stage) for i in range(config.num_hidden_layers) for stage in STAGES}

    for index, stage in [(0, STAGES[0]), (0, DOWN), (1, STAGES[1]), (1, MLP)]:

        def formats(variant: str, config: ModelConfig, dtype: str) -> dict[str, Format]:
            plain = formats_for("fp16", config, dtype)
            return plain | {f"layers.{index}.{linear}": LOW for linear in stage}  # noqa: B023

        monkeypatch.setattr(pipeline, "formats_for", formats)
        path = tmp_path / f"{index}-{stage[0]}"
        export(open_source(checkpoint), path, contract, variants=["int4"], onnx=False)
        cosines = (embed(exact, "fp16", texts) * embed(Bundle(path), "int4", texts)).sum(axis=1)
        assert effects[index, stage] == pytest.approx(1 - cosines.mean(), abs=COMPUTED_ALIKE)
        assert effects[index, stage] > 10 * COMPUTED_ALIKE


def _encoded(bundle: Bundle, contract: Contract) -> list[EncodedText]:
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident", threads=1)
    return Runner(bundle, plan).tokenizer.encode_rows(CALIBRATION)


def test_the_largest_effects_for_their_size_get_8_bits(checkpoint: Path) -> None:
    config = open_source(checkpoint).config
    effects = {
        (index, stage): 1e-6 for index in range(config.num_hidden_layers) for stage in STAGES
    }
    effects |= {(1, DOWN): 0.1, (0, MLP): 0.001}
    formats = allocate(effects, config, 5)
    assert formats["layers.1.mlp.down_proj"] == HIGH
    least = allocate(effects, config, 4.5)
    assert set(least.values()) == {LOW}
    assert set(allocate(effects, config, 8.5).values()) == {HIGH}


def test_the_budget_is_kept_and_nearly_spent(mixed: Bundle) -> None:
    checkpoint = Checkpoint(mixed.directory("int4-6"))
    bits = mixed.variant("int4-6").bits_per_weight["linears"]
    largest = max(int(np.prod(shape)) for shape in checkpoint.config.linears().values())
    assert 6 - 8 * largest / checkpoint.config.linear_weights < bits <= 6
    assert set(checkpoint.formats.values()) == {LOW, HIGH}
    assert mixed.variant("int4-6").recipe["budget"] == 6


def test_more_bits_are_nearer_to_full_precision(mixed: Bundle) -> None:
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident", threads=1)
    rows = list(data.load("quick"))
    texts = Runner(mixed, plan).tokenizer.encode_rows(rows)
    exact = embed(mixed, "fp16", texts)
    cosines = {name: (exact * embed(mixed, name, texts)).sum(axis=1) for name in ("int4", "int4-6")}
    lost = {name: 1 - values.mean() for name, values in cosines.items()}
    assert lost["int4-6"] < lost["int4"]


def test_onnx_runtime_runs_the_mixture(mixed: Bundle) -> None:
    plan = Plan("fp16", "torch", "cpu", "fp32", "resident", threads=1)
    texts = Runner(mixed, plan).tokenizer.encode_rows(list(data.load("quick"))[:8])
    cosines = embed(mixed, "int4-6", texts) * embed(mixed, "int4-6", texts, "onnxruntime")
    assert 1 - cosines.sum(axis=1).min() < 1e-5


def test_without_texts_a_budget_cannot_be_spent(checkpoint: Path, tmp_path: Path) -> None:
    source = open_source(checkpoint)
    with pytest.raises(InputError, match="int4-6 needs calibration texts"):
        export(source, tmp_path / "bundle", CONTRACT, variants=["int4-6"])
    assert not (tmp_path / "bundle").exists()


def test_what_would_be_refused_in_the_end_is_refused_before_anything_is_measured(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("measured before it was refused")

    monkeypatch.setattr(pipeline, "pooled_effects", measured)
    source, bundle = open_source(checkpoint), tmp_path / "bundle"
    export(source, bundle, CONTRACT, variants=["fp16"], onnx=False)
    (bundle / "int4-6").mkdir()
    options: dict[str, Any] = {"variants": ["int4-6"], "calibration": CALIBRATION}
    with pytest.raises(InputError, match="int4-6 is there and is no variant of the bundle"):
        export(source, bundle, CONTRACT, **options)
    (bundle / "int4-6").rmdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match=r"the export needs .* bytes of disk, 1000 are free"):
        export(source, bundle, CONTRACT, **options)
