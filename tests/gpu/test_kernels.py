"""Triton's kernels against the plain torch forms, on a CUDA device or under Triton's interpreter.

``tests/compute/test_triton_kernels.py`` runs this file on a CPU, in a process of its own.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from lowmem.artifact.formats import BnbInt8, BnbNf4, Format, Int8Channel, IntGrouped, Plain
from lowmem.compute.kernels import plain_rows
from lowmem.compute.kernels.rows import LARGEST_CODE, Rows
from lowmem.compute.operations import cuda_selftest
from lowmem.compute.operations.linear import Linear, to_torch
from tests.stored_weights import random_weights
from tests.tolerances import EXACT_ROWS, ROTATION, ROW_KERNELS, UNIT_ROUNDOFF

triton_rows = pytest.importorskip("lowmem.compute.kernels.triton_rows", reason="needs Triton")
from lowmem.compute.kernels import triton_dequantize, triton_int8  # noqa: E402 - they need Triton

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
TINY = torch.finfo(torch.float32).tiny
CAPABILITY = torch.cuda.get_device_capability() if DEVICE == "cuda" else (9, 0)
if CAPABILITY < (8, 0):
    pytest.skip("Triton serves no card before Ampere here", allow_module_level=True)
FP8 = torch.float8_e4m3fn
CODES = tuple(code for code in LARGEST_CODE if code != FP8 or CAPABILITY >= (8, 9))
DTYPES = (torch.float16, torch.bfloat16, *CODES)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adversarial(features: int) -> Tensor:
    """Rows of noise, one huge outlier, extremes in turn, halves between codes, tiny, and zeros."""
    outlier = noise(features)
    outlier[features // 2] = 3e4
    halves = (torch.arange(features) % 255 - 127).float() + 0.5
    halves[0] = 127
    turns = torch.tensor([1.0, -1.0]).repeat(features)[:features] * 0.02
    tiny = noise(features, seed=1) * 1e-37
    return torch.stack([noise(features), outlier, turns, halves, tiny, torch.zeros(features)])


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def values(rows: Rows) -> Tensor:
    """The rows that codes stand for, one a token."""
    wide = rows.values.float()
    return rows.join(wide if rows.scales is None else wide * rows.scales[:, None]).cpu()


def assert_near(got: Tensor, expected: Tensor, share: float) -> None:
    """No element is off by more than a share of its row's largest, or the least normal number."""
    bound = (share * expected.float().abs().amax(-1, keepdim=True)).clamp_min(TINY)
    assert bool(((got.cpu().float() - expected.float()).abs() <= bound).all())


@pytest.mark.parametrize("features", [1, 33, 128, 1000])
@pytest.mark.parametrize("dtype", CODES, ids=name)
@pytest.mark.parametrize("exact_rows", [0, 2, 6])
def test_rounded_rows_are_those_of_the_plain_form(
    features: int, dtype: torch.dtype, exact_rows: int
) -> None:
    states = adversarial(features)
    expected = plain_rows.round_rows(states, dtype, exact_rows)
    got = triton_rows.round_rows(states.to(DEVICE), dtype, exact_rows)
    assert got.tokens == len(states)
    assert got.values.shape == (len(states) + exact_rows, features)
    assert torch.equal(got.scales.cpu()[: len(states)], expected.scales[: len(states)])
    assert torch.equal(
        got.values.cpu().float()[: len(states)], expected.values.float()[: len(states)]
    )
    assert_near(values(got)[:exact_rows], states[:exact_rows], EXACT_ROWS[name(dtype)])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_rows_of_16_bits_are_rounded_from_float32(stored: torch.dtype) -> None:
    states = noise(5, 96).to(stored)
    expected = plain_rows.round_rows(states, torch.int8)
    got = triton_rows.round_rows(states.to(DEVICE), torch.int8)
    assert torch.equal(got.values.cpu(), expected.values)


