"""Draw the plots of a report, as SVG.

A lab names the plots it wants in `Lab.plots`: those below are for any lab, the others are its own
(`labs/<lab>/facts.py`). Each function draws from the judged run and returns its caption, or None
when there is nothing to draw.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND, VARIANTS
from labs.harness.analysis.computed import Summary
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import point_label
from labs.harness.analysis.verdicts import Interval, borne_out_between
from labs.harness.derived.lab_modules import COMMON_PLOTS, OwnPlot, kept, own_plots, parts_of
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.derived.sweep import concurrency_sweep
from labs.harness.reports.document import Figure, Inline
from labs.harness.reports.drawing import (
    BANDS,
    GREY,
    draw_forecasts,
    draw_forecasts_of_two,
    draw_logarithmic,
    legend_above,
    plt,
    reach,
)
from labs.harness.reports.rendering import told
from labs.harness.reports.svg import compact
from labs.harness.spec.lab import Lab, Point
from labs.harness.spec.visible import visible
from labs.harness.storage.results import RunFolder
from serving import atomic

Draw: TypeAlias = Callable[[JudgedRun], "Inline | None"]
"""Draws the current figure and returns its caption; None where there is nothing to draw."""


def draw(
    folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary, save: bool = True
) -> list[Figure]:
    """Draw the lab's plots into the run's folder, unless it has them already."""
    figures_of, caveats, influences = summary.measurements, summary.caveats, summary.influences
    context = Context(folder, folder.run(), lab, list(points), figures_of, caveats, influences)
    run, figures = JudgedRun.of(context, summary), []
    for name, draw_one in _drawn(lab).items():
        caption = draw_one(run)
        if caption:
            figures.append(Figure(f"{name}.svg", caption))
            if save:
                _save(plt.gcf(), folder.path / figures[-1].file)
        plt.close("all")
    return figures


def _drawn(lab: Lab) -> dict[str, Draw]:
    """Return what is drawn for a lab, by name: effects, its plots, and findings that draw."""
    known = plots_of(lab.name)
    findings = [name for name in lab.findings if name in known]
    return {name: known[name] for name in ("effects", *lab.plots, *findings)}


def plots_of(lab: str) -> Mapping[str, Draw]:
    """Return the plots that a lab may name, by name."""
    return FOR_ANY_LAB | {name: _captioned(name, plot) for name, plot in own_plots(lab).items()}


def _captioned(name: str, plot: OwnPlot) -> Draw:
    """Return what draws a lab's own plot, and gives it the caption of the lab's page.

    It draws nothing where a summary keeps the facts of another version of the lab.
    """

    def drawing(run: JudgedRun) -> Inline | None:
        facts = kept(run.lab.name, run.summary.facts)
        if facts is None and parts_of(run.lab.name).facts:
            return None
        is_drawn = plot(run, facts)
        return told(run.run, run.lab, run.summary).captions.get(name) if is_drawn else None

    return drawing


LINE_INCHES = 0.16  # of a name on an axis, in the size of its letters


def effects(run: JudgedRun) -> str | None:
    """Draw every claim's ratio with its interval, on its prediction."""
    judged = [j for j in run.summary.judgements if j.ratio]
    if not judged:
        return None
    claims = [j.claim for j in judged]
    names = []
    for j in judged:
        where = f", {point_label(j.treatment, run.lab)}" if claims.count(j.claim) > 1 else ""
        names.append(f"{_wrapped(j.title)}\n({METRICS[j.metric].title}{where})")
    lines = max(name.count("\n") + 1 for name in names)
    row_inches = max(0.6, LINE_INCHES * lines)  # so that no name lies over the next
    figure, ax = plt.subplots(figsize=(7.5, 1.2 + row_inches * len(judged)))
    for row, j in enumerate(reversed(judged)):
        if j.prediction.kind == "point":
            least, largest = borne_out_between(j.prediction)
            ax.barh(
                row, width=largest - least, height=0.5, left=least, color=BOUND, alpha=0.2,
                label="where the prediction holds" if row == 0 else None,
            )  # fmt: skip
        ax.plot(
            [j.prediction.value], [row], "|", color=BOUND, ms=14, mew=2,
            label="predicted" if row == 0 else None,
        )  # fmt: skip
        _draw_ratio(
            ax, row, j.ratio, color=BLUE, capsize=4,
            label="measured, 95% interval" if row == 0 else None,
        )  # fmt: skip
    clipped = _clip(ax, [j.ratio for j in judged][::-1], [j.prediction.value for j in judged])
    _name_ratios(ax, names, "treatment / baseline")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return "Each claim's measured ratio with its interval, and its prediction." + GOES_ON * clipped


