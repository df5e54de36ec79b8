"""Fixtures that several tests of exports share."""

import json
import shutil
from pathlib import Path

import pytest

from lowmem.artifact.variants import VARIANTS
from tests.bundles import write_bundle
from tests.command_line import lowmem
from tests.models import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in two shards; not to be changed."""
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", shards=2, layers=2).path


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


@pytest.fixture(scope="session")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All variants; not to be changed."""
    path = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_CACHE", str(path / "cache"))
        write_bundle(checkpoint, path / "bundle", VARIANTS)
    return path / "bundle"


@pytest.fixture(scope="session")
def cli_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One made by the command line, with reference vectors of ``quick``; not to be changed.

    Its ``checkpoint`` and ``contract.json`` lie beside it.
    """
    folder = tmp_path_factory.mktemp("cli")
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    contract = folder / "contract.json"
    contract.write_text(json.dumps(checkpoint.contract.to_json()))
    lowmem(
        *("export", checkpoint.path, folder / "bundle", "--contract", contract),
        *("--reference-texts", "quick", "--calibration", "none"),
    )
    return folder / "bundle"
