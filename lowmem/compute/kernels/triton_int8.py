"""Products of 8-bit rows and weights by Triton: sums of 32 bits are scaled where they are made.

Letters: M rows, N output features, K input features.
"""

from dataclasses import astuple, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from lowmem.compute.kernels.rows import Rows


@dataclass(frozen=True)
class Tile:
    """How a product is cut: the block of results of a program, and how deep its steps are."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return "-".join(map(str, astuple(self)))


# Those that published tunings of int8 products on Ampere, Ada and Hopper chose, and two for few
# rows. What does not fit a card's shared memory fails when it is tried, and is not chosen there.
TILES = (
    Tile(128, 256, 128, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 128, 8, 3),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 128, 64, 4, 4),
    Tile(64, 128, 128, 4, 4),
    Tile(16, 128, 128, 4, 4),
)
_GROUP_ROWS = 8  # programs that follow each other share weights, which stay in the L2 cache


def multiply(
    rows: Rows,
    weight: Tensor,
    channel_scales: Tensor,
    tile: Tile,
    *,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """rows @ weightᵀ * row scales * channel scales, and plus a residual where there is one.

    Args:
        rows: int8 ``[M, K]`` with their scales.
        weight: int8 ``[N, K]``, contiguous.
        channel_scales: float32 ``[N]``.
        tile: One of ``TILES``.
        dtype: Of the result; float32 with a residual.
        residual: float32 ``[tokens, N]``, contiguous.

    Returns:
        ``[tokens, N]``.

    Raises:
        RuntimeError: The tile does not fit this card.
    """
    total, in_features = rows.values.shape
    out_features = len(weight)
    result = torch.empty(total, out_features, dtype=dtype, device=weight.device)
    blocks = triton.cdiv(total, tile.rows) * triton.cdiv(out_features, tile.outputs)
    try:
        _multiply[(blocks,)](
            rows.values,
            weight,
            rows.scales,
            channel_scales,
            residual,
            result,
            total,
            rows.tokens,
            out_features,
            in_features,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.outputs,
            BLOCK_K=tile.inputs,
            GROUP_M=_GROUP_ROWS,
            IS_EVEN_K=in_features % tile.inputs == 0,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    except TritonError as error:
        raise RuntimeError(f"tile {tile} cannot be used: {error}") from error
    return rows.join(result)


@triton.jit(do_not_specialize=("M", "tokens"))
def _multiply(
    codes, weight, row_scales, channel_scales, residual, result, M, tokens, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, IS_EVEN_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * blocks_n)
    group_m = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    inside = program % (GROUP_M * blocks_n)
    row = (group * GROUP_M + inside % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (inside // group_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the edges rows and columns come round again; their results are not stored.
    step = tl.arange(0, BLOCK_K)
    left = codes + (row % M).to(tl.int64)[:, None] * K + step[None, :]
    right = weight + (column % N).to(tl.int64)[None, :] * K + step[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for begin in range(0, K, BLOCK_K):
        if IS_EVEN_K:
            a, b = tl.load(left), tl.load(right)
        else:
            a = tl.load(left, step[None, :] < K - begin, other=0)
            b = tl.load(right, step[:, None] < K - begin, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K
    scaled = total.to(tl.float32) * tl.load(row_scales + row, row < M, other=0.0)[:, None]
    scaled *= tl.load(channel_scales + column, column < N, other=0.0)[None, :]
    place = row.to(tl.int64)[:, None] * N + column[None, :]
    inside_n = column[None, :] < N
    if residual is not None:
        scaled += tl.load(residual + place, (row[:, None] < tokens) & inside_n, other=0.0)
    tl.store(result + place, scaled.to(result.dtype.element_ty), (row[:, None] < M) & inside_n)
