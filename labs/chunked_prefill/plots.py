"""Draw what a token budget shortens and what it costs, and one intrusion as the streams felt it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND
from labs.chunked_prefill.facts import Facts
from labs.harness.analysis.timeline import GRID_S, Timeline
from labs.harness.analysis.timeline import timeline as timeline_of
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import (
    GREY,
    draw_forecasts,
    legend_above,
    legend_of_all,
    plt,
    reach,
)
from loadtests.records import RequestRecord


def stall(run: JudgedRun, _facts: Facts) -> bool:
    """Draw the stall, the long prompt's own wait and that of the streams, over the budget."""
    points, lab = run.points, run.lab
    _, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for ax, metric, label in (
        (axes[0], "stall_mean_s", "stall of the streams, mean (ms)"),
        (axes[1], "intruder_ttft_mean_s", "long prompt's TTFT, mean (ms)"),
        (axes[2], "ttft_mean_s", "streams' own TTFT, mean (ms)"),
    ):
        known = {f.point: f.prediction.value for f in run.summary.forecasts if f.metric == metric}
        x = range(len(points))
        if known:
            predicted = [1000 * known.get(p.key, np.nan) for p in points]
            ax.plot(x, predicted, "_", ms=22, mew=2, color=BOUND, label="predicted floor")
        intervals = [run.interval(p, metric) for p in points]
        heights = [1000 * i.value if i else np.nan for i in intervals]
        bars = reach(intervals, 1000)
        ax.bar(x, heights, 0.6, yerr=bars, capsize=4, color=BLUE, label="measured, 95% interval")
        draw_forecasts(ax, x, [run.forecast(p, metric) for p in points], 1000)
        budgets = [p.flags.max_num_batched_tokens for p in points]
        ax.set_xticks(x, [f"{p.variant.name}\n{b}" for p, b in zip(points, budgets, strict=True)])
        ax.set_xlabel("variant, token budget")
        ax.set_ylabel(label)
        tops = [(h, r) for h, r in zip(heights, bars[1], strict=True) if h == h]
        ax.set_ylim(0, max([1, *(max(1.25 * h, 1.05 * (h + r)) for h, r in tops)]))
    if lab.slo.itl_s:
        label = f"SLO {1000 * lab.slo.itl_s:g} ms"
        axes[0].axhline(1000 * lab.slo.itl_s, color=GREY, ls=":", label=label)
    legend_above(axes[0])
    return True


def timeline(run: JudgedRun, _facts: Facts) -> bool:
    """Draw one intrusion as the streams felt it: a tick for every token of each stream.

    Where plays are kept, their gaps over the whole trial stand beside the measured ones.
    """
    drawn = []
    for point in run.points:
        trial = run.folder.trial_result(point, 1)
        if point.workload.intruder is None or trial is None or trial.failed:
            continue
        all_records = run.folder.records(point.key, 1)
        long_prompts = [
            r for r in all_records if point.workload.is_intruder(r.index) and r.ok and r.in_window
        ]
        if long_prompts:
            most_felt = max(long_prompts, key=lambda r: streams_stalled_by(r, all_records))
            drawn.append((point, most_felt, all_records))
    if not drawn:
        return False
    played = [run.played.get(point.key) for point, _, _ in drawn]
    beside = any(any(of.gaps_s) for of in played if of)
    figure, axes = plt.subplots(
        len(drawn),
        2 if beside else 1,
        figsize=(12 if beside else 9, 0.6 + 1.0 * len(drawn)),
        sharex="col",
        squeeze=False,
    )
    before_s = 0.5
    after_s = max(2 * max(long.ttft_s or 0 for _, long, _ in drawn), 1.0)
    for ax, (point, long, all_records) in zip(axes[:, 0], drawn, strict=True):
        start, first = long.sent_s, long.chunks[0][0]
        ax.axvspan(0, first - start, color=BOUND, alpha=0.25, lw=0)
        streams = [r for r in all_records if not point.workload.is_intruder(r.index) and r.chunks]
        seats: list[float] = []  # when each row is free again: a user's next answer takes it
        for r in sorted(streams, key=lambda r: r.sent_s):
            row = next((i for i, free in enumerate(seats) if free <= r.sent_s), len(seats))
            seats[row : row + 1] = [r.chunks[-1][0]]
            at = [t - start for t, _ in r.chunks if -before_s < t - start < after_s]
            # one line for all ticks of a row, as each mark would take several times as much text
            ticks = np.array([(row - TICK, row + TICK, math.nan)] * len(at)).ravel()
            ax.plot(np.repeat(at, 3), ticks, color=BLUE, lw=1)
        ax.set_ylabel(point.variant.name, rotation=0, ha="right", va="center")
        ax.set_yticks([])
        ax.set_ylim(-0.7, len(seats) - 0.3)
        ax.grid(False)
    axes[-1, 0].set_xlim(-before_s, after_s)
    axes[-1, 0].set_xlabel("seconds from the long prompt's arrival")
    if beside:
        measured = [timeline_of(point, all_records) for point, _, all_records in drawn]
        draw_gaps([*axes[:, 1]], measured, played)
        legend_of_all(figure, axes[:, 1])
    return True


