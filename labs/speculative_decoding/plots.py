"""Draws how far guesses are right, and what they gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from dashboards.palette import VARIANTS
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import GREY, aside, plt, reach
from labs.speculative_decoding.facts import Facts, SpeedUp


def speculation(run: JudgedRun, facts: Facts) -> bool:
    """Draw acceptance by position, and the speed-up over load, each workload in a column."""
    points = facts.speed_up.points
    if not points:
        return False
    workloads = list(dict.fromkeys(p.workload for p in points))
    colours = dict(zip(dict.fromkeys(p.variant for p in points), VARIANTS, strict=False))
    size = (max(5.5, 2.4 * len(workloads)), 5.4)
    figure, rows = plt.subplots(
        2, len(workloads), figsize=size, sharex="row", sharey="row", squeeze=False
    )
    for workload, above, below in zip(workloads, *rows, strict=True):
        mine = [p for p in points if p.workload == workload]
        above.set_title(workload, fontsize=9)
        _draw_acceptance(above, facts, mine, colours)
        _draw_gain(below, run, mine, colours)
    rows[0][0].set_ylabel("share of drafts\naccepted that far")
    rows[1][0].set_ylabel("speed-up\n(TPOT without / with)")
    rows[1][0].set_ylim(bottom=0)
    users = sorted({p.users for p in points})
    rows[1][0].set_xscale("log", base=2)  # of all columns, which share their axes
    rows[1][0].set_xticks(users, [str(n) for n in users])
    rows[1][0].set_xlim(users[0] / 1.4, users[-1] * 1.4)
    handles = [Line2D([], [], color=colour, marker="o", label=v) for v, colour in colours.items()]
    handles += [Line2D([], [], color=GREY, **FORMULA, label="formula, measured parts")]
    if any(_forecast_speed_up(run, p) for p in points):
        handles += [Line2D([], [], color=GREY, **FORESEEN, label="forecast before the run")]
    columns = len(handles) if len(workloads) > 2 else 3
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    return True


FORMULA: dict[str, Any] = {"marker": "o", "ls": "none", "mfc": "none", "ms": 10}
FORESEEN: dict[str, Any] = {"marker": "_", "ls": "none", "ms": 9, "mew": 2}


def _draw_acceptance(
    ax: Axes, facts: Facts, points: Sequence[SpeedUp], colours: Mapping[str, str]
) -> None:
    """Draw the share of drafts accepted by position, of a workload's point of least load."""
    for variant, colour in colours.items():
        if mine := _by_load(points, variant):
            at = [p.shares for p in facts.acceptance.points if p.point == mine[0].point]
            shares = [share.value or 0 for share in at[0]] if at else []
            ax.plot(range(1, len(shares) + 1), shares, "o-", color=colour)
    ax.set_xlabel("position drafted")
    ax.set_ylim(0, 1.05)
    ax.xaxis.set_major_locator(MultipleLocator(1))


def _draw_gain(
    ax: Axes, run: JudgedRun, points: Sequence[SpeedUp], colours: Mapping[str, str]
) -> None:
    """Draw a workload's speed-up over load: measured, explained, forecast."""
    for place, (variant, colour) in enumerate(colours.items()):
        mine = _by_load(points, variant)
        x = [aside(place, len(colours)) * p.users for p in mine]
        ax.errorbar(
            x, [p.measured.value or np.nan if p.is_valid else np.nan for p in mine],
            yerr=reach([p.measured for p in mine]),
            capsize=3, color=colour, marker="o",
        )  # fmt: skip
        explained = [p.explained.value or np.nan for p in mine]
        ax.plot(x, explained, color=colour, **FORMULA)
        foreseen = [_forecast_speed_up(run, p) or np.nan for p in mine]
        ax.plot(x, foreseen, color=GREY, **FORESEEN)
    ax.axhline(1, color=GREY, lw=1)
    ax.set_xlabel("requests in flight")


def _by_load(points: Sequence[SpeedUp], variant: str) -> list[SpeedUp]:
    """List a variant's points in the order of their loads."""
    mine = (p for p in points if p.variant == variant)
    return sorted(mine, key=lambda p: p.users)


def _forecast_speed_up(run: JudgedRun, of: SpeedUp) -> float | None:
    """Divide the plain engine's forecast TPOT by this point's; None without both."""
    point = next(p for p in run.points if p.key == of.point)
    plain = run.point("none", of.workload, str(point.load))
    return run.forecast_ratio(plain, point, "tpot_mean_s") if plain else None


PLOTS: Mapping[str, OwnPlot] = {"speculation": speculation}
