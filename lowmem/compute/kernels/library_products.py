"""8-bit products by the libraries behind torch: cuBLASLt's int8, and fp8 with a scale per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.compute.kernels.rows import Rows
from lowmem.compute.plan import INT_MM_CHUNK_ROWS

# torch._int_mm takes more than 16 rows, and multiples of 8 features; torch._scaled_mm of 16.
_FEWEST_ROWS = 32
_INT8_MULTIPLE = 8
_FP8_MULTIPLE = 16


def multiply_int8(
    rows: Rows,
    weight: Tensor,
    channel_scales: Tensor,
    *,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """rows @ weightᵀ * row scales * channel scales, and plus a residual where there is one.

    The sums of 32 bits are scaled in a pass of their own, a chunk of rows at a time.

    Args:
        rows: int8 ``[M, K]`` with their scales.
        weight: int8 ``[N, K]``.
        channel_scales: float32 ``[N]``.
        dtype: Of the result; float32 with a residual.
        residual: float32 ``[tokens, N]``.

    Returns:
        ``[tokens, N]``.
    """
    assert rows.scales is not None
    out_features = len(weight)
    weight = _padded(weight, _INT8_MULTIPLE, _INT8_MULTIPLE)
    total = len(rows.values)
    result = torch.empty(total, out_features, dtype=dtype, device=weight.device)
    for begin in range(0, total, INT_MM_CHUNK_ROWS):
        part = slice(begin, min(begin + INT_MM_CHUNK_ROWS, total))
        codes = rows.values[part]
        count = len(codes)
        if count < _FEWEST_ROWS or codes.shape[1] % _INT8_MULTIPLE:
            codes = _padded(codes, _FEWEST_ROWS, _INT8_MULTIPLE)
        sums = torch._int_mm(codes, weight.t())[:count, :out_features]
        result[part] = (sums * rows.scales[part, None]).mul_(channel_scales)
    return _finish(rows, result, residual)


def multiply_fp8(
    rows: Rows,
    weight: Tensor,
    channel_scales: Tensor,
    *,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """The same for rows and weights in ``float8_e4m3fn``; without a residual ``dtype`` is bf16.

    Sums are taken in fewer bits than float32 where the card is faster so; what that loses is far
    below what rounding to fp8 does.
    """
    assert rows.scales is not None
    out_features = len(weight)
    weight = _padded(weight, _FP8_MULTIPLE, _FP8_MULTIPLE)
    scales = _padded(channel_scales[:, None], _FP8_MULTIPLE, 1)
    codes = rows.values
    if codes.shape[1] % _FP8_MULTIPLE:
        codes = _padded(codes, 1, _FP8_MULTIPLE)
    result = torch._scaled_mm(
        codes,
        weight.t(),
        rows.scales[:, None],
        scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )[:, :out_features].contiguous()
    return _finish(rows, result if residual is None else result.to(dtype), residual)


def _finish(rows: Rows, result: Tensor, residual: Tensor | None) -> Tensor:
    result = rows.join(result)
    return result if residual is None else result.add_(residual)


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zeros up to multiples of rows and columns; itself where it has them."""
    right, below = -matrix.shape[1] % columns, -matrix.shape[0] % rows
    if not right and not below:
        return matrix
    if matrix.dtype == torch.float8_e4m3fn:  # torch pads no 8-bit floats; zero is zero in both
        return F.pad(matrix.view(torch.int8), (0, right, 0, below)).view(matrix.dtype)
    return F.pad(matrix, (0, right, 0, below))
