"""Draw what a schema costs the first token and every later one, backend by backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from dashboards.palette import VARIANTS
from labs.harness.facts.context import JudgedRun
from labs.harness.facts.drawing import GREY, draw_forecasts, plt, reach
from labs.harness.facts.parts import OwnPlot
from labs.harness.spec import Point
from labs.structured_output.facts import Facts

ABOVE: dict[str, Any] = {  # a legend beside the title, where no bar is
    "frameon": False,
    "loc": "lower right",
    "bbox_to_anchor": (1, 0.985),
    "borderaxespad": 0.2,
}
Points = Mapping[tuple[str, str], Point]


def draw_structures(run: JudgedRun, _: Facts) -> bool:
    """Draw each backend's TTFT of seen and unseen schemas, and its TPOT beside none imposed."""
    names = [v.name for v in run.lab.variants]
    points = {(p.variant.name, p.workload.name): p for p in run.points}
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.2), gridspec_kw={"wspace": 0.12})
    drawn = [
        _bars(left, run, names, points, "seen", "ttft_mean_s", -0.2, 0.4, alpha=0.45),
        _bars(left, run, names, points, "unseen", "ttft_mean_s", 0.2, 0.4, alpha=1),
        _bars(right, run, names, points, "imposed", "tpot_mean_s", 0, 0.8, alpha=1),
    ]
    if not any(drawn):
        plt.close(fig)
        return False
    left.set_ylabel("TTFT of one request, mean (s)")
    if left.get_legend_handles_labels()[0]:
        left.legend(ncols=2, columnspacing=1, handlelength=1.4, **ABOVE)
    asked = points.get((names[0], "asked"))
    level = run.mean(asked, "tpot_mean_s") if asked else None
    if asked and level:
        right.axhline(1e3 * level, ls="--", color=GREY, label="nothing imposed")
        right.legend(**ABOVE)
        right.set_title(f"{asked.load.users} answers at once", loc="left", fontsize=9)
    right.set_ylabel("TPOT, mean (ms)")
    return True


def _bars(
    ax: Axes,
    run: JudgedRun,
    names: list[str],
    points: Points,
    workload: str,
    metric: str,
    moved: float,
    width: float,
    alpha: float,
) -> bool:
    """Draw a bar for each backend, so far from its place; return whether any was."""
    scale = 1e3 if metric == "tpot_mean_s" else 1.0
    label = f"schema {workload}" if metric == "ttft_mean_s" else "_nolegend_"
    drawn = False
    for x, name in enumerate(names):
        point = points.get((name, workload))
        measured = run.interval(point, metric) if point else None
        if point is None or measured is None:
            continue
        draw_forecasts(ax, [x + moved], [run.forecast(point, metric)], scale, label="")
        ax.bar(
            x + moved,
            scale * measured.value,
            0.9 * width,
            yerr=reach([measured], scale),
            capsize=3,
            color=VARIANTS[x],
            alpha=alpha,
            label="_nolegend_" if drawn else label,
        )
        drawn = True
    ax.set_xticks(range(len(names)), [name.replace("-", "\n") for name in names])
    return drawn


PLOTS: Mapping[str, OwnPlot] = {"structures": draw_structures}