def ratios(rows: Sequence[tuple[str, Interval, bool]], path: Path) -> bool:
    """Draw (name, ratio, whether it differs) in rows; return whether there were any."""
    if not rows:
        return False
    figure, ax = plt.subplots(figsize=(8, 1 + 0.2 * len(rows)))
    for row, (_, ratio, differs) in enumerate(reversed(rows)):
        _draw_ratio(ax, row, ratio, color=BOUND if differs else BLUE, ms=4, capsize=2)
    clipped = _clip(ax, [ratio for _, ratio, _ in rows][::-1])
    label = "B / A with its 95% interval (orange: differs" + (
        "; arrow: goes on)" if clipped else ")"
    )
    _name_ratios(ax, [name for name, *_ in rows], label, fontsize=7)
    _save(figure, path)
    plt.close(figure)
    return True


def _draw_ratio(ax: Axes, row: int, ratio: Interval | None, **style: Any) -> None:
    ax.errorbar(ratio.value if ratio else np.nan, row, xerr=reach([ratio]), fmt="o", **style)


BEYOND = 4  # times all ratios: as far as a picture shows an interval
GOES_ON = " An arrow is where an interval goes on beyond the picture; the tables have its ends."


def _clip(ax: Axes, rows: Sequence[Interval | None], others: Sequence[float] = ()) -> bool:
    """End the axis where a few wide intervals would flatten all else; return whether any goes on.

    `rows` are drawn from the bottom; `others` are to be in sight, too.
    """
    values = [v for v in (*(r.value for r in rows if r), *others) if v > 0]
    if not values:
        return False
    left, right = min(values) / BEYOND, max(values) * BEYOND
    ends = [(row, r.low, r.high) for row, r in enumerate(rows) if r]
    to_left = [row for row, low, _ in ends if low is not None and low < left]
    to_right = [row for row, _, high in ends if high is not None and high > right]
    ax.plot([left] * len(to_left), to_left, "<", color=GREY, clip_on=False)
    ax.plot([right] * len(to_right), to_right, ">", color=GREY, clip_on=False)
    if to_left or to_right:
        ax.set_xscale("log")
        ax.set_xlim(left, right)
    return bool(to_left or to_right)


def _name_ratios(ax: Axes, names: Sequence[str], label: str, **style: Any) -> None:
    """Name the rows of ratios, the first at the top."""
    _ratio_axis(ax)
    ax.set_yticks(range(len(names)), names[::-1], **style)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlabel(label)


def _save(figure: matplotlib.figure.Figure, path: Path) -> None:
    atomic.write(path, as_svg(figure))


def as_svg(figure: matplotlib.figure.Figure) -> str:
    """Return a figure as the text of a file."""
    svg = io.StringIO()
    # not pyplot's own function, which draws the figure once more afterwards
    figure.savefig(svg, metadata={"Date": None})
    return visible(compact(svg.getvalue()))


WIDE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
MIDDLE = (0.15, 0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6)
NARROW = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2)


def _ratio_axis(ax: Axes) -> None:
    """Make the axis logarithmic, with several ticks in sight and a line at 1."""
    ax.axvline(1, color=GREY, lw=1)
    ax.set_xscale("log")
    left, right = ax.get_xlim()
    span = right / left
    shown = WIDE if span > 8 else MIDDLE if span > 2 else NARROW
    ticks = [t for t in shown if left <= t <= right]
    ax.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    ax.minorticks_off()


