"""What an export may hold, and its refusal of more than it may."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from export.memory import check_memory, peak_bytes
from lowmem.errors import CapacityError
from tests.shapes import SEVEN_B

GIB, MIB = 2**30, 2**20


def test_a_7b_export_stays_below_what_is_promised() -> None:
    assert peak_bytes(SEVEN_B, "F16", is_calibrated=False) < 2.5 * GIB
    assert peak_bytes(SEVEN_B, "F16", is_calibrated=True) < 4 * GIB


def test_wide_layers_and_wide_sources_take_more() -> None:
    wide = replace(SEVEN_B, intermediate_size=2 * SEVEN_B.intermediate_size)
    for is_calibrated in (False, True):
        plain = peak_bytes(SEVEN_B, "F16", is_calibrated=is_calibrated)
        assert peak_bytes(wide, "F16", is_calibrated=is_calibrated) > plain
        assert peak_bytes(SEVEN_B, "F32", is_calibrated=is_calibrated) > plain


def test_what_may_need_more_than_is_allowed_is_refused_with_the_way_out() -> None:
    source: Any = SimpleNamespace(config=SEVEN_B, dtype="F16")
    needed, less = (peak_bytes(SEVEN_B, "F16", is_calibrated=way) for way in (True, False))
    check_memory(source, needed, is_calibrated=True)
    check_memory(source, less, is_calibrated=False)
    with pytest.raises(CapacityError) as caught:
        check_memory(source, needed - 1, is_calibrated=True)
    assert str(caught.value) == (
        f"the export may need {needed // MIB} MiB of memory, {(needed - 1) // MIB} MiB are "
        f"allowed; --calibration none needs {less // MIB} MiB"
    )
    with pytest.raises(CapacityError, match=r"MiB are allowed$"):
        check_memory(source, less - 1, is_calibrated=True)
