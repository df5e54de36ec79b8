"""Our quantizers and bytes beside those of bitsandbytes."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from export.quantizers.data_free import quantize
from lowmem.artifact.formats import BnbInt8, BnbNf4
from lowmem.artifact.formats import bnb_nf4 as nf4_layout
from tests.stored_weights import uneven_weight
from tests.tolerances import BITSANDBYTES_INT8_TIE, BITSANDBYTES_NF4_TIE, UNIT_ROUNDOFF

PLACE = "layers.3.mlp.up_proj"
U = UNIT_ROUNDOFF["fp32"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_rows_are_those_of_bitsandbytes_but_for_ties(dtype: torch.dtype) -> None:
    weight = uneven_weight(64, 512).to(dtype)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.clone())
    ours = quantize(weight, BnbInt8(), PLACE)
    np.testing.assert_array_equal(ours["SCB"].array, absmax.numpy(), strict=True)
    differs = ours["weight"].array != codes.numpy()
    exact = weight.double().numpy() * 127 / absmax.double().numpy()[:, None]
    from_a_tie = np.abs(np.abs(exact - np.trunc(exact)) - 0.5)
    assert (from_a_tie[differs] <= BITSANDBYTES_INT8_TIE).all()
    steps = ours["weight"].array.astype(int) - codes.numpy()
    assert np.abs(steps).max() <= 1
    assert differs.mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nf4_codes_are_those_of_bitsandbytes_but_for_ties(dtype: torch.dtype) -> None:
    weight = uneven_weight(64, 512).to(dtype)
    weight[3, 64:128] = 0
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize(weight, BnbNf4(), PLACE)
    np.testing.assert_array_equal(ours["weight.absmax"].array, state.absmax.numpy(), strict=True)
    assert ours["weight"].shape == packed.shape
    codes = nf4_layout.unpack(ours["weight"].array).reshape(-1, 64)
    theirs = nf4_layout.unpack(packed.numpy()).reshape(-1, 64)
    absmax = state.absmax.double().numpy()[:, None]
    exact = weight.double().numpy().reshape(-1, 64) / np.where(absmax > 0, absmax, 1)
    middles = (nf4_layout.CODE_BOOK[1:] + nf4_layout.CODE_BOOK[:-1]) / 2
    from_a_tie = np.abs(exact[..., None] - middles).min(axis=-1)
    differs = codes != theirs
    assert (from_a_tie[differs] <= BITSANDBYTES_NF4_TIE).all()
    assert np.abs(codes.astype(int) - theirs).max() <= 1
    assert differs.mean() < 1e-3


def test_bitsandbytes_restores_our_int8_bytes_to_what_we_restore() -> None:
    tensors = quantize(uneven_weight(64, 512), BnbInt8(), PLACE)
    theirs = bnb.int8_vectorwise_dequant(
        torch.from_numpy(tensors["weight"].array), torch.from_numpy(tensors["SCB"].array)
    )
    # They multiply by 1 / 127 as a float32, after the product; we divide before it: two roundings
    # on either side, and that of the constant.
    np.testing.assert_allclose(BnbInt8().dequantize(tensors), theirs.numpy(), rtol=5 * U)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bitsandbytes_restores_our_nf4_bytes_to_what_we_restore(dtype: torch.dtype) -> None:
    form = BnbNf4(dtype=str(dtype).removeprefix("torch."))
    weight = uneven_weight(64, 512)
    tensors = quantize(weight, form, PLACE) | form.constants(*weight.shape)
    stored = {name: torch.from_numpy(raw.array.copy()) for name, raw in tensors.items()}
    packed = stored.pop("weight")
    state = bnb.QuantState.from_dict(
        {name.removeprefix("weight."): tensor for name, tensor in stored.items()},
        device=torch.device("cpu"),
    )
    theirs = bnb.dequantize_4bit(packed, state)
    assert theirs.dtype == dtype
    assert torch.equal(theirs, torch.from_numpy(form.dequantize(tensors)).to(dtype))
