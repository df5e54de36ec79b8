"""Stored codes to a 16-bit weight in one pass, by Triton.

All formats are flat here: byte i holds weight i, or weights 2i and 2i + 1, and consecutive weights
share a scale; a scale per output channel is one per ``in_features`` consecutive weights.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowmem.artifact.formats import BnbInt8, BnbNf4, Int8Channel, IntGrouped, Plain
from lowmem.artifact.formats.bnb_nf4 import CODE_BOOK
from lowmem.compute.operations.linear import Linear, largest_to_scales

_BLOCK_BYTES = 2048


def dequantize_into(weight: Tensor, linear: Linear) -> None:
    """Writes a linear's weight; scales are applied in float32, so that it is rounded once.

    Args:
        weight: Where to, ``(out_features, in_features)`` in a floating dtype, contiguous.
        linear: The linear, on the same device.
    """
    form, tensors = linear.format, linear.tensors
    if isinstance(form, Plain):
        weight.copy_(tensors["weight"])
        return
    if isinstance(form, Int8Channel):
        codes, scales = tensors["weight"], tensors["weight_scale"]
    elif isinstance(form, BnbInt8):
        codes, scales = tensors["weight"], largest_to_scales(tensors["SCB"])
    elif isinstance(form, IntGrouped):
        codes, scales = tensors["weight_packed"].view(torch.uint8), tensors["weight_scale"]
    else:
        codes, scales = tensors["weight"], tensors["weight.absmax"]
    group_size = linear.out_features * linear.in_features // scales.numel()
    total = codes.numel()
    grid = (triton.cdiv(total, _BLOCK_BYTES),)
    if form.bits == 8:
        _dequantize_bytes[grid](codes, scales, weight, total, group_size, BLOCK=_BLOCK_BYTES)
    else:
        book = _code_book(weight.device) if isinstance(form, BnbNf4) else None
        _dequantize_pairs[grid](codes, scales, book, weight, total, group_size, BLOCK=_BLOCK_BYTES)


@cache
def _code_book(device: torch.device) -> Tensor:
    return torch.from_numpy(CODE_BOOK).to(device)


@triton.jit
def _dequantize_bytes(codes, scales, weight, total, group_size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    values = tl.load(codes + index, mask, other=0).to(tl.float32)
    if codes.dtype.element_ty == tl.uint8:
        values -= 128
    values *= tl.load(scales + index // group_size, mask, other=0.0).to(tl.float32)
    tl.store(weight + index, values.to(weight.dtype.element_ty), mask)


@triton.jit
def _dequantize_pairs(codes, scales, book, weight, total, group_size, BLOCK: tl.constexpr):
    """Integers have their first code in the low nibble; NF4, which has a book, in the high one."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < total
    byte = tl.load(codes + index, mask, other=0).to(tl.int32)
    if book is None:
        first = ((byte & 15) - 8).to(tl.float32)
        second = ((byte >> 4) - 8).to(tl.float32)
    else:
        first = tl.load(book + (byte >> 4))
        second = tl.load(book + (byte & 15))
    # Both weights of a byte lie in one group: groups are even.
    scale = tl.load(scales + index * 2 // group_size, mask, other=0.0).to(tl.float32)
    element = weight.dtype.element_ty
    pairs = tl.interleave((first * scale).to(element), (second * scale).to(element))
    place = tl.program_id(0).to(tl.int64) * BLOCK * 2 + tl.arange(0, BLOCK * 2)
    tl.store(weight + place, pairs, place < total * 2)
