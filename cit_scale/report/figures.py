"""The drawings of the report, as SVG that stands in the page.

Drawn without any name that comes from data, and in the page's own colours: text and lines are drawn in stand-ins, whose
place CSS variables take, so that a drawing is as dark or light as the page. matplotlib's defaults, whatever a
matplotlibrc says.
"""

# ruff: noqa: E402  matplotlib is set up before it is imported

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

# It warns of folders for its cache of fonts that cannot be written.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

# A backend for screens, or a style, that somebody has set may not be there, and the import would fail.
os.environ.update(MPLBACKEND="svg", MATPLOTLIBRC=os.devnull)

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from cit_scale.report.history import Curve
from cit_scale.report.measures import Bin

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#010203", "#010204"  # stand-ins of the page's text and of its thin lines
SERIES = tuple(f"#01030{number}" for number in range(8))  # of its colours of curves, which start again after eight
DASHES = ("-", "--", "-.", ":")  # so that curves differ without colours, too; by turns, with the colours

FEW = 10  # images in a bin that is drawn pale

PICTURE_CELLS = 125  # on each side of the picture of a confusion matrix

LEAST_ON_LOG_SCALE = 1e-30  # below it, a drawing of what is larger would be empty

STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}

_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@contextmanager
def _style() -> Iterator[None]:
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE}
    # Nothing is drawn on a screen; to set it would look for one.
    with matplotlib.rc_context({key: value for key, value in style.items() if not key.startswith("backend")}):
        yield


def curves(
    drawn: Mapping[str, Curve],
    name: str,
    *,
    label: str,
    resumed: Sequence[int] = (),
    skipped: Sequence[int] = (),
    logarithmic: bool = False,
) -> Markup:
    """Curves by the names of the legend, which the page has, over steps. name: of the drawing, different in each.

    resumed: steps at which the run went on after a stop: dashed lines. skipped: bad steps: marks at the top.
    """
    with _style():
        figure, axes = _new()
        for number, curve in enumerate(drawn.values()):
            few = "o" if len(curve.steps) < 30 else None
            axes.plot(
                curve.steps,
                curve.values,
                color=SERIES[number % len(SERIES)],
                linestyle=DASHES[number % len(DASHES)],
                marker=few,
                markersize=3,
            )
        last = max(curve.steps[-1] for curve in drawn.values())
        for step in sorted({step for step in resumed if step <= last}):
            axes.axvline(step, color=INK, linewidth=1, linestyle=(0, (2, 3)), alpha=0.6)
        if skipped:
            axes.plot(
                skipped, [0.98] * len(skipped), "v", color=INK, markersize=5, transform=axes.get_xaxis_transform()
            )
        values = np.concatenate([curve.values for curve in drawn.values()])
        if logarithmic and np.nanmin(values) > LEAST_ON_LOG_SCALE:
            axes.set_yscale("log")
            for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                formatted(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("update")
        axes.set_ylabel(label)
        return _svg(figure, name)


def reliability_diagram(bins: Sequence[Bin], name: str) -> Markup:
    """Accuracy over confidence, the diagonal of perfect calibration, and below them how many images each bin has."""
    with _style():
        figure = Figure(figsize=(4.6, 4.6))
        FigureCanvasSVG(figure)
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        filled = [each for each in bins if each.count]
        width = bins[0].high - bins[0].low
        middles = [(each.low + each.high) / 2 for each in filled]
        bounds = [each.right.interval for each in filled]
        reach = np.array(
            [(each.accuracy - low, high - each.accuracy) for each, (low, high) in zip(filled, bounds, strict=True)]
        )
        for each, middle in zip(filled, middles, strict=True):
            pale = 0.2 if each.count < FEW else 0.55
            axes.bar(middle, each.accuracy, width * 0.92, color=SERIES[0], alpha=pale)
        axes.errorbar(
            [each.confidence for each in filled],
            [each.accuracy for each in filled],
            yerr=reach.T,
            fmt="o",
            color=SERIES[0],
            ecolor=INK,
            elinewidth=1,
        )
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share that is right")
        below.bar(middles, [each.count for each in filled], width * 0.92, color=SERIES[1], alpha=0.7)
        below.set(xlabel="probability of the chosen class", ylabel="images")
        below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        return _svg(figure, name)


def confusion_picture(matrix: np.ndarray, name: str) -> tuple[Markup, int]:
    """(K, K) counts as a picture: rows are the labels, columns the choices, by number of class.

    Returns how many classes on each side a cell stands for, too: single ones of a thousand could not be seen.
    """
    side = -(-len(matrix) // PICTURE_CELLS)
    starts = np.arange(0, len(matrix), side)
    cells = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    with _style():
        figure = Figure(figsize=(6.4, 5.6))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.grid(visible=False)
        # Without the darkest and the brightest colours, which a dark and a light page swallow.
        colours = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.2, 0.95, 256)))
        shown, most = np.ma.masked_equal(cells, 0), max(2, int(cells.max()))
        extent = (-0.5, len(cells) * side - 0.5, len(cells) * side - 0.5, -0.5)
        drawn = axes.imshow(shown, cmap=colours, norm=LogNorm(1, most), interpolation="none", extent=extent)
        axes.set(xlabel="number of the class that the student says", ylabel="number of the class that it is")
        figure.colorbar(drawn, ax=axes, label="images", shrink=0.8, format="%d")
        return _svg(figure, name), side


def histogram(values: np.ndarray, name: str, *, label: str, counted: str) -> Markup:
    """Percentages from 0 to 100 in bins of five."""
    with _style():
        figure, axes = _new()
        axes.hist(values, bins=list(range(0, 105, 5)), color=SERIES[0], alpha=0.7)
        axes.set(xlim=(0, 100), xlabel=label, ylabel=counted)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, name)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colours of uint8 values, from dark to bright: (...) to (..., 3) in [0, 1]."""
    return np.asarray(matplotlib.colormaps["inferno"](values))[..., :3]


def _new() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 2.9))
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as an element of a page, hidden from screen readers: the page says in words what it shows."""
    file = io.StringIO()
    # The salt keeps the ids of one drawing apart from those of the others in the page, and equal from call to call.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.id": f"drawing-{name}"}):
        figure.savefig(file, format="svg", metadata=_NO_METADATA, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Without what would hold for the page outside of it, and with the page's own font and width.
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    text = re.sub(r'(id="|url\(#|href="#)((?!drawing-)[^")]+)', rf"\1{name}-\2", text)
    for stand_in, variable in _variables():
        text = text.replace(stand_in, f"var(--{variable})")
    return Markup(re.sub(r"\n\s*", "\n", text))


def _variables() -> Iterator[tuple[str, str]]:
    yield INK, "ink"
    yield FAINT, "faint"
    for number, colour in enumerate(SERIES):
        yield colour, f"series-{number}"
