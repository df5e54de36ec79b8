"""Embeddings of a quantized decoder on the machine at hand, and what quantization did to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem.errors import BackendError, BundleError, CapacityError, InputError, LowmemError

if TYPE_CHECKING:
    from lowmem.embedder import Embedder

__all__ = [
    "BackendError",
    "BundleError",
    "CapacityError",
    "Embedder",
    "InputError",
    "LowmemError",
]


def __getattr__(name: str) -> object:
    """Loads ``Embedder``, and numpy with it, when it is first asked for."""
    if name != "Embedder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lowmem.embedder import Embedder

    return Embedder
