"""The operations of CUDA devices by kernels that also run on a CPU, against the plain form."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem.artifact.formats import BnbInt8, BnbNf4, Format, Int8Channel, IntGrouped, Plain
from lowmem.artifact.manifest import Bundle
from lowmem.artifact.variants import HIGH, LOW, VARIANTS
from lowmem.compute.engine import Runner
from lowmem.compute.kernels import library_products, plain_rows
from lowmem.compute.kernels.rows import Rows
from lowmem.compute.operations import cuda, cuda_products, cuda_selftest
from lowmem.compute.operations.cuda import Route, route
from lowmem.compute.operations.cuda_products import DenseProduct
from lowmem.compute.operations.dequantize import dequantize_into
from lowmem.compute.operations.linear import Linear, to_torch
from lowmem.compute.operations.plain import PlainOperations
from lowmem.compute.plan import COMPUTES, Plan
from lowmem.errors import BackendError
from tests.models import RMS_NORM_EPS
from tests.plain_cuda import ADA, AMPERE, BLACKWELL, HOPPER, TURING, operations
from tests.stored_weights import random_weights
from tests.tolerances import (
    BF16_VECTORS,
    EXACT_ROWS,
    FP16_VECTORS,
    PARITY_HIDDEN_STATES,
    ROUNDED_VECTORS,
    UNIT_ROUNDOFF,
    gamma,
)

FP8_VECTORS = ROUNDED_VECTORS * 2.0**-4 / (0.5 / 127 * 4)  # an element is off by up to 2^-4


def linear(form: Format, outputs: int = 40, inputs: int = 192, seed: int = 0) -> Linear:
    return Linear.load(random_weights(form, outputs, inputs, seed), to_torch)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(one: Linear) -> Tensor:
    weight = torch.empty(one.out_features, one.in_features)
    dequantize_into(weight, one)
    return weight


@pytest.mark.parametrize(
    ("compute", "capability", "has_triton", "expected"),
    [
        ("fp32", HOPPER, True, Route(torch.float32, None, "torch", False, False)),
        ("bf16", AMPERE, True, Route(torch.bfloat16, None, "torch", True, True)),
        ("fp16", TURING, True, Route(torch.float16, None, "torch", False, False)),
        ("fp16-acc16", ADA, True, Route(torch.float16, None, "torch", True, True)),
        ("int8", TURING, True, Route(torch.float16, torch.int8, "int_mm", False, False)),
        ("int8", AMPERE, True, Route(torch.float16, torch.int8, "triton", True, True)),
        ("int8", AMPERE, False, Route(torch.float16, torch.int8, "int_mm", False, True)),
        (
            "fp8",
            BLACKWELL,
            True,
            Route(torch.bfloat16, torch.float8_e4m3fn, "scaled_mm", True, True),
        ),
    ],
)
def test_the_kernels_follow_from_compute_and_card(
    compute: str, capability: tuple[int, int], has_triton: bool, expected: Route
) -> None:
    assert route(compute, capability, has_triton) == expected


@pytest.mark.parametrize(
    ("compute", "capability"), [("bf16", TURING), ("fp8", AMPERE), ("int8", (7, 0))]
)
def test_a_card_without_the_arithmetic_is_refused(
    compute: str, capability: tuple[int, int]
) -> None:
    major, minor = capability
    with pytest.raises(BackendError, match=rf"capability {major}\.{minor} has no {compute}"):
        route(compute, capability, has_triton=True)


def test_every_compute_has_a_route() -> None:
    assert all(route(compute, HOPPER, True).dtype for compute in COMPUTES)


FORMATS: Sequence[Format] = (
    Plain("F16"),
    Plain("BF16"),
    Int8Channel(),
    IntGrouped(bits=4, group_size=64),
    BnbInt8(),
    BnbNf4(group_size=64),
)


@pytest.mark.parametrize("form", FORMATS, ids=repr)
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_products_that_round_no_rows_are_those_of_the_plain_form(
    form: Format, compute: str
) -> None:
    states, weights, residual = noise(9, 192), linear(form), noise(9, 40, seed=2)
    expected = PlainOperations(compute, RMS_NORM_EPS).project_add(states, weights, residual, 0)
    got = operations(compute).project_add(states, weights, residual, 0)
    assert got.dtype == torch.float32
    # Two libraries add the same products in different orders.
    assert float((got - expected).abs().max()) <= gamma(192) * float(expected.abs().max())


@pytest.mark.parametrize("form", [Int8Channel(), BnbInt8()], ids=repr)
def test_int8_products_of_8_bit_weights_are_those_of_the_plain_form(form: Format) -> None:
    states, weights, residual = noise(9, 192), linear(form), noise(9, 40, seed=2)
    expected = PlainOperations("int8", RMS_NORM_EPS).project_add(states, weights, residual, 0)
    got = operations("int8").project_add(states, weights, residual, 0)
    assert float((got - expected).abs().max()) <= gamma(192) * float(expected.abs().max())


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_weights_that_are_not_stored_in_8_bits_are_rounded_per_channel(form: Format) -> None:
    weights = linear(form)
    states = torch.eye(192)  # exact in 8 bits: what is left is the weight's rounding
    got = operations("int8").project_add(states, weights, torch.zeros(192, 40), 0).T
    expected = dense(weights)
    step = expected.abs().amax(1, keepdim=True) / 127
    # Half a step, and before it a rounding to float16.
    share = 0.5 + 127 * UNIT_ROUNDOFF["fp16"] + 1e-3
    assert bool(((got - expected).abs() <= share * step).all())


@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_exact_rows_are_rounded_twice_as_finely(compute: str) -> None:
    ops, weights, states = operations(compute), linear(Int8Channel()), noise(6, 192)
    nothing = torch.zeros(6, 40)
    got = ops.project_add(states, weights, nothing, 2)
    rounded = ops.project_add(states, weights, nothing, 0)
    assert torch.equal(got[2:], rounded[2:])
    if compute == "fp8":  # its weights are rounded to fp8 as well
        weight = plain_rows.round_rows(dense(weights), torch.float8_e4m3fn)
        assert weight.scales is not None
        exact = states @ (weight.values.float() * weight.scales[:, None]).T
    else:
        exact = states @ dense(weights).T
    magnitude = states.abs().amax(1, keepdim=True) * dense(weights).abs().sum(1)
    name = {"int8": "int8", "fp8": "float8_e4m3fn"}[compute]
    roundoff = 2.0**-7 if compute == "fp8" else gamma(192)  # fp8 products are bf16
    bound = (EXACT_ROWS[name] + roundoff) * magnitude
    assert bool(((got - exact).abs() <= bound)[:2].all())
    share = {"int8": 0.1, "fp8": 1.0}[compute]  # what is left in fp8 is bf16's
    assert float((got - exact)[:2].abs().max()) < share * float((rounded - exact)[:2].abs().max())


def test_a_linear_that_says_so_gets_rows_that_are_kept_exact() -> None:
    states = noise(6, 192)
    free = linear(Int8Channel(rounds_activations=False))
    got = operations("int8").project_add(states, free, torch.zeros(6, 40), 0)
    all_exact = operations("int8").project_add(states, linear(Int8Channel()), torch.zeros(6, 40), 6)
    assert torch.equal(got, all_exact)
    pair = (linear(Int8Channel()), free)
    norm = torch.ones(192)
    for one in operations("int8").norm_project(states, norm, pair, 0):
        assert torch.equal(one, operations("int8").norm_project(states, norm, (free,), 0)[0])


@pytest.mark.parametrize("compute", ["fp32", "int8"])
def test_chunks_of_the_mlp_change_nothing(monkeypatch: pytest.MonkeyPatch, compute: str) -> None:
    gate, up = linear(Int8Channel(), 96, 64, 1), linear(Int8Channel(), 96, 64, 2)
    down, hidden, norm = linear(Int8Channel(), 64, 96, 3), noise(50, 64), torch.ones(64)
    whole = operations(compute).gated_mlp(hidden, norm, gate, up, down, 9)
    monkeypatch.setattr(cuda, "PLAIN_DEVICE_CHUNK_TOKENS", 7)
    parts = operations(compute).gated_mlp(hidden, norm, gate, up, down, 9)
    assert float((whole - parts).abs().max()) <= gamma(256) * float(whole.abs().max())


def switch_in_products(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fills with torch's switch for sums in 16 bits as each product from now on sees it."""
    seen: list[bool] = []
    plain = torch.nn.functional.linear

    def watched(*arguments: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.matmul.allow_fp16_accumulation)
        return plain(*arguments)

    monkeypatch.setattr(cuda_products.F, "linear", watched)
    return seen


