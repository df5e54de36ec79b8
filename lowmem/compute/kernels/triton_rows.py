"""What is done to rows between products, one Triton program a row: each is read and written once.

Rounding is spelled out in float32, to the nearest with ties to even, so that a conversion is exact
and the same in every version of Triton and under its interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowmem.compute.kernels.rows import LARGEST_CODE, Rows

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_ROUND_TO_ONES = tl.constexpr(1.5 * 2**23)  # float32 of this size are whole numbers
_ROUND_TO_512THS = tl.constexpr(1.5 * 2**14)

# Numbers of rows differ from pass to pass, and must not each compile a kernel of their own.
_COUNTS = ("tokens", "exact_rows")


def normalize(
    hidden: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, exact_rows: int = 0
) -> Rows:
    """RMSNorm, rounded; see :class:`~lowmem.compute.kernels.rows.RowKernels`."""
    rows, features, options = _prepare(hidden, dtype, exact_rows)
    _normalize[(rows.tokens,)](
        hidden, weight, rows.values, rows.scales, rows.tokens, exact_rows, features, eps, **options
    )
    return rows


def gate(gate: Tensor, up: Tensor, dtype: torch.dtype, exact_rows: int = 0) -> Rows:
    """SiLU(gate) * up, rounded."""
    rows, features, options = _prepare(gate, dtype, exact_rows)
    _gate[(rows.tokens,)](
        gate, up, rows.values, rows.scales, rows.tokens, exact_rows, features, **options
    )
    return rows


def round_rows(states: Tensor, dtype: torch.dtype, exact_rows: int = 0) -> Rows:
    """Rows rounded to ``dtype``, and behind them what that left of the exact ones."""
    if dtype not in LARGEST_CODE:
        return Rows(states.to(dtype), None, len(states))
    rows, features, options = _prepare(states, dtype, exact_rows)
    _round_rows[(rows.tokens,)](
        states, rows.values, rows.scales, rows.tokens, exact_rows, features, **options
    )
    return rows


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, in place."""
    tokens, count, head_dim = heads.shape
    pairs = count * head_dim // 2
    block = triton.next_power_of_2(pairs)
    _rotate[(tokens,)](heads, cos, sin, pairs, head_dim // 2, BLOCK=block, num_warps=4)
    return heads


def _prepare(
    states: Tensor, dtype: torch.dtype, exact_rows: int
) -> tuple[Rows, int, dict[str, float | int]]:
    """Where the rows go, how long they are, and how the kernels are launched."""
    tokens, features = states.shape
    largest = LARGEST_CODE.get(dtype, 0.0)
    total = tokens + (exact_rows if largest else 0)
    values = torch.empty(total, features, dtype=dtype, device=states.device)
    scales = None
    if largest:
        scales = torch.empty(total, dtype=torch.float32, device=states.device)
    block = triton.next_power_of_2(features)
    warps = min(16, max(1, block // 512))
    return (
        Rows(values, scales, tokens),
        features,
        {"LARGEST": largest, "BLOCK": block, "num_warps": warps},
    )


@triton.jit(do_not_specialize=_COUNTS)
def _normalize(
    hidden, weight, codes, scales, tokens, exact_rows, features, eps,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < features
    values = tl.load(hidden + row * features + columns, mask, other=0.0)
    inverse = 1 / tl.sqrt_rn(tl.sum(values * values, 0) / features + eps)
    values = values * inverse * tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    _write(values, codes, scales, row, tokens, exact_rows, features, LARGEST, BLOCK)


@triton.jit(do_not_specialize=_COUNTS)
def _gate(
    gate, up, codes, scales, tokens, exact_rows, features,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < features
    gated = tl.load(gate + row * features + columns, mask, other=0.0).to(tl.float32)
    raised = tl.load(up + row * features + columns, mask, other=0.0).to(tl.float32)
    decay = tl.exp(-tl.abs(gated))  # at most 1, whatever the gate
    values = gated * tl.where(gated < 0, decay, 1.0) / (1 + decay) * raised
    _write(values, codes, scales, row, tokens, exact_rows, features, LARGEST, BLOCK)


@triton.jit(do_not_specialize=_COUNTS)
def _round_rows(
    states, codes, scales, tokens, exact_rows, features,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(states + row * features + columns, columns < features, other=0.0)
    values = values.to(tl.float32)
    _write(values, codes, scales, row, tokens, exact_rows, features, LARGEST, BLOCK)


@triton.jit
def _write(
    values, codes, scales, row, tokens, exact_rows, features,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores a row as it is, or rounded, and what rounding left of it if it is to be exact."""
    if LARGEST == 0:
        columns = tl.arange(0, BLOCK)
        kept = values.to(codes.dtype.element_ty)
        tl.store(codes + row * features + columns, kept, columns < features)
    else:
        left = _write_codes(values, codes, scales, row, features, LARGEST, BLOCK)
        if row < exact_rows:
            _write_codes(left, codes, scales, tokens + row, features, LARGEST, BLOCK)


@triton.jit
def _write_codes(
    values, codes, scales, row, features, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rounds one row, and returns what that leaves of it."""
    # A maximum passes over NaN; 0 times infinity or NaN is NaN, and so becomes the scale.
    poison = tl.sum(values * 0.0, 0)
    # A plain division is not exact on a card.
    parts = tl.div_rn(tl.abs(values), tl.zeros_like(values) + LARGEST)
    scale = tl.maximum(tl.max(parts, 0), _TINY) + poison
    quotients = tl.div_rn(values, tl.zeros_like(values) + scale)
    if codes.dtype.element_ty == tl.int8:
        rounded = (quotients + _ROUND_TO_ONES) - _ROUND_TO_ONES
    else:
        rounded = _round_to_e4m3(quotients)
    columns = tl.arange(0, BLOCK)
    kept = rounded.to(codes.dtype.element_ty)
    tl.store(codes + row * features + columns, kept, columns < features)
    tl.store(scales + row, scale)
    return values - rounded * scale


@triton.jit
def _round_to_e4m3(values):
    """To the nearest of 1 + 3 bits, or below 2^-6 to whole 512ths, ties to even."""
    bits = values.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    normal = bits.to(tl.float32, bitcast=True)
    small = (values + _ROUND_TO_512THS) - _ROUND_TO_512THS
    return tl.where(tl.abs(values) < 2**-6, small, normal)


@triton.jit
def _rotate(heads, cos, sin, pairs, half, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    mask = pair < pairs
    feature = pair % half
    place = heads + row * pairs * 2 + pair // half * half * 2 + feature
    cosine = tl.load(cos + row * half + feature, mask, other=0.0)
    sine = tl.load(sin + row * half + feature, mask, other=0.0)
    first = tl.load(place, mask, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask, other=0.0).to(tl.float32)
    element = heads.dtype.element_ty
    tl.store(place, (first * cosine - second * sine).to(element), mask)
    tl.store(place + half, (second * cosine + first * sine).to(element), mask)
