"""Values and scales of each format, and that what is packed is what was chosen."""

import pytest
import torch

from export.quantizers.grids import grid_of, nf4_codes, pack
from lowmem.artifact.formats import BnbInt8, BnbNf4, Format, Int8Channel, IntGrouped
from lowmem.artifact.formats.bnb_nf4 import CODE_BOOK
from lowmem.errors import BundleError

FORMATS = [IntGrouped(4, 64), IntGrouped(8, 64), Int8Channel(), BnbInt8(), BnbNf4()]


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_what_is_packed_dequantizes_to_values_times_scales(form: Format) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    grid = grid_of(form, 128)
    scales = grid.scales(weight, torch.ones(128))
    assert scales.shape == (6, 128 // grid.group_size)
    wide = scales.repeat_interleave(grid.group_size, 1)
    values = grid.nearest(weight / wide)
    tensors = pack(form, values, scales)
    assert not isinstance(form, BnbNf4) or set(tensors) == {"weight", "weight.absmax"}
    if isinstance(form, BnbNf4):
        tensors = tensors | form.constants(6, 128)
    stored = torch.from_numpy(form.dequantize(tensors))
    torch.testing.assert_close(stored, values * wide, rtol=1e-6, atol=0)


def test_values_are_those_of_the_formats() -> None:
    far = torch.tensor([-1e9, -0.4, 0.6, 1e9])
    assert grid_of(IntGrouped(4, 64), 128).nearest(far.clone()).tolist() == [-8, 0, 1, 7]
    assert grid_of(Int8Channel(), 128).nearest(far.clone()).tolist() == [-127, 0, 1, 127]
    book = torch.from_numpy(CODE_BOOK)
    assert grid_of(BnbNf4(), 128).nearest(book).tolist() == CODE_BOOK.tolist()


@pytest.mark.parametrize("times", [1, 400], ids=["few", "many"])
def test_the_nearest_normal_float_is_found_next_to_every_middle_and_edge(times: int) -> None:
    book = torch.from_numpy(CODE_BOOK)
    middles = (book[1:] + book[:-1]) / 2
    near = torch.cat([middles, torch.linspace(-1, 1, 65), torch.tensor([-1e30, 1e30])])
    infinity = torch.tensor(torch.inf)
    values = torch.cat(
        [near, near.nextafter(infinity), near.nextafter(-infinity), infinity[None], -infinity[None]]
    ).repeat(times)
    codes = (values[:, None] > middles).sum(1)
    assert torch.equal(nf4_codes(values).long(), codes)
    assert torch.equal(grid_of(BnbNf4(), 128).nearest(values), book[codes])
    assert nf4_codes(torch.tensor([torch.nan])).item() == 0


def test_an_important_weight_decides_the_scale_of_its_group() -> None:
    """One large weight of no importance is clipped for the sake of the others."""
    weight = torch.full((1, 64), 0.1)
    weight[0, 0] = 1.0
    grid = grid_of(IntGrouped(4, 64), 64)
    equal = grid.scales(weight, torch.ones(64))
    importance = torch.ones(64)
    importance[0] = 0
    assert float(grid.scales(weight, importance)) < float(equal)


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_a_group_of_zeros_has_a_positive_scale_and_stays_zero(form: Format) -> None:
    grid = grid_of(form, 64)
    scales = grid.scales(torch.zeros(2, 64), torch.ones(64))
    assert bool((scales > 0).all())
    assert not bool(grid.nearest(torch.zeros(2, 64) / scales[:, :1]).any())


def test_a_scale_that_does_not_fit_is_an_error() -> None:
    weight = torch.full((1, 64), 1e6)
    with pytest.raises(BundleError, match=r"^a group's scale must fit torch\.float16$"):
        grid_of(IntGrouped(4, 64), 64).scales(weight, torch.ones(64))