def _wrapped(title: str, width: int = 34) -> str:
    words, lines = title.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _errorbar(
    ax: Axes,
    x: Sequence[float],
    points: Sequence[Point],
    run: JudgedRun,
    metric: str,
    scale: float,
    label: str,
) -> None:
    intervals = [run.interval(point, metric) for point in points]
    centre = [f.value * scale if f else np.nan for f in intervals]
    ax.errorbar(
        x, centre, yerr=reach(intervals, scale), fmt="o-", capsize=4, color=BLUE, label=label
    )


def sweep(run: JudgedRun) -> str | None:
    """Draw throughput and TPOT against requests in flight, measured on predicted."""
    swept = concurrency_sweep(run.points)
    if len(swept) < 2:
        return None
    x, forecast = [p.load.users for p in swept], False
    _, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, metric, scale, label, bound in (
        (axes[0], "output_tokens_per_s", 1.0, "output throughput (tok/s)", "ceiling"),
        (axes[1], "tpot_mean_s", 1000.0, "TPOT, mean (ms)", "floor"),
    ):
        known = {f.point: f.prediction.value for f in run.summary.forecasts if f.metric == metric}
        if known:
            predicted = [known.get(p.key, np.nan) * scale for p in swept]
            ax.plot(x, predicted, "--", color=BOUND, label=f"predicted {bound} (roofline)")
        forecast |= draw_forecasts(ax, x, [run.forecast(p, metric) for p in swept], scale)
        _errorbar(ax, x, swept, run, metric, scale, "measured, 95% interval")
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(v) for v in x])
        ax.set_xlabel("requests in flight")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        legend_above(ax)
    return (
        "Throughput and time per output token against requests in flight. While the right curve is"
        " flat, a larger batch is free; where it rises, each user starts to pay." + BANDS * forecast
    )


def pareto(run: JudgedRun) -> str | None:
    """Draw the throughput of all requests against the speed that one user gets."""
    swept = concurrency_sweep(run.points)
    if len(swept) < 2:
        return None
    _, ax = plt.subplots(figsize=(5.5, 3.6))
    for point in swept:
        both = [
            (1 / tpot_s, rate)
            for row in run.rows(point)
            if (tpot_s := row.get("tpot_mean_s")) and (rate := row.get("output_tokens_per_s"))
        ]
        if not both:
            continue
        user, total = np.mean(both, axis=0)
        ax.plot([u for u, _ in both], [t for _, t in both], ".", color=BLUE, alpha=0.4)
        ax.plot([user], [total], "o", color=BLUE)
        ax.annotate(str(point.load.users), (user, total), xytext=(5, 4),
                    textcoords="offset points")  # fmt: skip
    forecasts = [
        (run.forecast(p, "tpot_mean_s"), run.forecast(p, "output_tokens_per_s")) for p in swept
    ]
    forecast = draw_forecasts_of_two(ax, forecasts, across=lambda tpot_s: 1 / tpot_s)
    ax.axvline(
        1 / run.lab.slo.tpot_s,
        color=GREY,
        ls=":",
        label=f"SLO: TPOT {1000 * run.lab.slo.tpot_s:g} ms",
    )
    ax.margins(x=0.25)
    ax.set_ylim(0, 1.25 * ax.get_ylim()[1])
    ax.set_xlabel("one user's speed, 1 / TPOT (tok/s)")
    ax.set_ylabel("output throughput (tok/s)")
    ax.legend(frameon=False, loc="upper right")
    return (
        "The trade-off: further up is better for whoever pays for the machine, further right for"
        " whoever reads the answer. A number is that of the requests in flight; small dots are"
        " single repeats." + BANDS * forecast
    )


