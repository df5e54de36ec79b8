"""What the weights of a group may become in each format: a scale times one of a few values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowmem.artifact.formats import BnbInt8, BnbNf4, Format, Int8Channel, IntGrouped
from lowmem.artifact.formats import bnb_nf4 as nf4_layout
from lowmem.artifact.formats import int_grouped as grouped_layout
from lowmem.artifact.tensors import RawTensor
from lowmem.errors import BundleError

# Groups of few values gain from a scale that clips their largest; rows of 255 values do not.
_CLIPPING = tuple(float(factor) for factor in np.linspace(1.0, 0.5, 16))
_BLOCK_ELEMENTS = 2**18  # what stays in a processor's cache
_FEW_VALUES = 2**15

# By way of numpy, which knows no default device.
_BOOK = torch.from_numpy(nf4_layout.CODE_BOOK)
_CODES = torch.from_numpy(np.arange(len(_BOOK), dtype=np.uint8))
_MIDDLES = (_BOOK[1:] + _BOOK[:-1]) / 2
_PARTS = 64
_EDGES = torch.from_numpy(np.linspace(-1, 1, _PARTS + 1, dtype=np.float32))
# The code below a part's middle and the one above; a value next to an edge may be rounded into
# either part. In one that holds no middle the two are the same, and any middle will do.
_LOWER = torch.bucketize(_EDGES[:-1] - 1 / _PARTS**2, _MIDDLES)
_UPPER = torch.bucketize(_EDGES[1:] + 1 / _PARTS**2, _MIDDLES)
_PART_MIDDLES = _MIDDLES[_LOWER.clamp_max(len(_MIDDLES) - 1)]
# What a group of zeros gets: a scale that is not zero, in any arithmetic.
_SMALLEST_SCALES = {
    torch.float16: float(np.finfo(np.float16).smallest_subnormal),
    torch.float32: float(np.finfo(np.float32).smallest_normal),
}


@dataclass(frozen=True)
class Grid:
    """The values of one format.

    Attributes:
        group_size: Weights of a row that share a scale.
        largest: The value that stands for a group's largest weight where nothing is clipped.
        nearest: Weights in units of their scale to the nearest values.
        factors: What the scale at which nothing is clipped may be multiplied by.
        scale_dtype: What scales are stored in.
    """

    group_size: int
    largest: float
    nearest: Callable[[Tensor], Tensor]
    factors: tuple[float, ...]
    scale_dtype: torch.dtype

    def scales(self, weight: Tensor, importance: Tensor) -> Tensor:
        """The scale of each group that loses least.

        Args:
            weight: float32 ``[out_features, in_features]``.
            importance: Weight of each input's squared error, ``[in_features]``.

        Returns:
            Positive scales as they are stored, float32 ``[out_features, groups]``.

        Raises:
            BundleError: A scale does not fit the dtype that it is stored in.
        """
        rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
        return torch.cat([self._scales(block, importance) for block in weight.split(rows)])

    def _scales(self, weight: Tensor, importance: Tensor) -> Tensor:
        groups = weight.unflatten(1, (-1, self.group_size))
        importance = importance.unflatten(0, (-1, self.group_size))
        largest = groups.abs().amax(-1, keepdim=True) / self.largest
        if bool((largest > torch.finfo(self.scale_dtype).max).any()):
            raise BundleError(f"a group's scale must fit {self.scale_dtype}")
        smallest = _SMALLEST_SCALES[self.scale_dtype]
        best = torch.ones_like(largest)
        least = torch.full_like(largest, torch.inf)
        for factor in self.factors:
            scales = (largest * factor).to(self.scale_dtype).float().clamp_min_(smallest)
            lost = self.nearest(groups / scales).mul_(scales).sub_(groups).square_()
            error = lost.mul_(importance).sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scales, best)
        return best[..., 0]


def grid_of(form: Format, in_features: int) -> Grid:
    """The values of a quantized format."""
    if isinstance(form, IntGrouped):
        lowest, highest = -(1 << (form.bits - 1)), (1 << (form.bits - 1)) - 1
        return Grid(
            form.group_size, highest, _whole_numbers(lowest, highest), _CLIPPING, torch.float16
        )
    if isinstance(form, BnbNf4):
        return Grid(form.group_size, 1.0, _normal_floats, _CLIPPING, torch.float32)
    assert isinstance(form, Int8Channel | BnbInt8), form
    return Grid(in_features, 127, _whole_numbers(-127, 127), (1.0,), torch.float32)


def pack(form: Format, values: Tensor, scales: Tensor) -> dict[str, RawTensor]:
    """Tensors of a format, by suffix, without its constants.

    Args:
        form: The format.
        values: The value of each weight, ``[out_features, in_features]``.
        scales: float32 ``[out_features, groups]``.
    """
    if isinstance(form, IntGrouped):
        return {
            "weight_packed": RawTensor("I32", grouped_layout.pack(_int8(values), form.bits)),
            "weight_scale": RawTensor("F16", scales.half().numpy()),
        }
    if isinstance(form, Int8Channel):
        return {
            "weight": RawTensor("I8", _int8(values)),
            "weight_scale": RawTensor("F32", scales.numpy()),
        }
    if isinstance(form, BnbInt8):
        return {
            "weight": RawTensor("I8", _int8(values)),
            "SCB": RawTensor("F32", (scales[:, 0] * 127).numpy()),
        }
    assert isinstance(form, BnbNf4), form
    return {
        "weight": RawTensor("U8", nf4_layout.pack(nf4_codes(values).numpy())),
        "weight.absmax": RawTensor("F32", scales.flatten().numpy()),
    }


def _whole_numbers(lowest: int, highest: int) -> Callable[[Tensor], Tensor]:
    return lambda values: values.round().clamp_(lowest, highest)


def nf4_codes(values: Tensor) -> Tensor:
    """The nearest of the 16 normal floats to each value, uint8; the lower one of two as near."""
    return _of_nearest(values, _CODES)


def _normal_floats(values: Tensor) -> Tensor:
    if values.numel() > _FEW_VALUES:
        return _of_nearest(values, _BOOK)
    # A column at a time is too little for many passes: here the search is the faster one.
    device = values.device
    return _BOOK.to(device)[torch.bucketize(values, _MIDDLES.to(device))]


def _of_nearest(values: Tensor, meanings: Tensor) -> Tensor:
    """What the nearest normal float to each value means; NaN counts as -1.

    [-1, 1] is cut into parts so narrow that none holds two middles between neighbouring floats.
    So a value's part and one comparison tell its float, many times faster than a search.

    Args:
        values: float32, of any shape.
        meanings: Of each normal float, ``[16]``.
    """
    part = values.add(1).mul_(_PARTS / 2).clamp_(0, _PARTS - 1).nan_to_num_(0).int().flatten()
    above = _PART_MIDDLES.to(values.device).index_select(0, part).view_as(values)
    # One where a value lies above the middle: comparing takes longer than arithmetic.
    torch.sub(values, above, out=above).sign_().clamp_(0, 1).nan_to_num_(0)
    part.add_(above.flatten().int(), alpha=_PARTS)
    table = torch.cat([meanings[_LOWER], meanings[_UPPER]]).to(values.device)
    return table.index_select(0, part).view_as(values)


def _int8(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
    return values.to(torch.int8).numpy()
