"""The two pictures of a report's page, as SVG to stand in HTML.

Cosines near 1 are told apart by their distance from it, so both pictures put -log10(1 - cosine) on
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

from lowmem.artifact.verdict import Floor

# Reference vectors of two devices agree to this; what is closer cannot be told from equal.
_CLOSEST = 1e-6
_MOST_DOTS = 3000
_WORST_DOTS = 10
_FEWEST_IN_A_MEDIAN = 3
_LABEL_CHARACTERS = 40

_INK, _MUTED, _RULE = "#010203", "#040506", "#070809"  # stand-ins, replaced in the SVG
_PAGE_COLOURS = {_INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)"}
_COLOURS = ("#3f84d8", "#d0701f", "#9a63d0", "#1f948c", "#7d8794", "#d14f86", "#8d8223")
_KNOWN_VARIANTS = ("int8", "int4", "bnb-nf4", "bnb-int8", "fp16")
_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "^", "int8": "D", "fp8": "P", "fp16-acc16": "v"}
_OTHER_MARKER = "X"

_WIDTH_INCHES = 9.0
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


def distributions(groups: Sequence[tuple[str, Sequence[Series]]], floor: Floor) -> str:
    """Each plan's cosines on a line of its own, with the floor's three bounds.

    Args:
        groups: Title and plans of each group, from top to bottom; at least one plan.
        floor: Drawn as lines that the marks of the same kind must not stand left of.
    """
    everything = [series for _, members in groups for series in members]
    lines = len(everything) + len(groups)
    height = 0.95 + 0.27 * lines
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_style(matplotlib)):
        figure = matplotlib.figure.Figure(figsize=(_WIDTH_INCHES, height))
        label_inches = 0.2 + 0.072 * max(len(_label(series.plan)) for series in everything)
        left = min(label_inches, 3.2) / _WIDTH_INCHES
        axes = figure.add_axes(
            (left, 0.45 / height, 0.95 - left, 0.27 * lines / height), facecolor="none"
        )
        _bounds(axes, floor)
        names: list[tuple[float, str, str]] = []
        y = 0.0
        for title, members in groups:
            names.append((y, title, "bold"))
            for series in members:
                y += 1
                names.append((y, _label(series.plan), "normal"))
                colour = _colour(series.variant, everything)
                _distribution(axes, y, np.asarray(series.cosines), colour)
            y += 1
        beside = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        for position, name, weight in names:
            text = axes.text(-0.012, position, name, color=_INK, weight=weight, **beside)
            text.set_parse_math(False)
        axes.set_ylim(y - 0.5, -0.5)
        axes.set_yticks([])
        points = np.concatenate([_nines(series.cosines) for series in everything])
        levels = _nines([floor.mean, floor.p5, floor.min])
        _nines_axis(axes, axes.xaxis, [points.min(), points.max(), *levels])
        axes.set_xlabel("cosine to the 16-bit reference", color=_MUTED)
        return _svg(matplotlib, figure, "distributions", "Distribution of the cosines of each plan")


def by_length(everything: Sequence[Series], tokens: Sequence[int], floor: Floor) -> str:
    """Cosine against length: a dot for a text, a line through the medians of doubling lengths.

    Args:
        everything: At least one plan.
        tokens: Length of each text.
        floor: Its minimum is drawn.
    """
    matplotlib = _matplotlib()
    lengths = np.maximum(np.asarray(tokens), 1)
    step = -(-len(everything) * len(lengths) // _MOST_DOTS)
    kinds = sorted({(series.variant, series.compute) for series in everything}, key=_kind_order)
    with matplotlib.rc_context(_style(matplotlib)):
        figure = matplotlib.figure.Figure(figsize=(_WIDTH_INCHES, 4.4))
        axes = figure.add_axes((0.125, 0.12, 0.695, 0.85), facecolor="none")
        for variant, compute in kinds:
            members = [
                one for one in everything if (one.variant, one.compute) == (variant, compute)
            ]
            colour, marker = _colour(variant, everything), _marker(compute)
            for series in members:
                cosines = np.asarray(series.cosines)
                shown = _shown(cosines, step)
                style = {"marker": marker, "markersize": 3, "markeredgewidth": 0, "alpha": 0.4}
                axes.plot(
                    lengths[shown], _nines(cosines[shown]), linestyle="", color=colour, **style
                )
            x, y = _medians(lengths, np.mean([series.cosines for series in members], axis=0))
            axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.4)
        (level,) = _nines([floor.min])
        axes.axhline(level, color=_INK, linewidth=0.9, linestyle=":")
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        text = f"min ≥ {floor.min!r}"
        axes.annotate(text, (1, level), xytext=(5, 0), va="center", color=_INK, **where)
        axes.set_xscale("log", base=2)
        _token_ticks(axes, lengths)
        points = np.concatenate([_nines(series.cosines) for series in everything])
        _nines_axis(axes, axes.yaxis, [points.min(), points.max(), level])
        axes.set_xlabel("tokens of the text", color=_MUTED)
        axes.set_ylabel("cosine to the 16-bit reference", color=_MUTED)
        _legends(figure, matplotlib, everything, kinds)
        return _svg(matplotlib, figure, "by-length", "Cosine of each text against its length")


def _matplotlib() -> Any:
    import matplotlib
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import matplotlib.lines

    return matplotlib


def _style(matplotlib: Any) -> dict[str, Any]:
    """matplotlib's defaults and ours, whatever the user's matplotlibrc says."""
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    return {**defaults, **_STYLE}


def _nines(cosines: ArrayLike) -> NDArray[np.float64]:
    """-log10(1 - cosine): 0 for 0, 1 for 0.9, 2 for 0.99, at most 6."""
    distance = 1.0 - np.asarray(cosines, np.float64)
    nines: NDArray[np.float64] = -np.log10(distance.clip(_CLOSEST, 2.0))
    return nines


def _bounds(axes: Any, floor: Floor) -> None:
    """The floor's bounds as lines, their names one above the other so that none is covered."""
    where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    bounds = (("mean", floor.mean, "-"), ("p5", floor.p5, "--"), ("min", floor.min, ":"))
    for place, (name, level, linestyle) in enumerate(bounds):
        (x,) = _nines([level])
        line = {"color": _INK, "linewidth": 0.9, "linestyle": linestyle}
        axes.axvline(x, **line)
        stem = {"arrowstyle": "-", "shrinkA": 0, "shrinkB": 0, **line}
        axes.annotate("", (x, 1), xytext=(0, 10 + 10 * place), arrowprops=stem, **where)
        text, offset = f"{name} ≥ {level!r}", (3, 3 + 10 * place)
        axes.annotate(text, (x, 1), xytext=offset, color=_INK, fontsize=8, **where)


