"""How one linear is stored: tensor names, shapes, dtypes, and the way back to float32.

Both stages use the same module for a format: export packs with it, the runtime unpacks. The
maths here is plain numpy, the reference that every faster path is tested against. Which module
has which format is read from the variant's ``config.json`` and from nowhere else.
"""

from __future__ import annotations

from lowmem.artifact.formats.bnb_int8 import BnbInt8
from lowmem.artifact.formats.bnb_nf4 import BnbNf4
from lowmem.artifact.formats.int8_channel import Int8Channel
from lowmem.artifact.formats.int_grouped import IntGrouped
from lowmem.artifact.formats.plain import Plain
from lowmem.artifact.formats.stanza import quantization_config, read_formats
from lowmem.errors import BundleError

Format = Plain | Int8Channel | IntGrouped | BnbInt8 | BnbNf4


__all__ = [
    "BnbInt8",
    "BnbNf4",
    "Format",
    "Int8Channel",
    "IntGrouped",
    "Plain",
    "check_groups",
    "linear_bytes",
    "quantization_config",
    "read_formats",
    "weight_bytes",
]


def linear_bytes(form: Format, out_features: int, in_features: int) -> int:
    """What a linear takes on disk: codes, scales and whatever else its format keeps."""
    return sum(spec.nbytes for spec in form.specs(out_features, in_features).values())


def weight_bytes(form: Format, out_features: int, in_features: int) -> int:
    """What counts as bits of a linear's weights: codes and scales, or 16-bit weights."""
    constants = form.constants(out_features, in_features)
    return linear_bytes(form, out_features, in_features) - sum(
        raw.nbytes for raw in constants.values()
    )


def check_groups(form: Format, in_features: int, place: str) -> None:
    """Checks that the groups of a format fill the rows of a linear.

    Raises:
        BundleError: They do not.
    """
    if isinstance(form, IntGrouped | BnbNf4) and in_features % form.group_size:
        raise BundleError(
            f"group_size must divide in_features, got group_size={form.group_size} and "
            f"in_features={in_features} ({place})"
        )
