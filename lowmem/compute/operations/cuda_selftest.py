"""Whether the kernels that a CUDA plan is about to use are right on this card.

Compilers, drivers and libraries differ from card to card, and a kernel that is wrong on one of
them gives a wrong vector with no error. So each of them first computes extreme values here, and
what must be exact has to be exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem.artifact.formats import BnbInt8, BnbNf4, Int8Channel
from lowmem.artifact.tensors import DTYPES, RawTensor
from lowmem.artifact.variants import HIGH, LOW
from lowmem.artifact.weights import LinearWeights
from lowmem.compute.kernels import plain_rows
from lowmem.compute.kernels.rows import RowKernels, Rows
from lowmem.compute.operations.cuda_products import CodesProduct, Dequantize
from lowmem.compute.operations.dequantize import dequantize_into
from lowmem.compute.operations.linear import Linear, to_torch

# (rows, outputs, inputs): one row, no multiple of any tile, more than one tile of each, and inputs
# that fill every tile, as a model's do. Two sums of 127 * 128 over these inputs stay below 2^24, so
# float32 holds every one of them.
_SHAPES = ((1, 16, 32), (37, 136, 272), (300, 272, 496), (300, 272, 512))
# The formats that a kernel turns into weights, and a shape that is no multiple of its block.
_STORED = (Int8Channel(), BnbInt8(), LOW, HIGH, BnbNf4())
_STORED_SHAPE = (50, 192)
# Sums of fp8 products may be taken in 14 bits, and results are rounded to bf16.
_FP8_ERROR = 2.0**-7


def int8_is_exact(multiply: CodesProduct, device: str) -> bool:
    """Whether products of 8-bit codes are exact, with and without rows that are kept exact."""
    for rows, outputs, inputs in _SHAPES:
        codes = _extremes((127, -127, 0, 1), rows, inputs).to(torch.int8)
        weight = _extremes((-127, 127, -128, 0), outputs, inputs).to(torch.int8)
        for exact in (0, 1):
            tokens = rows - exact * (rows > 1)
            expected = codes.double() @ weight.double().T
            expected[: rows - tokens] += expected[tokens:]
            one = torch.ones((), dtype=torch.float32, device=device)
            got = multiply(
                Rows(codes.to(device), one.repeat(rows), tokens),
                weight.to(device),
                one.repeat(outputs),
                dtype=torch.float32,
                residual=one.repeat(tokens, outputs),
            )
            if not torch.equal(got.double().cpu(), expected[:tokens] + 1):
                return False
    return True


def fp8_is_right(multiply: CodesProduct, device: str) -> bool:
    """Whether products of fp8 codes with a scale per row and per channel are right.

    Raises:
        RuntimeError: torch has no such product for this card.
    """
    fp8 = torch.float8_e4m3fn
    for rows, outputs, inputs in _SHAPES:
        codes = _extremes((448, -448, 2**-9, 1), rows, inputs).to(fp8)
        weight = _extremes((-448, 13, 0, 2**-6), outputs, inputs).to(fp8)
        row_scales, scales = (
            torch.exp2(torch.arange(count, dtype=torch.float32, device="cpu") % 7 - 20)
            for count in (rows, outputs)
        )
        factors = row_scales[:, None].double() * scales.double()
        expected = codes.double() @ weight.double().T * factors
        bound = codes.double().abs() @ weight.double().abs().T * factors * _FP8_ERROR
        got = multiply(
            Rows(codes.to(device), row_scales.to(device), rows),
            weight.to(device),
            scales.to(device),
            dtype=torch.bfloat16,
        )
        if not bool(((got.double().cpu() - expected).abs() <= bound).all()):
            return False
    return True


def rows_are_right(kernels: RowKernels, device: str) -> bool:
    """Whether rows are normalized, gated, rounded and rotated as the plain form does it.

    Codes may differ by one step where a quotient lies between two, so what is compared is the rows
    that they stand for.
    """
    for features in (96, 4096):
        states = _extremes((3e4, -1.0, 1e-3, 0.0), 8, features)
        states[-1] = 0
        weight = 1 + _extremes((0.1, -0.2, 0.0, 0.3), 1, features)[0]
        angles = _extremes((0.0, 1.0, 3.0, 1000.0), 8, 16)[:, None]
        heads = states[:, :96].unflatten(-1, (-1, 32))
        for dtype in (torch.float16, torch.bfloat16, torch.int8):
            pairs = (
                ("normalize", (states, weight, 1e-5, dtype, 3)),
                ("gate", (states.sign() * 9, states / 3e4, dtype, 3)),
                ("round_rows", (states, dtype, 3)),
            )
            for name, arguments in pairs:
                expected: Rows = getattr(plain_rows, name)(*arguments)
                got: Rows = getattr(kernels, name)(*_on(device, arguments))
                if not _stand_for_the_same(got, expected):
                    return False
        turned = kernels.rotate(*_on(device, (heads.clone(), angles.cos(), angles.sin())))
        expected_heads = plain_rows.rotate(heads, angles.cos(), angles.sin())
        if not _is_near(turned, expected_heads, 2.0**-20):
            return False
    return True


def weights_are_right(dequantize: Dequantize, device: str) -> bool:
    """Whether every stored format becomes the weight that it does in the plain form.

    To the bit, but for the rounding to bfloat16, which may go either way.
    """
    random = np.random.default_rng(0)
    rows, columns = _STORED_SHAPE
    for form in _STORED:
        tensors = {}
        for suffix, spec in form.specs(rows, columns).items():
            if spec.dtype in ("F16", "F32"):  # scales
                values = 0.01 * np.exp(2 * random.standard_normal(spec.shape))
                array = values.astype(DTYPES[spec.dtype])
            else:
                array = np.frombuffer(random.bytes(spec.nbytes), DTYPES[spec.dtype])
                array = array.reshape(spec.shape).copy()
            tensors[suffix] = RawTensor(spec.dtype, array)
        weights = LinearWeights(form, rows, columns, tensors)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            expected = torch.empty(rows, columns, dtype=dtype, device="cpu")
            dequantize_into(expected, Linear.load(weights, to_torch))
            got = torch.empty(rows, columns, dtype=dtype, device=device)
            dequantize(got, Linear.load(weights, lambda raw: to_torch(raw, device)))
            allowed = 2.0**-7 * expected.abs().float() if dtype == torch.bfloat16 else 0
            if not bool(((got.cpu().float() - expected.float()).abs() <= allowed).all()):
                return False
    return True


def _stand_for_the_same(got: Rows, expected: Rows) -> bool:
    """Whether two roundings of the same rows differ by less than two steps."""
    if (got.scales is None) != (expected.scales is None) or got.tokens != expected.tokens:
        return False
    step = (
        2.0**-7
        if expected.scales is not None or expected.values.dtype == torch.bfloat16
        else 2.0**-10
    )
    return _is_near(_values(got), _values(expected), 2 * step)


def _values(rows: Rows) -> Tensor:
    """The rows that codes stand for."""
    values = rows.values.float()
    return rows.join(values if rows.scales is None else values * rows.scales[:, None]).cpu()


def _is_near(got: Tensor, expected: Tensor, share: float) -> bool:
    """Whether no element is off by more than a share of its row's largest."""
    got, expected = got.float().cpu().flatten(1), expected.float().flatten(1)
    largest = expected.abs().amax(1, keepdim=True)
    return bool(((got - expected).abs() <= share * largest).all())


def _on(device: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.to(device) if isinstance(one, Tensor) else one for one in arguments)


def _extremes(values: tuple[float, ...], rows: int, columns: int) -> Tensor:
    """Rows of one value, of two in turn, and of all in a random order."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (rows, columns), generator=generator, device="cpu")
    matrix = torch.tensor(values, dtype=torch.float32, device="cpu")[chosen]
    for row in range(0, rows, 3):
        matrix[row] = values[row // 3 % len(values)]
        if row + 1 < rows:
            matrix[row + 1, ::2], matrix[row + 1, 1::2] = values[0], values[1]
    return matrix