def test_summing_in_16_bits_is_switched_on_for_the_product_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = switch_in_products(monkeypatch)
    weights, nothing = linear(Plain("F16")), torch.zeros(2, 40)
    for compute in ("fp16", "fp16-acc16"):
        operations(compute).project_add(noise(2, 192), weights, nothing, 0)
    assert seen == [False, True]
    assert not torch.backends.cuda.matmul.allow_fp16_accumulation


def test_an_old_torch_that_cannot_sum_in_16_bits_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    with pytest.raises(BackendError, match=r"compute fp16-acc16 needs torch 2\.7 or newer, got"):
        DenseProduct(torch.float16, dequantize_into, sums_in_16_bits=True)


@pytest.mark.parametrize("rows_count", [1, 17, 40, 1500])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 33), (16, 64), (30, 200)])
def test_library_products_take_any_shape(rows_count: int, outputs: int, inputs: int) -> None:
    rounded = plain_rows.round_rows(noise(rows_count, inputs), torch.int8)
    weight = plain_rows.round_rows(noise(outputs, inputs, seed=1), torch.int8)
    assert rounded.scales is not None
    assert weight.scales is not None
    factors = rounded.scales.double()[:, None] * weight.scales.double()
    expected = rounded.values.double() @ weight.values.double().T * factors
    got = library_products.multiply_int8(rounded, weight.values, weight.scales, dtype=torch.float32)
    assert torch.allclose(got.double(), expected, rtol=gamma(3), atol=1e-6)


