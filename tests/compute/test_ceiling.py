"""What the speed of a plan is held against."""

import pytest
import torch

from lowmem.compute import ceiling
from lowmem.compute.plan import COMPUTES_OF_DEVICE
from tests.shapes import SEVEN_B

EVERY = [
    (device, compute) for device, computes in COMPUTES_OF_DEVICE.items() for compute in computes
]


@pytest.mark.parametrize(("device", "compute"), EVERY)
def test_every_compute_of_a_device_has_products_to_be_held_against(device, compute):
    dtypes = {dtype for _, dtype in ceiling._libraries(device, compute)}
    assert dtypes <= {torch.float32, torch.float16, torch.bfloat16, torch.int8}
    assert (torch.int8 in dtypes) == (compute == "int8")


def test_the_best_of_all_products_counts(monkeypatch):
    seconds = iter([4.0, 1.0, 2.0] * 9)
    monkeypatch.setattr(ceiling, "_least_seconds", lambda *_: next(seconds))
    monkeypatch.setattr(ceiling, "_TOKENS", (1, 2, 4))
    out_features, in_features = SEVEN_B.intermediate_size, SEVEN_B.hidden_size
    assert ceiling.best_product("cpu", "fp32", SEVEN_B, torch.get_num_threads()) == (
        max(1 / 4, 2 / 1, 4 / 2) * 2 * out_features * in_features
    )
