"""The plain operations: what rounding does to a product, and what becomes of the scratch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from lowmem.artifact.formats import Format, Int8Channel, Plain
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.weights import LinearWeights
from lowmem.compute.decoder import rms_norm
from lowmem.compute.operations.linear import Linear, to_torch
from lowmem.compute.operations.plain import PlainOperations, round_rows
from tests.tolerances import ROUNDED_ROWS, UNIT_ROUNDOFF, gamma

EPS = 1e-5
Codes = NDArray[np.int8]


def linear(form: Format, **tensors: RawTensor) -> Linear:
    rows, columns = tensors["weight"].shape
    return Linear.load(LinearWeights(form, rows, columns, tensors), to_torch)


def channel(codes: Codes, *, rounds: bool = True, scale: float = 1 / 127) -> Linear:
    """An 8-bit linear; its scales differ from row to row by up to a factor of two."""
    scales = (scale * (1 + np.arange(len(codes)) / len(codes)))[:, None].astype(np.float32)
    form = Int8Channel(rounds_activations=rounds)
    return linear(form, weight=RawTensor("I8", codes), weight_scale=RawTensor("F32", scales))


def random_codes(rows: int, columns: int, seed: int = 0) -> Codes:
    return np.random.default_rng(seed).integers(-127, 128, (rows, columns), np.int8)


def plain(rows: int, columns: int, dtype: str = "F32", seed: int = 0) -> Linear:
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    stored: dict[str, NDArray[Any]] = {
        "F32": weight,
        "F16": weight.astype(np.float16),
        "BF16": (weight.view(np.uint32) >> 16).astype(np.uint16),
    }
    return linear(Plain(dtype), weight=RawTensor(dtype, stored[dtype]))


def product(compute: str, states: Tensor, weights: Linear, exact_rows: int = 0) -> Tensor:
    """The product alone: ``project_add`` onto zeros."""
    nothing = torch.zeros(len(states), weights.out_features)
    return PlainOperations(compute, EPS).project_add(states, weights, nothing, exact_rows)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ROWS: dict[str, Callable[[int], Tensor]] = {
    "extremes": lambda size: torch.full((2, size), 3.7) * torch.tensor([[1.0], [-1.0]]),
    "alternating": lambda size: torch.tensor([1.0, -1.0]).repeat(size // 2)[None] * 0.02,
    "one huge outlier": lambda size: torch.cat([torch.tensor([6e4]), noise(size - 1)])[None],
    "zeros": lambda size: torch.zeros(1, size),
    "noise": lambda size: noise(3, size),
    "tiny": lambda size: noise(1, size) * 1e-38,
}


@pytest.mark.parametrize("size", [2, 32, 4096, 14336])
@pytest.mark.parametrize("kind", ROWS)
def test_int8_products_are_those_of_the_codes(kind: str, size: int) -> None:
    states = ROWS[kind](size)
    extreme = np.where(np.arange(size) % 2, -127, 127).astype(np.int8)
    weight = np.concatenate(
        [[extreme, -extreme, np.full(size, 127, np.int8)], random_codes(2, size)]
    )
    weights = channel(weight)
    codes, scales = round_rows(states)
    exact_codes = codes.numpy().astype(np.int64)
    channel_scales = weights.tensors["weight_scale"].numpy().astype(np.float64)
    factors = scales.numpy().astype(np.float64) * channel_scales.T
    expected = exact_codes @ weight.astype(np.int64).T * factors
    magnitude = np.abs(exact_codes) @ np.abs(weight.astype(np.int64)).T * factors
    error = np.abs(product("int8", states, weights).double().numpy() - expected)
    # Besides the sum: a weight's product with its scale, and the scale of the row.
    least = float(np.finfo(np.float32).tiny)  # below it, roundings are not relative
    assert (error <= gamma(size + 2) * magnitude + size * least).all()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
)
def test_a_rounded_row_is_off_by_half_a_scale(values: list[float]) -> None:
    states = torch.tensor([values], dtype=torch.float32)
    codes, scales = round_rows(states)
    assert codes.dtype == scales.dtype == torch.float32
    assert scales.shape == (1, 1)
    assert torch.equal(codes, codes.round())
    assert float(codes.abs().max()) <= 127
    error = (codes.double() * scales.double() - states.double()).abs()
    assert float(error.max()) <= ROUNDED_ROWS * float(scales)


def test_codes_and_scales_of_a_row_worked_out_by_hand() -> None:
    codes, scales = round_rows(torch.tensor([[254.0, -127.0, 1.0, 3.0, -254.0, 0.9]]))
    assert scales.tolist() == [[2.0]]
    assert codes.tolist() == [[127.0, -64.0, 0.0, 2.0, -127.0, 0.0]]  # halves go to even codes


def test_a_row_of_zeros_stays_zeros() -> None:
    codes, scales = round_rows(torch.zeros(1, 8))
    assert torch.equal(codes, torch.zeros(1, 8))
    assert float(scales) > 0


def test_a_row_that_is_not_finite_does_not_become_finite() -> None:
    states = torch.zeros(3, 4)
    states[0, 1], states[1, 2] = torch.nan, torch.inf
    result = product("int8", states, channel(random_codes(2, 4)))
    assert torch.isfinite(result).all(dim=1).tolist() == [False, False, True]


def test_a_row_is_rounded_by_itself() -> None:
    states = torch.cat([noise(4, 64), 1e4 * noise(1, 64, seed=1)])
    together, scales = round_rows(states)
    for row in range(len(states)):
        codes, scale = round_rows(states[row : row + 1])
        assert torch.equal(codes[0], together[row])
        assert torch.equal(scale[0], scales[row])


def test_exact_rows_are_not_rounded() -> None:
    states, weights = noise(5, 96), channel(random_codes(7, 96))
    rounded, exact = (product(compute, states, weights) for compute in ("int8", "fp32"))
    mixed = product("int8", states, weights, exact_rows=2)
    assert torch.equal(mixed[:2], exact[:2])
    assert torch.equal(mixed[2:], rounded[2:])
    assert not torch.equal(rounded, exact)


def test_a_linear_that_says_so_gets_unrounded_activations() -> None:
    states, codes = noise(5, 96), random_codes(7, 96)
    exact = product("fp32", states, channel(codes))
    assert torch.equal(product("int8", states, channel(codes, rounds=False)), exact)


def test_linears_with_the_same_inputs_are_rounded_only_if_each_may_be() -> None:
    hidden, norm = noise(5, 96), torch.ones(96)
    pair = (channel(random_codes(7, 96)), channel(random_codes(7, 96, seed=1), rounds=False))
    rounding, exact = PlainOperations("int8", EPS), PlainOperations("fp32", EPS)
    for linears in (pair, pair[::-1]):
        got = rounding.norm_project(hidden, norm, linears, 0)
        expected = exact.norm_project(hidden, norm, linears, 0)
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_16_bit_products_are_within_their_roundings(compute: str, stored: str) -> None:
    states, weights = noise(9, 512), plain(11, 512, stored)
    dense = weights.tensors["weight"].double()
    exact = states.double() @ dense.T
    magnitude = states.double().abs() @ dense.abs().T
    # Inputs, weights and the result are rounded to 16 bits, the sum is float32's.
    bound = gamma(3, UNIT_ROUNDOFF[compute]) + 2 * gamma(512)
    error = (product(compute, states, weights).double() - exact).abs()
    assert bool((error <= bound * magnitude).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16", "int8"])
def test_every_compute_gives_a_float32_residual(compute: str) -> None:
    ops, hidden, norm = PlainOperations(compute, EPS), noise(3, 64), torch.ones(64)
    gate, up, down = plain(48, 64, seed=1), plain(48, 64, seed=2), plain(64, 48, seed=3)
    assert ops.gated_mlp(hidden, norm, gate, up, down, 0).dtype == torch.float32
    (projected,) = ops.norm_project(hidden, norm, (gate,), 0)
    assert projected.dtype == ops.dtype


def test_the_gated_mlp_is_its_formula_over_any_number_of_rows() -> None:
    hidden, norm = noise(1100, 16), 1 + 0.1 * noise(16, seed=4)
    gate, up, down = plain(24, 16, seed=1), plain(24, 16, seed=2), plain(16, 24, seed=3)
    before = hidden.clone()
    got = PlainOperations("fp32", EPS).gated_mlp(hidden, norm, gate, up, down, 0)
    normed = (rms_norm(hidden, norm, EPS)).double()
    gated, raised = (normed @ part.tensors["weight"].double().T for part in (gate, up))
    activated = gated * torch.sigmoid(gated) * raised
    expected = hidden.double() + activated @ down.tensors["weight"].double().T
    assert torch.equal(hidden, before)
    assert float((got - expected).abs().max() / expected.abs().max()) < gamma(16 + 24 + 16)


def test_the_norm_is_its_formula() -> None:
    hidden, weight = 100 * noise(4, 33), noise(33, seed=1)
    wide = hidden.double()
    expected = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    error = (rms_norm(hidden, weight, EPS) - expected).abs() / expected.abs()
    assert float(error.max()) < gamma(33 + 6)


def test_a_row_of_zeros_passes_the_norm() -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 8), torch.ones(8), EPS), torch.zeros(1, 8))


def test_one_scratch_serves_all_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    allocate = torch.empty

    def counted(*size: int, **options: object) -> Tensor:
        sizes.append(int(np.prod(size)))
        return allocate(*size, **options)

    ops, states = PlainOperations("fp32", EPS), noise(2, 64)
    linears = [channel(random_codes(rows, 64, seed=rows)) for rows in (80, 8, 80, 33)]
    expected = [product("fp32", states, weights) for weights in linears]
    monkeypatch.setattr(torch, "empty", counted)
    got = [ops.project_add(states, part, torch.zeros(2, part.out_features), 0) for part in linears]
    assert sizes == [80 * 64]
    assert all(map(torch.equal, got, expected))


def test_results_do_not_lie_in_the_scratch() -> None:
    ops, hidden, norm = PlainOperations("fp32", EPS), noise(4, 64), torch.ones(64)
    linears = [channel(random_codes(16, 64, seed)) for seed in range(3)]
    query, key, value = ops.norm_project(hidden, norm, linears, 0)
    for got, weights in zip((query, key, value), linears, strict=True):
        (alone,) = PlainOperations("fp32", EPS).norm_project(hidden, norm, (weights,), 0)
        assert torch.equal(got, alone)
    assert len({states.untyped_storage().data_ptr() for states in (query, key, value)}) == 3


def test_weights_in_the_products_dtype_are_used_where_they_lie() -> None:
    weights = plain(8, 64, "F16")
    before = weights.tensors["weight"].clone()
    ops = PlainOperations("fp16", EPS)
    ops.project_add(noise(2, 64), weights, torch.zeros(2, 8), 0)
    assert torch.equal(weights.tensors["weight"], before)
    assert ops._weights.scratch is None
