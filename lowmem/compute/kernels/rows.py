"""Rows of activations as a product takes them: 16 or 32 bits as they are, or 8 bits under a scale.

Each row is rounded by itself, with scale = absolute maximum / the largest code. A row that must not
be rounded goes through an 8-bit product all the same: what rounding left of it is rounded again, as
a row of its own behind all others, and the two results are added. In int8 such a row has 15 bits
below its absolute maximum, in fp8 each of its elements has 8, and no weight is read twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Of each dtype that rows are rounded to; every other dtype holds them as they are."""


@dataclass(frozen=True)
class Rows:
    """Inputs of a product.

    Attributes:
        values: ``[tokens + exact rows, features]``.
        scales: What each row's product is multiplied by, float32 ``[tokens + exact rows]``, or None
            where the rows are not rounded.
        tokens: How many rows there are results for; those behind them belong to the first ones.
    """

    values: Tensor
    scales: Tensor | None
    tokens: int

    def join(self, product: Tensor) -> Tensor:
        """One result a token, of results ``[tokens + exact rows, …]``, which are changed."""
        exact = len(self.values) - self.tokens
        if exact:
            product[:exact] += product[self.tokens :]
        return product[: self.tokens]


class RowKernels(Protocol):
    """What is done to rows between products; a module of functions is one.

    ``dtype`` is what the rows become, ``exact_rows`` how many leading ones must not be rounded
    where that is one of ``LARGEST_CODE``.
    """

    def normalize(
        self, hidden: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, exact_rows: int = 0
    ) -> Rows:
        """RMSNorm of ``[tokens, hidden]`` float32, rounded."""

    def gate(self, gate: Tensor, up: Tensor, dtype: torch.dtype, exact_rows: int = 0) -> Rows:
        """SiLU(gate) * up in float32, rounded; both ``[tokens, features]``."""

    def round_rows(self, states: Tensor, dtype: torch.dtype, exact_rows: int = 0) -> Rows:
        """``[tokens, features]`` of any floating dtype, rounded."""

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions: ``[tokens, heads, head_dim]``, which may be overwritten.

        Pairs feature i with i + head_dim / 2; ``cos`` and ``sin`` are float32
        ``[tokens, 1, head_dim / 2]``.
        """
