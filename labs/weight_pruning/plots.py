"""Draws what zeros in the weights cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND, ORANGE
from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.quality_summary import Quality
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import GREY, plt, write_plainly
from labs.weight_pruning.facts import PATTERN, Facts, Selection, Sparsities, Step
from labs.weight_pruning.lab import energy_gone


def cliff(run: JudgedRun, facts: Facts) -> bool:
    """Draw perplexity over sparsity, and the energy that goes beside its forecast."""
    if facts.sparsities is None:
        return False
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=(3, 2))
    for by, colour in zip(get_args(Selection), (BLUE, ORANGE), strict=True):
        _draw_perplexity(left, facts.sparsities, by, colour)
    if facts.quality:
        _draw_served(left, run, facts.sparsities, facts.quality)
    left.set_ylabel("perplexity / dense")
    left.set_xlabel("zeros, %; dotted: each method's knee")
    _draw_energy(right, facts.sparsities)
    right.set_ylabel("energy of the weights gone, %")
    right.set_xlabel("zeros, %")
    for ax in (left, right):
        ax.set_yscale("log")
        write_plainly(ax.yaxis)
        ax.legend(frameon=False, fontsize=8)
    return True


def _draw_perplexity(ax: Axes, of: Sparsities, by: Selection, colour: str) -> None:
    name = by.capitalize()
    ratios = [step.by[by]["ratio"] for step in of.curve]
    ax.plot(percent(of.curve), values(ratios), "o-", color=colour, ms=4, label=name)
    if pattern := of.at(PATTERN):
        zeros, ratio = percent([pattern]), values([pattern.by[by]["ratio"]])
        ax.plot(zeros, ratio, "s", color=colour, mfc="white", ms=7, label=f"{name}, 2:4")
    if knee := of.knees[by]:
        ax.axvline(percent([knee.before])[0], color=colour, ls=":", lw=1)


def _draw_served(ax: Axes, run: JudgedRun, of: Sparsities, quality: Quality) -> None:
    """Draw the perplexity that the quality probe found on the engines."""
    patterns = {v.name: v.weights.partition("-")[2] for v in run.lab.variants}
    label, style = "on the engine", dict[str, Any](color=BOUND, ms=5, zorder=4, mfc="none")
    for name, beside in quality.treatments.items():
        if step := of.at(patterns[name]):
            ratio = values([beside.perplexity_ratio])
            ax.plot(percent([step]), ratio, "D", label=label, **style)
            label = ""


def _draw_energy(ax: Axes, of: Sparsities) -> None:
    """Draw the energy that goes by magnitude beside its forecast."""
    shares = [i / 100 for i in range(5, 76)]
    forecast = [100 * energy_gone(share) for share in shares]
    ax.plot([100 * s for s in shares], forecast, color=GREY, label="forecast: normal weights")
    gone = values([100 * step.by["magnitude"]["energy_gone"] for step in of.curve[1:]])
    ax.plot(percent(of.curve[1:]), gone, "o", color=BLUE, ms=4, label="measured, by magnitude")


def percent(steps: Sequence[Step]) -> list[float]:
    return values([100 * step.zeros for step in steps])


def values(figures: Sequence[Quantity]) -> list[float]:
    """List the values; what is missing is not drawn."""
    return [math.nan if figure.value is None else figure.value for figure in figures]


PLOTS: Mapping[str, OwnPlot] = {"cliff": cliff}
