"""Embeddings of a quantized decoder on the machine at hand, and what quantization did to them."""

from lowmem.embedder import Embedder
from lowmem.errors import BackendError, BundleError, CapacityError, InputError, LowmemError

__all__ = [
    "BackendError",
    "BundleError",
    "CapacityError",
    "Embedder",
    "InputError",
    "LowmemError",
]
