"""The fastest product that a device is seen to make: what the speed of a plan is held against.

All arithmetic of a decoder but a little is products, so no plan can take less time than its
operations over this rate.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.artifact.config import ModelConfig
from lowmem.compute.operations.plain import PRODUCT_DTYPES
from lowmem.compute.operations.products import Product, onednn

# What only a card has is held against its 16-bit products; of 8-bit ones it may make more.
_DTYPES = {**PRODUCT_DTYPES, "fp16-acc16": torch.float16, "fp8": torch.bfloat16}
_TOKENS = (256, 1024, 4096)
_ROUNDS = 4
# Rounds stop early on a device that is slow, but each product is made twice.
_SECONDS = 1.0


def best_product(device: str, compute: str, config: ModelConfig, threads: int) -> float:
    """Operations per second, a multiplication and an addition being two.

    The best of several products with the model's widest linear, by every library that torch has
    for them, which takes a few seconds.

    Args:
        device: ``cpu`` or ``cuda``.
        compute: The arithmetic of the linears; 8-bit compute is held against 8-bit products, and
            where there are none, or slower ones, against float32's.
        config: The model's shape.
        threads: CPU threads of this process's torch.
    """
    torch.set_num_threads(threads)
    out_features, in_features = max(config.linears().values(), key=lambda shape: shape[0])
    best = 0.0
    for multiply, dtype in _libraries(device, compute):
        weight = torch.ones(out_features, in_features, dtype=dtype, device=device)
        for tokens in _TOKENS:
            states = torch.ones(tokens, in_features, dtype=dtype, device=device)
            operations = 2 * tokens * out_features * in_features
            best = max(best, operations / _least_seconds(multiply, states, weight))
    return best


def _libraries(device: str, compute: str) -> list[tuple[Product, torch.dtype]]:
    dtype = _DTYPES[compute]
    libraries: list[tuple[Product, torch.dtype]] = [(F.linear, dtype)]
    if device == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        libraries.append((onednn, dtype))
    if compute == "int8":
        libraries.append((lambda states, weight: torch._int_mm(states, weight.t()), torch.int8))
    return libraries


def _least_seconds(multiply: Product, states: Tensor, weight: Tensor) -> float:
    least, start = float("inf"), time.perf_counter()
    for number in range(_ROUNDS):
        before = time.perf_counter()
        multiply(states, weight)
        if states.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        least = min(least, now - before)
        if number and now - start > _SECONDS:
            break
    return least