def _distribution(axes: Any, y: float, cosines: NDArray[np.float64], colour: str) -> None:
    """A plan's line: middle half, 5th to 95th percentile, median, mean, and what is below."""
    quantiles = np.quantile(cosines, [0.05, 0.25, 0.5, 0.75, 0.95])
    p5, p25, median, p75, p95 = _nines(quantiles)
    below = _nines(np.sort(cosines[cosines < quantiles[0]]))
    axes.plot([p5, p95], [y, y], color=colour, linewidth=1.2)
    axes.plot([p25, p75], [y, y], color=colour, linewidth=7, alpha=0.45, solid_capstyle="butt")
    axes.plot([p5, median], [y, y], "|", color=colour, markersize=7.5, markeredgewidth=1.5)
    axes.plot(below, [y] * len(below), ".", color=colour, markersize=4)
    axes.plot(below[:1], [y] * len(below[:1]), "o", color=colour, markersize=4)
    axes.plot(_nines([cosines.mean()]), [y], "D", color=_INK, markersize=3.6, markeredgewidth=0)


def _medians(
    lengths: NDArray[np.int64], cosines: NDArray[np.float64]
) -> tuple[list[float], list[float]]:
    x, y = [], []
    spans = np.floor(np.log2(lengths))
    for span in np.unique(spans):
        members = spans == span
        if members.sum() >= _FEWEST_IN_A_MEDIAN:
            x.append(float(np.median(lengths[members])))
            y.append(float(_nines([float(np.median(cosines[members]))])[0]))
    return x, y