TICK = 0.35  # of a row, up and down from its middle
MOST_GAPS_DRAWN = 300  # in a row of the picture, which is no finer; pages hold it as text


def longest_of_each(gaps_s: Sequence[float | None], together: int) -> list[float]:
    """Return the longest gap of so many readings at a time, in ms; NaN where there is none."""
    return [
        1000 * max((s for s in gaps_s[i : i + together] if s is not None), default=math.nan)
        for i in range(0, len(gaps_s), together)
    ]


def draw_gaps(
    column: Sequence[Axes], measured: Sequence[Timeline], played: Sequence[Timeline | None]
) -> None:
    """Draw the streams' gaps over a trial, a row a point, measured and forecast on one axis."""
    gaps_s = [s for of in (*measured, *played) if of for s in of.gaps_s if s]
    least_ms, most_ms = 1000 * min(gaps_s), 1000 * max(gaps_s)
    for ax, came, foreseen in zip(column, measured, played, strict=True):
        draw_gaps_of(ax, came, "measured", BLUE, BOUND, 0.92)
        if foreseen:
            draw_gaps_of(ax, foreseen, "forecast", GREY, GREY, 0.8)
        ax.set_yscale("log")
        ax.set_ylim(0.7 * least_ms, most_ms * (most_ms / least_ms) ** 0.6)  # bars are above
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylabel("gap (ms)")
    column[-1].set_xlabel("seconds in the trial")


def draw_gaps_of(
    ax: Axes, of: Timeline, source: str, gap_colour: str, prompt_colour: str, height: float
) -> None:
    together = max(1, math.ceil(len(of.gaps_s) / MOST_GAPS_DRAWN))
    gaps_ms = longest_of_each(of.gaps_s, together)
    edges_s = GRID_S * together * np.arange(len(gaps_ms) + 1)
    ax.stairs(gaps_ms, edges_s, baseline=None, color=gap_colour, label=f"longest gap, {source}")
    ax.broken_barh(
        [(start_s, end_s - start_s) for start_s, end_s in of.prefills_s],
        (height, 0.08),
        transform=ax.get_xaxis_transform(),
        color=prompt_colour,
        lw=0,
        label=f"long prompts, {source}",
    )


def streams_stalled_by(long: RequestRecord, all_records: Sequence[RequestRecord]) -> int:
    """Count streams that were decoding from a long prompt's arrival to its first token."""
    start, first = long.sent_s, long.chunks[0][0]
    return sum(
        r.chunks[0][0] <= start and r.chunks[-1][0] >= first for r in all_records if r.chunks
    )


PLOTS: Mapping[str, OwnPlot] = {"stall": stall, "timeline": timeline}
