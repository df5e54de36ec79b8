"""A linear on its device: a format with that format's tensors in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.artifact.formats import BnbInt8, Format, Int8Channel
from lowmem.artifact.tensors import RawTensor
from lowmem.artifact.weights import LinearWeights


@dataclass(frozen=True)
class Linear:
    """One linear without bias; ``tensors`` are its format's, by suffix."""

    format: Format
    out_features: int
    in_features: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def load(cls, weights: LinearWeights, place: Callable[[RawTensor], Tensor]) -> Linear:
        """A linear with each of its stored tensors where ``place`` puts it."""
        tensors = {name: place(raw) for name, raw in weights.tensors.items()}
        return cls(weights.format, weights.out_features, weights.in_features, tensors)

    @property
    def rounds_activations(self) -> bool:
        """Whether 8-bit compute may round this linear's inputs."""
        return not isinstance(self.format, Int8Channel) or self.format.rounds_activations

    def channel_scales(self) -> Tensor | None:
        """Scales of 8-bit codes that have one for each output, float32 ``[out_features]``.

        The codes are the tensor ``weight``. None for every other format.
        """
        if isinstance(self.format, Int8Channel):
            return self.tensors["weight_scale"][:, 0]
        return largest_to_scales(self.tensors["SCB"]) if isinstance(self.format, BnbInt8) else None


def largest_to_scales(largest: Tensor) -> Tensor:
    """Scales of codes whose 127 stands for the largest: a true division, on every device.

    By a number CUDA does not divide: it multiplies by what 1 / 127 is rounded to.
    """
    return largest / torch.full_like(largest, 127)


def to_torch(raw: RawTensor, device: str = "cpu") -> Tensor:
    """The same bytes as a torch tensor; a view of the array where the device is the CPU."""
    tensor = torch.from_numpy(raw.array)
    if raw.dtype == "BF16":
        tensor = tensor.view(torch.bfloat16)
    return tensor if device == "cpu" else tensor.to(device)
