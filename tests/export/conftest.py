"""Fixtures that the tests of GGUF files share."""

from pathlib import Path

import pytest

from export.sources import GgufFile
from tests.gguf_files import write_gguf


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> GgufFile:
    return GgufFile(smollm2_path)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
