"""Draw plots as SVG in the colours of `dashboards.palette`; equal data gives equal bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

from dashboards.palette import BLUE, BOUND, ORANGE
from labs.harness.analysis.computed import Band
from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.verdicts import ForecastAtPoint, Interval
from labs.harness.derived.step_parts import Parts

mpl.use("svg")
mpl.rcdefaults()  # whatever the reader's own `matplotlibrc` says
mpl.rcParams.update(
    {
        "svg.hashsalt": "labs",  # the same data gives the same file
        "svg.fonttype": "none",  # text stays text: a third of the size, and it can be searched
        "font.sans-serif": ["DejaVu Sans", "Verdana"],  # of the same widths, wherever it is read
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "savefig.facecolor": "white",
    }
)
from matplotlib import pyplot  # noqa: E402  (the backend is chosen first)

plt = pyplot  # for whatever draws: it has chosen the backend and the style
GREY = "#666666"
BANDS = " Grey is what was forecast before any engine started, with its band."  # for captions
MOST_DRAWN = 20_000  # points of one line; a page has few of them


def draw_forecasts(
    ax: Axes,
    x: Sequence[float],
    forecasts: Sequence[ForecastAtPoint | Band | None],
    scale: float = 1,
    colour: str = GREY,
    label: str = "forecast, with its band",
) -> bool:
    """Draw each forecast as a short line on its band, at its place x; tell whether any was drawn.

    `scale` multiplies the figures into the unit of the axis.
    """
    known = [(at, f) for at, f in zip(x, forecasts, strict=True) if f]
    if not known:
        return False
    at = [a for a, _ in known]
    ax.vlines(
        at,
        [scale * f.low for _, f in known],
        [scale * f.high for _, f in known],
        color=colour,
        alpha=0.4,
        lw=9,
        zorder=3,
        label=label,
    )
    ax.plot(at, [scale * f.value for _, f in known], "_", color=colour, ms=13, mew=2, zorder=3)
    return True


def draw_forecasts_of_two(
    ax: Axes,
    forecasts: Sequence[tuple[ForecastAtPoint | Band | None, ForecastAtPoint | Band | None]],
    across: Callable[[float], float],
    label: str = "forecast, with its bands",
    colour: str = GREY,
) -> bool:
    """Draw forecasts of two figures as crosses over both bands; tell whether any was drawn.

    Of each pair the first is drawn across, changed by the monotonic function `across`, and the
    second upwards. A pair that lacks one is left out.
    """
    known = [(x, y) for x, y in forecasts if x and y and x.value and x.low and x.high]
    for x, y in known:
        left, right = sorted((across(x.low), across(x.high)))
        ax.hlines(y.value, left, right, color=colour, alpha=0.4, lw=3, zorder=1, label=label)
        ax.vlines(across(x.value), y.low, y.high, color=colour, alpha=0.4, lw=3, zorder=1)
        label = "_nolegend_"
    return bool(known)


def reach(intervals: Sequence[Interval | Quantity | None], scale: float = 1) -> list[list[float]]:
    """List how far intervals reach below and above their values; 0 where one is not known.

    This is what matplotlib takes as `yerr`. Where a mean's interval is one of its logarithm, the
    upper part is longer. `scale` multiplies the figures into the unit of the axis.
    """
    ends = [(i.value or 0.0, i.low, i.high) if i else (0.0, None, None) for i in intervals]
    below = [scale * (value - low) if low is not None else 0.0 for value, low, _ in ends]
    above = [scale * (high - value) if high is not None else 0.0 for value, _, high in ends]
    return [below, above]


def draw_measured(
    ax: Axes,
    x: Sequence[float],
    figures: Sequence[Interval | Quantity | None],
    colour: str,
    label: str,
    scale: float = 1,
    **style: Any,
) -> None:
    """Draw figures with their intervals, each at its place x; what is missing is left out.

    `scale` multiplies the figures into the unit of the axis; `style` is matplotlib's of error bars.
    """
    known = [
        (at, scale * f.value, f)
        for at, f in zip(x, figures, strict=True)
        if f and f.value is not None
    ]
    if known:
        places, heights, drawn = zip(*known, strict=True)
        bars = reach(drawn, scale) if any(f.low is not None for f in drawn) else None
        ax.errorbar(places, heights, yerr=bars, color=colour, label=label, **style)


def aside(place: int, series: int) -> float:
    """Return by what factor to move one of several series across a logarithmic axis.

    The intervals of two series at one place then stand beside each other.
    """
    return float(2 ** (0.15 * (place - (series - 1) / 2)))


def draw_logarithmic(ax: Axes) -> None:
    """Make both axes logarithmic over what has been drawn, with plain numbers."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        write_plainly(axis)


