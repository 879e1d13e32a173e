"""Curves and bars with intervals, in one quiet style, without a display and without global state.

Figures are `matplotlib.figure.Figure` objects made without pyplot, so nothing leaks between callers or threads.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError
from weft.media import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Readable on white and on near-black, and told apart with the common colour vision deficiencies.
COLOURS = ("#3f7fd0", "#d9822b", "#2a9d8f", "#b5598f", "#7a8088", "#8a6fd1")
INK = "#2b2f34"
GRID = "#8d939b"
MARKS = ("D", "o", "s", "^", "v", "P")


@dataclass(slots=True)
class Series:
    """A line: `y` over `x`, and where given the interval from `low` to `high` as a band."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def curve(
    series: Mapping[str, Series],
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
    log_x: bool = False,
    log_y: bool = False,
    limits: tuple[float, float] | None = None,
    size: tuple[float, float] = (6.4, 3.4),
) -> Figure:
    """Lines with interval bands. `limits` fixes the vertical axis; `size` is in inches."""
    if not series:
        raise WeftError("a curve needs at least one series")
    figure, axes = _figure(size)
    for index, (name, line) in enumerate(series.items()):
        lengths = {len(values) for values in (line.x, line.y, line.low, line.high) if values is not None}
        if len(lengths) != 1:
            raise WeftError(f"series {name!r}: x, y, low and high have different lengths {sorted(lengths)}")
        colour = COLOURS[index % len(COLOURS)]
        single = len(line.x) == 1
        axes.plot(line.x, line.y, color=colour, label=name, linewidth=1.8, marker="o" if single else None)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    if limits:
        axes.set_ylim(*limits)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=GRID, alpha=0.3, linewidth=0.6)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    _title(axes, title)
    return figure


def bars(
    values: Mapping[str, float],
    *,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    marks: Mapping[str, Mapping[str, float]] | None = None,
    label: str,
    title: str | None = None,
    percent: bool = False,
    width: float = 6.4,
) -> Figure:
    """Horizontal bars, one for each name, top to bottom, with intervals as whiskers.

    `intervals[name]` is (low, high) in the units of `values`. `marks[baseline][name]` draws a small mark on the bar's
    line, for baselines and ceilings. With `percent`, values are fractions and the axis runs from 0 to 100 %.
    """
    if not values:
        raise WeftError("a bar plot needs at least one value")
    names = list(values)
    figure, axes = _figure((width, 0.9 + 0.3 * len(names) + (0.25 if marks else 0)))
    scale = 100.0 if percent else 1.0
    axes.barh(range(len(names)), [values[name] * scale for name in names], height=0.62, color=COLOURS[0], alpha=0.85)
    for row, name in enumerate(names):
        if intervals and name in intervals:
            low, high = (edge * scale for edge in intervals[name])
            axes.plot([low, high], [row, row], color=INK, linewidth=1.1, zorder=3)
            axes.plot([low, low, None, high, high], [row - 0.12, row + 0.12, None] + [row - 0.12, row + 0.12],
                      color=INK, linewidth=1.1, zorder=3)  # fmt: skip
    for index, (baseline, points) in enumerate((marks or {}).items()):
        known = [(row, points[name] * scale) for row, name in enumerate(names) if name in points]
        axes.plot([x for _, x in known], [row for row, _ in known], linestyle="none", marker=MARKS[index % len(MARKS)],
                  markersize=5, color=COLOURS[1 + index % (len(COLOURS) - 1)], label=baseline, zorder=4,
                  markeredgecolor="white", markeredgewidth=0.7, clip_on=False)  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GRID, alpha=0.3, linewidth=0.6)
    if percent:
        axes.set_xlim(0, 100)
    axes.set_xlabel(f"{label} (%)" if percent else label)
    if marks:
        axes.legend(frameon=False, labelcolor=INK, ncols=len(marks), loc="lower left", bbox_to_anchor=(-0.01, 1.0),
                    borderaxespad=0.2, handletextpad=0.2, columnspacing=1.4)  # fmt: skip
        if title:
            figure.suptitle(title, x=0.02, ha="left", color=INK, fontsize=10.5)
    else:
        _title(axes, title)
    return figure


def png(figure: Figure, dpi: int = 144) -> bytes:
    """The figure as PNG bytes on white; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, salt: str = "weft", inline: bool = False) -> str:
    """The figure as SVG text; `inline` drops the XML header and draws the ink in the page's own text colour.

    `salt` keeps the element ids of several figures on one page apart.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    if not inline:
        return text
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib names groups figure_1, axes_1 ...; an id may occur once on a page.
    return re.sub(r'<g id="[^"]*"', "<g", text)


def save(figure: Figure, path: str | Path) -> Path:
    """Write PNG or SVG, as the suffix says, by way of a temporary file."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise WeftError(f"{path.name}: a figure is saved as .png or .svg, not {path.suffix or 'without a suffix'}")
    data = png(figure) if path.suffix == ".png" else svg(figure).encode()
    with atomic_write(path) as file:
        file.write(data)
    return path


def _figure(size: tuple[float, float]) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=GRID, labelcolor=INK, labelsize=8.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(9)
    axes.set_axisbelow(True)
    return figure, axes


def _title(axes: Any, title: str | None) -> None:
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=10.5)
