"""Figures as people read them: in tables, sentences and pictures of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

NONE = "–"


def cosine_text(value: float, bound: float = -math.inf) -> str:
    """Four decimals, or as many as show that a value is below a bound."""
    for decimals in range(4, 17):
        text = f"{value:.{decimals}f}"
        if value >= bound or float(text) < bound:
            break
    return text


def size_text(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return NONE
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            digits = f"{count / size:#.3g}" if count < 100 * size else f"{count / size:.0f}"
            return f"{digits} {unit}"
    return f"{count:.0f} B"


def speed_text(tokens_per_second: float | None) -> str:
    """Three digits or more, thousands apart."""
    if not tokens_per_second:
        return NONE
    decimals = max(0, 2 - math.floor(math.log10(tokens_per_second)))
    return f"{tokens_per_second:,.{decimals}f}"


def share_text(value: float | None) -> str:
    """Three decimals."""
    return NONE if value is None else f"{value:.3f}"


def signed_text(value: float | None, decimals: int = 4) -> str:
    """A change, with its sign; none where it rounds to 0."""
    if value is None:
        return NONE
    rounded = round(value, decimals)
    return f"{rounded:+.{decimals}f}" if rounded else f"{0:.{decimals}f}"


def tiny_text(value: float | None) -> str:
    """One digit and a power of ten, or 0."""
    if value is None:
        return NONE
    return f"{value:.0e}" if value else "0"


def sentence_text(words: str) -> str:
    """Words with a capital in front; all that follows stays as it is, as names do."""
    return words[:1].upper() + words[1:]


FILTERS: Mapping[str, Callable[..., Any]] = {
    "cosine": cosine_text,
    "size": size_text,
    "speed": speed_text,
    "share": share_text,
    "signed": signed_text,
    "tiny": tiny_text,
    "sentence": sentence_text,
}
"""What a page's template calls them."""
