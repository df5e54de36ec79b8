"""The plain torch form of the operations: right on every device, for every format.

A weight is dequantized a matrix at a time into one scratch that all linears share. Of the MLP only
one activation is held for all tokens; what meets it goes through a chunk of tokens at a time. 8-bit
compute rounds activations per token and then takes an ordinary product, so that it is exact where
fast 8-bit kernels saturate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.compute.attention import Spans, attend
from lowmem.compute.decoder import Rotation, rms_norm
from lowmem.compute.operations.attention_forms import blocks_from
from lowmem.compute.operations.dequantize import Weights
from lowmem.compute.operations.linear import Linear
from lowmem.compute.operations.products import (
    fuses,
    product,
    product_times,
    rows_computed,
    silu_product,
)
from lowmem.compute.plan import CHUNK_BYTES

PRODUCT_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}


@dataclass(frozen=True)
class Activations:
    """Inputs of a product, and what its rows must be multiplied by afterwards."""

    states: Tensor
    row_scales: Tensor | None

    def of(self, rows: slice) -> Activations:
        """Those of some of the tokens."""
        scales = None if self.row_scales is None else self.row_scales[rows]
        return Activations(self.states[rows], scales)


class PlainOperations:
    """The operations in plain torch.

    Attributes:
        compute: A key of ``PRODUCT_DTYPES``.
        dtype: What products are computed in.
    """

    def __init__(self, compute: str, rms_norm_eps: float) -> None:
        """Chooses the arithmetic; allocates nothing yet."""
        self.compute = compute
        self.dtype = PRODUCT_DTYPES[compute]
        self._eps = rms_norm_eps
        self._weights = Weights(self.dtype)

    def norm_project(
        self, hidden: Tensor, norm: Tensor, linears: Sequence[Linear], exact_rows: int
    ) -> list[Tensor]:
        """RMSNorm, then each linear, ``[tokens, out_features]`` in the product's dtype."""
        inputs = self._inputs(self._norm(hidden, norm), linears, exact_rows, overwrites=True)
        return [self._product(inputs, self._weights.of(linear)) for linear in linears]

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Rotary positions, in float32, then in the dtype of ``heads``."""
        return rotation.apply(heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        """Attention within each text, ``[queries, query size]``, by the form that is fastest."""
        return attend(query, key, value, spans, blocks_from=self._blocks_from(spans, self.dtype))

    @staticmethod
    def _blocks_from(spans: Spans, dtype: torch.dtype) -> float:
        """From how many tokens on blocks are faster than what multiplies such states."""
        return blocks_from(torch.get_num_threads(), dtype) if spans.is_causal else math.inf

    def project_add(
        self, mixed: Tensor, linear: Linear, residual: Tensor, exact_rows: int
    ) -> Tensor:
        """residual + linear(mixed), float32 ``[tokens, hidden]``."""
        weight = self._weights.of(linear)
        total = torch.empty_like(residual)
        for rows in chunks(len(mixed), chunk_tokens(mixed.shape[1])):
            exact = max(0, exact_rows - rows.start)
            projected = self._product(self._inputs(mixed[rows], (linear,), exact), weight)
            torch.add(residual[rows], projected, out=total[rows])
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
        """hidden + down(SiLU(gate(n)) * up(n)), n = RMSNorm(hidden), float32."""
        inputs = self._inputs(self._norm(hidden, norm), (gate, up), exact_rows, overwrites=True)
        is_fused = inputs.row_scales is None and fuses(inputs.states)
        gated = self._gated_at_once if is_fused else self._gated
        mixed = gated(inputs, gate, up)
        del inputs
        return self.project_add(mixed, down, hidden, exact_rows)

    def _gated(self, inputs: Activations, gate: Linear, up: Linear) -> Tensor:
        """SiLU(gate(n)) * up(n), rounded to the product's dtype, ``[tokens, intermediate]``."""
        gated = self._product(inputs, self._weights.of(gate))
        weight = self._weights.of(up)
        for rows in chunks(len(gated), chunk_tokens(gated.shape[1])):
            raised = self._product(inputs.of(rows), weight)
            wide = gated[rows].float()  # the rows themselves where they are float32
            gated[rows] = F.silu(wide, inplace=True).mul_(raised)
        return gated

    def _gated_at_once(self, inputs: Activations, gate: Linear, up: Linear) -> Tensor:
        """The same, by products that end in SiLU and in the multiplication."""
        gated = silu_product(inputs.states, self._weights.of(gate))
        weight = self._weights.of(up)
        for rows in chunks(len(gated), chunk_tokens(gated.shape[1])):
            gated[rows] = product_times(inputs.states[rows], weight, gated[rows])
        return gated

    def _norm(self, hidden: Tensor, norm: Tensor) -> Tensor:
        return rms_norm(hidden, norm, self._eps)

    def _inputs(
        self,
        states: Tensor,
        linears: Sequence[Linear],
        exact_rows: int,
        *,
        overwrites: bool = False,
    ) -> Activations:
        """What linears that share their inputs multiply; rounded only where each of them may be.

        It may take the memory of the states where that is said.
        """
        if self.compute == "int8" and all(linear.rounds_activations for linear in linears):
            exact = states[:exact_rows].clone()
            codes, scales = round_rows(states.float(), out=states if overwrites else None)
            if exact_rows:
                codes[:exact_rows] = exact
                scales[:exact_rows] = 1.0
            return Activations(codes, scales)
        return Activations(states.to(self.dtype), None)

    def _product(self, inputs: Activations, weight: Tensor) -> Tensor:
        result = product(inputs.states, weight)
        return result if inputs.row_scales is None else result.mul_(inputs.row_scales)


def chunk_tokens(features: int) -> int:
    """How many tokens go through an operation at a time, by how wide its widest tensor is."""
    return max(1, CHUNK_BYTES // (4 * features))


def chunks(tokens: int, most: int) -> list[slice]:
    """Slices of all tokens, none with more than ``most`` of them, and as many in all but the last.

    They are about equal, but of numbers of tokens that :func:`rows_computed` leaves as they are.
    """
    if not tokens:
        return []
    step = min(most, rows_computed(-(-tokens // -(-tokens // most))))
    return [slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step)]


def round_rows(states: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds each row to 8 bits: states ≈ codes * scales, error at most half a scale.

    Args:
        states: float32 ``[tokens, features]``.
        out: Where the codes go, if not into new memory; the states themselves will do.

    Returns:
        Whole numbers from -127 to 127 as float32 ``[tokens, features]``, and
        scales = absolute maximum / 127, float32 ``[tokens, 1]``, never below the least normal
        number.
    """
    # The same norm as a reduction of its own would take ten times as long.
    scales = torch.maximum(states.amax(-1, keepdim=True), -states.amin(-1, keepdim=True)).div_(127)
    scales.clamp_min_(torch.finfo(scales.dtype).tiny)
    return torch.div(states, scales, out=out).round_(), scales
