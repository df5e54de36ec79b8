"""Calibration on a device: all that computes is there, and the bytes are those of the CPU."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from export import sensitivities
from export.memory import CUDA_BYTES, card_bytes
from export.sources import open_source
from lowmem import data
from lowmem.compute.operations import products
from tests.bundles import write_bundle
from tests.models import tiny_checkpoint
from tests.pretend_device import DEVICE, PretendDevice

VARIANTS = ("int8", "int4", "int4-6", "bnb-int8", "bnb-nf4")


def test_the_device_mixes_with_no_other() -> None:
    with PretendDevice() as device:
        there = torch.ones(3, 4, device=DEVICE)
        there[1:].mul_(2)
        assert (there @ there.T).sum() == 100
        with pytest.raises(AssertionError, match="mixes devices"):
            there + torch.ones(4)
        assert torch.equal(there.cpu(), torch.tensor([[1.0], [2], [2]]).expand(3, 4))
    assert device.calls > 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_device_gives_the_bytes_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(products, "has_onednn", lambda: False)  # a library of the CPU alone
    monkeypatch.setattr(sensitivities, "_factors", lambda device: torch.float32)  # so is bfloat16
    checkpoint = tiny_checkpoint(tmp_path / "tiny", dtype=dtype, layers=2)
    rows = data.load("calibration")[:20]

    with sdpa_kernel(SDPBackend.MATH):  # torch chooses by the device, and each rounds its own way
        expected = write_bundle(checkpoint.path, tmp_path / "cpu", VARIANTS, calibration=rows)
        with PretendDevice() as device:
            found = write_bundle(
                checkpoint.path, tmp_path / "device", VARIANTS, calibration=rows, device=DEVICE
            )
    assert found == expected
    assert device.calls > 1000


def test_what_a_card_holds_stays_within_what_is_asked_for(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1792}
    checkpoint = tiny_checkpoint(tmp_path / "tiny", layers=1, **shape).path
    rows = data.load("calibration")[:60]  # enough to fill a batch
    with PretendDevice() as device:
        write_bundle(checkpoint, tmp_path / "bundle", ["int4"], calibration=rows, device=DEVICE)
    bound = card_bytes(open_source(checkpoint).config) - CUDA_BYTES
    assert 0.7 * bound < device.peak_bytes < bound
