"""What each variant is made of: a format for every linear, and the recipe that says so.

Export writes by this table, and the planner plans by it before anything is exported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowmem.artifact.config import ModelConfig
from lowmem.artifact.formats import BnbInt8, BnbNf4, Format, Int8Channel, IntGrouped, Plain
from lowmem.artifact.weights import module_shapes
from lowmem.errors import InputError

VARIANTS = ("fp16", "int8", "int4", "bnb-int8", "bnb-nf4")
ROUNDED = "rounded"
"""What a recipe says of activations where codes were fitted to rounded ones, BOS's included."""
DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16"}
LOW, HIGH = IntGrouped(bits=4, group_size=32), IntGrouped(bits=8, group_size=64)
"""The formats among which a budget of bits is spent."""

MODEL, MODEL_INT8, MODEL_FP16 = "model.onnx", "model_int8.onnx", "model_fp16.onnx"
_HEAD_MULTIPLE = 16
"""ONNX Runtime's causal attention refuses other head sizes when it runs."""
_BLOCKS = {IntGrouped(bits, size) for bits in (4, 8) for size in (16, 32, 64, 128, 256)}
"""What MatMulNBits takes."""

_BUDGETED = re.compile(r"int4-([0-9]+(?:\.[0-9]+)?)")
_LEAST_BITS, _MOST_BITS = 4.5, 8.25  # codes, and a 16-bit scale for a group of them


def budgeted(bits: float) -> str:
    """The name of the variant whose linears take that many bits per weight, ``int4-5.5``.

    Raises:
        InputError: No mixture of 4 and 8 bits takes so many.
    """
    if not _LEAST_BITS <= bits <= _MOST_BITS:
        raise InputError(f"bits must be from {_LEAST_BITS} to {_MOST_BITS}, got {bits:g}")
    return f"int4-{bits:g}"


def budget_of(variant: str) -> float | None:
    """Bits per weight that a variant's name allows its linears, or None where it names none."""
    match = _BUDGETED.fullmatch(variant)
    if match is None:
        return None
    bits = float(match[1])
    return bits if _LEAST_BITS <= bits <= _MOST_BITS and variant == f"int4-{bits:g}" else None


def check_variants(names: Iterable[str]) -> None:
    """Refuses names that are not in ``VARIANTS`` and name no budget of bits.

    Raises:
        InputError: There is no such variant.
    """
    for name in names:
        if name not in VARIANTS and budget_of(name) is None:
            raise InputError(
                f"a variant must be one of {', '.join(VARIANTS)}, or int4-BITS with BITS from "
                f"{_LEAST_BITS} to {_MOST_BITS}, got {name!r}"
            )


def formats_for(variant: str, config: ModelConfig, dtype: str) -> dict[str, Format]:
    """The format of every linear of a variant that has one format.

    Args:
        variant: A name in ``VARIANTS``; what a budget is spent on is not known beforehand.
        config: The model's shape.
        dtype: F16 or BF16: dtype of the unquantized weights.

    Raises:
        InputError: There is no such variant.
    """
    forms: dict[str, Format] = {
        "fp16": Plain(dtype),
        "int8": Int8Channel(),
        "int4": LOW,
        "bnb-int8": BnbInt8(),
        "bnb-nf4": BnbNf4(group_size=64, dtype=DTYPE_NAMES[dtype]),
    }
    if variant not in forms:
        raise InputError(f"a variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return dict.fromkeys(module_shapes(config), forms[variant])


def graphs_for(formats: Mapping[str, Format], head_dim: int, *, is_causal: bool) -> dict[str, str]:
    """The ONNX graphs that a variant has.

    Args:
        formats: The format of every linear.
        head_dim: Size of an attention head.
        is_causal: Whether tokens see none behind them.

    Returns:
        File name to compute, empty where no operator of ONNX Runtime takes formats or heads:

        * 16-bit weights: ``model.onnx`` ``fp32``; with float16 also ``model_fp16.onnx`` ``fp16``,
          for CUDA;
        * grouped codes: ``model.onnx`` ``fp32`` and ``model_int8.onnx`` ``int8``;
        * channel codes: ``model.onnx`` ``int8``, or ``fp32`` if no linear rounds its inputs;
        * bitsandbytes' formats, mixtures of the above, and groups of another size than 16, 32,
          64, 128 or 256: none;
        * causal attention with a ``head_dim`` that is no multiple of 16: none.
    """
    forms = set(formats.values())
    if is_causal and head_dim % _HEAD_MULTIPLE:
        return {}
    if all(isinstance(form, Plain) for form in forms):
        return {MODEL: "fp32"} | ({MODEL_FP16: "fp16"} if forms == {Plain("F16")} else {})
    if forms <= _BLOCKS:
        return {MODEL: "fp32", MODEL_INT8: "int8"}
    if all(isinstance(form, Int8Channel) for form in forms):
        rounds = any(form.rounds_activations for form in forms if isinstance(form, Int8Channel))
        return {MODEL: "int8" if rounds else "fp32"}
    return {}


def recipe_for(variant: str, dtype: str, calibration: str | None = None) -> dict[str, Any]:
    """How a variant is made, as the manifest states it; equal recipes give equal bytes.

    Args:
        variant: A name in ``VARIANTS``, or one with a budget of bits.
        dtype: F16 or BF16: dtype of the unquantized weights.
        calibration: Hash of the texts that steer the quantizers, or None where the weights alone
            do.
    """
    if variant == "fp16":
        return {"method": "none", "dtype": dtype}
    if calibration is not None:
        recipe: dict[str, Any] = {"method": "gptq", "targets": "full precision"}
        recipe |= {"calibration": calibration, "dtype": dtype}
        if variant == "int8":
            recipe |= {"folds": "balanced", "activations": ROUNDED}
    else:
        recipe = {"method": "data-free", "calibration": "none", "dtype": dtype}
    budget = budget_of(variant)
    if budget is not None:
        recipe |= {"bits": [LOW.bits, HIGH.bits], "group_size": [LOW.group_size, HIGH.group_size]}
        recipe |= {"budget": budget, "spent": "pooled effect", "scales": "squared error"}
    elif variant == "int4":
        recipe |= {"bits": LOW.bits, "group_size": LOW.group_size, "scales": "squared error"}
    return recipe
