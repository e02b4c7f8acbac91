"""Draw what a schema costs the first token and every later one, backend by backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from dashboards.palette import VARIANTS
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import GREY, draw_forecasts, plt, reach
from labs.structured_output.facts import Facts

ABOVE: dict[str, Any] = {  # a legend beside the title, where no bar is
    "frameon": False,
    "loc": "lower right",
    "bbox_to_anchor": (1, 0.985),
    "borderaxespad": 0.2,
}


def draw_structures(run: JudgedRun, _: Facts) -> bool:
    """Draw each backend's TTFT of seen and unseen schemas, and its TPOT beside none imposed."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.2), gridspec_kw={"wspace": 0.12})
    drawn = [
        _bars(left, run, "seen", "ttft_mean_s", 1, moved=-0.2, width=0.36, alpha=0.45),
        _bars(left, run, "unseen", "ttft_mean_s", 1, moved=0.2, width=0.36),
        _bars(right, run, "imposed", "tpot_mean_s", 1000, width=0.72),
    ]
    if not any(drawn):
        plt.close(fig)
        return False
    left.set_ylabel("TTFT of one request, mean (s)")
    if left.get_legend_handles_labels()[0]:
        left.legend(ncols=2, columnspacing=1, handlelength=1.4, **ABOVE)
    asked = next((p for p in run.points if p.workload.name == "asked"), None)
    level = run.mean(asked, "tpot_mean_s") if asked else None
    if asked and level:
        right.axhline(1000 * level, ls="--", color=GREY, label="nothing imposed")
        right.legend(**ABOVE)
        right.set_title(f"{asked.load.users} answers at once", loc="left", fontsize=9)
    right.set_ylabel("TPOT, mean (ms)")
    return True


def _bars(
    ax: Axes,
    run: JudgedRun,
    workload: str,
    metric: str,
    scale: float,
    moved: float = 0,
    width: float = 0.8,
    alpha: float = 1,
) -> bool:
    """Draw a bar for each backend, so far from its place; return whether any was."""
    points = {p.variant.name: p for p in run.points if p.workload.name == workload}
    label = f"schema {workload}" if metric == "ttft_mean_s" else "_nolegend_"
    for x, (variant, colour) in enumerate(zip(run.lab.variants, VARIANTS, strict=False)):
        point = points.get(variant.name)
        measured = run.interval(point, metric) if point else None
        if point is None or measured is None:
            continue
        draw_forecasts(ax, [x + moved], [run.forecast(point, metric)], scale, label="")
        height, bars = scale * measured.value, reach([measured], scale)
        style: dict[str, Any] = {"capsize": 3, "color": colour, "alpha": alpha, "label": label}
        ax.bar(x + moved, height, width, yerr=bars, **style)
        label = "_nolegend_"  # once is enough
    names = [v.name.replace("-", "\n") for v in run.lab.variants]
    ax.set_xticks(range(len(names)), names)
    return bool(ax.patches)


PLOTS: Mapping[str, OwnPlot] = {"structures": draw_structures}
