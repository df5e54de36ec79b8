import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from lowmem.artifact.formats import (
    BnbInt8,
    BnbNf4,
    Format,
    Int8Channel,
    IntGrouped,
    Plain,
    bnb_nf4,
    int_grouped,
)
from lowmem.artifact.tensors import RawTensor, TensorSpec

# Other processes may hold the cores for seconds.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_the_first_code_of_four_bits_lies_in_the_low_nibble_plus_eight() -> None:
    codes = np.array([[-8, -7, -1, 0, 1, 2, 6, 7], [7, -8, 0, 0, 0, 0, -8, 7]], np.int8)
    packed = int_grouped.pack(codes, bits=4)
    assert packed.dtype == np.int32
    assert packed.shape == (2, 1)
    assert packed.tobytes() == bytes([0x10, 0x87, 0xA9, 0xFE, 0x0F, 0x88, 0x88, 0xF0])


def test_codes_of_eight_bits_are_stored_plus_128() -> None:
    codes = np.array([[-128, -127, -1, 0], [1, 2, 126, 127]], np.int8)
    packed = int_grouped.pack(codes, bits=8)
    assert packed.dtype == np.int32
    assert packed.shape == (2, 1)
    assert packed.tobytes() == bytes([0x00, 0x01, 0x7F, 0x80, 0x81, 0x82, 0xFE, 0xFF])


def test_element_i_of_a_packed_row_takes_bits_from_i_times_bits() -> None:
    for bits in (4, 8):
        codes = np.arange(64, dtype=np.int8)[None] % 8
        (row,) = int_grouped.pack(codes, bits)
        string = int.from_bytes(row.tobytes(), "little")
        found = [(string >> (i * bits)) % (1 << bits) - (1 << (bits - 1)) for i in range(64)]
        assert found == codes[0].tolist()


def test_the_first_nf4_code_lies_in_the_high_nibble() -> None:
    packed = bnb_nf4.pack(np.array([[1, 2, 15, 0], [8, 7, 0, 15]], np.uint8))
    assert packed.dtype == np.uint8
    assert packed.shape == (4, 1)
    assert packed.tobytes() == bytes([0x12, 0xF0, 0x87, 0x0F])


@given(
    st.sampled_from([4, 8]).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            arrays(
                np.int8,
                st.tuples(st.integers(1, 5), st.integers(1, 6).map(lambda words: 8 * words)),
                elements=st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
            ),
        )
    )
)
@UNHURRIED
def test_unpacking_undoes_packing_of_grouped_codes(case: tuple[int, NDArray[np.int8]]) -> None:
    bits, codes = case
    packed = int_grouped.pack(codes, bits)
    assert packed.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(int_grouped.unpack(packed, bits), codes, strict=True)


@given(
    arrays(
        np.uint8,
        st.tuples(st.integers(1, 5), st.integers(1, 9).map(lambda pairs: 2 * pairs)),
        elements=st.integers(0, 15),
    )
)
@UNHURRIED
def test_unpacking_undoes_packing_of_nf4_codes(codes: NDArray[np.uint8]) -> None:
    packed = bnb_nf4.pack(codes)
    assert packed.nbytes * 2 == codes.size
    np.testing.assert_array_equal(bnb_nf4.unpack(packed), codes.reshape(-1), strict=True)


def test_a_view_with_strides_is_packed_as_what_it_shows() -> None:
    codes = np.arange(-8, 8, dtype=np.int8).repeat(2).reshape(2, 16)
    strided = np.repeat(codes, 2, axis=1)[:, ::2]
    for bits in (4, 8):
        packed = int_grouped.pack(strided, bits)
        np.testing.assert_array_equal(packed, int_grouped.pack(codes, bits))
        wide = np.repeat(packed, 2, axis=1)[:, ::2]
        np.testing.assert_array_equal(int_grouped.unpack(wide, bits), codes)


def test_plain_weights_are_widened() -> None:
    halves = RawTensor("F16", np.array([[1.5, -65504.0]], np.float16))
    brain = RawTensor("BF16", np.array([[0x3FC0, 0xC000]], np.uint16))
    assert Plain("F16").dequantize({"weight": halves}).tolist() == [[1.5, -65504.0]]
    assert Plain("BF16").dequantize({"weight": brain}).tolist() == [[1.5, -2.0]]
    assert Plain("BF16").dequantize({"weight": brain}).dtype == np.float32


def test_a_channel_code_counts_scales_of_its_row() -> None:
    weight = Int8Channel().dequantize(
        {
            "weight": RawTensor("I8", np.array([[-127, 0, 64], [1, 2, -3]], np.int8)),
            "weight_scale": RawTensor("F32", np.array([[0.5], [2.0]], np.float32)),
        }
    )
    assert weight.tolist() == [[-63.5, 0.0, 32.0], [2.0, 4.0, -6.0]]
    assert weight.dtype == np.float32


