"""The plots of KV quantization."""

from __future__ import annotations

import numpy as np

from dashboards.palette import VARIANTS
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import draw_forecasts, plt
from labs.kv_quantization.facts import Facts


def preemption(run: JudgedRun, _: Facts) -> bool:
    """Draw requests in decode and preemptions over the requests in flight."""
    growing = [p for p in run.points if p.workload.name == "growing"]
    if not growing:
        return False
    _figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    names = list(dict.fromkeys(p.variant.name for p in growing))
    for name, colour in zip(names, VARIANTS, strict=False):
        points = sorted((p for p in growing if p.variant.name == name), key=lambda p: p.load.users)
        x = [p.load.users for p in points]
        for ax, metric in ((axes[0], "batch"), (axes[1], "preemptions")):
            means = [run.interval(p, metric) for p in points]
            ax.plot(x, [m.value if m else np.nan for m in means], "o-", color=colour, label=name)
            known = [run.forecast(p, metric) for p in points]
            draw_forecasts(ax, x, known, colour=colour, label=f"forecast, {name}")
        full = points[0].prompt_tokens + points[0].output_tokens
        capacity = run.interval(points[0], "kv_capacity_tokens")
        if capacity:
            axes[1].axvspan(
                capacity.value / full, capacity.value / points[0].context_tokens,
                color=colour, alpha=0.15, lw=0, label=f"predicted onset, {name}",
            )  # fmt: skip
    for ax, label in ((axes[0], "requests in decode, mean"), (axes[1], "preemptions a trial")):
        ax.set_xlabel("requests in flight")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=8)
    return True


PLOTS = {"preemption": preemption}
