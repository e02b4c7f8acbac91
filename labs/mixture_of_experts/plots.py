"""Draws what a mixture of experts gains."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from dashboards.palette import VARIANTS
from labs.harness import theory
from labs.harness.facts.context import JudgedRun
from labs.harness.facts.drawing import GREY, aside, draw_forecasts, legend_above, plt, reach
from labs.harness.facts.parts import OwnPlot
from labs.harness.facts.sweep import concurrency_sweep
from labs.harness.spec import Point
from labs.mixture_of_experts.facts import Facts
from labs.mixture_of_experts.lab import ACTIVE, MIXTURE, TOTAL

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)  # labelled


def batches(run: JudgedRun, facts: Facts) -> bool:
    """Draw TPOT over the batch beside its bounds, and the mixture's ratio to each dense model."""
    if not facts.batches:
        return False
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    colours = dict(zip([v.name for v in run.lab.variants], VARIANTS, strict=False))
    forecast = False
    for place, (name, colour) in enumerate(colours.items()):
        forecast |= _draw_tpots(left, run, name, colour, aside(place, len(colours)), forecast)
    left.set_ylabel("TPOT (ms); dotted: at least, by bytes and FLOP")
    left.set_ylim(bottom=0)
    for place, dense in enumerate((TOTAL, ACTIVE)):
        if dense in colours:
            _draw_ratios(right, run, facts, dense, colours[dense], aside(place, 2))
    right.axhline(1, color=GREY, lw=0.8)
    right.set_yscale("log")
    low, high = right.get_ylim()
    ticks = [ratio for ratio in RATIOS if low <= ratio <= high]
    right.set_yticks(ticks, [f"{ratio:g}" for ratio in ticks])
    right.minorticks_off()
    right.set_ylabel("TPOT, mixture / dense; lines: by bytes")
    users = [at.users for at in facts.batches]
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(users, [str(n) for n in users])
        ax.set_xlabel("requests in flight")
        legend_above(ax)
    return True


def _draw_tpots(
    ax: Axes, run: JudgedRun, variant: str, colour: str, moved: float, labelled: bool
) -> bool:
    """Draw one model's TPOT, as forecast and as measured; tell whether any was forecast.

    `labelled`: the legend explains what a forecast looks like already.
    """
    points = [p for p in concurrency_sweep(run.points) if p.variant.name == variant]
    forecast = draw_forecasts(
        ax,
        [moved * p.load.users for p in points],
        [run.forecast(p, "tpot_mean_s") for p in points],
        1000,
        label="" if labelled else "forecast, with its band",
    )
    known = [(p, i) for p in points if (i := run.interval(p, "tpot_mean_s"))]
    if known:
        users = [moved * p.load.users for p, _ in known]
        values = [1000 * i.value for _, i in known]
        ax.errorbar(users, values, yerr=reach([i for _, i in known], 1000), fmt="o-", ms=4,
                    color=colour, capsize=3, label=variant)  # fmt: skip
    if points:
        batch = _between(points)
        least_ms = [1000 * _step_s(points[0], b) for b in batch]
        ax.plot(batch, least_ms, ":", lw=1.2, color=colour)
    return forecast


def _draw_ratios(
    ax: Axes, run: JudgedRun, facts: Facts, dense: str, colour: str, moved: float
) -> None:
    sides = [(at.users, at.total if dense == TOTAL else at.active) for at in facts.batches]
    known = [(users, of.measured) for users, of in sides if of and of.measured.known]
    if known:
        ratios = [ratio for _, ratio in known]
        values = [float(ratio.value or 0) for ratio in ratios]
        ax.errorbar([moved * users for users, _ in known], values,
                    yerr=reach(ratios), fmt="o", ms=4, color=colour, capsize=3,
                    label=f"mixture / {dense}")  # fmt: skip
    sweep = concurrency_sweep(run.points)
    ours, theirs = ([p for p in sweep if p.variant.name == v] for v in (MIXTURE.name, dense))
    for mine, other in itertools.product(ours, theirs):
        forecast = run.forecast_ratio(mine, other, "tpot_mean_s")
        if forecast and mine.load == other.load:
            ax.plot(moved * mine.load.users, forecast, "_", color=GREY, ms=13, mew=2, zorder=3)
    if ours and theirs:
        batch = _between(ours)
        ax.plot(batch, [_step_s(ours[0], b) / _step_s(theirs[0], b) for b in batch],
                "-", lw=1, color=colour)  # fmt: skip


def _between(points: list[Point]) -> list[float]:
    """List batches from the lightest to the heaviest load, evenly on a logarithmic axis."""
    users = [p.load.users for p in points]
    return [float(b) for b in np.geomspace(min(users), max(users), 40)]


def _step_s(point: Point, batch: float) -> float:
    return theory.decode_step_s(point.shape, point.ceilings, batch, point.context_tokens)


PLOTS: Mapping[str, OwnPlot] = {"batches": batches}
