"""The picture of published runs on GPUs: forecast beside measured, over the rate of arrivals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dashboards.palette import BLUE, VARIANTS
from labs.harness.reports.drawing import draw_forecasts, legend_of_all, plt
from labs.harness.reports.plots import as_svg
from labs.harness.storage.published_gpu import Judged

SHOWN = {  # figure -> its title, unit, and how many of that a second has
    "ttft_mean_s": ("mean TTFT", "ms", 1000),
    "tpot_mean_s": ("mean TPOT", "ms", 1000),
    "e2e_mean_s": ("mean E2E", "s", 1),
}
MARKS = "^vDsX"  # of the others' predictions, which stand beside their rate:
ASIDE = 0.018  # each so much further, as a share of the axis


def picture(judged: Sequence[Judged]) -> str:
    """Draw a row for each model on each card, a column for each figure; return the SVG."""
    rows = list(dict.fromkeys(map(_served, judged)))
    others = dict.fromkeys(name for run in judged for name in run.others)
    figure, axes = plt.subplots(
        len(rows), len(SHOWN), figsize=(9, 1.1 + 2 * len(rows)), squeeze=False
    )
    for at, served in enumerate(rows):
        runs = [run for run in judged if _served(run) == served]
        for ax, (name, (title, unit, scale)) in zip(axes[at], SHOWN.items(), strict=True):
            known = [run for run in runs if name in run.measured]
            if not known:
                ax.set_axis_off()
                continue
            x = [run.rate_per_s for run in known]
            label = "this lab's forecast, with its band"
            draw_forecasts(ax, x, [run.forecast[name] for run in known], scale, label=label)
            if name == "e2e_mean_s":
                kinds = zip(others, MARKS, VARIANTS[1:], strict=False)
                for place, (other, mark, colour) in enumerate(kinds, 1):
                    predicted = [run.others.get(other, np.nan) for run in known]
                    beside = [at + ASIDE * place * max(x) for at in x]
                    ax.plot(beside, predicted, mark, color=colour, ms=4, label=other, zorder=4)
            measured = [scale * run.measured[name] for run in known]
            ax.plot(x, measured, "o", color=BLUE, ms=5, label="measured by others", zorder=5)
            ax.set_ylabel(f"{title} ({unit})")
            ax.set_xlim(0, 1.15 * max(x))
            ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
            ax.set_xlabel("requests/s")
        axes[at, 0].set_title(served, loc="left", fontsize=9, fontweight="bold")
    legend_of_all(figure, axes.flat, columns=4)
    svg = as_svg(figure)
    plt.close(figure)
    return svg


def _served(run: Judged) -> str:
    gpus = f"{run.run.gpus} x " if run.run.gpus > 1 else ""
    return f"{run.run.model_name.split('/')[-1]} on {gpus}{run.run.card.upper()}"
