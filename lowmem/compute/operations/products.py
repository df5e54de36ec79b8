"""Which library multiplies fastest on this processor, found by trying and not by its name.

torch hands float32 products to MKL, which reaches half of oneDNN's speed on some processors and
outdoes it on others. Both are exact to float32 rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
"""``[tokens, in_features]`` and ``(out_features, in_features)`` to ``[tokens, out_features]``."""

_TOKENS, _FEATURES = 256, 1024
_REPEATS = 5


def product(states: Tensor, weight: Tensor) -> Tensor:
    """states @ weightᵀ in the dtype of both, by the fastest library for their device."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return F.linear(states, weight)
    return _fastest_float32(torch.get_num_threads())(states, weight)


def onednn(states: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product of float32 matrices, as torch's own compiler calls it."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return result


def reproducible_product(states: Tensor, weight: Tensor) -> Tensor:
    """states @ weightᵀ in float32, by a library that no timing chooses."""
    return (onednn if _has_onednn() else F.linear)(states, weight)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _fastest_float32(threads: int) -> Product:
    """Tries each library for some tens of milliseconds; ``threads`` are those of torch."""
    if not _has_onednn():
        return F.linear
    states = torch.ones(_TOKENS, _FEATURES)
    weight = torch.ones(_FEATURES, _FEATURES)
    seconds: dict[Product, float] = dict.fromkeys((F.linear, onednn), float("inf"))
    for _ in range(1 + _REPEATS):  # the first pass of each prepares it, and is never the fastest
        for multiply in seconds:
            start = time.perf_counter()
            multiply(states, weight)
            seconds[multiply] = min(seconds[multiply], time.perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)
