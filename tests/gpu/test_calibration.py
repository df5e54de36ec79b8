"""Calibration on a CUDA device beside the CPU's, and within the memory that it asks for."""

from pathlib import Path

import pytest
import torch

from export.memory import CUDA_BYTES, card_bytes
from export.sources import open_source
from lowmem import data
from lowmem.artifact.manifest import Manifest
from tests.bundles import write_bundle
from tests.models import tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VARIANTS = ("int8", "int4", "int4-6", "bnb-int8", "bnb-nf4")
# Sums in another order carry a few weights over the middle between two codes.
NEAR = 0.05


def test_a_card_loses_as_little_as_the_cpu(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1792}
    checkpoint = tiny_checkpoint(tmp_path / "tiny", layers=2, **shape).path
    rows = data.load("calibration")[:60]
    expected = write_bundle(checkpoint, tmp_path / "cpu", VARIANTS, calibration=rows)
    torch.cuda.reset_peak_memory_stats()
    found = write_bundle(checkpoint, tmp_path / "cuda", VARIANTS, calibration=rows, device="cuda")
    bound = card_bytes(open_source(checkpoint).config) - CUDA_BYTES
    assert torch.cuda.max_memory_allocated() < bound
    for name in VARIANTS:
        assert errors(found, name) == pytest.approx(errors(expected, name), rel=NEAR)


def errors(manifest: Manifest, variant: str) -> dict[str, float]:
    """How far each module is off."""
    modules = manifest.variants[variant].modules
    return {module: about["error"] for module, about in modules.items()}