def test_a_bitsandbytes_code_counts_127ths_of_the_largest_weight_of_its_row() -> None:
    weight = BnbInt8().dequantize(
        {
            "weight": RawTensor("I8", np.array([[-127, 0, 127], [1, 2, -3], [5, 0, 0]], np.int8)),
            "SCB": RawTensor("F32", np.array([254.0, 127.0, 0.0], np.float32)),
            "weight_format": RawTensor("U8", np.zeros((), np.uint8)),
        }
    )
    assert weight.tolist() == [[-254.0, 0.0, 254.0], [1.0, 2.0, -3.0], [0.0, 0.0, 0.0]]
    assert weight.dtype == np.float32


@pytest.mark.parametrize("bits", [4, 8])
def test_a_grouped_code_counts_scales_of_its_group(bits: int) -> None:
    codes = np.array([[-8, 7, 0, 1, 2, 3, 4, 5, -8, 7, 0, 1, 2, 3, 4, 5]], np.int8)
    weight = IntGrouped(bits=bits, group_size=8).dequantize(
        {
            "weight_packed": RawTensor("I32", int_grouped.pack(codes, bits)),
            "weight_scale": RawTensor("F16", np.array([[0.5, 2.0]], np.float16)),
            "weight_shape": RawTensor("I64", np.array([1, 16])),
        }
    )
    first, second = [-4.0, 3.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [-16.0, 14, 0, 2, 4, 6, 8, 10]
    assert weight.tolist() == [[*first, *second]]
    assert weight.dtype == np.float32


def test_nf4_codes_pick_from_the_book_times_the_largest_weight_of_their_block() -> None:
    form = BnbNf4(group_size=64)
    codes = np.full((2, 64), 7, np.uint8)  # 7 is zero
    codes[0, :3] = [0, 15, 11]
    codes[1, 63] = 14
    weight = form.dequantize(
        {
            "weight": RawTensor("U8", bnb_nf4.pack(codes)),
            "weight.absmax": RawTensor("F32", np.array([2.0, 0.5], np.float32)),
            **form.constants(2, 64),
        }
    )
    expected = np.zeros((2, 64), np.float32)
    expected[0, :3] = [-2.0, 2.0, np.float32(0.33791524171829224) * 2]
    expected[1, 63] = np.float32(0.7229568362236023) / 2
    np.testing.assert_array_equal(weight, expected, strict=True)


def test_the_nf4_book_rises_from_minus_one_over_zero_to_one() -> None:
    book = bnb_nf4.CODE_BOOK
    assert book[[0, 7, 15]].tolist() == [-1.0, 0.0, 1.0]
    assert (np.diff(book) > 0).all()


def test_blocks_of_nf4_run_over_the_ends_of_rows() -> None:
    form = BnbNf4(group_size=64)
    codes = np.full((4, 32), 15, np.uint8)
    weight = form.dequantize(
        {
            "weight": RawTensor("U8", bnb_nf4.pack(codes)),
            "weight.absmax": RawTensor("F32", np.array([3.0, 5.0], np.float32)),
            **form.constants(4, 32),
        }
    )
    assert weight[:, 0].tolist() == [3.0, 3.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("form", "specs"),
    [
        (Plain("BF16"), {"weight": ("BF16", (192, 128))}),
        (Int8Channel(), {"weight": ("I8", (192, 128)), "weight_scale": ("F32", (192, 1))}),
        (
            IntGrouped(bits=4, group_size=64),
            {
                "weight_packed": ("I32", (192, 16)),
                "weight_scale": ("F16", (192, 2)),
                "weight_shape": ("I64", (2,)),
            },
        ),
        (
            IntGrouped(bits=8, group_size=32),
            {
                "weight_packed": ("I32", (192, 32)),
                "weight_scale": ("F16", (192, 4)),
                "weight_shape": ("I64", (2,)),
            },
        ),
        (
            BnbInt8(),
            {"weight": ("I8", (192, 128)), "SCB": ("F32", (192,)), "weight_format": ("U8", ())},
        ),
        (
            BnbNf4(),
            {
                "weight": ("U8", (12288, 1)),
                "weight.absmax": ("F32", (384,)),
                "weight.quant_map": ("F32", (16,)),
                "weight.quant_state.bitsandbytes__nf4": ("U8", (79,)),
            },
        ),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_tensors_are_called_and_shaped_as_their_loaders_expect(
    form: Format, specs: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    assert form.specs(192, 128) == {name: TensorSpec(*spec) for name, spec in specs.items()}


@pytest.mark.parametrize("form", [IntGrouped(), BnbInt8(), BnbNf4()], ids=lambda form: form.name)
def test_constants_are_what_their_specs_say(form: IntGrouped | BnbInt8 | BnbNf4) -> None:
    specs, constants = form.specs(192, 128), form.constants(192, 128)
    assert constants
    for suffix, constant in constants.items():
        assert TensorSpec(constant.dtype, constant.shape) == specs[suffix]


def test_constants_hold_what_their_loaders_read() -> None:
    assert IntGrouped().constants(192, 128)["weight_shape"].array.tolist() == [192, 128]
    assert BnbInt8().constants(192, 128)["weight_format"].array.tolist() == 0
    state = BnbNf4(dtype="bfloat16").constants(192, 128)[bnb_nf4.STATE]
    assert json.loads(state.array.tobytes()) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [192, 128],
    }
