"""bitsandbytes' LLM.int8 rows, as ``transformers.from_pretrained`` loads them.

Stored per linear (bitsandbytes ``nn/modules.py``, ``Linear8bitLt``):

    weight         I8   (out_features, in_features)
    SCB            F32  (out_features,)   absolute maximum of the row
    weight_format  U8   ()                0: rows in plain order

weight = codes * SCB / 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.tensors import RawTensor, TensorSpec


@dataclass(frozen=True)
class BnbInt8:
    """Symmetric 8-bit codes, one absolute maximum per output channel."""

    name = "bnb-int8"
    bits = 8

    def specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Tensor suffix to dtype and shape."""
        return {
            "weight": TensorSpec("I8", (out_features, in_features)),
            "SCB": TensorSpec("F32", (out_features,)),
            "weight_format": TensorSpec("U8", ()),
        }

    def constants(self, out_features: int, in_features: int) -> dict[str, RawTensor]:
        """The content of ``weight_format``: 0, rows in plain order."""
        return {"weight_format": RawTensor("U8", np.zeros((), np.uint8))}

    def dequantize(self, tensors: Mapping[str, RawTensor]) -> NDArray[np.float32]:
        """codes * SCB / 127, as float32 ``(out_features, in_features)``."""
        scales = tensors["SCB"].float32() / np.float32(127)
        return tensors["weight"].array.astype(np.float32) * scales[:, None]
