"""The operations on a CUDA device, and which kernels serve a compute on a card.

Activations are 16-bit between the products, sums and the residual stream are float32. 8-bit
computes round rows on their way into a product, in the pass that normalizes or gates them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from subprocess import SubprocessError

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from lowmem.compute.attention import Spans
from lowmem.compute.decoder import Rotation
from lowmem.compute.kernels import library_products, packed_attention, plain_rows
from lowmem.compute.kernels.rows import RowKernels
from lowmem.compute.operations import cuda_selftest
from lowmem.compute.operations.cuda_products import (
    CodesProduct,
    DenseProduct,
    Dequantize,
    Product,
    RoundedProduct,
)
from lowmem.compute.operations.dequantize import dequantize_into
from lowmem.compute.operations.linear import Linear
from lowmem.compute.out_of_memory import is_out_of_memory
from lowmem.compute.plan import (
    DEVICE_CHUNK_TOKENS,
    INT8_CAPABILITY,
    PLAIN_DEVICE_CHUNK_TOKENS,
    TRITON_CAPABILITY,
)
from lowmem.errors import BackendError

logger = logging.getLogger(__name__)

_FLASH_CAPABILITY = (8, 0)
# Of Triton, besides its own: the last two come where it cannot load what it compiled for itself.
_TRITON_FAILURES = (RuntimeError, OSError, SubprocessError, ImportError, AssertionError)
_ADA = (8, 9)
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Route:
    """Which kernels serve a compute on a card.

    Attributes:
        dtype: Of queries, keys, values and gates, and of products that are not of codes.
        codes: What rows and weights are rounded to, or None.
        product: ``torch``, ``triton`` (int8), ``int_mm`` or ``scaled_mm``.
        uses_triton: Whether rows between products, and codes of weights, go through Triton.
        packs_attention: Whether attention goes through a kernel for packed texts, if one is right.
    """

    dtype: torch.dtype
    codes: torch.dtype | None
    product: str
    uses_triton: bool
    packs_attention: bool


def route(compute: str, capability: tuple[int, int], has_triton: bool) -> Route:
    """Chooses the kernels.

    float32 is what the others are judged by, and stays in torch's own kernels. 8-bit products hand
    on float16, whose roundings are eight times finer than bf16's: what is large in these models,
    the residual stream and the gated rows, is float32. The library's fp8 product gives bf16 alone.

    Args:
        compute: A compute's name.
        capability: The card's compute capability.
        has_triton: Whether Triton is installed and works.

    Raises:
        BackendError: The card does not have this arithmetic.
    """
    triton = has_triton and capability >= TRITON_CAPABILITY and compute != "fp32"
    flash = capability >= _FLASH_CAPABILITY and compute != "fp32"
    match compute:
        case "fp32":
            return Route(torch.float32, None, "torch", triton, flash)
        case "bf16" if capability >= (8, 0):
            return Route(torch.bfloat16, None, "torch", triton, flash)
        case "fp16" | "fp16-acc16":
            return Route(torch.float16, None, "torch", triton, flash)
        case "int8" if capability >= INT8_CAPABILITY:
            product = "triton" if triton else "int_mm"
            return Route(torch.float16, torch.int8, product, triton, flash)
        case "fp8" if capability >= _FP8_CAPABILITY:
            return Route(torch.bfloat16, torch.float8_e4m3fn, "scaled_mm", triton, flash)
    major, minor = capability
    raise BackendError(f"a GPU of compute capability {major}.{minor} has no {compute} arithmetic")


def cuda_operations(compute: str, rms_norm_eps: float, head_dim: int) -> CudaOperations:
    """The operations for the current CUDA device, each of its kernels having passed its self-test.

    Args:
        compute: A compute's name.
        rms_norm_eps: Of the model.
        head_dim: Features of a head.

    Raises:
        BackendError: The card or torch does not have this arithmetic, or gets it wrong.
    """
    capability = torch.cuda.get_device_capability()
    may_use_triton = compute != "fp32" and capability >= TRITON_CAPABILITY
    chosen = route(compute, capability, may_use_triton and triton_works("cuda"))
    kernels, dequantize = row_kernels(chosen.uses_triton)
    product: Product
    if chosen.codes is None:
        product = DenseProduct(chosen.dtype, dequantize, compute == "fp16-acc16")
    else:
        multiply = _checked_product(chosen.product)
        product = RoundedProduct(chosen.codes, chosen.dtype, multiply, kernels, dequantize)
    attention = None
    if chosen.packs_attention:
        attention = packed_attention.find_kernel(chosen.dtype, head_dim, "cuda")
    return CudaOperations(chosen, rms_norm_eps, kernels, product, attention)


class CudaOperations:
    """The operations by the kernels that are given.

    Attributes:
        route: What was chosen.
    """

    def __init__(
        self,
        route: Route,
        rms_norm_eps: float,
        kernels: RowKernels,
        product: Product,
        attention: packed_attention.Kernel | None,
    ) -> None:
        """Takes the kernels; ``cuda_operations`` chooses them.

        Args:
            route: The dtypes.
            rms_norm_eps: Of the model.
            kernels: What is done to rows between products.
            product: Of rows and a linear.
            attention: A kernel for packed texts, or None for SDPA by length.
        """
        self.route = route
        self._eps = rms_norm_eps
        self._kernels = kernels
        self._product = product
        self._attention = attention
        self._inputs = route.codes or route.dtype
        self._chunk = DEVICE_CHUNK_TOKENS if route.uses_triton else PLAIN_DEVICE_CHUNK_TOKENS

    def norm_project(
        self, hidden: Tensor, norm: Tensor, linears: Sequence[Linear], exact_rows: int
    ) -> list[Tensor]:
        """RMSNorm, then each linear, ``[tokens, out_features]`` in the route's dtype."""
        exact = _exact_rows(linears, exact_rows, len(hidden))
        rows = self._kernels.normalize(hidden, norm, self._eps, self._inputs, exact)
        return [self._product(rows, linear) for linear in linears]

    def rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        """Rotary positions, in place where a kernel does it."""
        return self._kernels.rotate(heads, rotation.cos, rotation.sin)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        """Attention within each text, ``[queries, query size]``."""
        if self._attention is None:
            return packed_attention.by_length(query, key, value, spans)
        return packed_attention.attend(self._attention, query, key, value, spans)

    def project_add(
        self, mixed: Tensor, linear: Linear, residual: Tensor, exact_rows: int
    ) -> Tensor:
        """residual + linear(mixed), float32 ``[tokens, hidden]``."""
        exact = _exact_rows((linear,), exact_rows, len(mixed))
        rows = self._kernels.round_rows(mixed, self._inputs, exact)
        return self._product(rows, linear, residual)

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

        Goes in chunks of tokens, large enough that bringing in the weights for each costs little.
        """
        total = torch.empty_like(hidden)
        for begin in range(0, len(hidden), self._chunk):
            part = hidden[begin : begin + self._chunk]
            exact = min(max(0, exact_rows - begin), len(part))
            inputs = self._kernels.normalize(
                part, norm, self._eps, self._inputs, _exact_rows((gate, up), exact, len(part))
            )
            gated, raised = self._product(inputs, gate), self._product(inputs, up)
            del inputs
            exact = _exact_rows((down,), exact, len(part))
            rows = self._kernels.gate(gated, raised, self._inputs, exact)
            del gated, raised
            total[begin : begin + len(part)] = self._product(rows, down, part)
            del rows
        return total


def row_kernels(uses_triton: bool) -> tuple[RowKernels, Dequantize]:
    """What is done to rows between products, and what turns codes into a weight."""
    if not uses_triton:
        return plain_rows, dequantize_into
    from lowmem.compute.kernels import triton_dequantize, triton_rows

    return triton_rows, triton_dequantize.dequantize_into


@cache
def triton_works(device: str) -> bool:
    """Whether Triton is there, compiles, and computes what torch does.

    It may be installed and not work: it needs a C compiler and a card that it supports.
    """
    if find_spec("triton") is None:
        logger.warning("Triton is not installed: kernels of torch serve, which are slower")
        return False
    try:
        from triton.errors import TritonError
    except ImportError as error:
        logger.warning("Triton cannot be imported, kernels of torch serve: %s", error)
        return False
    kernels, dequantize = row_kernels(uses_triton=True)
    try:
        is_right = cuda_selftest.rows_are_right(
            kernels, device
        ) and cuda_selftest.weights_are_right(dequantize, device)
    except (TritonError, *_TRITON_FAILURES) as error:
        if is_out_of_memory(error):
            raise  # which says nothing of Triton
        logger.warning("Triton does not work here, kernels of torch serve: %s", error)
        return False
    if not is_right:
        logger.warning("Triton's kernels are wrong on this card, kernels of torch serve")
    return is_right


@cache
def _checked_product(name: str) -> CodesProduct:
    """The product of codes that a route names, once it has been found right on this card.

    Raises:
        BackendError: It does not run here, or is wrong.
    """
    if name == "triton":
        from lowmem.compute.kernels.tuned_int8 import TunedInt8Product

        return TunedInt8Product(_card())
    if name == "scaled_mm" and _may_hang():
        raise BackendError(
            f"torch {torch.__version__} multiplies fp8 on this card by a kernel that may never "
            "end: use torch 2.12 or newer, or another compute"
        )
    try:
        if name == "int_mm":
            multiply: CodesProduct = library_products.multiply_int8
            is_right = cuda_selftest.int8_is_exact(multiply, "cuda")
        else:
            multiply = library_products.multiply_fp8
            is_right = cuda_selftest.fp8_is_right(multiply, "cuda")
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise BackendError(f"torch has no 8-bit product for this card ({name}): {error}") from error
    if not is_right:
        raise BackendError(f"torch's 8-bit product is wrong on this card ({name})")
    return multiply


def _may_hang() -> bool:
    """Whether torch clears what its fp8 kernel waits for in another stream than the kernel's.

    Source: https://github.com/pytorch/pytorch/issues/177651.
    """
    is_old = TorchVersion(torch.__version__) < "2.12"
    return is_old and torch.cuda.get_device_capability() == _ADA


def _card() -> str:
    """What a tuning depends on."""
    import triton

    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} {major}.{minor} triton {triton.__version__}"


def _exact_rows(linears: Sequence[Linear], exact_rows: int, rows: int) -> int:
    """How many rows must not be rounded: all of them for a linear that says so."""
    return exact_rows if all(linear.rounds_activations for linear in linears) else rows
