"""What each variant is made of: a format for every linear, and the recipe that says so.

Export writes by this table, and the planner plans by it before anything is exported.
"""

from __future__ import annotations

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


def check_variants(names: Iterable[str]) -> None:
    """Refuses names that are not in ``VARIANTS``.

    Raises:
        InputError: There is no such variant.
    """
    for name in names:
        if name not in VARIANTS:
            raise InputError(f"a variant must be one of {', '.join(VARIANTS)}, got {name!r}")


def formats_for(variant: str, config: ModelConfig, dtype: str) -> dict[str, Format]:
    """The format of every linear of a variant.

    Args:
        variant: A name in ``VARIANTS``.
        config: The model's shape.
        dtype: F16 or BF16: dtype of the unquantized weights.

    Raises:
        InputError: There is no such variant.
    """
    forms: dict[str, Format] = {
        "fp16": Plain(dtype),
        "int8": Int8Channel(),
        "int4": IntGrouped(bits=4, group_size=64),
        "bnb-int8": BnbInt8(),
        "bnb-nf4": BnbNf4(group_size=64, dtype=DTYPE_NAMES[dtype]),
    }
    check_variants([variant])
    return dict.fromkeys(module_shapes(config), forms[variant])


def recipe_for(variant: str, dtype: str, calibration: str | None = None) -> dict[str, Any]:
    """How a variant is made, as the manifest states it; equal recipes give equal bytes.

    Args:
        variant: A name in ``VARIANTS``.
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
    if variant == "int4":
        recipe |= {"bits": 4, "group_size": 64, "scales": "squared error"}
    return recipe
