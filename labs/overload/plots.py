"""Draw goodput over the offered load, and the signals along a ramp."""

from __future__ import annotations

from collections.abc import Mapping

from dashboards.palette import BLUE, BOUND, VARIANTS
from labs.harness.analysis.signals import BATCH, GRID_S, KV, SIGNALS, TTFT, late_from_s, series
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import GREY, plt, reach
from labs.overload.facts import Facts, ramp_of


def draw_goodput(run: JudgedRun, facts: Facts) -> bool:
    """Draw goodput over offered load, in multiples of the capacity, beside the fluid model."""
    found = facts.admission
    if not found or not found.rows or not (capacity := found["capacity_per_s"].value):
        return False
    _, ax = plt.subplots(figsize=(7.5, 4.2))
    names = list(dict.fromkeys(o.variant for o in found.rows))
    sent = {o.name: (o["offered_per_s"].value or 0.0) / capacity for o in found.rows}
    for name, colour in zip(names, VARIANTS, strict=False):
        of_name = [o for o in found.rows if o.variant == name]
        mine = sorted(of_name, key=lambda o: o["times"].value or 0.0)
        goodput = [o["goodput_per_s"] / capacity for o in mine]
        ax.errorbar(
            [sent[o.name] for o in mine], [g.value or 0.0 for g in goodput],
            yerr=reach(goodput), fmt="o-", capsize=4, color=colour,
            label=name,
        )  # fmt: skip
        forecast = [
            (o["times"].value, o["forecast_per_s"] / found["forecast_capacity_per_s"]) for o in mine
        ]
        if known := [(times, share.value) for times, share in forecast if share.known]:
            ax.plot(*zip(*known, strict=True), "x:", color=colour, label=f"{name}, forecast")
    most = 1.05 * max((found["most"].value or 0.0), *sent.values())
    ax.plot([0, 1, most], [0, 1, 1], color=BOUND, lw=1, ls="--", label="min(offered, capacity)")
    ax.set_xlim(0, most)
    ax.set_ylim(0, None)
    ax.set_xlabel("offered load / capacity")
    ax.set_ylabel("goodput / capacity")
    ax.legend(frameon=False, fontsize=8)
    return True


def draw_ramp(run: JudgedRun, facts: Facts) -> bool:
    """Draw the signals of the ramp's first trial under one another, and the breach."""
    trial = next(run.trials(ramp_of(run)), None)
    if trial is None or facts.signals is None:
        return False
    readings, breach_s = series(trial), late_from_s(trial)
    _, axes = plt.subplots(4, 1, figsize=(8, 6.4), sharex=True)
    limits = {s.name: s["highest_steady"].value or 0.0 for s in facts.signals.rows}
    for ax, name in zip(axes, SIGNALS, strict=True):
        scale = 100 if name in (BATCH, KV) else 1
        y = [scale * v for v in readings[name]]
        ax.step([i * GRID_S for i in range(len(y))], y, where="post", color=BLUE, lw=1.2)
        if name in limits:
            ax.axhline(scale * limits[name], color=GREY, lw=1, ls=":")
        if breach_s is not None:
            ax.axvline(breach_s, color=BOUND, lw=1.2)
        ax.set_ylabel(f"{name}\n({'%' if scale == 100 else 's' if name == TTFT else 'requests'})")
        ax.set_ylim(0, None)
    axes[-1].set_xlabel("time in the first trial (s)")
    axes[-1].set_xlim(0, trial.summary.window_s[1])
    return True


PLOTS: Mapping[str, OwnPlot] = {"goodput": draw_goodput, "ramp": draw_ramp}