# What a broken kernel does, and that the self-test sees it.


@pytest.mark.parametrize("sums", [torch.int16, torch.float16])
def test_the_self_test_of_int8_products_sees_sums_that_are_too_narrow(
    monkeypatch: pytest.MonkeyPatch, sums: torch.dtype
) -> None:
    assert cuda_selftest.int8_is_exact(library_products.multiply_int8, "cpu")
    exact = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: exact(a, b).to(sums).float())
    assert not cuda_selftest.int8_is_exact(library_products.multiply_int8, "cpu")


def test_the_self_test_of_fp8_products_sees_scales_that_are_left_out() -> None:
    assert cuda_selftest.fp8_is_right(library_products.multiply_fp8, "cpu")

    def unscaled(rounded: Rows, weight: Tensor, scales: Tensor, **options: Any) -> Tensor:
        return library_products.multiply_fp8(rounded, weight, torch.ones_like(scales), **options)

    assert not cuda_selftest.fp8_is_right(unscaled, "cpu")


class BrokenRows:
    """The plain kernels with one of them off by some per cent."""

    def __init__(self, broken: str) -> None:
        self.broken = broken

    def __getattr__(self, name: str) -> Any:
        function = getattr(plain_rows, name)
        return partial(self._spoiled, function) if name == self.broken else function

    @staticmethod
    def _spoiled(function: Any, first: Tensor, *rest: Any) -> Any:
        return function(first.clone().index_fill_(0, torch.tensor(2), 0.5), *rest)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_are_rounded_alike_in_blocks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    states = noise(7, 48)
    whole = plain_rows.round_rows(states, dtype, 2)
    monkeypatch.setattr(plain_rows, "_BLOCK_ELEMENTS", 100)
    parts = plain_rows.round_rows(states, dtype, 2)
    assert torch.equal(parts.values.float(), whole.values.float())
    assert parts.scales is not None
    assert whole.scales is not None
    assert torch.equal(parts.scales, whole.scales)
    assert len(parts.values) == 7 + 2


@pytest.mark.parametrize("broken", ["normalize", "gate", "round_rows", "rotate"])
def test_the_self_test_of_rows_sees_a_kernel_that_is_wrong(broken: str) -> None:
    kernels: Any = BrokenRows(broken)
    assert not cuda_selftest.rows_are_right(kernels, "cpu")
    assert cuda_selftest.rows_are_right(plain_rows, "cpu")


