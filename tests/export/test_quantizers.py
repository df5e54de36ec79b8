import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from export.quantizers import data_free
from export.quantizers.data_free import is_finite, quantize
from lowmem.artifact.formats import BnbInt8, BnbNf4, Format, Int8Channel, IntGrouped, int_grouped
from lowmem.artifact.formats import bnb_nf4 as nf4_layout
from lowmem.artifact.tensors import RawTensor
from lowmem.errors import BundleError
from tests.stored_weights import uneven_weight
from tests.tolerances import (
    UNIT_ROUNDOFF,
    summed_squares_slack,
)

# Other processes may hold the cores for seconds.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

U = UNIT_ROUNDOFF["fp32"]
ROW_FORMATS: tuple[Int8Channel | BnbInt8, ...] = (Int8Channel(), BnbInt8())
FORMATS: tuple[Format, ...] = (
    *ROW_FORMATS,
    IntGrouped(bits=4, group_size=64),
    IntGrouped(bits=4, group_size=32),
    IntGrouped(bits=8, group_size=64),
    BnbNf4(group_size=64),
)
PLACE = "layers.3.mlp.up_proj"
LARGEST = {"float16": 65504.0, "bfloat16": 2.0**18}  # 2^18 / 7 is a float16 yet


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """A 16-bit weight: any values at all, or values such as weights have, of any size."""
    shape = (draw(st.integers(1, 4)), 64 * draw(st.integers(1, 3)))
    dtype = draw(st.sampled_from(["float16", "bfloat16"]))
    largest = LARGEST[dtype]
    if draw(st.booleans()):
        values = draw(arrays(np.float32, shape, elements=st.floats(-largest, largest, width=32)))
    else:
        noise = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        values = noise.standard_normal(shape) * 2.0 ** draw(st.integers(-130, 14))
        values[noise.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.9]))] = 0
        values[noise.random(shape) < 0.02] *= 30
        values = values.clip(-largest, largest)
    return torch.from_numpy(values).to(getattr(torch, dtype))


