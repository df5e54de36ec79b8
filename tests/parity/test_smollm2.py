"""A real decoder with real outliers: beside transformers, and calibrated as well as promised."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from export.pipeline import export
from export.sources import open_source
from lowmem import data
from lowmem.artifact.contract import read_contract
from lowmem.artifact.manifest import Bundle
from lowmem.compute.engine import Runner, unit_length
from lowmem.compute.plan import Plan
from lowmem.fidelity import metrics
from lowmem.fidelity.directions import Vectors
from lowmem.measure import measure
from tests.tolerances import INVARIANCE_DISTANCE, ONNX_SMOLLM2_COSINE, PARITY_COSINE

CONTRACT = Path(__file__).parents[2] / "benchmarks" / "smollm2.json"
# Mean, 5th percentile and minimum of the cosine on ``probe``: what the project promises. Anything
# broken in a quantizer or in a kernel falls far below.
FLOORS = {
    "int8-torch-cpu-fp32": (0.998, 0.9965, 0.99),
    "int8-torch-cpu-int8": (0.998, 0.9965, 0.99),
    "int4-torch-cpu-fp32": (0.9935, 0.982, 0.965),
    "bnb-nf4-torch-cpu-fp32": (0.9935, 0.982, 0.965),
}
REPORTED = {
    "int8": ("--engine", "torch"),
    "int4": ("--engine", "torch", "--compute", "fp32"),
    "bnb-nf4": ("--engine", "torch", "--compute", "fp32"),
}


@pytest.fixture(scope="module")
def bundle(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("smollm2") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(path.parent / "cache"))
        export(open_source(smollm2_path), path, read_contract(CONTRACT), variants=["fp16"])
    return Bundle(path)


@pytest.fixture(scope="module")
def theirs(bundle: Bundle, rows: list[data.Row]) -> Vectors:
    """What transformers makes of the exported directory, text by text."""
    runner = Runner(bundle, Plan("fp16", "torch", "cpu", "fp32", "resident"))
    prompts = [bundle.contract.prompt(row.input_type, row.task) for row in rows]
    texts = runner.tokenizer.encode([row.text for row in rows], prompts, truncate=True)
    model = AutoModel.from_pretrained(bundle.directory("fp16"), dtype=torch.float32).eval()
    with torch.inference_mode():
        states = [model(torch.from_numpy(text.input_ids)[None])[0][0, -1] for text in texts]
    return unit_length(torch.stack(states).numpy())


@pytest.fixture(scope="module", params=["quick", pytest.param("probe", marks=pytest.mark.slow)])
def rows(request: pytest.FixtureRequest) -> list[data.Row]:
    return data.load(request.param)


@pytest.mark.parametrize(
    ("engine", "tolerance"), [("torch", PARITY_COSINE), ("onnxruntime", ONNX_SMOLLM2_COSINE)]
)
def test_every_text_has_the_vector_of_transformers(
    bundle: Bundle,
    rows: list[data.Row],
    theirs: Vectors,
    tmp_path: Path,
    engine: str,
    tolerance: float,
) -> None:
    plan = Plan("fp16", engine, "cpu", "fp32", "resident", threads=2)
    measure(bundle, plan, rows, vectors=tmp_path / "ours.npy", warm_up=False)
    cosines = metrics.cosines(theirs, np.load(tmp_path / "ours.npy"))
    assert (1 - cosines).max() < tolerance


@pytest.fixture(scope="module")
def reported(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and, for each variant, a report on ``probe`` and its vectors."""
    folder = tmp_path_factory.mktemp("reported")
    wanted = ("--variants", ",".join(["fp16", *REPORTED]), "--no-onnx")
    contract = ("--contract", CONTRACT, "--reference-texts", "probe")
    lowmem("export", smollm2_path, folder / "bundle", *wanted, *contract)
    for variant, wishes in REPORTED.items():
        dump = ("--json", folder / f"{variant}.json", "--dump", folder / variant)
        # The floor that all reach: what each must reach is asked for below.
        floor = ("--floor", "mean=0.5,p5=0,min=-1")
        lowmem("report", folder / "bundle", "--variant", variant, *wishes, *dump, *floor)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("variant", REPORTED)
def test_calibrated_variants_are_as_faithful_as_promised(reported: Path, variant: str) -> None:
    reports = json.loads((reported / f"{variant}.json").read_text())["reports"]
    found = {
        one["plan"]: tuple(one["cosine"][key] for key in ("mean", "p5", "min")) for one in reports
    }
    for plan, floor in FLOORS.items():
        if plan.startswith(f"{variant}-"):
            assert all(figure >= bound for figure, bound in zip(found[plan], floor, strict=True)), (
                plan,
                found[plan],
            )


@pytest.mark.slow
@pytest.mark.parametrize("variant", REPORTED)
def test_figures_follow_from_the_dumped_vectors(reported: Path, variant: str) -> None:
    reference = np.load(reported / variant / "reference.npy")
    for one in json.loads((reported / f"{variant}.json").read_text())["reports"]:
        vectors = np.load(reported / variant / f"{one['plan']}.npy")
        cosines = metrics.cosines(reference, vectors)
        figures = (cosines.mean(), np.quantile(cosines, 0.05), cosines.min())
        found = [one["cosine"][key] for key in ("mean", "p5", "min")]
        assert found == pytest.approx(figures, abs=1e-6)


@pytest.mark.slow
def test_embedding_the_dumped_texts_gives_the_dumped_vectors(
    reported: Path, tmp_path: Path
) -> None:
    bundle, texts = reported / "bundle", reported / "int4" / "texts.jsonl"
    wishes = ("--variant", "int4", *REPORTED["int4"], "--truncate")
    lowmem("embed", bundle, texts, tmp_path / "again.npy", *wishes)
    dumped = np.load(reported / "int4" / "int4-torch-cpu-fp32.npy")
    distances = np.linalg.norm(np.load(tmp_path / "again.npy") - dumped, axis=1)
    assert distances.max() < INVARIANCE_DISTANCE


def lowmem(*arguments: object) -> None:
    command = [sys.executable, "-m", "lowmem", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
