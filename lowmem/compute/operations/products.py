"""Which library multiplies fastest on this processor.

torch hands float32 products to MKL, which reaches half of oneDNN's speed on some processors and
outdoes it on others. Both are exact to float32 rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.compute.operations import trials
from lowmem.errors import BackendError

Product = Callable[[Tensor, Tensor], Tensor]
"""``[tokens, in_features]`` and ``(out_features, in_features)`` to ``[tokens, out_features]``."""

# Numbers of rows are multiples of 16, of large ones multiples of a larger power of two.
_LEAST_STEP_BITS = 4
# Libraries that tie on one of these differ on the other: tokens and features of a small model's
# MLP, and of a large one's, whose matrices have at least so many weights.
_SMALL_TRIAL, _LARGE_TRIAL = (1024, 576, 1536), (256, 2048, 2048)
_LARGE_ELEMENTS = 2**21
# oneDNN reads its own switch from the first of these that is there, and torch does not know of it.
_ONEDNN_SWITCHES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


def check_float32() -> None:
    """Refuses a torch, or an environment, that is set to multiply float32 in fewer bits.

    Raises:
        BackendError: It is.
    """
    for switch in _ONEDNN_SWITCHES:
        mode = os.environ.get(switch, "")
        if mode.lower() not in ("", "strict"):
            raise BackendError(
                f"float32 products must be float32, and {switch}={mode} is set: unset it before "
                "Python starts"
            )
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # so torch answers where the precision was set for one backend alone
        precision = "one backend's fp32_precision"
    if precision != "highest":
        raise BackendError(
            f"float32 products must be float32, and torch is set otherwise ({precision}): call "
            "torch.set_float32_matmul_precision('highest')"
        )


def product(states: Tensor, weight: Tensor) -> Tensor:
    """states @ weightᵀ in the dtype of both, by the fastest library for their device."""
    if weight.device.type != "cpu" or not keeps_code(weight.dtype, weight.numel()):
        return F.linear(states, weight)
    multiply = _library(weight.numel()) if weight.dtype == torch.float32 else F.linear
    return multiply(filled(states), weight)[: len(states)]


def keeps_code(dtype: torch.dtype, weights: int) -> bool:
    """Whether products on this CPU go to oneDNN, whose code for each number of rows stays.

    Args:
        dtype: What is multiplied.
        weights: How many a matrix has.
    """
    return dtype != torch.float32 or _library(weights) is not F.linear


def _library(weights: int) -> Product:
    return _fastest_float32(torch.get_num_threads(), weights >= _LARGE_ELEMENTS)


def filled(states: Tensor) -> Tensor:
    """The states with rows of zeros behind them, up to one of few numbers of rows.

    oneDNN compiles code for every number of rows that it meets and keeps it, 0.8 MiB each that lie
    between larger things in the heap: texts of all lengths would make a process grow by a GiB.
    """
    rows = len(states)
    computed = rows_computed(rows)
    if computed == rows:
        return states
    result = states.new_empty(computed, states.shape[1])
    result[:rows] = states
    result[rows:].zero_()
    return result


def rows_computed(rows: int) -> int:
    """How many rows are multiplied where so many are asked for: up to an eighth or 15 more.

    Of all numbers up to 4096 these are 48.
    """
    step = 1 << max(_LEAST_STEP_BITS, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def onednn(states: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product of float32 matrices, as torch's own compiler calls it."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return result


def fuses(states: Tensor) -> bool:
    """Whether :func:`silu_product` and :func:`product_times` should multiply such states.

    They leave out passes over results as wide as the MLP. Of float32 they would lose some bits:
    oneDNN's SiLU is an approximation.
    """
    if states.device.type != "cpu" or states.dtype != torch.bfloat16:
        return False
    return _fused_is_faster(torch.get_num_threads())


def silu_product(states: Tensor, weight: Tensor) -> Tensor:
    """SiLU(states @ weightᵀ), rounded to the dtype of both after it."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    result: Tensor = pointwise(filled(states), weight, None, "swish", [], "")
    return result[: len(states)]


def product_times(states: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """(states @ weightᵀ) * other, rounded to the dtype of all three after it."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    result: Tensor = pointwise.binary(filled(states), filled(other), weight, None, "mul")
    return result[: len(states)]


def reproducible_product(states: Tensor, weight: Tensor) -> Tensor:
    """states @ weightᵀ in float32, by a library that no timing chooses."""
    by_onednn = weight.device.type == "cpu" and has_onednn()
    return (onednn if by_onednn else F.linear)(states, weight)


def has_onednn() -> bool:
    """Whether torch has oneDNN, with the product that its own compiler calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _fastest_float32(threads: int, is_large: bool) -> Product:
    """The library for torch with so many threads, and for weights of such a size."""
    if not has_onednn():
        return F.linear
    tokens, inner, outer = _LARGE_TRIAL if is_large else _SMALL_TRIAL
    states, raised = _ones(tokens, inner), _ones(tokens, outer)
    up, down = _ones(outer, inner), _ones(inner, outer)
    libraries: dict[str, Product] = {"torch": F.linear, "onednn": onednn}

    def both(multiply: Product) -> None:
        multiply(states, up)
        multiply(raised, down)

    winner = trials.fastest(
        f"float32 products of {inner} and {outer} features",
        {name: partial(both, multiply) for name, multiply in libraries.items()},
    )
    return libraries[winner]


@cache
def _fused_is_faster(threads: int) -> bool:
    """Tries a gated MLP's first two products in bfloat16, with torch on so many threads."""
    if not has_onednn():
        return False
    tokens, inner, outer = _SMALL_TRIAL
    states = _ones(tokens, inner, torch.bfloat16)
    weight = _ones(outer, inner, torch.bfloat16)

    def apart() -> Tensor:
        gated, raised = F.linear(states, weight), F.linear(states, weight)
        return F.silu(gated.float(), inplace=True).mul_(raised).to(torch.bfloat16)

    def fused() -> Tensor:
        return product_times(states, weight, silu_product(states, weight))

    return trials.fastest("gated bfloat16 product", {"apart": apart, "fused": fused}) == "fused"


def _ones(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(rows, columns, dtype=dtype, device="cpu")
