"""The operations of a CUDA device in plain torch, which also run on a CPU."""

from typing import Any

import torch

from lowmem.compute.kernels import library_products, plain_rows
from lowmem.compute.operations.cuda import CudaOperations, route
from lowmem.compute.operations.cuda_products import DenseProduct, RoundedProduct
from lowmem.compute.operations.dequantize import dequantize_into
from tests.models import RMS_NORM_EPS

TURING, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 6), (8, 9), (9, 0), (12, 0)
"""Compute capabilities."""


def operations(compute: str, capability: tuple[int, int] = HOPPER) -> CudaOperations:
    """Those of a card without Triton, on the CPU."""
    chosen = route(compute, capability, has_triton=False)
    product: Any
    if chosen.codes is None:
        product = DenseProduct(chosen.dtype, dequantize_into, compute == "fp16-acc16")
    else:
        int8 = chosen.codes == torch.int8
        multiply = library_products.multiply_int8 if int8 else library_products.multiply_fp8
        product = RoundedProduct(chosen.codes, chosen.dtype, multiply, plain_rows, dequantize_into)
    return CudaOperations(chosen, RMS_NORM_EPS, plain_rows, product, None)
