"""Products on CUDA devices: one call for a linear, whatever it is stored as.

A product takes the rows as :mod:`lowmem.compute.kernels.rows` makes them. Weights that are not
stored as they are multiplied are brought into that form a matrix at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.compute.kernels.rows import RowKernels, Rows
from lowmem.compute.operations.dequantize import Weights
from lowmem.compute.operations.linear import Linear
from lowmem.errors import BackendError

Dequantize = Callable[[Tensor, Linear], None]

_accumulation_lock = threading.Lock()


class Product(Protocol):
    """rows @ weightᵀ, ``[tokens, out_features]``; with a residual float32, and that added."""

    def __call__(self, rows: Rows, linear: Linear, residual: Tensor | None = None) -> Tensor:
        """The product of a linear."""


class CodesProduct(Protocol):
    """rows @ weightᵀ * row scales * channel scales, and plus a residual where there is one."""

    def __call__(
        self,
        rows: Rows,
        weight: Tensor,
        channel_scales: Tensor,
        *,
        dtype: torch.dtype,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``[tokens, out_features]`` in ``dtype``, which is float32 with a residual."""


class DenseProduct:
    """Products in 16 or 32 bits by torch; weights are dequantized into one reused scratch."""

    def __init__(
        self, dtype: torch.dtype, dequantize: Dequantize, sums_in_16_bits: bool = False
    ) -> None:
        """Chooses the arithmetic; allocates nothing yet.

        Args:
            dtype: What is multiplied.
            dequantize: Writes a linear's weight.
            sums_in_16_bits: Whether float16 products are summed in float16.

        Raises:
            BackendError: This version of torch cannot sum in float16.
        """
        if sums_in_16_bits and not hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation"):
            raise BackendError(
                f"compute fp16-acc16 needs torch 2.7 or newer, got {torch.__version__}"
            )
        self._weights = Weights(dtype, dequantize)
        self._sums_in_16_bits = sums_in_16_bits

    def __call__(self, rows: Rows, linear: Linear, residual: Tensor | None = None) -> Tensor:
        """The product of a linear."""
        weight = self._weights.of(linear)
        result = _product(rows.values, weight, self._sums_in_16_bits)
        return result if residual is None else residual + result


class RoundedProduct:
    """Products of 8-bit rows and 8-bit weights, one scale a row and one a channel.

    Weights that are stored otherwise are rounded to 8 bits per channel, each time they are used.
    """

    def __init__(
        self,
        codes: torch.dtype,
        dtype: torch.dtype,
        multiply: CodesProduct,
        kernels: RowKernels,
        dequantize: Dequantize,
    ) -> None:
        """Chooses the arithmetic; allocates nothing yet.

        Args:
            codes: ``int8`` or ``float8_e4m3fn``.
            dtype: Of results without a residual, and of weights on their way to codes.
            multiply: The product of codes.
            kernels: Round the rows of a weight.
            dequantize: Writes a linear's weight.
        """
        self._codes = codes
        self._dtype = dtype
        self._multiply = multiply
        self._kernels = kernels
        self._weights = Weights(dtype, dequantize)

    def __call__(self, rows: Rows, linear: Linear, residual: Tensor | None = None) -> Tensor:
        """The product of a linear."""
        weight, scales = self._weight(linear)
        dtype = self._dtype if residual is None else torch.float32
        return self._multiply(rows, weight, scales, dtype=dtype, residual=residual)

    def _weight(self, linear: Linear) -> tuple[Tensor, Tensor]:
        """Codes ``(out_features, in_features)`` and scales ``[out_features]``."""
        if self._codes == torch.int8 and (scales := linear.channel_scales()) is not None:
            return linear.tensors["weight"], scales
        rounded = self._kernels.round_rows(self._weights.of(linear), self._codes)
        assert rounded.scales is not None
        return rounded.values, rounded.scales


def _product(states: Tensor, weight: Tensor, sums_in_16_bits: bool) -> Tensor:
    """states @ weightᵀ, summed as the plan says whatever the caller has set torch to.

    The switch is the process's, so it is as wanted for this one call alone.
    """
    matmul = torch.backends.cuda.matmul
    if states.dtype != torch.float16 or not hasattr(matmul, "allow_fp16_accumulation"):
        return F.linear(states, weight)
    with _accumulation_lock:
        before = matmul.allow_fp16_accumulation
        matmul.allow_fp16_accumulation = sums_in_16_bits
        try:
            return F.linear(states, weight)
        finally:
            matmul.allow_fp16_accumulation = before
