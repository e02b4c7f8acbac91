"""Draw what a schema costs the first token and every later one, backend by backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dashboards.palette import VARIANTS
from labs.harness.facts.context import JudgedRun
from labs.harness.facts.drawing import GREY, draw_forecasts, plt, reach
from labs.harness.facts.parts import OwnPlot
from labs.harness.spec import Point
from labs.structured_output.facts import Facts

ABOVE: dict[str, Any] = {  # a legend beside the title, where no bar is
    "frameon": False, "loc": "lower right", "bbox_to_anchor": (1, 0.985), "borderaxespad": 0.2,
}  # fmt: skip


def draw_structures(run: JudgedRun, _: Facts) -> bool:
    """Draw each backend's TTFT of seen and unseen schemas, and its TPOT beside none imposed."""
    names = [v.name for v in run.lab.variants]
    by_name = {(p.variant.name, p.workload.name): p for p in run.points}
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.2), gridspec_kw={"wspace": 0.12})
    drawn = [
        _bars(run, left, names, by_name, ("seen", "unseen"), "ttft_mean_s"),
        _bars(run, right, names, by_name, ("imposed",), "tpot_mean_s"),
    ]
    if not any(drawn):
        plt.close(fig)
        return False
    left.set_ylabel("TTFT of one request, mean (s)")
    if left.get_legend_handles_labels()[0]:
        left.legend(ncols=2, columnspacing=1, handlelength=1.4, **ABOVE)
    asked = by_name.get((names[0], "asked"))
    level = run.mean(asked, "tpot_mean_s") if asked else None
    if asked and level:
        right.axhline(1e3 * level, ls="--", color=GREY, label="nothing imposed")
        right.legend(**ABOVE)
        right.set_title(f"{asked.load.users} answers at once", loc="left", fontsize=9)
    right.set_ylabel("TPOT, mean (ms)")
    return True


def _bars(
    run: JudgedRun, ax: Any, names: list[str], by_name: Mapping[tuple[str, str], Point],
    workloads: tuple[str, ...], metric: str,
) -> bool:  # fmt: skip
    """Draw a bar for each backend and workload; return whether any was."""
    scale = 1e3 if metric == "tpot_mean_s" else 1.0
    width = 0.8 / len(workloads)
    drawn = False
    for i, workload in enumerate(workloads):
        label: str | None = f"schema {workload}" if len(workloads) > 1 else None
        for x, name in enumerate(names):
            point = by_name.get((name, workload))
            measured = run.interval(point, metric) if point else None
            if point is None or measured is None:
                continue
            drawn = True
            at = x + (i - (len(workloads) - 1) / 2) * width
            draw_forecasts(ax, [at], [run.forecast(point, metric)], scale, label="")
            ax.bar(at, scale * measured.value, 0.9 * width,
                   yerr=reach([measured], scale), capsize=3, color=VARIANTS[x],
                   alpha=0.45 if workload == "seen" else 1, label=label)  # fmt: skip
            label = None  # once is enough
    ax.set_xticks(range(len(names)), [name.replace("-", "\n") for name in names])
    return drawn


PLOTS: Mapping[str, OwnPlot] = {"structures": draw_structures}
