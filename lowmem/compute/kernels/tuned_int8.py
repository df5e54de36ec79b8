"""Triton's int8 product, for each shape in the way that is fastest on this card.

A tile is compiled when it is first tried, and must be exact on extreme values before it counts.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lowmem.compute.kernels.rows import Rows
from lowmem.compute.kernels.triton_int8 import TILES, Tile, multiply
from lowmem.compute.kernels.tuning import Tuner, device_seconds
from lowmem.compute.operations.cuda_selftest import int8_is_exact
from lowmem.errors import BackendError


class TunedInt8Product:
    """A product of codes, as :class:`~lowmem.compute.operations.cuda_products.CodesProduct`."""

    def __init__(self, card: str) -> None:
        """Reads what was chosen before.

        Args:
            card: The card's name, and the versions that a choice depends on.
        """
        self._tuner = Tuner("int8", card)
        self._tiles = {str(tile): tile for tile in TILES}
        self._chosen: dict[tuple[int, int, int], Tile] = {}

    def __call__(
        self,
        rows: Rows,
        weight: Tensor,
        channel_scales: Tensor,
        *,
        dtype: torch.dtype,
        residual: Tensor | None = None,
    ) -> Tensor:
        """rows @ weightᵀ, scaled, and plus a residual where there is one.

        Raises:
            BackendError: The tile that was chosen is wrong on this card, or none can be used.
        """
        out_features, in_features = weight.shape
        # Numbers of rows between two powers of two behave alike.
        shape = (out_features, in_features, (len(rows.values) - 1).bit_length())
        tile = self._chosen.get(shape)
        if tile is None:
            tile = self._choose(shape, rows, weight, channel_scales)
            self._chosen[shape] = tile
        return multiply(rows, weight, channel_scales, tile, dtype=dtype, residual=residual)

    def _choose(
        self, shape: tuple[int, int, int], rows: Rows, weight: Tensor, channel_scales: Tensor
    ) -> Tile:
        ways = {
            name: partial(multiply, rows, weight, channel_scales, tile, dtype=torch.float16)
            for name, tile in self._tiles.items()
        }
        out_features, in_features, bits = shape
        key = f"{out_features}x{in_features}x{1 << bits}"
        tile = self._tiles[self._tuner.choose(key, ways, device_seconds)]
        if not int8_is_exact(partial(multiply, tile=tile), weight.device.type):
            raise BackendError(f"Triton's 8-bit product is wrong on this card (tile {tile})")
        return tile