def _shown(cosines: NDArray[np.float64], step: int) -> NDArray[np.int64]:
    """Every step-th text, and the worst ten whatever the step."""
    order = np.argsort(cosines, kind="stable")
    return np.union1d(np.arange(0, len(cosines), step), order[:_WORST_DOTS])


def _nines_axis(axes: Any, axis: Any, values: Iterable[float]) -> None:
    low, high = min(values), max(values)
    pad = 0.04 * max(high - low, 0.5)
    limits = (low - pad, min(high + pad, 6.1))
    (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(*limits)
    ticks = list(_nines_ticks(*limits))
    axis.set_ticks([place for place, _ in ticks], [name for _, name in ticks], color=_MUTED)
    axis.set_tick_params(length=0)
    axis.grid(color=_RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _nines_ticks(low: float, high: float) -> Iterator[tuple[float, str]]:
    """0, 0.9, 0.99 and so on; halves between them where there is room for few whole nines."""
    digits = {0: "0"} | {count: "0." + "9" * count for count in range(1, 6)}
    ticks = [(float(count), name) for count, name in digits.items()] + [(6.0, "≥ 0.999999")]
    if high - low < 3.5:
        halves = [0.5] + [1 - 5 * 10.0 ** -(count + 1) for count in range(1, 5)]
        ticks += [(float(_nines([half])[0]), f"{half:.5f}".rstrip("0")) for half in halves]
    yield from (tick for tick in sorted(ticks) if low <= tick[0] <= high)


def _token_ticks(axes: Any, lengths: NDArray[np.int64]) -> None:
    first, last = int(np.floor(np.log2(lengths.min()))), int(np.ceil(np.log2(lengths.max())))
    powers = [2**power for power in range(first, last + 1)]
    axes.set_xticks(powers, [str(power) for power in powers], color=_MUTED)
    axes.set_xticks([], minor=True)
    axes.set_xlim(lengths.min() / 1.2, lengths.max() * 1.2)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", color=_RULE, linewidth=0.7)


def _legends(
    figure: Any, matplotlib: Any, everything: Sequence[Series], kinds: Sequence[tuple[str, str]]
) -> None:
    line = matplotlib.lines.Line2D
    variants = list(dict.fromkeys(variant for variant, _ in kinds))
    colours = [
        line([], [], color=_colour(variant, everything), linewidth=3, label=_label(variant))
        for variant in variants
    ]
    markers = [
        line([], [], color=_MUTED, linestyle="", marker=_marker(compute), label=_label(compute))
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
            labelcolor=_INK,
        )
        legend.get_title().set_color(_MUTED)
        for text in legend.get_texts():
            text.set_parse_math(False)
        top -= 0.075 + 0.052 * len(handles)


def _kind_order(kind: tuple[str, str]) -> tuple[int, str, str]:
    variant, compute = kind
    known = variant in _KNOWN_VARIANTS
    return (_KNOWN_VARIANTS.index(variant) if known else len(_KNOWN_VARIANTS), variant, compute)


def _colour(variant: str, everything: Sequence[Series]) -> str:
    others = sorted({series.variant for series in everything} - set(_KNOWN_VARIANTS))
    order = [*_KNOWN_VARIANTS, *others]
    return _COLOURS[order.index(variant) % len(_COLOURS)]


def _marker(compute: str) -> str:
    return _MARKERS.get(compute, _OTHER_MARKER)


def _label(text: str) -> str:
    """What the fonts of every machine can show, and not wider than a third of the picture."""
    plain = re.sub("^_|[^ -~]", "?", text)  # a legend leaves out what begins with "_"
    cut = len(plain) > _LABEL_CHARACTERS
    return plain[: _LABEL_CHARACTERS - 3] + "..." if cut else plain


def _svg(matplotlib: Any, figure: Any, name: str, title: str) -> str:
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