def write_plainly(axis: Axis) -> None:
    """Write plain numbers, no powers of ten, on a logarithmic axis: few on a long one.

    That is 1, 2 and 5 times each power of ten; beyond two of these powers, 1 and 3 times; beyond
    four, the powers alone. Call it when all is drawn.
    """
    low, high = axis.get_view_interval()
    span = high / low
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if span < 100 else (1, 3) if span < 1e4 else (1,))
    )
    axis.set_major_formatter("{x:,.7g}")
    axis.set_minor_formatter(NullFormatter())


def draw_parts(ax: Axes, passes: Mapping[str, Parts]) -> None:
    """Draw each of one or more passes as a bar of its parts in ms, with the measured total.

    Where the parts before the last are longer together than the pass, as where the device reads and
    computes at once, the total lies below the top of the bar.
    """
    x, foot, parts = range(len(passes)), [0.0] * len(passes), list(passes.values())
    split = [p.overhead_s.known for p in parts]
    for name, colour, seconds in (
        ("reading", BLUE, [p.reading_s.value for p in parts]),
        ("computing", BOUND, [p.computing_s.value for p in parts]),
        ("overhead", ORANGE, [p.overhead_s.value for p in parts]),
        ("the engine's own", GREY, [p.engine_s.value for p in parts]),
        ("the rest", GREY, [None if p.overhead_s.known else p.rest_s.value for p in parts]),
    ):
        if all(s is None for s in seconds):
            continue
        heights = [1000 * max(0.0, s or 0.0) for s in seconds]
        hatch = "//" if name == "the rest" and any(split) else None
        ax.bar(x, heights, 0.6, bottom=foot, color=colour, alpha=0.75, label=name, hatch=hatch)
        foot = [below + height for below, height in zip(foot, heights, strict=True)]
    measured = [1000 * (p.measured_s.value or 0.0) for p in parts]
    ax.plot(x, measured, "_", color="black", ms=30, mew=2, label="measured")
    for at, top in zip(x, measured, strict=True):
        text = f"{float(f'{top:.3g}'):,.4g}"
        ax.annotate(text, (at, top), xytext=(0, 3), textcoords="offset points", ha="center")
    ax.set_xticks(x, list(passes))
    ax.set_xlim(-0.6, max(1.6, len(passes) - 0.4))
    ax.set_ylim(0, 1.2 * max([*foot, *measured]))
    ax.grid(axis="x", visible=False)


def legend_above(ax: Axes) -> None:
    """Put the legend above the axes, where it hides no figure."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=8)


def legend_of_all(figure: Figure, axes: Iterable[Axes], columns: int | None = None) -> None:
    """Put one legend above all axes of a figure, with each of their labels once."""
    known = (zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes)
    by_label = {label: drawn for of in known for drawn, label in of}
    ncols = columns or len(by_label)
    figure.legend(
        by_label.values(), by_label, loc="outside upper center", ncols=ncols, frameon=False
    )


def thinned(x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Thin out a line that has more points than can be seen; a shorter one stays as it is.

    Of each of many equal stretches its ends, its lowest and its highest point are kept.
    """
    if len(x) <= MOST_DRAWN:
        return x, y
    stretches = np.array_split(np.arange(len(x)), MOST_DRAWN // 4)
    kept = np.unique([(s[0], s[np.argmin(y[s])], s[np.argmax(y[s])], s[-1]) for s in stretches])
    return x[kept], y[kept]