@pytest.mark.parametrize("features", [1, 33, 128, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_normalized_rows_are_those_of_the_plain_form(
    features: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    hidden, weight = adversarial(features), (1 + 0.2 * noise(features, seed=3)).to(stored)
    expected = plain_rows.normalize(hidden, weight, EPS, dtype, 2)
    got = triton_rows.normalize(*on_device(hidden, weight), EPS, dtype, 2)
    assert (got.scales is None) == (expected.scales is None)
    assert_near(values(got), values(expected), ROW_KERNELS[name(dtype)])


@pytest.mark.parametrize("features", [1, 33, 192, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_gated_rows_are_those_of_the_plain_form(
    features: int, dtype: torch.dtype, stored: torch.dtype
) -> None:
    gate, up = noise(7, features).to(stored) * 8, noise(7, features, seed=1).to(stored)
    gate[0], gate[1], up[2] = 300, -300, 0
    expected = plain_rows.gate(gate, up, dtype, 3)
    got = triton_rows.gate(*on_device(gate, up), dtype, 3)
    assert_near(values(got), values(expected), ROW_KERNELS[name(dtype)])


@pytest.mark.parametrize("dtype", CODES, ids=name)
def test_gated_rows_beyond_float16_are_held_by_their_scale(dtype: torch.dtype) -> None:
    gate = torch.full((1, 64), 5e4, dtype=torch.float16)
    got = triton_rows.gate(*on_device(gate, gate), dtype)
    assert_near(values(got), torch.full((1, 64), float(gate[0, 0]) ** 2), 1e-5)


@pytest.mark.parametrize("dtype", CODES, ids=name)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_does_not_become_finite(dtype: torch.dtype, bad: float) -> None:
    states = noise(3, 40)
    states[1, 17] = bad
    got = triton_rows.round_rows(states.to(DEVICE), dtype)
    assert torch.isfinite(got.scales).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "head_dim"), [(1, 2), (6, 32), (3, 128)])
def test_rotated_heads_are_those_of_the_plain_form(
    dtype: torch.dtype, count: int, head_dim: int
) -> None:
    heads, angles = noise(5, count, head_dim).to(dtype), 100 * noise(5, 1, head_dim // 2, seed=1)
    expected = plain_rows.rotate(heads.clone(), angles.cos(), angles.sin())
    got = triton_rows.rotate(*on_device(heads.clone(), angles.cos(), angles.sin()))
    assert got.dtype == dtype
    stored = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    assert_near(got.flatten(1), expected.flatten(1), ROTATION + 2 * UNIT_ROUNDOFF[stored])


FORMATS: tuple[Format, ...] = (
    Plain("F16"),
    Plain("BF16"),
    Int8Channel(),
    IntGrouped(bits=4, group_size=32),
    IntGrouped(bits=4, group_size=64),
    IntGrouped(bits=4, group_size=192),
    IntGrouped(bits=8, group_size=64),
    BnbInt8(),
    BnbNf4(group_size=64),
)


@pytest.mark.parametrize("form", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 50])
def test_weights_are_those_of_numpy_rounded_once(
    form: Format, dtype: torch.dtype, rows: int
) -> None:
    weights = random_weights(form, rows, 192)
    size = rows * 192
    scratch = torch.full((size + 64,), torch.nan, dtype=dtype, device=DEVICE)
    linear = Linear.load(weights, lambda raw: to_torch(raw, DEVICE))
    triton_dequantize.dequantize_into(scratch[:size].view(rows, 192), linear)
    exact = torch.from_numpy(form.dequantize(weights.tensors))
    if DEVICE == "cpu" and dtype == torch.bfloat16 and not isinstance(form, Plain):
        exact = (exact.view(torch.int32) & -0x10000).view(torch.float32)  # so the interpreter does
    expected = exact.to(dtype)
    assert torch.equal(scratch[:size].view(rows, 192).cpu(), expected)
    assert scratch[size:].isnan().all()


def codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    numbers = np.random.default_rng(seed).integers(-127, 128, (rows, columns), np.int8)
    return torch.from_numpy(numbers)


@pytest.mark.parametrize("tile", triton_int8.TILES, ids=str)
def test_int8_products_are_exact_in_every_tile(tile: triton_int8.Tile) -> None:
    multiply = partial(with_tile, tile)
    assert cuda_selftest.int8_is_exact(multiply, DEVICE)


def with_tile(tile: triton_int8.Tile, *arguments: Tensor, **options: object) -> Tensor:
    return triton_int8.multiply(*arguments, tile, **options)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 7, 33), (45, 70, 200), (17, 130, 128)])
@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("has_residual", [False, True])
def test_int8_products_are_scaled_by_row_and_channel(
    rows: int, outputs: int, inputs: int, exact: int, has_residual: bool
) -> None:
    row_codes, weight = codes(rows + exact, inputs), codes(outputs, inputs, 1)
    row_scales = 0.01 * noise(rows + exact).abs() + 0.01  # sums go to millions, float16 to 65504
    scales = noise(outputs, seed=1).abs() + 0.1
    residual = noise(rows, outputs, seed=2)
    dtype = torch.float32 if has_residual else torch.float16
    got = triton_int8.multiply(
        Rows(*on_device(row_codes, row_scales), rows),
        *on_device(weight, scales),
        triton_int8.TILES[-1],
        dtype=dtype,
        residual=residual.to(DEVICE) if has_residual else None,
    )
    each = row_codes.double() @ weight.double().T * row_scales.double()[:, None] * scales.double()
    expected = each[:rows]
    expected[:exact] += each[rows:]
    if has_residual:
        expected = expected + residual
    roundoff = UNIT_ROUNDOFF["fp32" if has_residual else "fp16"]
    # The sum and its two factors, and of a row that is kept exact the two results and their sum.
    magnitude = each.abs().amax() * (1 + exact) + residual.abs().amax()
    assert got.dtype == dtype
    assert float((got.cpu().double() - expected).abs().max()) <= 4 * roundoff * float(magnitude)


def test_the_self_test_of_rows_passes() -> None:
    assert cuda_selftest.rows_are_right(triton_rows, DEVICE)


def test_the_self_test_of_weights_passes() -> None:
    assert cuda_selftest.weights_are_right(triton_dequantize.dequantize_into, DEVICE)
