"""bitsandbytes' NF4, as ``transformers.from_pretrained`` loads it.

Stored per linear (bitsandbytes ``functional.py``, ``QuantState.as_dict(packed=True)``):

    weight                                U8   (weights / 2, 1)   first element in the high nibble
    weight.absmax                         F32  (weights / 64,)    per block of the flattened rows
    weight.quant_map                      F32  (16,)              the code book below
    weight.quant_state.bitsandbytes__nf4  U8   JSON: type, block size, dtype, shape

weight = code_book[code] * absmax. The code book holds the quantiles of a normal distribution
(QLoRA, https://arxiv.org/abs/2305.14314, appendix E); its values are bitsandbytes' own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.tensors import RawTensor, TensorSpec

CODE_BOOK = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class BnbNf4:
    """4-bit normal-float codes, one absolute maximum per ``group_size`` consecutive weights.

    Attributes:
        group_size: Weights per absolute maximum; bitsandbytes calls it ``blocksize``.
        dtype: ``float16`` or ``bfloat16``: what bitsandbytes dequantizes to.
    """

    group_size: int = 64
    dtype: str = "float16"

    name = "bnb-nf4"
    bits = 4

    def specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Tensor suffix to dtype and shape."""
        weights = out_features * in_features
        constants = self.constants(out_features, in_features)
        return {
            "weight": TensorSpec("U8", (weights // 2, 1)),
            "weight.absmax": TensorSpec("F32", (weights // self.group_size,)),
            **{suffix: TensorSpec(raw.dtype, raw.shape) for suffix, raw in constants.items()},
        }

    def constants(self, out_features: int, in_features: int) -> dict[str, RawTensor]:
        """The code book and the JSON state, which are known before any weight is read."""
        state = {
            "quant_type": "nf4",
            "blocksize": self.group_size,
            "dtype": self.dtype,
            "shape": [out_features, in_features],
        }
        return {
            "weight.quant_map": RawTensor("F32", CODE_BOOK),
            STATE: RawTensor("U8", np.frombuffer(json.dumps(state).encode(), np.uint8)),
        }

    def dequantize(self, tensors: Mapping[str, RawTensor]) -> NDArray[np.float32]:
        """code_book[codes] * absmax, as float32 ``(out_features, in_features)``."""
        state = json.loads(tensors[STATE].array.tobytes())
        values = CODE_BOOK[unpack(tensors["weight"].array)]
        scaled = values.reshape(-1, self.group_size) * tensors["weight.absmax"].array[:, None]
        shape: list[int] = state["shape"]
        return np.asarray(scaled.reshape(shape), np.float32)


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Packs codes 0…15 of any shape into ``(codes / 2, 1)`` bytes, the first in the high nibble."""
    flat = codes.reshape(-1, 2)
    return ((flat[:, 0] << 4) | flat[:, 1]).astype(np.uint8)[:, None]


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Undoes ``pack``: bytes to a flat array of codes 0…15."""
    data = packed.reshape(-1)
    return np.stack([data >> 4, data & 15], axis=-1).reshape(-1)
