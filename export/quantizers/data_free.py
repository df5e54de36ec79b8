"""Quantizers that look at the weights alone.

Each works on a block of rows at a time, computes its codes with the scale as it is stored, and
returns the tensors of its format. Bounds, with ``scale`` as stored:

    int8_channel, bnb_int8   |error| <= scale / 2
    int_grouped              |error| <= scale / 2 where the weight lies in [-8.5, 7.5] scales, else
                             the distance to the clipped code; a group's squared error is at most
                             that of scale = absmax / 7
    bnb_nf4                  |error| <= 0.152 * absmax of the block
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from export.quantizers.grids import nf4_codes, pack
from lowmem.artifact.formats import (
    BnbInt8,
    BnbNf4,
    Format,
    Int8Channel,
    IntGrouped,
    check_groups,
)
from lowmem.artifact.formats import bnb_nf4 as nf4_layout
from lowmem.artifact.tensors import DTYPES, RawTensor
from lowmem.compute.threads import lone_threads
from lowmem.errors import BundleError

# float32 temporaries of a block should stay in cache, and be large beside what a call costs: at a
# quarter of this size, as at four times it, quantizing takes about twice as long.
_BLOCK_ELEMENTS = 2**19
# A scale of absmax / 7 wastes code -8 and spends codes on the outlier; the best factor lies here.
_FACTORS = tuple(float(factor) for factor in np.linspace(1.0, 0.55, 16))
_SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)


def quantize(weight: Tensor, form: Format, place: str) -> dict[str, RawTensor]:
    """Quantizes one linear.

    Args:
        weight: 16-bit ``(out_features, in_features)``; only a block of rows is widened at a time.
        form: The format to give it.
        place: The module's name, for messages.

    Returns:
        The format's tensors, by suffix, without its constants.

    Raises:
        BundleError: The weight holds NaN or infinity, or a shape or scale that the format cannot
            hold.
    """
    check_groups(form, weight.shape[1], place)
    if isinstance(form, Int8Channel):
        return _by_rows(weight, form, int8_channel, place)
    if isinstance(form, BnbInt8):
        return _by_rows(weight, form, bnb_int8, place)
    if isinstance(form, IntGrouped):
        bits, size = form.bits, form.group_size
        return _by_rows(weight, form, lambda block: int_grouped(block, bits, size), place)
    if isinstance(form, BnbNf4):
        size = form.group_size
        return _by_rows(weight, form, lambda block: bnb_nf4(block, size), place)
    raise AssertionError(form)


def is_finite(weight: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, in one pass (``isfinite`` takes several)."""
    least, largest = torch.aminmax(weight)  # each is NaN where any element is
    return math.isfinite(least) and math.isfinite(largest)


def int8_channel(weight: Tensor) -> dict[str, RawTensor]:
    """Codes -127…127 with scale = absmax / 127 of each row, in float32; uses the weight up."""
    codes, absmax = _row_codes(weight)
    return pack(Int8Channel(), codes, absmax / 127)


def bnb_int8(weight: Tensor) -> dict[str, RawTensor]:
    """bitsandbytes' ``int8_vectorwise_quant`` without outliers; uses the weight up."""
    codes, absmax = _row_codes(weight)
    return {
        "weight": RawTensor("I8", codes.numpy()),
        "SCB": RawTensor("F32", absmax[:, 0].numpy()),
    }


def int_grouped(weight: Tensor, bits: int, group_size: int) -> dict[str, RawTensor]:
    """Codes with one positive float16 scale per group, each chosen by squared error.

    The scales tried are absmax / 7 (for 4 bits) times factors from 1 down to 0.55.
    """
    groups = weight.unflatten(1, (-1, group_size))  # [rows, groups, group_size]
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = groups.abs().amax(-1, keepdim=True) / highest
    if bool((largest > torch.finfo(torch.float16).max).any()):
        raise BundleError("a group's scale must fit float16")
    best_scales = torch.ones_like(largest)
    best_error = torch.full_like(largest, torch.inf)
    work = torch.empty_like(groups)
    for factor in _FACTORS:
        scales = (largest * factor).half().float().clamp_min_(_SMALLEST_SCALE)
        torch.div(groups, scales, out=work).round_().clamp_(lowest, highest)
        error = work.mul_(scales).sub_(groups).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
    best_codes = torch.div(groups, best_scales, out=work).round_().clamp_(lowest, highest)
    return pack(IntGrouped(bits, group_size), best_codes.flatten(1), best_scales[..., 0])


def bnb_nf4(weight: Tensor, group_size: int) -> dict[str, RawTensor]:
    """The nearest of 16 normal-float values, per block of the flattened rows."""
    blocks = weight.reshape(-1, group_size)
    absmax = blocks.abs().amax(-1)
    scaled = blocks / torch.where(absmax > 0, absmax, torch.ones_like(absmax))[:, None]
    return {
        "weight": RawTensor("U8", nf4_layout.pack(nf4_codes(scaled).numpy())),
        "weight.absmax": RawTensor("F32", absmax.numpy()),
    }


def _row_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and absolute maximum of each row; the weight's memory is used up."""
    # abs() of all would take as much memory again. That of a row of zeros must not be -0.
    absmax = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True)).abs_()
    scales = torch.where(absmax > 0, absmax, torch.ones_like(absmax)) / 127
    return weight.div_(scales).round_().clamp_(-127, 127).to(torch.int8), absmax


def _by_rows(
    weight: Tensor,
    form: Format,
    quantize_block: Callable[[Tensor], dict[str, RawTensor]],
    place: str,
) -> dict[str, RawTensor]:
    """Quantizes blocks of rows, each on one thread.

    Blocks are too small for torch to divide among threads: its barriers would cost more than the
    work, and many times more while another process computes.
    """
    known = form.constants(*weight.shape)
    whole = {
        suffix: RawTensor(spec.dtype, np.empty(spec.shape, DTYPES[spec.dtype]))
        for suffix, spec in form.specs(*weight.shape).items()
        if suffix not in known
    }
    # A format may flatten its rows, but no two of them share a number.
    by_rows = {suffix: raw.array.reshape(len(weight), -1) for suffix, raw in whole.items()}
    rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])

    def one(begin: int) -> None:
        block = weight[begin : begin + rows].to(torch.float32, copy=True)
        if not is_finite(block):
            raise BundleError(f"a weight must be finite, got NaN or infinity ({place})")
        count = len(block)
        try:
            parts = quantize_block(block)
        except BundleError as error:
            raise BundleError(f"{error} ({place})") from None
        for suffix, part in parts.items():
            by_rows[suffix][begin : begin + count] = part.array.reshape(count, -1)

    with lone_threads(torch.get_num_threads()) as pool:
        list(pool.map(one, range(0, len(weight), rows)))
    return whole
