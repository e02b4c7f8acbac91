"""Draws what adapters cost."""

from __future__ import annotations

from collections.abc import Mapping

from dashboards.palette import BLUE, BOUND
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import GREY, draw_forecasts, draw_measured, plt
from labs.multi_lora.facts import Facts, base_of
from labs.multi_lora.lab import adapter_bytes


def adapters(run: JudgedRun, facts: Facts) -> bool:
    """Draw throughput over the adapters in the batch, measured on what bytes predict."""
    counted = [
        (p.workload.adapters.count if p.workload.adapters else 0, p)
        for p in run.points
        if p.variant.name == "lora"
        and p.load == run.points[0].load
        and (p.workload.adapters is None or p.workload.adapters.mix == "uniform")
    ]
    counted.sort(key=lambda pair: pair[0])
    measured = [run.interval(p, "output_tokens_per_s") for _, p in counted]
    if not any(measured):
        return False
    _, ax = plt.subplots(figsize=(6, 3.6))
    x = range(len(counted))
    draw_measured(ax, x, measured, BLUE, "measured, 95% interval", fmt="o-", capsize=4)
    draw_forecasts(ax, x, [run.forecast(p, "output_tokens_per_s") for _, p in counted])
    base = base_of(run)
    level = run.interval(base, "output_tokens_per_s") if base else None
    if level:
        shares = [1 + n * adapter_bytes(p) / p.shape.weight_bytes if n else 1.0 for n, p in counted]
        by_bytes = [level.value / share for share in shares]
        ax.plot(x, by_bytes, "--", color=BOUND, label="base / bytes of the active adapters")
        ax.plot([-0.35], [level.value], "D", color=GREY, label="engine without LoRA")
    ax.set_xticks(x, ["base only" if n == 0 else str(n) for n, _ in counted])
    ax.set_xlabel("adapters in the batch")
    ax.set_ylabel("output throughput (tok/s)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return True


PLOTS: Mapping[str, OwnPlot] = {"adapters": adapters}
