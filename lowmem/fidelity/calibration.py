"""Whether the texts of a report steered the quantizer that it judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem import data
from lowmem.artifact.manifest import Bundle
from lowmem.data import Row
from lowmem.data.overlap import shared
from lowmem.fidelity.inputs import open_tokenizer

NONE = "none"
BUILT_IN = "calibration"


def steered_by(recipe: Mapping[str, Any]) -> str:
    """Which texts a variant was calibrated with.

    Args:
        recipe: As in the manifest; ``calibration`` is ``none``, the name of the built-in texts or
            the sha256 of texts.

    Returns:
        ``none``, ``calibration`` for the built-in texts, or the sha256 of others.
    """
    named = str(recipe.get("calibration", NONE))
    return BUILT_IN if named == data.sha256(data.load(BUILT_IN)) else named


def statement(bundle: Bundle, steered: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The ``calibration`` of a report.

    Args:
        bundle: Whose tokenizer counts.
        steered: As :func:`steered_by` says.
        rows: The report's texts.

    Returns:
        ``texts``, which is ``steered``, and as ``shared`` what the report's texts have in common
        with the built-in calibration texts; None where nothing was calibrated, or with texts that
        are not known here.
    """
    if steered != BUILT_IN:
        return {"texts": steered, "shared": None}
    tokenizer = open_tokenizer(bundle)
    others = [row.text for row in data.load(BUILT_IN)]
    found = shared([(row.id, row.text) for row in rows], others, tokenizer.pieces)
    return {"texts": steered, "shared": found.to_json()}