def roofline(run: JudgedRun) -> str | None:
    """Draw achieved decode FLOP/s over arithmetic intensity, under the machine's measured roof."""
    swept = concurrency_sweep(run.points)
    if not swept:
        return None
    ceilings = swept[0].ceilings
    ridge = ceilings.ridge_flops_per_byte
    _, ax = plt.subplots(figsize=(6, 3.8))
    x = np.geomspace(0.5, 4 * ridge, 200)
    roof = np.minimum(x * ceilings.memory_bandwidth_bytes_per_s, ceilings.flops_per_s)
    ax.plot(x, roof / 1e9, color=BOUND, label="measured roof")
    ax.axvline(ridge, color=GREY, ls=":", label=f"ridge, {ridge:.0f} FLOP/byte")
    for point in swept:
        both = [
            (i, f)
            for row in run.rows(point)
            if (i := row.get("intensity")) is not None and (f := row.get("flops_per_s")) is not None
        ]
        if both:
            at, rate = np.mean(both, axis=0)
            ax.plot([at], [rate / 1e9], "o", color=BLUE)
            ax.annotate(str(point.load.users), (at, rate / 1e9), xytext=(-4, 5), ha="right",
                        textcoords="offset points",
                        bbox={"fc": "white", "ec": "none", "pad": 0.5})  # fmt: skip
    ax.plot([], [], "o", color=BLUE, label="decode at 1, 2, 4 ... in flight")
    draw_logarithmic(ax)
    ax.set_xlabel("arithmetic intensity (FLOP/byte)")
    ax.set_ylabel("decode GFLOP/s")
    ax.legend(frameon=False, loc="upper left")
    return (
        "Decode on this machine's measured roofline. Left of the ridge, memory bandwidth is the"
        " limit. How far a point lies below the roof is what neither memory nor compute explains."
    )


def variants(run: JudgedRun) -> str | None:
    """Draw the first claim's metric for every variant, workload by workload."""
    if not run.lab.claims:  # what they compare was left out
        return None
    lab, name = run.lab, run.lab.claims[0].metric
    metric = METRICS[name]
    measured = [p for p in run.points if run.interval(p, name)]
    places = list(dict.fromkeys((p.workload.name, p.load.words) for p in measured))
    if not places:
        return None
    scale, unit = {"s": (1000.0, "ms"), "share": (100.0, "%")}.get(metric.unit, (1.0, metric.unit))
    width, forecast = 0.8 / len(lab.variants), False
    wide = max(1.0 * len(places), min(0.3 * len(lab.variants) * len(places), 8))
    figure, ax = plt.subplots(figsize=(2.4 + wide, 3.4))
    for column, (variant, colour) in enumerate(zip(lab.variants, VARIANTS, strict=False)):
        mine = {
            (p.workload.name, p.load.words): p for p in run.points if p.variant.name == variant.name
        }
        at = [i + (column - (len(lab.variants) - 1) / 2) * width for i in range(len(places))]
        means = [run.interval(mine[place], name) if place in mine else None for place in places]
        heights = [m.value * scale if m else np.nan for m in means]
        bars = reach(means, scale)
        ax.bar(at, heights, width, yerr=bars, capsize=3, color=colour, label=variant.name)
        known = [run.forecast(mine[place], name) if place in mine else None for place in places]
        forecast |= draw_forecasts(ax, at, known, scale, label="")
    several = len(lab.workloads) > 1
    names = [f"{workload}\n" * several + _wrapped(load, 18) for workload, load in places]
    ax.set_xticks(range(len(places)), names)
    ax.set_ylim(bottom=0)
    ax.set_ylabel(f"{metric.title} ({unit})")
    figure.legend(loc="outside right upper", frameon=False)
    caption = f"{metric.title} of each variant, with 95% intervals, workload by workload."
    return caption + BANDS * forecast


FOR_ANY_LAB: dict[str, Draw] = {
    "effects": effects,
    "sweep": sweep,
    "pareto": pareto,
    "roofline": roofline,
    "variants": variants,
}
assert FOR_ANY_LAB.keys() == COMMON_PLOTS
