"""Draws what a mixture of experts gains."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from dashboards.palette import VARIANTS
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.derived.sweep import concurrency_sweep
from labs.harness.reports.drawing import (
    GREY,
    aside,
    draw_forecasts,
    draw_measured,
    legend_above,
    plt,
)
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from labs.mixture_of_experts.facts import Facts
from labs.mixture_of_experts.lab import ACTIVE, MIXTURE, TOTAL

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)  # labelled


def batches(run: JudgedRun, facts: Facts) -> bool:
    """Draw TPOT over the batch beside its bounds, and the mixture's ratio to each dense model."""
    if not facts.batches:
        return False
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    colours = dict(zip([v.name for v in run.lab.variants], VARIANTS, strict=False))
    forecast_label = "forecast, with its band"
    for place, (name, colour) in enumerate(colours.items()):
        moved = aside(place, len(colours))
        if _draw_tpots(left, run, name, colour, moved, forecast_label):
            forecast_label = ""  # the legend explains it once
    for place, dense in enumerate((TOTAL, ACTIVE)):
        if dense in colours:
            _draw_ratios(right, run, facts, dense, colours[dense], aside(place, 2))
    left.set_ylabel("TPOT (ms); dotted: at least, by bytes and FLOP")
    left.set_ylim(bottom=0)
    right.set_ylabel("TPOT, mixture / dense; lines: by bytes")
    right.axhline(1, color=GREY, lw=0.8)
    right.set_yscale("log")
    low, high = right.get_ylim()
    ticks = [ratio for ratio in RATIOS if low <= ratio <= high]
    right.set_yticks(ticks, [f"{ratio:g}" for ratio in ticks])
    right.minorticks_off()
    users = [at.users for at in facts.batches]
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(users, [str(n) for n in users])
        ax.set_xlabel("requests in flight")
        legend_above(ax)
    return True


def _sweep(run: JudgedRun, variant: str) -> list[Point]:
    return [p for p in concurrency_sweep(run.points) if p.variant.name == variant]


def _draw_tpots(
    ax: Axes, run: JudgedRun, variant: str, colour: str, moved: float, forecast_label: str
) -> bool:
    """Draw one model's TPOT, as forecast and as measured; tell whether any was forecast."""
    points = _sweep(run, variant)
    x = [moved * p.load.users for p in points]
    forecasts = [run.forecast(p, "tpot_mean_s") for p in points]
    forecast = draw_forecasts(ax, x, forecasts, 1000, label=forecast_label)
    measured = [run.interval(p, "tpot_mean_s") for p in points]
    draw_measured(ax, x, measured, colour, variant, 1000, fmt="o-", ms=4, capsize=3)
    if points:
        batch = _between(points)
        least_ms = [1000 * _step_s(points[0], b) for b in batch]
        ax.plot(batch, least_ms, ":", lw=1.2, color=colour)
    return forecast


def _draw_ratios(
    ax: Axes, run: JudgedRun, facts: Facts, dense: str, colour: str, moved: float
) -> None:
    """Draw the mixture's TPOT beside a dense model's: measured, forecast, and by bytes."""
    sides = [at.total if dense == TOTAL else at.active for at in facts.batches]
    x = [moved * at.users for at in facts.batches]
    ratios = [of.measured if of else None for of in sides]
    draw_measured(ax, x, ratios, colour, f"mixture / {dense}", fmt="o", ms=4, capsize=3)
    ours, theirs = _sweep(run, MIXTURE.name), _sweep(run, dense)
    for mine, other in itertools.product(ours, theirs):
        forecast = run.forecast_ratio(mine, other, "tpot_mean_s")
        if forecast and mine.load == other.load:
            ax.plot(moved * mine.load.users, forecast, "_", color=GREY, ms=13, mew=2, zorder=3)
    if ours and theirs:
        batch = _between(ours)
        by_bytes = [_step_s(ours[0], b) / _step_s(theirs[0], b) for b in batch]
        ax.plot(batch, by_bytes, "-", lw=1, color=colour)


def _between(points: Sequence[Point]) -> list[float]:
    """List batches from the lightest to the heaviest load, evenly on a logarithmic axis."""
    users = [p.load.users for p in points]
    return [float(b) for b in np.geomspace(min(users), max(users), 40)]


def _step_s(point: Point, batch: float) -> float:
    return theory.decode_step_s(point.shape, point.ceilings, batch, point.context_tokens)


PLOTS: Mapping[str, OwnPlot] = {"batches": batches}
