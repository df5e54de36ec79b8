"""What is done to rows between products, in plain torch: right on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.compute.decoder import Rotation, rms_norm
from lowmem.compute.kernels.rows import LARGEST_CODE, Rows


def normalize(
    hidden: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, exact_rows: int = 0
) -> Rows:
    """RMSNorm, rounded; see :class:`~lowmem.compute.kernels.rows.RowKernels`."""
    return round_rows(rms_norm(hidden, weight, eps), dtype, exact_rows)


def gate(gate: Tensor, up: Tensor, dtype: torch.dtype, exact_rows: int = 0) -> Rows:
    """SiLU(gate) * up, rounded."""
    return round_rows(F.silu(gate.float()).mul_(up), dtype, exact_rows)


def round_rows(states: Tensor, dtype: torch.dtype, exact_rows: int = 0) -> Rows:
    """Rows rounded to ``dtype``, and behind them what that left of the exact ones."""
    if dtype not in LARGEST_CODE:
        return Rows(states.to(dtype), None, len(states))
    states = states.float()
    codes, scales = _round(states, dtype)
    if exact_rows:
        left = states[:exact_rows] - codes[:exact_rows].float() * scales[:exact_rows, None]
        more_codes, more_scales = _round(left, dtype)
        # torch does not concatenate 8-bit floats; their bytes it does.
        codes = torch.cat([codes.view(torch.int8), more_codes.view(torch.int8)]).view(dtype)
        scales = torch.cat([scales, more_scales])
    return Rows(codes, scales, len(states))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    return Rotation(cos, sin).apply(heads)


def _round(states: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 rows; a row that is not finite gets a scale that is not."""
    scales = torch.linalg.vector_norm(states, torch.inf, dim=-1).div_(LARGEST_CODE[dtype])
    scales.clamp_min_(torch.finfo(scales.dtype).tiny)
    quotients = states / scales[:, None]
    return (quotients.round() if dtype == torch.int8 else quotients).to(dtype), scales
