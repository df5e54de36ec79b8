"""Dequantization in torch against the formats' own numpy form, which is the reference."""

from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

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
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.weights import LinearWeights
from lowmem.compute.operations import dequantize
from lowmem.compute.operations.dequantize import dequantize_into
from lowmem.compute.operations.linear import Linear, to_torch
from tests.stored_weights import random_weights

# Other processes may hold the cores for seconds.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FORMATS: tuple[Format, ...] = (
    Plain("F16"),
    Plain("BF16"),
    Plain("F32"),
    Int8Channel(),
    IntGrouped(bits=4, group_size=64),
    IntGrouped(bits=4, group_size=32),
    IntGrouped(bits=4, group_size=192),
    IntGrouped(bits=8, group_size=64),
    BnbInt8(),
    BnbNf4(group_size=64),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def restored(weights: LinearWeights, dtype: torch.dtype) -> Tensor:
    """In the middle of a larger scratch, all else of which must be left alone."""
    size = weights.out_features * weights.in_features
    scratch = torch.full((size + 128,), torch.nan, dtype=dtype)
    weight = scratch[64 : 64 + size].view(weights.out_features, weights.in_features)
    dequantize_into(weight, Linear.load(weights, to_torch))
    assert scratch[:64].isnan().all()
    assert scratch[64 + size :].isnan().all()
    return weight


def reference(weights: LinearWeights) -> Tensor:
    return torch.from_numpy(weights.format.dequantize(weights.tensors))


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_float32_is_that_of_numpy_to_the_bit(form: Format) -> None:
    weights = random_weights(form, 50, 192)
    assert torch.equal(restored(weights, torch.float32), reference(weights))


@pytest.mark.parametrize("form", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_numpy_rounded_once(form: Format, dtype: torch.dtype) -> None:
    weights = random_weights(form, 50, 192)
    assert torch.equal(restored(weights, dtype), reference(weights).to(dtype))


@pytest.mark.parametrize("form", FORMATS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_fill_a_block_are_restored(form: Format, dtype: torch.dtype) -> None:
    rows = 2 * (dequantize._BLOCK_ELEMENTS // 192) + 7
    weights = random_weights(form, rows, 192)
    assert torch.equal(restored(weights, dtype), reference(weights).to(dtype))


@given(
    form=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    columns=st.integers(1, 3).map(lambda count: 192 * count),
    block_elements=st.integers(1, 8000),
    seed=st.integers(0, 999),
)
@UNHURRIED
def test_blocks_of_any_size_change_nothing(
    form: Format, dtype: torch.dtype, rows: int, columns: int, block_elements: int, seed: int
) -> None:
    weights = random_weights(form, rows, columns, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dequantize, "_BLOCK_ELEMENTS", block_elements)
        assert torch.equal(restored(weights, dtype), reference(weights).to(dtype))


def test_threads_that_come_later_may_compute_with_as_many_threads_as_before() -> None:
    threads = torch.get_num_threads()
    restored(random_weights(Int8Channel(), 50, 192), torch.float32)
    found = []
    later = Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert [torch.get_num_threads(), *found] == [threads, threads]


@pytest.mark.parametrize("threads", [1, 2, dequantize._DIVIDED_LOOK_UP_THREADS])
@pytest.mark.usefixtures("three_threads")
def test_every_byte_of_nf4_is_restored(threads: int) -> None:
    torch.set_num_threads(threads)
    codes = np.arange(256, dtype=np.uint8).reshape(-1, 1)  # 512 weights, 8 blocks
    form = BnbNf4()
    weights = LinearWeights(
        form,
        8,
        64,
        {
            "weight": RawTensor("U8", codes),
            "weight.absmax": RawTensor("F32", np.arange(1, 9, dtype=np.float32)),
            bnb_nf4.STATE: RawTensor("U8", form.constants(8, 64)[bnb_nf4.STATE].array.copy()),
        },
    )
    assert torch.equal(restored(weights, torch.float32), reference(weights))


def test_every_code_of_a_grouped_format_is_restored() -> None:
    for bits in (4, 8):
        half = 1 << (bits - 1)
        codes = np.arange(-half, half).astype(np.int8)[None]
        form = IntGrouped(bits=bits, group_size=codes.size)
        weights = LinearWeights(
            form,
            1,
            codes.size,
            {
                "weight_packed": RawTensor("I32", int_grouped.pack(codes, bits)),
                "weight_scale": RawTensor("F16", np.array([[0.5]], np.float16)),
            },
        )
        assert restored(weights, torch.float32).tolist() == (codes / 2).tolist()


def test_every_byte_of_a_grouped_format_is_restored() -> None:
    byte = np.arange(256, dtype=np.uint8).reshape(8, 32)
    scales = RawTensor("F16", np.array([[1], [2], [3], [5], [7], [11], [13], [17]], np.float16))
    for bits, columns in ((4, 64), (8, 32)):
        parts = {"weight_packed": RawTensor("I32", byte.view(np.int32)), "weight_scale": scales}
        form = IntGrouped(bits=bits, group_size=columns)
        weights = LinearWeights(form, 8, columns, parts)
        assert torch.equal(restored(weights, torch.float32), reference(weights))


def test_rows_of_zeros_stay_zeros() -> None:
    weights = LinearWeights(
        BnbInt8(),
        2,
        4,
        {
            "weight": RawTensor("I8", np.array([[0, 0, 0, 0], [127, 0, -127, 1]], np.int8)),
            "SCB": RawTensor("F32", np.array([0, 127], np.float32)),
        },
    )
    assert restored(weights, torch.float16).tolist() == [[0, 0, 0, 0], [127, 0, -127, 1]]
