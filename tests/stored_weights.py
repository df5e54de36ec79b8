"""Linears as they would come from a file: random codes of every format, and 16-bit weights."""

import numpy as np
import torch
from torch import Tensor

from lowmem.artifact.formats import (
    BnbInt8,
    BnbNf4,
    Format,
    Int8Channel,
    IntGrouped,
    Plain,
    bnb_nf4,
    int_grouped,
)
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.weights import LinearWeights


def random_weights(form: Format, rows: int, columns: int, seed: int = 0) -> LinearWeights:
    """Any codes at all, under scales of many sizes."""
    noise = np.random.default_rng(seed)

    def scales(*shape: int) -> np.ndarray:
        return (0.01 * np.exp(2 * noise.standard_normal(shape))).astype(np.float32)

    tensors: dict[str, RawTensor]
    if isinstance(form, Plain):
        weight = (noise.standard_normal((rows, columns)) * scales(rows, 1)).astype(np.float32)
        if form.dtype == "F16":
            weight = weight.astype(np.float16)
        elif form.dtype == "BF16":
            weight = (weight.view(np.uint32) >> 16).astype(np.uint16)
        tensors = {"weight": RawTensor(form.dtype, weight)}
    elif isinstance(form, Int8Channel):
        codes = noise.integers(-127, 128, (rows, columns), np.int8)
        tensors = {
            "weight": RawTensor("I8", codes),
            "weight_scale": RawTensor("F32", scales(rows, 1)),
        }
    elif isinstance(form, BnbInt8):
        codes = noise.integers(-127, 128, (rows, columns), np.int8)
        tensors = {"weight": RawTensor("I8", codes), "SCB": RawTensor("F32", scales(rows))}
    elif isinstance(form, IntGrouped):
        half = 1 << (form.bits - 1)
        codes = noise.integers(-half, half, (rows, columns), np.int8)
        groups = scales(rows, columns // form.group_size).astype(np.float16)
        tensors = {
            "weight_packed": RawTensor("I32", int_grouped.pack(codes, form.bits)),
            "weight_scale": RawTensor("F16", groups),
        }
    else:
        nibbles = noise.integers(0, 16, (rows, columns), np.uint8)
        blocks = scales(rows * columns // form.group_size)
        tensors = {
            "weight": RawTensor("U8", bnb_nf4.pack(nibbles)),
            "weight.absmax": RawTensor("F32", blocks),
        }
    if isinstance(form, BnbInt8 | IntGrouped | BnbNf4):
        tensors |= form.constants(rows, columns)
    specs = form.specs(rows, columns)
    assert {name: (raw.dtype, raw.shape) for name, raw in tensors.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in specs.items()
    }
    # As from a file: torch warns of arrays that cannot be written.
    tensors = {name: RawTensor(raw.dtype, raw.array.copy()) for name, raw in tensors.items()}
    return LinearWeights(form, rows, columns, tensors)


def uneven_weight(rows: int, columns: int) -> Tensor:
    """float16 of the size that weights have, with rows of other sizes and a few that stand out."""
    noise = np.random.default_rng(7)
    values = (
        0.05 * noise.standard_normal((rows, columns)) * np.exp(noise.standard_normal((rows, 1)))
    )
    values[noise.random(values.shape) < 0.001] *= 20
    return torch.from_numpy(values).half()
