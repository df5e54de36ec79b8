"""Whether products of ONNX Runtime are exact, and what happens where they are not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from lowmem.artifact.formats import Int8Channel, IntGrouped, Plain
from lowmem.artifact.manifest import Bundle
from lowmem.compute import onnx_selftest
from lowmem.compute.engine import Runner
from lowmem.compute.plan import Plan
from lowmem.errors import BackendError


def test_selftests_notice_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    class Saturating:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self, _: None, feeds: dict[str, Any]) -> list[Any]:
            return [np.full((len(feeds["input"]), 37), 32767, np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Saturating)
    assert not onnx_selftest.matmul_integer_is_exact(1)
    assert not onnx_selftest.matmul_nbits_is_exact(4, 64, 1)
    assert not onnx_selftest.is_exact([Int8Channel()], 1)
    assert not onnx_selftest.is_exact([Plain("F16"), IntGrouped()], 1)
    assert onnx_selftest.is_exact([Plain("F16")], 1)


def test_no_plan_runs_on_products_that_are_not_exact(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_selftest, "is_exact", lambda *_: False)
    bundle, plan = Bundle(tiny_bundle), Plan("int8", "onnxruntime", "cpu", "int8", "resident")
    with pytest.raises(BackendError, match="8-bit products of onnxruntime are not exact"):
        Runner(bundle, plan)
    Runner(bundle, replace(plan, variant="fp16", compute="fp32"))


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
def test_four_bit_products_of_rounded_inputs_are_exact(group_size: int) -> None:
    assert onnx_selftest.matmul_nbits_is_exact(4, group_size, 1)


def test_eight_bit_products_are_exact_with_and_without_vnni() -> None:
    assert onnx_selftest.matmul_integer_is_exact(1)
    assert all(onnx_selftest.matmul_nbits_is_exact(8, size, 1) for size in (32, 64, 128))
