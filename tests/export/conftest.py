"""Fixtures that several files of tests share."""

from pathlib import Path

import pytest

from export.sources import GgufFile
from tests.gguf_files import write_gguf
from tests.graphs import write_variants
from tests.models import tiny_checkpoint


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> GgufFile:
    return GgufFile(smollm2_path)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source")).path


@pytest.fixture(scope="module")
def variants(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_variants(source, tmp_path_factory.mktemp("variants"))
