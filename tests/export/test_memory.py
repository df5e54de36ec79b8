"""What an export may hold, and its refusal of more than it may."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from export.memory import calibrating_device, card_bytes, check_memory, peak_bytes, within_card
from lowmem.errors import BackendError, CapacityError
from lowmem.hardware import Gpu, Hardware
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


def machine(*free_bytes: int) -> Hardware:
    gpus = tuple(Gpu("a card", 24 * GIB, free, (8, 6)) for free in free_bytes)
    return Hardware("a cpu", 2, (), 8 * GIB, 8 * GIB, gpus, None if gpus else "no driver")


def test_a_card_that_has_room_calibrates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    needed = card_bytes(SEVEN_B)
    assert needed < 6 * GIB
    for wanted in ("auto", "cuda"):
        assert calibrating_device(wanted, SEVEN_B, machine(needed)) == ("cuda", "a card")
    assert calibrating_device("cpu", SEVEN_B, machine(needed)) == ("cpu", "asked for")


@pytest.mark.parametrize(
    ("free", "torch_sees_it", "error", "problem"),
    [
        ((), False, BackendError, "there is no CUDA device: no driver"),
        ((8 * GIB,), False, BackendError, "torch finds no CUDA device that it can use"),
        (
            (GIB,),
            True,
            CapacityError,
            r"calibration may need \d+ MiB of the card's memory",
        ),
    ],
)
def test_where_no_card_can_the_cpu_does_unless_the_card_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    free: tuple[int, ...],
    torch_sees_it: bool,
    error: type[Exception],
    problem: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees_it)
    device, why = calibrating_device("auto", SEVEN_B, machine(*free))
    assert device == "cpu"
    assert re.match(problem, why)
    with pytest.raises(error, match=problem):
        calibrating_device("cuda", SEVEN_B, machine(*free))


def test_a_card_that_is_used_up_is_one_clear_error() -> None:
    with (
        pytest.raises(CapacityError, match=r"the card's memory is used up, .* --device cpu"),
        within_card("cuda"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError, match="a defect"), within_card("cuda"):
        raise RuntimeError("a defect")
    with pytest.raises(torch.OutOfMemoryError), within_card("cpu"):
        raise torch.OutOfMemoryError
