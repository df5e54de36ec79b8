"""8-bit compute in the processor's own 8-bit arithmetic, over codes as they are stored.

Codes of activations meet codes of weights: ``torch._int_mm`` sums their products in int32, and both
scales follow. The plain form takes the same codes of activations to float32 products, so the two
differ by float32 rounding alone. What the plain form keeps exact goes through the plain form:
leading rows, linears whose inputs are not rounded, and other formats.

On processors that sum such products in 16 bits results would be wrong without an error, and on
those without instructions for them they come a hundredfold slower. So this form must first be
exact on extreme values, and faster in a trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product as combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.compute.attention import Spans, attend
from lowmem.compute.operations import trials
from lowmem.compute.operations.attention_forms import narrow_from
from lowmem.compute.operations.linear import Linear
from lowmem.compute.operations.plain import PlainOperations, chunk_tokens, chunks, round_rows
from lowmem.compute.operations.products import product
from lowmem.compute.plan import int8_chunk_rows, multiplies_codes

# A matrix of one column is read wrongly, and more than so many products of 127 * 128 may leave
# int32.
_IN_FEATURES = range(2, 2**31 // (127 * 128))

_TRIAL_TOKENS, _TRIAL_FEATURES = 256, 1024


class Int8Operations(PlainOperations):
    """The operations with 8-bit products."""

    def __init__(self, rms_norm_eps: float) -> None:
        """Chooses the arithmetic, attention's by trial; allocates nothing yet."""
        super().__init__("int8", rms_norm_eps)
        self._narrow_from = narrow_from(torch.get_num_threads())

    def norm_project(
        self, hidden: Tensor, norm: Tensor, linears: Sequence[Linear], exact_rows: int
    ) -> list[Tensor]:
        """RMSNorm, then each linear, float32 ``[tokens, out_features]``."""
        if exact_rows or not all(map(has_codes, linears)):
            return super().norm_project(hidden, norm, linears, exact_rows)
        results = [hidden.new_empty(len(hidden), linear.out_features) for linear in linears]
        for rows in self._chunks(hidden, *linears):
            codes, scales = round_to_int8(self._norm(hidden[rows], norm))
            for linear, result in zip(linears, results, strict=True):
                multiply(codes, scales, linear, out=result[rows])
        return results

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        """Attention within each text, float32 ``[queries, query size]``.

        Long texts go through bfloat16 where that is faster: beside activations that are rounded to
        8 bits it does not count. Where blocks are faster still, they do not.
        """
        is_narrow = self._narrow_from < math.inf
        blocks = self._blocks_from(spans, torch.bfloat16 if is_narrow else torch.float32)
        narrow = self._narrow_from
        return attend(query, key, value, spans, narrow_from=narrow, blocks_from=blocks)

    def project_add(
        self, mixed: Tensor, linear: Linear, residual: Tensor, exact_rows: int
    ) -> Tensor:
        """residual + linear(mixed), float32 ``[tokens, hidden]``."""
        if exact_rows or not has_codes(linear):
            return super().project_add(mixed, linear, residual, exact_rows)
        total = torch.empty_like(residual)
        for rows in self._chunks(mixed, linear):
            multiply(*round_to_int8(mixed[rows]), linear, out=total[rows]).add_(residual[rows])
        return total

    def gated_mlp(
        self,
        hidden: Tensor,
        norm: Tensor,
        gate: Linear,
        up: Linear,
        down: Linear,
        exact_rows: int,
    ) -> Tensor:
        """hidden + down(SiLU(gate(n)) * up(n)), n = RMSNorm(hidden), float32.

        A chunk of tokens goes through all three, so that nothing as wide as the MLP is held for
        every token.
        """
        keeps_gated = has_codes(down) or not down.rounds_activations
        if exact_rows or not (has_codes(gate) and has_codes(up) and keeps_gated):
            return super().gated_mlp(hidden, norm, gate, up, down, exact_rows)
        full = None if has_codes(down) else self._weights.of(down)
        total = torch.empty_like(hidden)
        for rows in self._chunks(hidden, gate, up, down):
            codes, scales = round_to_int8(self._norm(hidden[rows], norm))
            gated = F.silu(multiply(codes, scales, gate), inplace=True)
            gated.mul_(multiply(codes, scales, up))
            if full is None:
                multiply(*round_to_int8(gated), down, out=total[rows]).add_(hidden[rows])
            else:
                torch.add(hidden[rows], product(gated, full), out=total[rows])
        return total

    def _chunks(self, states: Tensor, *linears: Linear) -> list[slice]:
        widest = max(max(linear.in_features, linear.out_features) for linear in linears)
        most = int8_chunk_rows(torch.get_num_threads())
        return chunks(len(states), min(most, chunk_tokens(widest)))


