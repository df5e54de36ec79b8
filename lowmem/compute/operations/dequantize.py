"""Stored codes to a weight in the dtype that is computed in, a block of rows at a time.

The formats' own numpy forms are the reference. A block is a few operations that torch divides among
its threads: to hand blocks to threads of our own took twice as long as all of that work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lowmem.artifact.formats import BnbInt8, BnbNf4, Int8Channel, IntGrouped, Plain
from lowmem.artifact.formats.bnb_nf4 import CODE_BOOK
from lowmem.compute.operations.linear import Linear, largest_to_scales

# Enough to occupy all threads, or a card, and little beside the weight itself.
_BLOCK_ELEMENTS = 2**20
_DEVICE_BLOCK_ELEMENTS = 2**22
# From so many threads on torch's divided look-up is faster than its serial one.
_DIVIDED_LOOK_UP_THREADS = 4


class Weights:
    """Weights in the dtype of a product, one at a time, in a scratch that all linears share.

    Attributes:
        scratch: The scratch, or None as long as nothing had to change its form.
    """

    def __init__(
        self, dtype: torch.dtype, dequantize: Callable[[Tensor, Linear], None] | None = None
    ) -> None:
        """Allocates nothing yet.

        Args:
            dtype: What is multiplied.
            dequantize: Writes a linear's weight; ``dequantize_into`` by default.
        """
        self.scratch: Tensor | None = None
        self._dtype = dtype
        self._dequantize = dequantize or dequantize_into

    def of(self, linear: Linear) -> Tensor:
        """The weight ``(out_features, in_features)``, where it is stored if it needs no change."""
        stored = linear.tensors.get("weight")
        if stored is not None and isinstance(linear.format, Plain) and stored.dtype == self._dtype:
            return stored
        size = linear.out_features * linear.in_features
        device = next(iter(linear.tensors.values())).device
        if self.scratch is None or self.scratch.numel() < size or self.scratch.device != device:
            self.scratch = None
            self.scratch = torch.empty(size, dtype=self._dtype, device=device)
        weight = self.scratch[:size].view(linear.out_features, linear.in_features)
        self._dequantize(weight, linear)
        return weight


def dequantize_into(weight: Tensor, linear: Linear) -> None:
    """Writes a linear's weight.

    Args:
        weight: Where to, ``(out_features, in_features)`` in a floating dtype, contiguous.
        linear: The linear, on the same device.
    """
    if isinstance(linear.format, Plain) and not _is_slow(weight, linear.tensors["weight"]):
        weight.copy_(linear.tensors["weight"])
        return
    elements = _BLOCK_ELEMENTS if weight.device.type == "cpu" else _DEVICE_BLOCK_ELEMENTS
    rows = max(1, elements // linear.in_features)
    for begin in range(0, linear.out_features, rows):
        end = min(begin + rows, linear.out_features)
        _dequantize_rows(weight[begin:end], linear, begin, end)


def _dequantize_rows(block: Tensor, linear: Linear, begin: int, end: int) -> None:
    """Writes rows of a weight; scales are applied in float32, so that it is rounded once."""
    if block.dtype != torch.float32:
        wide = torch.empty_like(block, dtype=torch.float32)
        _dequantize_rows(wide, linear, begin, end)
        block.copy_(wide)
        return
    # Codes are copied before they are scaled: a product of two dtypes takes torch longer than both.
    form, tensors = linear.format, linear.tensors
    if isinstance(form, Plain):
        block.copy_(tensors["weight"][begin:end])
    elif isinstance(form, Int8Channel):
        block.copy_(tensors["weight"][begin:end]).mul_(tensors["weight_scale"][begin:end])
    elif isinstance(form, BnbInt8):
        scales = largest_to_scales(tensors["SCB"][begin:end, None])
        block.copy_(tensors["weight"][begin:end]).mul_(scales)
    elif isinstance(form, IntGrouped):
        packed = tensors["weight_packed"][begin:end].view(torch.uint8)
        block.copy_(_halves(packed) if form.bits == 4 else (packed ^ 0x80).view(torch.int8))
        scales = tensors["weight_scale"][begin:end, :, None].float()
        block.unflatten(-1, (-1, form.group_size)).mul_(scales)
    elif isinstance(form, BnbNf4):
        first, last = begin * linear.in_features, end * linear.in_features
        _look_up(block, tensors["weight"][first // 2 : last // 2])
        scales = tensors["weight.absmax"][first // form.group_size : last // form.group_size]
        block.view(-1, form.group_size).mul_(scales[:, None])
    else:
        raise AssertionError(form)


def _is_slow(weight: Tensor, stored: Tensor) -> bool:
    """Whether a copy is better made through float32, a block at a time.

    From float16 to bfloat16 or back torch takes six times as long as for both of these steps.
    """
    both = {weight.dtype, stored.dtype}
    return weight.device.type == "cpu" and both == {torch.float16, torch.bfloat16}


def _halves(packed: Tensor) -> Tensor:
    """The codes -8 to 7 of bytes whose low half is the first: ``[..., n]`` to int8 ``[..., 2n]``.

    A byte is widened to 16 bits in which each half comes to stand in a byte of its own.
    """
    wide = packed.to(torch.int16)
    wide |= wide << 4
    wide &= 0x0F0F
    wide += 0x7878  # 8 less than 0x80 for each, which flips the sign
    wide ^= -0x7F80  # 0x8080 in 16 bits
    return wide.view(torch.int8)


def _look_up(block: Tensor, packed: Tensor) -> None:
    """Writes both values of each byte of NF4; a pair of float32 moves as one float64."""
    pairs, values = _nf4_pairs(block.device), block.view(torch.float64).view(-1)
    codes = packed.reshape(-1)
    if block.device.type == "cpu" and torch.get_num_threads() >= _DIVIDED_LOOK_UP_THREADS:
        torch.take(pairs, codes.long(), out=values)
    else:
        torch.index_select(pairs, 0, codes.int(), out=values)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """Both values of every byte, the high half first: two float32 as a float64, ``[256]``."""
    book, byte = torch.from_numpy(CODE_BOOK), torch.arange(256, device="cpu")
    pairs = torch.stack([book[byte >> 4], book[byte & 15]], dim=-1).view(torch.float64)
    return pairs[:, 0].contiguous().to(device)
