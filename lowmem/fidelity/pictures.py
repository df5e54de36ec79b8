"""The pictures of a report's page: distributions, lengths, and size against fidelity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem.artifact.verdict import Floor
from lowmem.fidelity.drawing import (
    INK,
    MUTED,
    RULE,
    WIDTH_INCHES,
    Series,
    colour_of,
    kind_order,
    legends,
    load_matplotlib,
    marker_of,
    nines,
    nines_axis,
    plain_label,
    style_of,
    svg,
)

_MOST_DOTS = 3000
_WORST_DOTS = 10
_FEWEST_IN_A_MEDIAN = 3


@dataclass(frozen=True)
class Point:
    """One plan of the picture of sizes.

    Attributes:
        plan: Its id.
        variant: Stored form, which gives the colour.
        compute: Arithmetic, which gives the mark.
        bits: Stored bits per weight of the linears.
        size: Of all files, in words.
        mean: Mean cosine.
        p5: 5th percentile.
    """

    plan: str
    variant: str
    compute: str
    bits: float
    size: str
    mean: float
    p5: float


def distributions(groups: Sequence[tuple[str, Sequence[Series]]], floor: Floor) -> str:
    """Each plan's cosines on a line of its own, with the floor's three bounds.

    Args:
        groups: Title and plans of each group, from top to bottom; at least one plan.
        floor: Drawn as lines that the marks of the same kind must not stand left of.
    """
    everything = [series for _, members in groups for series in members]
    lines = len(everything) + len(groups)
    height = 0.95 + 0.27 * lines
    matplotlib = load_matplotlib()
    with matplotlib.rc_context(style_of(matplotlib)):
        figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, height))
        label_inches = 0.2 + 0.072 * max(len(plain_label(series.plan)) for series in everything)
        left = min(label_inches, 3.2) / WIDTH_INCHES
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
                names.append((y, plain_label(series.plan), "normal"))
                colour = colour_of(series.variant, everything)
                _distribution(axes, y, np.asarray(series.cosines), colour)
            y += 1
        beside = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        for position, name, weight in names:
            text = axes.text(-0.012, position, name, color=INK, weight=weight, **beside)
            text.set_parse_math(False)
        axes.set_ylim(y - 0.5, -0.5)
        axes.set_yticks([])
        points = np.concatenate([nines(series.cosines) for series in everything])
        levels = nines([floor.mean, floor.p5, floor.min])
        nines_axis(axes, axes.xaxis, [points.min(), points.max(), *levels])
        axes.set_xlabel("cosine to the 16-bit reference", color=MUTED)
        return svg(matplotlib, figure, "distributions", "Distribution of the cosines of each plan")


def by_length(everything: Sequence[Series], tokens: Sequence[int], floor: Floor) -> str:
    """Cosine against length: a dot for a text, a line through the medians of doubling lengths.

    Args:
        everything: At least one plan.
        tokens: Length of each text.
        floor: Its minimum is drawn.
    """
    matplotlib = load_matplotlib()
    lengths = np.maximum(np.asarray(tokens), 1)
    step = -(-len(everything) * len(lengths) // _MOST_DOTS)
    kinds = sorted({(series.variant, series.compute) for series in everything}, key=kind_order)
    with matplotlib.rc_context(style_of(matplotlib)):
        figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, 4.4))
        axes = figure.add_axes((0.125, 0.12, 0.695, 0.85), facecolor="none")
        for variant, compute in kinds:
            members = [
                one for one in everything if (one.variant, one.compute) == (variant, compute)
            ]
            colour, marker = colour_of(variant, everything), marker_of(compute)
            for series in members:
                cosines = np.asarray(series.cosines)
                shown = _shown(cosines, step)
                style = {"marker": marker, "markersize": 3, "markeredgewidth": 0, "alpha": 0.4}
                axes.plot(
                    lengths[shown], nines(cosines[shown]), linestyle="", color=colour, **style
                )
            x, y = _medians(lengths, np.mean([series.cosines for series in members], axis=0))
            axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.4)
        (level,) = nines([floor.min])
        axes.axhline(level, color=INK, linewidth=0.9, linestyle=":")
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        text = f"min ≥ {floor.min!r}"
        axes.annotate(text, (1, level), xytext=(5, 0), va="center", color=INK, **where)
        axes.set_xscale("log", base=2)
        _token_ticks(axes, lengths)
        points = np.concatenate([nines(series.cosines) for series in everything])
        nines_axis(axes, axes.yaxis, [points.min(), points.max(), level])
        axes.set_xlabel("tokens of the text", color=MUTED)
        axes.set_ylabel("cosine to the 16-bit reference", color=MUTED)
        legends(figure, matplotlib, everything, kinds)
        return svg(matplotlib, figure, "by-length", "Cosine of each text against its length")


def _bounds(axes: Any, floor: Floor) -> None:
    """The floor's bounds as lines, their names one above the other so that none is covered."""
    where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    bounds = (("mean", floor.mean, "-"), ("p5", floor.p5, "--"), ("min", floor.min, ":"))
    for place, (name, level, linestyle) in enumerate(bounds):
        (x,) = nines([level])
        line = {"color": INK, "linewidth": 0.9, "linestyle": linestyle}
        axes.axvline(x, **line)
        stem = {"arrowstyle": "-", "shrinkA": 0, "shrinkB": 0, **line}
        axes.annotate("", (x, 1), xytext=(0, 10 + 10 * place), arrowprops=stem, **where)
        text, offset = f"{name} ≥ {level!r}", (3, 3 + 10 * place)
        axes.annotate(text, (x, 1), xytext=offset, color=INK, fontsize=8, **where)


