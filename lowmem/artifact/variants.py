"""What each variant is made of: a format for every linear, and the recipe that says so.

Export writes by this table, and the planner plans by it before anything is exported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
