"""Draw what a step is made of, and fixed batches above continuous ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dashboards.palette import BLUE, BOUND
from labs.continuous_batching.facts import Facts, waves_beside_continuous
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import GREY, draw_parts, legend_of_all, plt, thinned


def steps(_: JudgedRun, facts: Facts) -> bool:
    """Draw what an output token's time goes to at each load of the sweep."""
    if not facts.steps:
        return False
    figure, ax = plt.subplots(figsize=(6.5, 3.6))
    draw_parts(ax, {str(s.users): s.parts for s in facts.steps})
    ax.set_xlabel("requests in flight")
    ax.set_ylabel("TPOT, mean (ms)")
    figure.legend(loc="outside right upper", frameon=False)
    return True


def static(run: JudgedRun, facts: Facts) -> bool:
    """Draw requests being decoded over time, fixed batches above continuous ones."""
    chosen = waves_beside_continuous(run.points)
    if not chosen:
        return False
    figure, axes = plt.subplots(
        2, len(chosen), figsize=(9, 3.6), sharex=True, sharey=True, squeeze=False
    )
    for column, pair in enumerate(chosen):
        for row, (point, colour) in enumerate(zip(pair, (BOUND, BLUE), strict=True)):
            ax = axes[row][column]
            first = run.folder.trial_result(point, 1)
            if first is None or first.failed:
                continue
            found = run.folder.records(point.key, 1)
            spans = [(r.chunks[0][0], r.chunks[-1][0]) for r in found if r.chunks]
            times, in_decode = in_decode_over_time(spans)
            kind = "fixed batches" if row == 0 else "continuous"
            label = f"{kind}, measured"
            ax.step(times, in_decode, where="post", color=colour, lw=1, label=label)
            ax.fill_between(times, in_decode, step="post", color=colour, alpha=0.2)
            if played := run.played.get(point.key):
                times, in_decode = in_decode_over_time(played.decoding_s)
                ax.step(times, in_decode, where="post", color=GREY, lw=1, label="forecast")
            tokens_per_s = run.mean(point, "output_tokens_per_s")
            rate = f", {tokens_per_s:.0f} tok/s" if tokens_per_s else ""
            ax.set_title(f"{point.workload.name} lengths, {kind} ({point.load}){rate}", fontsize=9)
            if column == 0:
                ax.set_ylabel("in decode")
    for ax in axes[1]:
        ax.set_xlabel("time in the first repeat (s)")
        ax.set_xlim(0, run.lab.warmup_s + run.lab.window_s)
    if facts.played:
        legend_of_all(figure, axes.flat)
    return True


def in_decode_over_time(spans: Iterable[tuple[float, float]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Count the requests that are decoded, from each of these times to the next."""
    both_ends = ([(a, 1), (b, -1)] for a, b in spans)
    edges = sorted(chain.from_iterable(both_ends))
    times = np.array([0.0, *(t for t, _ in edges)])
    return thinned(times, np.cumsum([0, *(d for _, d in edges)]))


PLOTS: Mapping[str, OwnPlot] = {"steps": steps, "static": static}
