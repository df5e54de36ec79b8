"""How close is close enough, with the reason; loosening one says why here.

Rounding to p significant bits changes a number by at most u = 2^-p of it, and a sum of n rounded
products is within gamma(n) of the sum of their magnitudes, in whatever order it is taken (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


def gamma(terms: int, unit_roundoff: float = UNIT_ROUNDOFF["fp32"]) -> float:
    """n u / (1 - n u): the relative error of a sum of n rounded products."""
    return terms * unit_roundoff / (1 - terms * unit_roundoff)


# Two float32 decoders that add in different orders. A layer of the tiny models has sums of at most
# 192 terms whose errors are independent, about sqrt(192) u = 8e-7 of the result; 3 layers of 7
# products each stay below 1e-5.
PARITY_HIDDEN_STATES = 1e-5
# 1 - cos is half the square of the relative error: 5e-11 by the above. What is promised of the
# reference on every device is 1e-6.
PARITY_COSINE = 1e-6
# The same of a graph over 30 layers, whose operators use their own polynomials for exponentials and
# sines; the promise for ONNX Runtime is ten times that of torch.
ONNX_SMOLLM2_COSINE = 10 * PARITY_COSINE


# Attention of float32 heads of at most 32 features within [-1, 1]: a score is off by at most
# gamma(34) sqrt(32) = 1.2e-5, so a weight by 2.4e-5 of itself, and a mixture of values within
# [-1, 1] by 2.4e-5 and a few roundings.
ATTENTION = 3e-5
# The same in bfloat16: 2 gamma(1) of each of 32 products, so 32 / sqrt(32) times that of a score,
# twice that of a weight, and a rounding of value, weight and mixture each.
NARROW_ATTENTION = 2 * 32**0.5 * gamma(2, UNIT_ROUNDOFF["bf16"]) + gamma(3, UNIT_ROUNDOFF["bf16"])


# How far oneDNN's polynomial is from SiLU, of values of a few tens: far below a rounding to
# bfloat16 of what is not near zero.
SILU = 1e-5

# round_rows: the quotient x / scale is at most 127 and off by one rounding before it is rounded to
# a whole number, so the error is half a scale and that rounding.
ROUNDED_ROWS = 0.5 + 127 * UNIT_ROUNDOFF["fp32"]

# bitsandbytes multiplies by 127 / absmax where we divide by absmax / 127: either side rounds twice,
# so each is within 2 u of the exact quotient, which is at most 127. Codes may differ only where
# that quotient lies so near to the middle between two codes.
BITSANDBYTES_INT8_TIE = 127 * gamma(2)
# The same for NF4, whose quotients are at most 1; bitsandbytes multiplies by 1 / absmax.
BITSANDBYTES_NF4_TIE = gamma(2)


def summed_squares_slack(terms: int) -> tuple[float, float]:
    """How far a sum of squared float32 errors may be off: (relative, absolute).

    A difference and its square are rounded three times, their sum once a term; two such sums are
    compared. A square below the least subnormal float32 counts as zero.
    """
    return 2 * gamma(terms + 3), terms * 2.0**-149


# The same text beside other neighbours: float32 products of other shapes add in another order.
# 1 - cos is half the square of the relative error, which PARITY_HIDDEN_STATES bounds.
INVARIANCE = PARITY_HIDDEN_STATES**2
# The distance of two unit vectors, and so of each of their elements: |a - b|^2 = 2 (1 - cos).
INVARIANCE_DISTANCE = (2 * INVARIANCE) ** 0.5
# Where results are rounded to 16 or activations to 8 bits, that noise may carry a number over a
# rounding boundary, after which the two passes round differently. Each stays as far from float32
# as its arithmetic is, so they are at most twice that angle apart: four times 1 - cos.
ROUNDED_INVARIANCE_FACTOR = 4

# bitsandbytes 0.50 multiplies sums of 8-bit products by 6.200124e-5, which stands for 1 / 127^2.
BITSANDBYTES_INT8_CONSTANT = 6.200124e-5 * 127**2 - 1

# Vectors of the tiny models when something in them is rounded, as relative Euclidean distances
# between two passes. Rounding errors of single numbers are independent, so one rounded input or
# weight adds about u / sqrt(3) (relative, Euclidean) to a product; 3 layers of 7 products add in
# quadrature: a factor of 5; attention and the norm of the last token enlarge this up to 4 times.
_PRODUCTS = 21**0.5 * 4 / 3**0.5
# Weights alone rounded to float16: 5e-3.
FP16_VECTORS = _PRODUCTS * UNIT_ROUNDOFF["fp16"]
# On CPUs with bf16 instructions bitsandbytes computes NF4 in it: weights, their scales and the
# inputs are rounded, a factor of sqrt(3). 7e-2.
BF16_VECTORS = _PRODUCTS * 3**0.5 * UNIT_ROUNDOFF["bf16"]
# Inputs rounded to 8 bits: codes are off by up to a half of 127, and the largest feature of a row
# is 3 to 6 times (of the inputs of down_proj) their root mean square, so that u is 0.5 / 127 * 4.
# Rounding is chaotic: a code that tips over tips others later, and two passes that round with
# other scales are as far from each other as two independent errors, a factor of sqrt(2). 0.24.
ROUNDED_VECTORS = _PRODUCTS * 2**0.5 * 0.5 / 127 * 4

# ONNX graphs whose inputs of linears are rounded to 8 bits, against the same rounding elsewhere or
# against none: the square of ROUNDED_VECTORS, halved. Where the roundings are defined alike, most
# texts meet no boundary between two codes, and the median is that of float32.
ONNX_ROUNDED_COSINE = ROUNDED_VECTORS**2 / 2
ONNX_ROUNDED_MEDIAN_COSINE = PARITY_COSINE
# A graph in float16: weights are stored in it, and inputs, outputs and attention are rounded to it,
# a factor of sqrt(3).
ONNX_HALF_COSINE = (3**0.5 * FP16_VECTORS) ** 2 / 2

# What stands between two products, computed in another order: float32 sums of n terms, then one
# rounding to the dtype, of each side. Relative to the largest of a row, which bounds every element.
# A code may fall on either side of a tie, so that two roundings differ by a whole step.
ROW_KERNELS = {
    "float16": 2 * UNIT_ROUNDOFF["fp16"],
    "bfloat16": 2 * UNIT_ROUNDOFF["bf16"],
    "int8": 1 / 127 + 1e-5,
    "float8_e4m3fn": 2.0**-3 + 1e-5,  # a step of the largest binade
}
# Rows that are rounded twice: what the second rounding leaves is half a step of what the first did.
EXACT_ROWS = {"int8": 0.5 / 127 * 0.5 / 127 + 1e-6, "float8_e4m3fn": 2.0**-4 * 2.0**-4 + 1e-6}
# Rotations in float32, with and without a fused multiplication and addition.
ROTATION = 4 * UNIT_ROUNDOFF["fp32"]
# A kernel for packed texts in 16 bits: weights and the mixture are rounded once each, inputs are
# exact; of values within [-1, 1].
PACKED_ATTENTION = {"float16": 4 * UNIT_ROUNDOFF["fp16"], "bfloat16": 4 * UNIT_ROUNDOFF["bf16"]}
