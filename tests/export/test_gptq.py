"""The two closed forms beside their slow, obvious versions."""

import pytest
import torch
from torch import Tensor

from export.hidden_states import Inputs
from export.quantizers.gptq import (
    least_squares,
    quantize_outputs,
    ridge_inverse,
    round_weight,
)
from export.quantizers.grids import Grid, grid_of
from export.quantizers.moments import Moments, second_moments
from lowmem.artifact.formats import BnbInt8, BnbNf4, Format, Int8Channel, IntGrouped
from lowmem.errors import BundleError

FORMATS = [IntGrouped(4, 64), IntGrouped(8, 64), Int8Channel(), BnbInt8(), BnbNf4()]
IN_FEATURES, OUT_FEATURES, TOKENS = 128, 24, 600


@pytest.fixture
def inputs() -> Tensor:
    """Inputs that tell of one another, of very different ranges, one of them always zero."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN_FEATURES, IN_FEATURES, generator=generator)
    states = torch.randn(TOKENS, IN_FEATURES, generator=generator) @ (mixing / 4 + torch.eye(128))
    states *= torch.logspace(-2, 2, IN_FEATURES)[torch.randperm(IN_FEATURES, generator=generator)]
    states[:, 5] = 0
    return states


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUT_FEATURES, IN_FEATURES, generator=torch.Generator().manual_seed(1)) / 8


def moments_of(inputs: Tensor, wanted: Tensor) -> Moments:
    return Moments(inputs.T @ inputs, wanted.T @ inputs)


def missing(weight: Tensor, moments: Moments) -> Tensor:
    return moments.targets - weight @ moments.inputs


def lost(inputs: Tensor, wanted: Tensor, weight: Tensor) -> float:
    return float((wanted - inputs @ weight.T).square().sum())


def obvious_round(weight: Tensor, second_moments: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """One input at a time; after each, those that are left are solved for anew, in float64.

    With the inputs in ``done`` fixed at their rounding errors e, the rest r of a row moves to where
    eᵀ H e + 2 eᵀ H r + rᵀ H r is least.
    """
    weight, second_moments = weight.double(), second_moments.double()
    order = second_moments.diagonal().argsort(descending=True, stable=True).tolist()
    values = torch.zeros_like(weight)
    errors = torch.zeros_like(weight)
    moved = weight.clone()
    for place, column in enumerate(order):
        scale = scales[:, column // grid.group_size].double()
        values[:, column] = grid.nearest((moved[:, column] / scale).float()).double()
        errors[:, column] = values[:, column] * scale - weight[:, column]
        done, rest = order[: place + 1], order[place + 1 :]
        if rest:
            toward = errors[:, done] @ second_moments[done][:, rest]
            step = torch.linalg.solve(second_moments[rest][:, rest], toward.T).T
            moved[:, rest] = weight[:, rest] - step
    return values


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_rounding_is_that_of_solving_anew_after_every_input(
    form: Format, inputs: Tensor, weight: Tensor
) -> None:
    second_moments = inputs.T @ inputs
    inverse = ridge_inverse(second_moments.clone())
    grid = grid_of(form, IN_FEATURES)
    regular = torch.linalg.inv(inverse.double())
    values, scales = round_weight(weight.clone(), second_moments.diagonal(), inverse, grid)
    expected = obvious_round(weight, regular, scales, grid)
    # Rounding of float32 may put a weight that lies on an edge to its other side.
    assert (values != expected.float()).float().mean() < 0.01


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_outputs_lose_less_than_with_each_weight_rounded_by_itself(
    form: Format, inputs: Tensor, weight: Tensor
) -> None:
    wanted = inputs @ weight.T
    moments = moments_of(inputs, wanted)
    grid = grid_of(form, IN_FEATURES)
    importance = moments.inputs.diagonal().clone()
    scales = grid.scales(weight, importance).repeat_interleave(grid.group_size, 1)
    nearest = grid.nearest(weight / scales) * scales
    values, own_scales = quantize_outputs(weight, moments, grid)
    fitted = values * own_scales.repeat_interleave(grid.group_size, 1)
    assert lost(inputs, wanted, fitted) < 0.75 * lost(inputs, wanted, nearest)


def test_least_squares_is_the_ridge_regression_of_the_normal_equations(
    inputs: Tensor, weight: Tensor
) -> None:
    noise = torch.randn(TOKENS, OUT_FEATURES, generator=torch.Generator().manual_seed(2))
    wanted = inputs @ weight.T + noise
    moments = moments_of(inputs, wanted)
    inverse = ridge_inverse(moments.inputs.clone(), 0.1)
    second = inputs.double().T @ inputs.double()
    seen = second.diagonal()
    floor = seen[seen > 0].median() * 1e-3
    ridge = 0.1 * torch.diag(seen.clamp_min(floor))
    # The least of |wanted - x wᵀ|² + (w - weight) ridge (w - weight)ᵀ.
    right = wanted.double().T @ inputs.double() + weight.double() @ ridge
    expected = torch.linalg.solve(second + ridge, right.T).T
    moved = least_squares(weight, missing(weight, moments), inverse)
    torch.testing.assert_close(moved.double(), expected, rtol=1e-3, atol=1e-3)
    assert lost(inputs, wanted, moved) < lost(inputs, wanted, weight)


def test_a_weight_whose_outputs_are_those_wanted_stays(inputs: Tensor, weight: Tensor) -> None:
    moments = moments_of(inputs, inputs @ weight.T)
    left = missing(weight, moments)
    moved = least_squares(weight, left, ridge_inverse(moments.inputs))
    torch.testing.assert_close(moved, weight, rtol=0, atol=2e-3)


def test_an_input_that_is_always_zero_gets_codes_all_the_same(
    inputs: Tensor, weight: Tensor
) -> None:
    moments = moments_of(inputs, inputs @ weight.T)
    values, scales = quantize_outputs(weight, moments, grid_of(IntGrouped(), IN_FEATURES))
    assert bool(torch.isfinite(values).all())
    assert bool(torch.isfinite(scales).all())


@pytest.mark.parametrize("form", FORMATS, ids=repr)
@pytest.mark.parametrize("dead", [64, 120, 128])
def test_inputs_that_are_mostly_zero_leave_the_others_their_weights(
    inputs: Tensor, weight: Tensor, form: Format, dead: int
) -> None:
    inputs[:, :dead] = 0
    wanted = inputs @ weight.T
    grid = grid_of(form, IN_FEATURES)
    values, scales = quantize_outputs(weight, moments_of(inputs, wanted), grid)
    fitted = values * scales.repeat_interleave(grid.group_size, 1)
    assert bool(fitted.isfinite().all())
    assert lost(inputs, wanted, fitted) <= 0.02 * lost(inputs, wanted, torch.zeros_like(fitted))


def test_moments_of_fewer_texts_than_inputs_have_an_inverse() -> None:
    states = torch.randn(3, IN_FEATURES, generator=torch.Generator().manual_seed(3))
    inverse = ridge_inverse(states.T @ states)
    assert bool(torch.isfinite(inverse).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_an_error(value: float) -> None:
    moments = torch.eye(4)
    moments[1, 1] = value
    with pytest.raises(BundleError, match="activations on the calibration texts are not finite"):
        ridge_inverse(moments)


def test_moments_of_inputs_that_are_all_zero_have_an_inverse() -> None:
    assert bool(torch.isfinite(ridge_inverse(torch.zeros(8, 8))).all())


@pytest.mark.parametrize("features", [1, 6, 64, 67])
def test_moments_are_weighted_sums_over_all_batches(features: int) -> None:
    generator = torch.Generator().manual_seed(features)
    states = torch.randn(50, features, generator=generator)
    wanted = torch.randn(50, 9, generator=generator)
    counts = torch.rand(50, 1, generator=generator)
    rows = [slice(0, 20), slice(20, 50)]
    inputs: Inputs = lambda: ((one, states[one]) for one in rows)  # noqa: E731
    seen, crossed = second_moments(
        inputs, (wanted[one] for one in rows), (counts[one] for one in rows)
    )
    exact = states.double().T @ (counts * states).double()
    assert torch.equal(seen, seen.T)
    torch.testing.assert_close(seen.double(), exact, rtol=1e-5, atol=1e-5 * exact.max())
    exact = wanted.double().T @ (counts * states).double()
    torch.testing.assert_close(crossed.double(), exact, rtol=1e-5, atol=5e-4)
