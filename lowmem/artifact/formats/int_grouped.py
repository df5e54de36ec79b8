"""Codes of 4 or 8 bits with one scale per group of inputs: compressed-tensors ``pack-quantized``.

Stored per linear (compressed-tensors ``compressors/pack_quantized``; the packed bytes are also
those of ONNX Runtime's ``MatMulNBits``, whose ``block_size`` is our ``group_size``):

    weight_packed  I32  (out_features, in_features * bits / 32)
    weight_scale   F16  (out_features, in_features / group_size)
    weight_shape   I64  (2,)   out_features, in_features

Element i of a row takes bits i*bits and up of the row's little-endian bit string, and holds its
code plus 2^(bits-1). weight = code * scale; codes of 4 bits run from -8 to 7, scales are positive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.tensors import RawTensor, TensorSpec


@dataclass(frozen=True)
class IntGrouped:
    """Symmetric codes of ``bits`` bits, one positive scale per ``group_size`` inputs."""

    bits: int = 4
    group_size: int = 32

    name = "int-grouped"

    def specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Tensor suffix to dtype and shape."""
        columns = in_features * self.bits // 32
        groups = in_features // self.group_size
        return {
            "weight_packed": TensorSpec("I32", (out_features, columns)),
            "weight_scale": TensorSpec("F16", (out_features, groups)),
            "weight_shape": TensorSpec("I64", (2,)),
        }

    def constants(self, out_features: int, in_features: int) -> dict[str, RawTensor]:
        """The content of ``weight_shape``, which is known before any weight is read."""
        return {"weight_shape": RawTensor("I64", np.array([out_features, in_features], np.int64))}

    def dequantize(self, tensors: Mapping[str, RawTensor]) -> NDArray[np.float32]:
        """codes * scale, as float32 ``(out_features, in_features)``."""
        codes = unpack(tensors["weight_packed"].array, self.bits).astype(np.float32)
        scales = tensors["weight_scale"].float32()
        grouped = codes.reshape(*scales.shape, self.group_size)
        return (grouped * scales[..., None]).reshape(codes.shape)


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Packs signed codes ``(rows, columns)`` into int32 ``(rows, columns * bits / 32)``."""
    data = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        data = (data[:, 0::2] | (data[:, 1::2] << 4)).astype(np.uint8)
    return np.ascontiguousarray(data).view(np.int32)


def unpack(packed: NDArray[np.int32], bits: int) -> NDArray[np.int8]:
    """Undoes ``pack``: int32 ``(rows, words)`` to signed codes ``(rows, words * 32 / bits)``."""
    data = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)
    return (data.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