@pytest.mark.parametrize("form", [Int8Channel(), BnbInt8(), LOW, HIGH, BnbNf4()], ids=repr)
def test_the_self_test_of_weights_sees_one_that_is_wrong_in_one_format(form: Format) -> None:
    def spoiled(weight: Tensor, one: Linear) -> None:
        dequantize_into(weight, one)
        if one.format == form:
            weight[3, 5] *= 1.01

    assert not cuda_selftest.weights_are_right(spoiled, "cpu")
    assert cuda_selftest.weights_are_right(dequantize_into, "cpu")


def test_a_wrong_or_missing_product_is_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda._checked_product.cache_clear()
    monkeypatch.setattr(cuda_selftest, "int8_is_exact", lambda *_: False)
    with pytest.raises(BackendError, match=r"8-bit product is wrong on this card \(int_mm\)"):
        cuda._checked_product("int_mm")

    def unsupported(*_: object) -> bool:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(cuda_selftest, "fp8_is_right", unsupported)
    with pytest.raises(BackendError, match=r"no 8-bit product .* \(scaled_mm\): CUBLAS_STATUS"):
        cuda._checked_product("scaled_mm")


@pytest.mark.parametrize(
    ("version", "capability", "is_refused"),
    [
        ("2.11.0+cu130", ADA, True),
        ("2.9.1", ADA, True),
        ("2.12.0+cu130", ADA, False),
        ("2.11.0", HOPPER, False),
    ],
)
def test_a_torch_whose_fp8_may_never_end_on_a_card_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, capability: tuple[int, int], is_refused: bool
) -> None:
    cuda._checked_product.cache_clear()
    monkeypatch.setattr(cuda_selftest, "fp8_is_right", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch, "__version__", version)
    if is_refused:
        with pytest.raises(BackendError, match="by a kernel that may never end"):
            cuda._checked_product("scaled_mm")
    else:
        assert cuda._checked_product("scaled_mm") is library_products.multiply_fp8
    cuda._checked_product.cache_clear()


@pytest.mark.parametrize("error", [AssertionError("libcuda.so cannot be found"), ImportError("so")])
def test_triton_that_cannot_load_what_it_compiled_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fails(*_: object) -> bool:
        raise error

    monkeypatch.setattr(cuda_selftest, "rows_are_right", fails)
    cuda.triton_works.cache_clear()
    assert not cuda.triton_works("cuda")
    assert f"Triton does not work here, kernels of torch serve: {error}" in caplog.text
    cuda.triton_works.cache_clear()


def test_triton_that_is_missing_or_fails_is_said_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.triton_works.cache_clear()
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert [cuda.triton_works("cuda") for _ in range(2)] == [False, False]
    assert caplog.text.count("Triton is not installed: kernels of torch serve") == 1
    cuda.triton_works.cache_clear()


# Whole models: the same vectors as the plain form gives, within what the compute rounds.

NEAR = {
    "fp32": PARITY_HIDDEN_STATES,
    "fp16": 3**0.5 * FP16_VECTORS,
    "fp16-acc16": 3**0.5 * FP16_VECTORS,
    "bf16": BF16_VECTORS,
    "int8": ROUNDED_VECTORS,
    "fp8": FP8_VECTORS,
}


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_vectors_are_near_those_of_the_plain_form(
    tiny_bundle: Any, variant: str, compute: str
) -> None:
    bundle = Bundle(tiny_bundle)
    plan = Plan(variant, "torch", "cpu", "fp32", "resident", threads=1)
    plain = Runner(bundle, plan)
    # The plan's compute also says which prefixes are computed apart.
    model = Runner(bundle, plan.with_(compute="int8" if compute in ("int8", "fp8") else "fp32"))
    engine: Any = model._engine
    engine._ops = operations(compute)
    words = [" ".join(["the fox"] * count) for count in (1, 1, 2, 5, 9)]
    texts = plain.tokenizer.encode(words, [plain.contract.prompt("query")] * len(words))
    expected = torch.from_numpy(plain.embed(texts, normalize=True))
    got = torch.from_numpy(model.embed(texts, normalize=True))
    distance = (got - expected).norm(dim=1).median()
    assert float(distance) <= NEAR[compute]


def test_a_caller_that_sums_in_16_bits_changes_no_other_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = switch_in_products(monkeypatch)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        operations("fp16").project_add(noise(2, 192), linear(Plain("F16")), torch.zeros(2, 40), 0)
        assert torch.backends.cuda.matmul.allow_fp16_accumulation
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert seen == [False]
