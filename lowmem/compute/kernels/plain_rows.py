"""What is done to rows between products, in plain torch: right on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.compute.decoder import Rotation, rms_norm
from lowmem.compute.kernels.rows import LARGEST_CODE, Rows

_BLOCK_ELEMENTS = 2**22  # enough to occupy a card


def normalize(
    hidden: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, exact_rows: int = 0
) -> Rows:
    """RMSNorm, rounded; see :class:`~lowmem.compute.kernels.rows.RowKernels`."""
    return round_rows(rms_norm(hidden, weight, eps), dtype, exact_rows)


def gate(gate: Tensor, up: Tensor, dtype: torch.dtype, exact_rows: int = 0) -> Rows:
    """SiLU(gate) * up, rounded."""
    wide = gate.float()  # itself where it is float32
    return round_rows(F.silu(wide, inplace=wide is not gate).mul_(up), dtype, exact_rows)


def round_rows(states: Tensor, dtype: torch.dtype, exact_rows: int = 0) -> Rows:
    """Rows rounded to ``dtype``, and behind them what that left of the exact ones."""
    if dtype not in LARGEST_CODE:
        return Rows(states.to(dtype), None, len(states))
    parts = [_round(block.float(), dtype) for block in states.split(_block_rows(states))]
    codes, scales = (_joined(pieces) for pieces in zip(*parts, strict=True))
    if exact_rows:
        left = states[:exact_rows].float() - codes[:exact_rows].float() * scales[:exact_rows, None]
        more_codes, more_scales = _round(left, dtype)
        codes, scales = _joined((codes, more_codes)), _joined((scales, more_scales))
    return Rows(codes, scales, len(states))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    return Rotation(cos, sin).apply(heads)


def _block_rows(states: Tensor) -> int:
    """Rows at a time: float32 copies of a whole weight would be many times what it takes stored."""
    return max(1, _BLOCK_ELEMENTS // max(1, states.shape[1]))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    # torch does not concatenate 8-bit floats; their bytes it does.
    dtype = parts[0].dtype
    is_byte = dtype.itemsize == 1
    joined = torch.cat([part.view(torch.int8) if is_byte else part for part in parts])
    return joined.view(dtype)


def _round(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 rows; a row that is not finite gets a scale that is not."""
    scales = torch.linalg.vector_norm(states, torch.inf, dim=-1).div_(LARGEST_CODE[dtype])
    scales.clamp_min_(torch.finfo(scales.dtype).tiny)
    quotients = states / scales[:, None]
    return (quotients.round_() if dtype == torch.int8 else quotients).to(dtype), scales
