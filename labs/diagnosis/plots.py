"""Draw what moved under each disturbance, what each trial was named, and the fits."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dashboards.palette import BLUE, BOUND
from labs.diagnosis.facts import Facts, Signature, alone
from labs.diagnosis.lab import Figure
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import plt

TIMES: tuple[Figure, ...] = ("TTFT", "Prefill", "TPOT")


def draw_signatures(run: JudgedRun, facts: Facts) -> bool:
    """Draw the times under each disturbance, and beside them what each trial was named."""
    moved, told = facts.signatures, facts.told_apart
    if not moved or not moved.rows or not told or not told.named:
        return False
    causes = [row.injected for row in moved.rows]
    _, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.9 + 0.42 * len(causes)), width_ratios=(2, 4)
    )
    ratios = np.array([[_multiple(row, name) for name in TIMES] for row in moved.rows])
    most = math.log2(max(4.0, float(np.nanmax(ratios, initial=1.0))))
    left.imshow(np.log2(ratios), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    counts = [told.matrix.get(cause, [None] * len(told.names)) for cause in causes]
    trials = np.array([[count or 0 for count in row] for row in counts])
    shares = trials / np.maximum(1, trials.sum(axis=1, keepdims=True))
    right.imshow(shares, cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for ax, columns, texts in (
        (left, list(TIMES), [["–" if v != v else f"{v:.2f}x" for v in row] for row in ratios]),
        (right, told.names, [[str(count or "") for count in row] for row in counts]),
    ):
        for y, row in enumerate(texts):
            for x, text in enumerate(row):
                dark = ax is left and abs(math.log2(ratios[y, x])) > 0.7 * most
                ax.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
        ax.set_yticks(range(len(causes)), causes if ax is left else [])
        ax.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        ax.grid(False)
    left.set_title("times, of the reference's", fontsize=9)
    right.set_title("what the rule named, trials", fontsize=9)
    return True


def _multiple(row: Signature, figure: Figure) -> float:
    moved = row.figures[figure]
    value = moved.level.value.value if moved else None
    return np.nan if value is None else value


def draw_coefficients(run: JudgedRun, facts: Facts) -> bool:
    """Draw both fits through the requests that were alone, beside the forecast's step."""
    fits, times = facts.coefficients, run.once(alone)
    if not fits or not fits.ttft or not fits.itl:
        return False
    _, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for ax, fit, measured, forecast, xlabel, ylabel in (
        (axes[0], fits.ttft, times.ttft, times.forecast_ttft, "prompt (tokens)", "TTFT (ms)"),
        (axes[1], fits.itl, times.itl, times.forecast_itl, "context (tokens)",
         "ITL, mean of a request (ms)"),
    ):  # fmt: skip
        x, y = zip(*measured, strict=True)
        ax.plot(x, [1e3 * v for v in y], "o", ms=3.5, alpha=0.6, color=BLUE, label="a request")
        grid = np.linspace(min(x), max(x), 50)
        ax.plot(grid, [1e3 * fit.at(v) for v in grid], color=BLUE, label="fit")
        if forecast:
            x, y = zip(*sorted(forecast), strict=True)
            ax.plot(x, [1e3 * v for v in y], "--", color=BOUND, label="forecast's step")
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.set_ylim(0, None)
    axes[0].legend(frameon=False)
    return True


PLOTS: Mapping[str, OwnPlot] = {"signatures": draw_signatures, "coefficients": draw_coefficients}