def _distribution(axes: Any, y: float, cosines: NDArray[np.float64], colour: str) -> None:
    """A plan's line: middle half, 5th to 95th percentile, median, mean, and what is below."""
    quantiles = np.quantile(cosines, [0.05, 0.25, 0.5, 0.75, 0.95])
    p5, p25, median, p75, p95 = nines(quantiles)
    below = nines(np.sort(cosines[cosines < quantiles[0]]))
    axes.plot([p5, p95], [y, y], color=colour, linewidth=1.2)
    axes.plot([p25, p75], [y, y], color=colour, linewidth=7, alpha=0.45, solid_capstyle="butt")
    axes.plot([p5, median], [y, y], "|", color=colour, markersize=7.5, markeredgewidth=1.5)
    axes.plot(below, [y] * len(below), ".", color=colour, markersize=4)
    axes.plot(below[:1], [y] * len(below[:1]), "o", color=colour, markersize=4)
    axes.plot(nines([cosines.mean()]), [y], "D", color=INK, markersize=3.6, markeredgewidth=0)


def _medians(
    lengths: NDArray[np.int64], cosines: NDArray[np.float64]
) -> tuple[list[float], list[float]]:
    x, y = [], []
    spans = np.floor(np.log2(lengths))
    for span in np.unique(spans):
        members = spans == span
        if members.sum() >= _FEWEST_IN_A_MEDIAN:
            x.append(float(np.median(lengths[members])))
            y.append(float(nines([float(np.median(cosines[members]))])[0]))
    return x, y


def _shown(cosines: NDArray[np.float64], step: int) -> NDArray[np.int64]:
    """Every step-th text, and the worst ten whatever the step."""
    order = np.argsort(cosines, kind="stable")
    return np.union1d(np.arange(0, len(cosines), step), order[:_WORST_DOTS])


def _token_ticks(axes: Any, lengths: NDArray[np.int64]) -> None:
    first, last = int(np.floor(np.log2(lengths.min()))), int(np.ceil(np.log2(lengths.max())))
    powers = [2**power for power in range(first, last + 1)]
    axes.set_xticks(powers, [str(power) for power in powers], color=MUTED)
    axes.set_xticks([], minor=True)
    axes.set_xlim(lengths.min() / 1.2, lengths.max() * 1.2)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", color=RULE, linewidth=0.7)


def frontier(points: Sequence[Point], floor: Floor) -> str:
    """Stored bits against mean and 5th percentile; a line joins the plans that none beats.

    Args:
        points: At least one plan.
        floor: Its mean and 5th percentile are drawn.
    """
    matplotlib = load_matplotlib()
    everything = [Series(point.plan, point.variant, point.compute, ()) for point in points]
    kinds = sorted({(one.variant, one.compute) for one in everything}, key=kind_order)
    with matplotlib.rc_context(style_of(matplotlib)):
        figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, 3.9))
        panels = (("mean", floor.mean, "mean"), ("p5", floor.p5, "5th percentile"))
        for place, (key, bound, title) in enumerate(panels):
            axes = figure.add_axes((0.11 + 0.385 * place, 0.2, 0.285, 0.71), facecolor="none")
            values = [getattr(point, key) for point in points]
            bits = [point.bits for point in points]
            for point, value in zip(points, values, strict=True):
                axes.plot(
                    [point.bits],
                    nines([value]),
                    marker=marker_of(point.compute),
                    color=colour_of(point.variant, everything),
                    markersize=6,
                    markeredgewidth=0,
                    alpha=0.85,
                )
            best = unbeaten(bits, values)
            axes.plot(*_steps(best), color=MUTED, linewidth=1, zorder=0)
            (level,) = nines([bound])
            axes.axhline(level, color=INK, linewidth=0.9, linestyle="--")
            axes.set_title(f"{title} (floor {bound!r})", color=INK, loc="left", fontsize=9)
            places = nines(values)
            nines_axis(axes, axes.yaxis, [places.min(), places.max(), level])
            _size_ticks(axes, points)
        figure.text(0.11, 0.03, "stored bits per weight of the linears, size", color=MUTED)
        legends(figure, matplotlib, everything, kinds)
        return svg(matplotlib, figure, "frontier", "Size of each plan against its fidelity")


def unbeaten(bits: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """Bits and value of the plans that no plan of as few bits or fewer exceeds, by bits."""
    best: list[tuple[float, float]] = []
    for size, value in sorted(zip(bits, values, strict=True), key=lambda one: (one[0], -one[1])):
        if not best or value > best[-1][1]:
            best.append((size, value))
    return best


def _steps(best: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    x, y = [], []
    for (size, value), (following, _) in zip(best, [*best[1:], best[-1]], strict=True):
        x += [size, following]
        y += [float(nines([value])[0])] * 2
    return x, y


def _size_ticks(axes: Any, points: Sequence[Point]) -> None:
    """Bits and size below each variant, but for those that would stand on one another."""
    low, high = min(point.bits for point in points), max(point.bits for point in points)
    apart = max(high - low, 1.0) / 6
    shown: list[Point] = []
    for point in sorted(points, key=lambda point: point.bits):
        if not shown or point.bits - shown[-1].bits > apart:
            shown.append(point)
    names = [f"{point.bits:.2f}\n{point.size}" for point in shown]
    axes.set_xticks([point.bits for point in shown], names, color=MUTED, fontsize=8)
    axes.set_xlim(low - apart / 2, high + apart / 2)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", color=RULE, linewidth=0.7)
