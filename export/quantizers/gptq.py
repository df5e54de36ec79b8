"""Codes that keep a linear's outputs, not its weights: least squares, then GPTQ.

Two closed forms over the second moments of what goes into a linear. First the weight itself moves
to where its outputs are nearest to those wanted, which are the full-precision model's: so each
linear also takes back, as far as its inputs tell, what was lost before it. The idea of unequal
inputs is GPTAQ's (https://arxiv.org/abs/2504.02692); here the wanted outputs of ``o_proj`` and
``down_proj`` take in the error of the residual stream as well. Then GPTQ
(https://arxiv.org/abs/2210.17323) rounds one input at a time, the weightiest first, and lets the
inputs that are still to come make up for it. Groups and their scales are fixed before that, so
that the order shows nowhere in the format.

The moments of a large matrix are most of what calibration holds, so they are worked on in place:
at no time are there more than two matrices of their size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.quantizers.grids import Grid
from export.quantizers.moments import Moments
from lowmem.errors import BundleError

RIDGE = 0.05
"""Part of each input's own second moment that is added to it: how little the weight may move."""
_BLOCK = 64
_MOST_TRIES = 40


def quantize_outputs(weight: Tensor, moments: Moments, grid: Grid) -> tuple[Tensor, Tensor]:
    """Quantizes linears that share their inputs, for the sake of their outputs.

    Args:
        weight: Their weights, stacked, float32 ``[out_features, in_features]``.
        moments: Their inputs and wanted outputs; both are overwritten.
        grid: The values of their format.

    Returns:
        The value of each weight, float32 ``[out_features, in_features]``, and the scales as they
        are stored, float32 ``[out_features, groups]``.

    Raises:
        BundleError: A scale does not fit the format, or the inputs are not finite.
    """
    importance = moments.inputs.diagonal().clone()
    missing = moments.targets.addmm_(weight, moments.inputs, alpha=-1)
    inverse = ridge_inverse(moments.inputs)
    moved = missing.copy_(least_squares(weight, missing, inverse))  # nothing else is missing now
    values, scales = round_weight(moved, importance, inverse, grid)
    if not bool(values.isfinite().all()):
        raise BundleError("what was quantized is not finite")
    return values, scales


def least_squares(weight: Tensor, missing: Tensor, inverse: Tensor) -> Tensor:
    """The weight moved to where its outputs are nearest to the wanted ones.

    Ridge regression around the weight: weight + (t xᵀ - weight x xᵀ) (x xᵀ + ridge)⁻¹.

    Args:
        weight: float32 ``[out_features, in_features]``.
        missing: t xᵀ - weight x xᵀ, ``[out_features, in_features]``.
        inverse: (x xᵀ + ridge)⁻¹, ``[in_features, in_features]``.
    """
    return torch.addmm(weight, missing, inverse)


def ridge_inverse(inputs: Tensor, ridge: float = RIDGE) -> Tensor:
    """The inverse of second moments with ``ridge`` times their diagonal added to it.

    Inputs that never differ from zero count as if they sometimes did. Where small eigenvalues
    drown in rounding, the ridge is made larger.

    Args:
        inputs: x xᵀ, ``[in_features, in_features]``, which becomes the inverse.
        ridge: Relative to each input's own moment, so that no input of large range drowns others.

    Raises:
        BundleError: The moments are not finite.
    """
    moments = inputs.diagonal().clone()
    seen = moments[moments > 0]
    floor = seen.median() * 1e-3 if len(seen) else moments.new_ones(())
    for _ in range(_MOST_TRIES):
        torch.add(moments, moments.clamp_min(floor), alpha=ridge, out=inputs.diagonal())
        factor, failed = torch.linalg.cholesky_ex(inputs)
        if not int(failed):
            # LAPACK writes columns; into rows it would be by way of one more matrix.
            torch.cholesky_inverse(factor, out=inputs.mT)
            return inputs
        del factor
        ridge *= 2
    raise BundleError("the model's activations on the calibration texts are not finite")


def round_weight(
    weight: Tensor, importance: Tensor, inverse: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """GPTQ with the order of activations and static groups.

    Args:
        weight: float32 ``[out_features, in_features]``.
        importance: Each input's second moment, ``[in_features]``.
        inverse: Of the inputs' second moments, ``[in_features, in_features]``; it is overwritten.
        grid: The format's values.

    Returns:
        The value of each weight, float32 ``[out_features, in_features]``, and the scales as they
        are stored, float32 ``[out_features, groups]``.

    Raises:
        BundleError: A scale does not fit the format.
    """
    scales = grid.scales(weight, importance)
    order = importance.argsort(descending=True, stable=True)
    _reorder(inverse, order)
    factor = torch.linalg.cholesky(inverse, upper=True)
    # An input's weights lie next to each other here, where they are worked on input by input.
    inputs = weight.T[order]
    groups = (order // grid.group_size).tolist()
    _round_inputs(inputs, scales.T.contiguous(), groups, factor, grid)
    del factor  # before what is returned is copied
    return inputs.T.index_select(1, order.argsort()), scales


def _round_inputs(
    inputs: Tensor, scales: Tensor, groups: Sequence[int], factor: Tensor, grid: Grid
) -> None:
    """Rounds one input after another, and lets those behind it make up for it.

    Args:
        inputs: Weights, ``[in_features, out_features]``, which become values of the grid.
        scales: ``[groups, out_features]``.
        groups: The group of each input.
        factor: Upper Cholesky factor of the inverse of the second moments, in the same order.
        grid: The format's values.
    """
    for begin in range(0, len(inputs), _BLOCK):
        end = min(begin + _BLOCK, len(inputs))
        block, corner = inputs[begin:end], factor[begin:end, begin:end]
        errors = torch.empty_like(block)
        for i, pivot in enumerate(corner.diagonal().tolist()):
            scale = scales[groups[begin + i]]
            value = grid.nearest(block[i] / scale)
            torch.addcmul(block[i], value, scale, value=-1, out=errors[i]).div_(pivot)
            block[i] = value
            block[i + 1 :].addr_(corner[i, i + 1 :], errors[i], alpha=-1)
        inputs[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)


def _reorder(matrix: Tensor, order: Tensor) -> None:
    """Brings rows and columns of a square matrix into an order, with one copy of it at most."""
    matrix.copy_(matrix[order])
    for rows in matrix.split(_BLOCK):
        rows.copy_(rows[:, order])
