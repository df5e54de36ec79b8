"""8-bit products against the plain form, on values that would saturate and shapes of every kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.artifact.formats import BnbInt8, Int8Channel, Plain
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.weights import LinearWeights
from lowmem.compute.operations import int8, trials
from lowmem.compute.operations.int8 import Int8Operations
from lowmem.compute.operations.linear import Linear, to_torch
from lowmem.compute.operations.plain import PlainOperations
from tests.tolerances import gamma

EPS = 1e-5
HIDDEN, INNER = 96, 200


def linear(rows: int, columns: int, *, form: str = "channel", seed: int = 0) -> Linear:
    """Random codes, extremes among them; ``full`` is a linear whose inputs are not rounded."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(-127, 128, (rows, columns), np.int8)
    codes[:: max(1, rows // 3)] = np.where(np.arange(columns) % 2, -127, 127)
    scales = (generator.random(rows) + 0.5).astype(np.float32) / 127 / columns**0.5
    if form == "bnb":
        tensors = {"weight": RawTensor("I8", codes), "SCB": RawTensor("F32", scales * 127)}
        return Linear.load(LinearWeights(BnbInt8(), rows, columns, tensors), to_torch)
    tensors = {
        "weight": RawTensor("I8", codes),
        "weight_scale": RawTensor("F32", scales[:, None]),
    }
    stored = Int8Channel(rounds_activations=form != "full")
    return Linear.load(LinearWeights(stored, rows, columns, tensors), to_torch)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forms() -> tuple[Int8Operations, PlainOperations]:
    return Int8Operations(EPS), PlainOperations("int8", EPS)


def close(got: Tensor, expected: Tensor, terms: int) -> None:
    """Equal but for float32 rounding of sums of so many terms, relative to the largest value."""
    assert got.shape == expected.shape
    assert got.dtype == torch.float32
    bound = 4 * gamma(terms) * max(1.0, float(expected.abs().max()))
    assert float((got - expected).abs().max()) <= bound


TOKENS = [1, 2, 17, 300, 4096]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("form", ["channel", "bnb"])
def test_a_product_is_that_of_the_plain_form(form: str, tokens: int) -> None:
    fast, plain = forms()
    states, weights = noise(tokens, INNER), linear(HIDDEN, INNER, form=form)
    states[0] = 3.7  # every code is 127
    residual = noise(tokens, HIDDEN, seed=1)
    got, expected = (ops.project_add(states, weights, residual, 0) for ops in (fast, plain))
    close(got, expected, INNER)


@pytest.mark.parametrize("tokens", [1, 5, 700])
@pytest.mark.parametrize("shapes", [(96, 32, 32), (1, 37, 3), (576, 192, 192)], ids=str)
def test_projections_are_those_of_the_plain_form(shapes: tuple[int, ...], tokens: int) -> None:
    hidden, norm = noise(tokens, HIDDEN), 1 + 0.1 * noise(HIDDEN, seed=2)
    linears = [linear(rows, HIDDEN, seed=rows) for rows in shapes]
    got, expected = (ops.norm_project(hidden, norm, linears, 0) for ops in forms())
    for one, other in zip(got, expected, strict=True):
        close(one, other, HIDDEN)


@pytest.mark.parametrize("down", ["channel", "bnb", "full"])
def test_the_mlp_is_that_of_the_plain_form(down: str) -> None:
    hidden, norm = noise(700, HIDDEN), 1 + 0.1 * noise(HIDDEN, seed=2)
    before = hidden.clone()
    parts = (
        linear(INNER, HIDDEN, seed=3),
        linear(INNER, HIDDEN, seed=4),
        linear(HIDDEN, INNER, form=down, seed=5),
    )
    got, expected = (ops.gated_mlp(hidden, norm, *parts, 0) for ops in forms())
    assert torch.equal(hidden, before)
    # Where an input of down_proj lies between two codes, rounding noise decides which it gets.
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.median()) <= gamma(HIDDEN + INNER)
    assert float(error.max()) <= 1 / 127


@pytest.mark.parametrize("exact_rows", [1, 5])
def test_exact_rows_and_full_linears_go_through_the_plain_form(exact_rows: int) -> None:
    hidden, norm = noise(5, HIDDEN), torch.ones(HIDDEN)
    gate, up, down = linear(INNER, HIDDEN), linear(INNER, HIDDEN, seed=1), linear(HIDDEN, INNER)
    fast, plain = forms()
    for ops_call in (
        lambda ops: ops.norm_project(hidden, norm, (gate, up), exact_rows)[1],
        lambda ops: ops.norm_project(hidden, norm, (gate, linear(3, HIDDEN, form="full")), 0)[0],
        lambda ops: ops.gated_mlp(hidden, norm, gate, up, down, exact_rows),
        lambda ops: ops.project_add(noise(5, INNER), down, hidden, exact_rows),
    ):
        assert torch.equal(ops_call(fast), ops_call(plain))


def test_a_row_that_is_not_finite_does_not_become_finite() -> None:
    states = noise(3, INNER)
    states[0, 1], states[1, 2] = torch.nan, torch.inf
    got = Int8Operations(EPS).project_add(states, linear(HIDDEN, INNER), torch.zeros(3, HIDDEN), 0)
    assert torch.isfinite(got).all(dim=1).tolist() == [False, False, True]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    states, weights = noise(700, INNER), linear(HIDDEN, INNER)
    ops, nothing = Int8Operations(EPS), torch.zeros(700, HIDDEN)
    together = ops.project_add(states, weights, nothing, 0)
    for row in (0, 255, 256, 699):
        alone = ops.project_add(states[row : row + 1], weights, nothing[:1], 0)
        assert torch.equal(alone[0], together[row])


def test_other_formats_and_shapes_that_the_product_misreads_have_no_codes() -> None:
    assert int8.has_codes(linear(4, 2))
    assert not int8.has_codes(linear(4, 1))
    assert not int8.has_codes(linear(4, 8, form="full"))
    widest = replace(linear(1, 2), in_features=2**31 // (127 * 128))
    assert not int8.has_codes(widest)


def test_sums_that_saturate_fail_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    assert int8.is_exact()

    def saturating(codes: Tensor, weight: Tensor) -> Tensor:
        """Pairs of products summed in 16 bits, codes made unsigned first, as AVX2 does it."""
        columns = -codes.shape[1] % 2
        unsigned = F.pad(codes.int() + 128, (0, columns))
        wide = F.pad(weight.int(), (0, 0, 0, columns))
        products = unsigned[:, :, None] * wide[None]
        pairs = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(1).int() - 128 * wide.sum(0).int()

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not int8.is_exact()
    int8.is_exact_and_faster.cache_clear()
    assert not int8.is_exact_and_faster(1)
    int8.is_exact_and_faster.cache_clear()


@pytest.mark.parametrize("winner", ["plain", "int8"])
def test_only_the_faster_form_is_used(winner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "fastest", lambda question, calls: winner)
    int8.is_exact_and_faster.cache_clear()
    assert int8.is_exact_and_faster(1) == (winner == "int8")
    int8.is_exact_and_faster.cache_clear()


def test_an_mlp_whose_last_linear_is_stored_otherwise_is_that_of_the_plain_form() -> None:
    hidden, norm = noise(300, HIDDEN), 1 + 0.1 * noise(HIDDEN, seed=2)
    gate, up = linear(INNER, HIDDEN, seed=3), linear(INNER, HIDDEN, seed=4)
    weight = RawTensor("F16", noise(HIDDEN, INNER, seed=5).half().numpy())
    down = Linear.load(LinearWeights(Plain("F16"), HIDDEN, INNER, {"weight": weight}), to_torch)
    fast, plain = (ops.gated_mlp(hidden, norm, gate, up, down, 0) for ops in forms())
    assert torch.equal(fast, plain)
