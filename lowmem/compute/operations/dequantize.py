"""Stored codes to a weight in the dtype that is computed in, a block of rows at a time.

The formats' own numpy forms are the reference. On a CPU each block is one thread's: its few passes
stay in that core's cache, and torch's own division of such small work would spend more on barriers
than on the work, and far more while another process computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from lowmem.artifact.formats import BnbInt8, BnbNf4, Int8Channel, IntGrouped, Plain
from lowmem.artifact.formats.bnb_nf4 import CODE_BOOK
from lowmem.compute.operations.linear import Linear, largest_to_scales
from lowmem.compute.threads import lone_threads

_BLOCK_ELEMENTS = 2**18
_DEVICE_BLOCK_ELEMENTS = 2**22  # enough to occupy a card, and little beside the weight itself


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


_pool = cache(lone_threads)


def dequantize_into(weight: Tensor, linear: Linear) -> None:
    """Writes a linear's weight.

    Args:
        weight: Where to, ``(out_features, in_features)`` in a floating dtype, contiguous.
        linear: The linear, on the same device.
    """
    if isinstance(linear.format, Plain) and not _is_slow(weight, linear.tensors["weight"]):
        weight.copy_(linear.tensors["weight"])
        return
    on_cpu = weight.device.type == "cpu"
    rows = max(1, (_BLOCK_ELEMENTS if on_cpu else _DEVICE_BLOCK_ELEMENTS) // linear.in_features)

    def one(begin: int) -> None:
        with torch.inference_mode():
            end = min(begin + rows, linear.out_features)
            _dequantize_rows(weight[begin:end], linear, begin, end)

    if not on_cpu:
        for begin in range(0, linear.out_features, rows):
            one(begin)
        return
    # Each block is one task; list() waits for all and raises what any of them raised.
    list(_pool(torch.get_num_threads()).map(one, range(0, linear.out_features, rows)))


def _dequantize_rows(block: Tensor, linear: Linear, begin: int, end: int) -> None:
    """Writes rows of a weight; scales are applied in float32, so that it is rounded once."""
    if block.dtype != torch.float32:
        wide = torch.empty_like(block, dtype=torch.float32)
        _dequantize_rows(wide, linear, begin, end)
        block.copy_(wide)
        return
    form, tensors = linear.format, linear.tensors
    if isinstance(form, Plain):
        block.copy_(tensors["weight"][begin:end])
    elif isinstance(form, Int8Channel):
        torch.mul(tensors["weight"][begin:end], tensors["weight_scale"][begin:end], out=block)
    elif isinstance(form, BnbInt8):
        scales = largest_to_scales(tensors["SCB"][begin:end, None])
        torch.mul(tensors["weight"][begin:end], scales, out=block)
    elif isinstance(form, IntGrouped):
        packed = tensors["weight_packed"][begin:end].view(torch.uint8)
        if form.bits == 4:
            _look_up(block, packed, _int4_pairs(block.device))
        else:
            block.copy_(packed).sub_(1 << (form.bits - 1))  # uint8 arithmetic would wrap
        scales = tensors["weight_scale"][begin:end, :, None].float()
        block.unflatten(-1, (-1, form.group_size)).mul_(scales)
    elif isinstance(form, BnbNf4):
        first, last = begin * linear.in_features, end * linear.in_features
        _look_up(block, tensors["weight"][first // 2 : last // 2], _nf4_pairs(block.device))
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


def _look_up(block: Tensor, packed: Tensor, pairs: Tensor) -> None:
    """Writes both values of each byte; a pair of float32 moves as one float64."""
    torch.index_select(pairs, 0, packed.reshape(-1).int(), out=block.view(torch.float64).view(-1))


@cache
def _int4_pairs(device: torch.device) -> Tensor:
    """Both codes of every byte, the low nibble first, as pairs of float32 in ``[256]`` float64."""
    byte = torch.arange(256, device="cpu")
    return _as_pairs((byte & 15) - 8, (byte >> 4) - 8, device)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """Both values of every byte, the high nibble first, as pairs of float32 in ``[256]``."""
    book, byte = torch.from_numpy(CODE_BOOK), torch.arange(256, device="cpu")
    return _as_pairs(book[byte >> 4], book[byte & 15], device)


def _as_pairs(first: Tensor, second: Tensor, device: torch.device) -> Tensor:
    pairs = torch.stack([first.float(), second.float()], dim=-1).view(torch.float64)
    return pairs[:, 0].contiguous().to(device)
