"""8-bit weights with one scale per output channel: compressed-tensors ``int-quantized``.

Stored per linear, as compressed-tensors 0.13 reads it
(https://github.com/neuralmagic/compressed-tensors, ``compressors/quantized_compressors``):

    weight        I8   (out_features, in_features)   codes -127…127
    weight_scale  F32  (out_features, 1)             weight = codes * scale

Loaders round activations to 8 bits per token, dynamically, where the config group says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.tensors import RawTensor, TensorSpec


@dataclass(frozen=True)
class Int8Channel:
    """Symmetric 8-bit codes, one positive scale per output channel.

    Attributes:
        rounds_activations: Whether 8-bit compute may round this linear's inputs.
    """

    rounds_activations: bool = True

    name = "int8-channel"
    bits = 8

    def specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Tensor suffix to dtype and shape."""
        return {
            "weight": TensorSpec("I8", (out_features, in_features)),
            "weight_scale": TensorSpec("F32", (out_features, 1)),
        }

    def constants(self, out_features: int, in_features: int) -> dict[str, RawTensor]:
        """Tensors that are known before any weight is read: none."""
        return {}

    def dequantize(self, tensors: Mapping[str, RawTensor]) -> NDArray[np.float32]:
        """codes * scale, as float32 ``(out_features, in_features)``."""
        codes = tensors["weight"].array.astype(np.float32)
        return codes * tensors["weight_scale"].float32()