def has_codes(linear: Linear) -> bool:
    """Whether a linear is stored as 8-bit codes that meet rounded activations."""
    return multiplies_codes(linear.format) and linear.in_features in _IN_FEATURES


def round_to_int8(states: Tensor) -> tuple[Tensor, Tensor]:
    """``round_rows`` with codes as int8."""
    codes, scales = round_rows(states)
    return codes.to(torch.int8), scales


def multiply(codes: Tensor, scales: Tensor, linear: Linear, out: Tensor | None = None) -> Tensor:
    """The product of rounded activations and a linear that ``has_codes``.

    Args:
        codes: int8 ``[tokens, in_features]``.
        scales: Of each row, float32 ``[tokens, 1]``.
        linear: The linear.
        out: Where to, float32 ``[tokens, out_features]``, or None for a new tensor.
    """
    channel_scales = linear.channel_scales()
    assert channel_scales is not None, linear.format
    sums = torch._int_mm(codes, linear.tensors["weight"].t())
    if out is None:
        out = scales.new_empty(sums.shape)
    # Converted first: an integer times a float goes through a slower loop.
    return out.copy_(sums).mul_(scales).mul_(channel_scales)


@cache
def is_exact_and_faster(threads: int) -> bool:
    """Whether this form may and should take the plain one's place, with so many threads of torch.

    Costs some tens of milliseconds the first time on a machine, and a few in later processes:
    speed is remembered, exactness is tested in each.
    """
    return is_exact() and _is_faster()


def is_exact() -> bool:
    """Multiplies values that saturate 16 bits, in shapes of one and of many tiles."""
    for tokens, outputs, features in combinations((1, 3, 64), (1, 37, 192), (2, 259, 576)):
        codes = _extremes((127, -127, 127, 127, -128, 0), tokens, features)
        weight = _extremes((127, 127, -127, -128, 127), outputs, features)
        exact = codes.double() @ weight.double().t()
        if not torch.equal(torch._int_mm(codes, weight.t()).double(), exact):
            return False
    return True


def _is_faster() -> bool:
    """Times a product of each form."""
    states = _extremes((127, -127), _TRIAL_TOKENS, _TRIAL_FEATURES)
    weight = _extremes((127, 1), _TRIAL_FEATURES, _TRIAL_FEATURES)
    plain_states, plain_weight, scales = (
        states.float(),
        weight.float(),
        torch.ones(_TRIAL_TOKENS, 1, dtype=torch.float32, device="cpu"),
    )
    winner = trials.fastest(
        "8-bit product",
        {
            "plain": lambda: product(plain_states, plain_weight),
            "int8": lambda: torch._int_mm(states, weight.t()) * scales,
        },
    )
    return winner == "int8"


def _extremes(values: tuple[int, ...], rows: int, columns: int) -> Tensor:
    """Values in turn, a row long, each row one further on; the first row holds the first alone."""
    numbers = torch.tensor(values, dtype=torch.int8, device="cpu")
    places = torch.arange(rows * columns, device="cpu")
    table = numbers[places % len(numbers)].view(rows, columns)
    table[0] = values[0]
    return table
