"""Which library multiplies fastest on this processor.

torch hands float32 products to MKL, which reaches half of oneDNN's speed on some processors and
outdoes it on others. Both are exact to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem.compute.operations import trials
from lowmem.errors import BackendError

Product = Callable[[Tensor, Tensor], Tensor]
"""``[tokens, in_features]`` and ``(out_features, in_features)`` to ``[tokens, out_features]``."""

_TOKENS, _FEATURES = 256, 1024


def check_float32() -> None:
    """Refuses a torch that is set to multiply float32 in fewer bits.

    Raises:
        BackendError: It is.
    """
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
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return F.linear(states, weight)
    return _fastest_float32(torch.get_num_threads())(states, weight)


def onednn(states: Tensor, weight: Tensor) -> Tensor:
    """oneDNN's product of float32 matrices, as torch's own compiler calls it."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return result


def reproducible_product(states: Tensor, weight: Tensor) -> Tensor:
    """states @ weightᵀ in float32, by a library that no timing chooses."""
    by_onednn = weight.device.type == "cpu" and _has_onednn()
    return (onednn if by_onednn else F.linear)(states, weight)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _fastest_float32(threads: int) -> Product:
    """The library for torch with so many threads."""
    if not _has_onednn():
        return F.linear
    states = torch.ones(_TOKENS, _FEATURES, dtype=torch.float32, device="cpu")
    weight = torch.ones(_FEATURES, _FEATURES, dtype=torch.float32, device="cpu")
    libraries: dict[str, Product] = {"torch": F.linear, "onednn": onednn}
    winner = trials.fastest(
        "float32 product",
        {name: partial(multiply, states, weight) for name, multiply in libraries.items()},
    )
    return libraries[winner]
