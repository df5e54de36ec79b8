"""What a caller has set torch to: it changes no vector, or is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem.artifact.manifest import Bundle
from lowmem.compute.operations.dequantize import _nf4_pairs
from lowmem.compute.operations.int8 import is_exact_and_faster
from lowmem.compute.operations.products import _fastest_float32
from lowmem.errors import BackendError
from tests.runners import cosine_distances, encoded, runner
from tests.tolerances import INVARIANCE, ROUNDED_INVARIANCE_FACTOR


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle(tiny_bundle)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarser_float32_products_are_refused(bundle: Bundle, precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.raises(BackendError, match=f"must be float32, .*{precision}"):
            runner(bundle)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs torch 2.9 or newer"
)
def test_coarser_float32_products_of_one_backend_are_refused(bundle: Bundle) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(BackendError, match="must be float32"):
            runner(bundle)
    finally:
        torch.set_float32_matmul_precision("highest")
    runner(bundle)


def test_products_that_become_coarser_later_are_refused(bundle: Bundle) -> None:
    model = runner(bundle)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(BackendError, match="must be float32"):
            model.embed(encoded(model), normalize=True)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_autocast_changes_no_vector_of_this_pass_or_a_later_one(bundle: Bundle) -> None:
    model = runner(bundle)
    texts = encoded(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = model.embed(texts, normalize=True)
    expected = runner(bundle).embed(texts, normalize=True)
    assert np.array_equal(within, expected)
    assert cosine_distances(model.embed(texts, normalize=True), expected).max() < INVARIANCE


@pytest.mark.parametrize(
    ("variant", "compute"),
    [("fp16", "fp32"), ("int4", "fp32"), ("bnb-nf4", "fp32"), ("int8", "int8")],
)
@pytest.mark.parametrize("schedule", ["resident", "streamed"])
def test_what_the_caller_makes_tensors_of_by_default_changes_no_vector(
    bundle: Bundle, variant: str, compute: str, schedule: str
) -> None:
    expected_of = runner(bundle, variant, compute, schedule=schedule)
    texts = encoded(expected_of)
    expected = expected_of.embed(texts, normalize=True)
    for remembered in (_fastest_float32, _nf4_pairs, is_exact_and_faster):
        remembered.cache_clear()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = runner(bundle, variant, compute, schedule=schedule).embed(texts, normalize=True)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    # A trial may choose the other of two libraries.
    allowed = INVARIANCE * (ROUNDED_INVARIANCE_FACTOR if compute == "int8" else 1)
    assert cosine_distances(found, expected).max() < allowed


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
@pytest.mark.parametrize("mode", ["BF16", "any"])
def test_an_environment_that_makes_onednn_coarser_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    monkeypatch.setenv(name, "STRICT")
    runner(bundle)
    monkeypatch.setenv(name, mode)
    with pytest.raises(BackendError, match=f"must be float32, and {name}={mode} is set: unset it"):
        runner(bundle)
