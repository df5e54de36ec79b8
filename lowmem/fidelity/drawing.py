"""How the pictures of a report's page are drawn: axes, colours, marks, and SVG to stand in HTML.

Cosines near 1 are told apart by their distance from it, so every picture puts -log10(1 - cosine) on
an axis: one step for each nine. Ink, muted ink and rules are taken from the page, so that a picture
follows its light or dark colours; the colours of data are readable on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Reference vectors of two devices agree to this; what is closer cannot be told from equal.
_CLOSEST = 1e-6
_LABEL_CHARACTERS = 40

INK, MUTED, RULE = "#010203", "#040506", "#070809"  # stand-ins, replaced in the SVG
_PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"}
_COLOURS = ("#3f84d8", "#d0701f", "#9a63d0", "#1f948c", "#7d8794", "#d14f86", "#8d8223")
_KNOWN_VARIANTS = ("int8", "int4", "bnb-nf4", "bnb-int8", "fp16")
_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "^", "int8": "D", "fp8": "P", "fp16-acc16": "v"}
_OTHER_MARKER = "X"

WIDTH_INCHES = 9.0
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lowmem",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@dataclass(frozen=True)
class Series:
    """The cosines of one plan, in the order of the texts."""

    plan: str
    variant: str
    compute: str
    cosines: Sequence[float]


def load_matplotlib() -> Any:
    """Imports what is drawn with, at first use only."""
    import matplotlib
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import matplotlib.lines

    return matplotlib


def style_of(matplotlib: Any) -> dict[str, Any]:
    """matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    return {**defaults, **_STYLE}


def nines(cosines: ArrayLike) -> NDArray[np.float64]:
    """-log10(1 - cosine): 0 for 0, 1 for 0.9, 2 for 0.99, at most 6."""
    distance = 1.0 - np.asarray(cosines, np.float64)
    nines: NDArray[np.float64] = -np.log10(distance.clip(_CLOSEST, 2.0))
    return nines


def nines_axis(axes: Any, axis: Any, values: Iterable[float]) -> None:
    """Gives an axis in nines its limits, ticks and grid, wide enough for values in nines."""
    low, high = min(values), max(values)
    pad = 0.04 * max(high - low, 0.5)
    limits = (low - pad, min(high + pad, 6.1))
    (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(*limits)
    ticks = list(nines_ticks(*limits))
    axis.set_ticks([place for place, _ in ticks], [name for _, name in ticks], color=MUTED)
    axis.set_tick_params(length=0)
    axis.grid(color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def nines_ticks(low: float, high: float) -> Iterator[tuple[float, str]]:
    """0, 0.9, 0.99 and so on; halves between them where there is room for few whole nines."""
    digits = {0: "0"} | {count: "0." + "9" * count for count in range(1, 6)}
    ticks = [(float(count), name) for count, name in digits.items()] + [(6.0, "≥ 0.999999")]
    if high - low < 3.5:
        halves = [0.5] + [1 - 5 * 10.0 ** -(count + 1) for count in range(1, 5)]
        ticks += [(float(nines([half])[0]), f"{half:.5f}".rstrip("0")) for half in halves]
    yield from (tick for tick in sorted(ticks) if low <= tick[0] <= high)


def legends(
    figure: Any, matplotlib: Any, everything: Sequence[Series], kinds: Sequence[tuple[str, str]]
) -> None:
    """Names the colours of variants and the marks of computes, beside the picture."""
    line = matplotlib.lines.Line2D
    variants = list(dict.fromkeys(variant for variant, _ in kinds))
    colours = [
        line([], [], color=colour_of(variant, everything), linewidth=3, label=plain_label(variant))
        for variant in variants
    ]
    markers = [
        line(
            [], [], color=MUTED, linestyle="", marker=marker_of(compute), label=plain_label(compute)
        )
        for compute in sorted({compute for _, compute in kinds})
    ]
    top = 0.985
    for title, handles in (("variant", colours), ("compute", markers)):
        legend = figure.legend(
            handles=handles,
            title=title,
            loc="upper left",
            bbox_to_anchor=(0.835, top),
            frameon=False,
            alignment="left",
            labelcolor=INK,
        )
        legend.get_title().set_color(MUTED)
        for text in legend.get_texts():
            text.set_parse_math(False)
        top -= 0.075 + 0.052 * len(handles)


def kind_order(kind: tuple[str, str]) -> tuple[int, str, str]:
    """Sorts (variant, compute) with the known variants first."""
    variant, compute = kind
    known = variant in _KNOWN_VARIANTS
    return (_KNOWN_VARIANTS.index(variant) if known else len(_KNOWN_VARIANTS), variant, compute)


def colour_of(variant: str, everything: Sequence[Series]) -> str:
    """The colour of a variant, the same in every picture of a page."""
    others = sorted({series.variant for series in everything} - set(_KNOWN_VARIANTS))
    order = [*_KNOWN_VARIANTS, *others]
    return _COLOURS[order.index(variant) % len(_COLOURS)]


def marker_of(compute: str) -> str:
    """The mark of a compute."""
    return _MARKERS.get(compute, _OTHER_MARKER)


def plain_label(text: str) -> str:
    """What the fonts of every machine can show, and not wider than a third of the picture."""
    plain = re.sub("^_|[^ -~]", "?", text)  # a legend leaves out what begins with "_"
    cut = len(plain) > _LABEL_CHARACTERS
    return plain[: _LABEL_CHARACTERS - 3] + "..." if cut else plain


def svg(matplotlib: Any, figure: Any, name: str, title: str) -> str:
    """The figure as an SVG element: equal figures give equal text, with no links and no date."""
    buffer = io.StringIO()
    figure.patch.set_visible(False)
    canvas = matplotlib.backends.backend_svg.FigureCanvasSVG(figure)
    canvas.print_svg(buffer, metadata=_NO_METADATA)
    text = buffer.getvalue()
    opening = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', text)
    assert opening is not None
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[opening.end() :], flags=re.S)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for stand_in, colour in _PAGE_COLOURS.items():
        body = body.replace(stand_in, colour)
    return f'<svg role="img" aria-label="{escape(title)}" viewBox="{opening[1]}">{body}'
