"""Draws what each engine makes of the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from dashboards.palette import VARIANTS
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import draw_forecasts_of_two, draw_logarithmic, legend_of_all, plt
from labs.harness.spec.lab import Point
from labs.serving_engines.facts import Facts

RATE = "output_tokens_per_s"
ACROSS = {"tpot_mean_s": "TPOT, mean (ms)", "ttft_mean_s": "TTFT, mean (ms)"}


def curves(run: JudgedRun, facts: Facts) -> bool:
    """Draw throughput against TPOT and TTFT, a line for each engine, from few users to many."""
    if not facts.curves:
        return False
    names = dict.fromkeys(at.variant for at in facts.curves)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    for name, colour in zip(names, VARIANTS, strict=False):
        points = [p for p in run.points if p.variant.name == name]
        points.sort(key=lambda p: p.load.users)
        for ax, metric in zip(axes, ACROSS, strict=True):
            _draw_curve(ax, run, name, points, metric, colour)
    for ax, title in zip(axes, ACROSS.values(), strict=True):
        draw_logarithmic(ax)
        ax.set_xlabel(title)
    axes[0].set_ylabel("output throughput (tok/s)")
    legend_of_all(figure, axes)
    return True


def _draw_curve(
    ax: Axes, run: JudgedRun, name: str, points: Sequence[Point], metric: str, colour: str
) -> None:
    """Draw an engine's throughput against a metric, with the users beside each point."""
    forecasts = [(run.forecast(p, metric), run.forecast(p, RATE)) for p in points]
    draw_forecasts_of_two(ax, forecasts, lambda s: 1000 * s, f"{name}, forecast")
    known = [
        (1000 * x, y, p.load.users)
        for p in points
        if (x := run.mean(p, metric)) is not None and (y := run.mean(p, RATE))
    ]
    xs, ys = [x for x, _, _ in known], [y for _, y, _ in known]
    ax.plot(xs, ys, "o-", color=colour, label=name, ms=4)
    beside: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, 4)}
    for x, y, users in known:
        ax.annotate(str(users), (x, y), fontsize=7, color=colour, **beside)


PLOTS: Mapping[str, OwnPlot] = {"curves": curves}
