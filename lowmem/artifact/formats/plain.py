"""16-bit (or, in a source, 32-bit) weights as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.tensors import RawTensor, TensorSpec


@dataclass(frozen=True)
class Plain:
    """``weight`` of shape ``(out_features, in_features)`` in F16, BF16 or F32."""

    dtype: str

    name = "plain"
    bits = 16

    def specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Tensor suffix to dtype and shape."""
        return {"weight": TensorSpec(self.dtype, (out_features, in_features))}

    def constants(self, out_features: int, in_features: int) -> dict[str, RawTensor]:
        """Tensors that are known before any weight is read: none."""
        return {}

    def dequantize(self, tensors: Mapping[str, RawTensor]) -> NDArray[np.float32]:
        """The weight as float32 ``(out_features, in_features)``."""
        return tensors["weight"].float32()