def quantized(weight: Tensor, form: Format) -> dict[str, RawTensor]:
    tensors = quantize(weight, form, PLACE)
    specs, constants = form.specs(*weight.shape), form.constants(*weight.shape)
    assert tensors.keys() == specs.keys() - constants.keys()
    tensors |= constants
    assert {name: (raw.dtype, raw.shape) for name, raw in tensors.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    return tensors


def numbers(weight: Tensor) -> NDArray[np.float64]:
    return weight.double().numpy()


def group_parts(
    weight: Tensor, form: IntGrouped
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Weights and codes ``[groups, group_size]``, and scales ``[groups, 1]``."""
    tensors = quantized(weight, form)
    codes = int_grouped.unpack(tensors["weight_packed"].array, form.bits)
    return (
        numbers(weight).reshape(-1, form.group_size),
        codes.astype(np.float64).reshape(-1, form.group_size),
        tensors["weight_scale"].array.astype(np.float64).reshape(-1, 1),
    )


@pytest.mark.parametrize("form", ROW_FORMATS, ids=lambda form: form.name)
def test_int8_rows_are_as_computed_by_hand(form: Int8Channel | BnbInt8) -> None:
    weight = torch.tensor(
        [
            [254.0, -254.0, 2.0, 1.0, -3.0, 5.0],  # scale 2; halves go to the even code
            [0.0, 0.0, 0.0, -0.0, 0.0, 0.0],
            [-127.0, 0.4, 126.5, -0.6, 0.0, 125.5],  # the extreme is negative; scale 1
        ],
        dtype=torch.float16,
    )
    tensors = quantized(weight, form)
    assert tensors["weight"].array.tolist() == [
        [127, -127, 1, 0, -2, 2],
        [0, 0, 0, 0, 0, 0],
        [-127, 0, 126, -1, 0, 126],
    ]
    if isinstance(form, BnbInt8):
        assert tensors["SCB"].array.tolist() == [254.0, 0.0, 127.0]
    else:
        assert tensors["weight_scale"].array.tolist() == [[2.0], [0.0], [1.0]]


def test_int4_groups_are_as_computed_by_hand() -> None:
    weight = torch.tensor(
        [[7.0, -7, 1, 2, 3, -4, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0], [3.5, -1, 1, 0, 2, 0.5, 3, -3] * 2],
        dtype=torch.bfloat16,
    )
    tensors = quantized(weight, IntGrouped(bits=4, group_size=8))
    assert int_grouped.unpack(tensors["weight_packed"].array, 4).tolist() == [
        [7, -7, 1, 2, 3, -4, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [7, -2, 2, 0, 4, 1, 6, -6] * 2,
    ]
    smallest = 2.0**-24
    assert tensors["weight_scale"].array.tolist() == [[1.0, smallest], [0.5, 0.5]]


def test_int8_groups_are_as_computed_by_hand() -> None:
    weight = torch.tensor([[127.0, -127, 1, 2.5, 3.5, -4, 50, 0] + [0.0] * 8]).half()
    tensors = quantized(weight, IntGrouped(bits=8, group_size=8))
    assert int_grouped.unpack(tensors["weight_packed"].array, 8).tolist() == [
        [127, -127, 1, 2, 4, -4, 50, 0] + [0] * 8
    ]
    assert tensors["weight_scale"].array.tolist() == [[1.0, 2.0**-24]]


def test_an_int4_group_with_a_negative_extreme_uses_the_lowest_code() -> None:
    weight = torch.tensor([[-8.0, 7, 1, 2, 3, -4, 5, 0]], dtype=torch.float16)
    values, codes, scales = group_parts(weight, IntGrouped(bits=4, group_size=8))
    assert codes.tolist() == [[-8, 7, 1, 2, 3, -4, 5, 0]]
    assert ((codes * scales - values) ** 2).sum() < 0.01


def test_an_nf4_weight_in_the_middle_of_two_values_takes_the_lower() -> None:
    book = nf4_layout.CODE_BOOK
    weight = torch.ones(1, 64)
    weight[0, :15] = torch.from_numpy((book[1:] + book[:-1]) / 2)
    codes = nf4_layout.unpack(data_free.bnb_nf4(weight, 64)["weight"].array)
    assert codes[:15].tolist() == list(range(15))
    assert set(codes[15:].tolist()) == {15}


def test_nf4_blocks_are_as_computed_by_hand() -> None:
    row = [0.0] * 64
    # absmax 2; 0.33 * 2 and 0.36 * 2 lie on either side of 0.33791524, 0.85 * 2 below the middle
    # of 0.7229568 and 1, 0.87 * 2 above it.
    row[:8] = [-2.0, 0.66, 0.72, 1.7, 1.74, 1.0, -0.18, -0.01]
    weight = torch.tensor([row, [0.0] * 64]).half()
    tensors = quantized(weight, BnbNf4())
    codes = nf4_layout.unpack(tensors["weight"].array)
    assert codes[:8].tolist() == [0, 11, 11, 14, 15, 12, 6, 7]
    assert set(codes[8:].tolist()) == {7}
    assert tensors["weight"].array[:4, 0].tolist() == [0x0B, 0xBE, 0xFC, 0x67]
    assert tensors["weight.absmax"].array.tolist() == [2.0, 0.0]


@given(weights())
@UNHURRIED
def test_int8_error_is_at_most_half_a_scale(weight: Tensor) -> None:
    values = numbers(weight)
    for form in ROW_FORMATS:
        tensors = quantized(weight, form)
        if isinstance(form, BnbInt8):
            scales = (tensors["SCB"].array / np.float32(127))[:, None]
        else:
            scales = tensors["weight_scale"].array
        # The quotient is rounded to float32 before it is rounded to a code, and so is their
        # product: each by at most u of itself.
        restored = form.dequantize(tensors).astype(np.float64)
        slack = U * (np.abs(values) + np.abs(restored))
        assert (np.abs(restored - values) <= scales / 2 + slack).all()


@pytest.mark.parametrize("bits", [4, 8])
@given(weight=weights())
@UNHURRIED
def test_grouped_error_is_at_most_half_a_scale_or_the_distance_to_the_clip(
    bits: int, weight: Tensor
) -> None:
    values, codes, scales = group_parts(weight, IntGrouped(bits=bits, group_size=64))
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    inside = (values >= (lowest - 0.5) * scales) & (values <= (highest + 0.5) * scales)
    to_the_clip = np.abs(values - np.clip(values, lowest * scales, highest * scales))
    bound = np.where(inside, scales / 2 + U * np.abs(values), to_the_clip)
    assert (np.abs(codes * scales - values) <= bound).all()
    assert (scales > 0).all()


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (4, 32), (8, 64)])
@given(weight=weights())
@UNHURRIED
def test_a_groups_squared_error_is_at_most_that_of_the_plain_scale(
    bits: int, group_size: int, weight: Tensor
) -> None:
    values, codes, scales = group_parts(weight, IntGrouped(bits=bits, group_size=group_size))
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    absmax = np.abs(values).max(axis=1, keepdims=True)
    plain = (absmax / highest).astype(np.float16).astype(np.float64).clip(2.0**-24)
    plain_codes = np.rint(values / plain).clip(lowest, highest)
    error = ((codes * scales - values) ** 2).sum(axis=1)
    plain_error = ((plain_codes * plain - values) ** 2).sum(axis=1)
    relative, absolute = summed_squares_slack(group_size)
    assert (error <= plain_error * (1 + relative) + absolute).all()


def test_a_searched_scale_beats_the_plain_one_by_a_lot_where_one_weight_stands_out() -> None:
    noise = np.random.default_rng(0)
    row = noise.standard_normal(64)
    row[5] = 6.0
    values, codes, scales = group_parts(torch.from_numpy(row[None]).half(), IntGrouped())
    plain = np.float64(np.float16(6.0 / 7))
    plain_error = ((np.rint(values / plain).clip(-8, 7) * plain - values) ** 2).sum()
    assert ((codes * scales - values) ** 2).sum() < 0.9 * plain_error


@given(weights())
@UNHURRIED
def test_nf4_error_is_at_most_152_thousandths_of_the_largest_weight(weight: Tensor) -> None:
    restored = BnbNf4().dequantize(quantized(weight, BnbNf4())).astype(np.float64)
    values = numbers(weight)
    absmax = np.abs(values).reshape(-1, 64).max(axis=1).repeat(64).reshape(values.shape)
    assert (np.abs(restored - values) <= 0.152 * absmax).all()


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_zeros_stay_zeros_beside_anything(form: Format) -> None:
    weight = torch.zeros(3, 128, dtype=torch.float16)
    weight[1] = torch.linspace(-9, 9, 128)
    restored = form.dequantize(quantized(weight, form))
    assert (restored[[0, 2]] == 0).all()
    assert (restored[1] != 0).any()
    weight[1, :64] = 0
    if isinstance(form, IntGrouped | BnbNf4):
        assert (form.dequantize(quantized(weight, form))[1, :64] == 0).all()


@pytest.mark.parametrize("form", [Int8Channel(), BnbInt8()], ids=repr)
def test_the_scale_of_a_row_of_zeros_has_no_sign(form: Format) -> None:
    """Or its bytes would depend on how many rows a processor works on at a time."""
    for zeros in (torch.zeros(37, 64).half(), -torch.zeros(37, 64).half()):
        for suffix, raw in quantize(zeros, form, "here").items():
            assert suffix == "weight" or not np.signbit(raw.array).any()


@pytest.mark.parametrize("form", FORMATS, ids=repr)
@pytest.mark.parametrize("size", [1e-40, 6e-8, 1e-7, 1e-5])
def test_tiny_weights_give_finite_tensors(form: Format, size: float) -> None:
    weight = (torch.linspace(-1, 1, 256) * size).reshape(2, 128).bfloat16()
    assert weight.abs().max() > 0
    restored = form.dequantize(quantized(weight, form))
    assert np.isfinite(restored).all()
    # The least float16 scale may round up a weight of half of it.
    assert np.abs(restored).max() <= 1.01 * float(weight.abs().max()) + 2.0**-25


def test_the_least_bfloat16_numbers_survive_formats_with_float32_scales() -> None:
    weight = torch.zeros(1, 64, dtype=torch.bfloat16)
    weight[0, :3] = torch.tensor([1, -1, 0.5]) * 2.0**-132  # 2^-133 is the least of all
    for form in (*ROW_FORMATS, BnbNf4()):
        restored = form.dequantize(quantized(weight, form))
        assert restored[0, 0] == pytest.approx(2.0**-132, rel=0.004)  # the scale is subnormal
        assert restored[0, 1] == -restored[0, 0]
        assert 0 < restored[0, 2] < restored[0, 0]


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_the_largest_float16_numbers_survive(form: Format) -> None:
    weight = torch.full((2, 128), 65504.0, dtype=torch.float16)
    weight[1] *= -1
    restored = form.dequantize(quantized(weight, form))
    # A float16 scale is within 2^-11 of what it stands for.
    np.testing.assert_allclose(restored, numbers(weight), rtol=2.0**-11)


def test_a_scale_that_float16_cannot_hold_is_refused() -> None:
    weight = torch.zeros(2, 64, dtype=torch.bfloat16)
    weight[1, 7] = -(2.0**19)
    with pytest.raises(BundleError) as caught:
        quantize(weight, IntGrouped(), PLACE)
    assert str(caught.value) == f"a group's scale must fit float16 ({PLACE})"


@pytest.mark.parametrize("form", FORMATS, ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_module(form: Format, value: float) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.zeros(3, 128, dtype=dtype)
        weight[2, 127] = value
        with pytest.raises(BundleError) as caught:
            quantize(weight, form, PLACE)
        assert str(caught.value) == f"a weight must be finite, got NaN or infinity ({PLACE})"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_found_at_any_place(dtype: torch.dtype, value: float) -> None:
    weight = torch.linspace(-3, 3, 7 * 13, dtype=dtype).reshape(7, 13)
    assert is_finite(weight)
    for place in range(weight.numel()):
        broken = weight.clone()
        broken.view(-1)[place] = value
        assert not is_finite(broken)


def test_groups_that_do_not_fill_a_row_are_refused_with_the_module() -> None:
    weight = torch.zeros(2, 96, dtype=torch.float16)
    with pytest.raises(BundleError) as caught:
        quantize(weight, IntGrouped(bits=4, group_size=64), PLACE)
    assert str(caught.value) == (
        f"group_size must divide in_features, got group_size=64 and in_features=96 ({PLACE})"
    )
    with pytest.raises(BundleError) as caught:
        quantize(weight, BnbNf4(), PLACE)
    assert str(caught.value) == (
        f"group_size must divide in_features, got group_size=64 and in_features=96 ({PLACE})"
    )


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_blocks_of_rows_change_nothing(form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = uneven_weight(37, 192)
    whole = quantize(weight, form, PLACE)
    for elements in (1, 192 * 5, 192 * 36):
        monkeypatch.setattr(data_free, "_BLOCK_ELEMENTS", elements)
        _assert_equal(quantize(weight, form, PLACE), whole)


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_a_dtype_that_holds_the_same_numbers_changes_nothing(form: Format) -> None:
    weight = uneven_weight(5, 128).bfloat16().half()  # fits both
    expected = quantize(weight, form, PLACE)
    _assert_equal(quantize(weight.bfloat16(), form, PLACE), expected)
    _assert_equal(quantize(weight.float(), form, PLACE), expected)


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_quantizing_leaves_the_weight_and_the_threads_as_they_were(form: Format) -> None:
    weight, threads = uneven_weight(5, 128).float(), torch.get_num_threads()
    before = weight.clone()
    quantize(weight, form, PLACE)
    assert torch.equal(weight, before)
    with pytest.raises(BundleError):
        quantize(torch.full((5, 128), torch.nan), form, PLACE)
    assert torch.get_num_threads() == threads


def _assert_equal(found: dict[str, RawTensor], expected: dict[str, RawTensor]) -> None:
    assert found.keys() == expected.keys()
    for suffix, raw in expected.items():
        assert found[suffix].dtype == raw.dtype
        np.testing.assert_array_equal(found[suffix].array, raw.array, strict=True)
