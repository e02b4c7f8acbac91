"""The plots of a report, as SVG. Colours are told apart by colour-blind readers.

A lab names the plots it wants in `Lab.plots`; each function draws from the summary (or, for the
timeline, from the records) and returns its caption, or None when there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND, VARIANTS
from labs.filing.results import RunFolder, Summary
from labs.findings import quantization
from labs.findings import speculation as speculations
from labs.findings.context import Context
from labs.findings.replies import concurrency_sweep
from labs.judging.judge import Interval
from labs.judging.metrics import METRICS
from labs.judging.text import short
from labs.lab import Lab, Point
from labs.multi_lora import adapter_bytes
from labs.telling.document import Figure
from loadtests import records
from loadtests.records import RequestRecord

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "labs",  # the same data gives the same file
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "savefig.facecolor": "white",
    }
)
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

GREY = "#666666"

Draw = Callable[[RunFolder, Lab, Sequence[Point], Summary], str | None]


def draw(
    folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary, save: bool = True
) -> list[Figure]:
    """Draw the lab's plots, into the run's folder unless they lie there already."""
    figures = []
    for name in ("effects", *lab.plots):
        caption = PLOTS[name](folder, lab, points, summary)
        if caption:
            figures.append(Figure(f"{name}.svg", caption))
            if save:
                plt.savefig(folder.path / figures[-1].file, metadata={"Date": None})
        plt.close("all")
    return figures


def effects(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """Every claim's ratio with its interval, on its prediction."""
    found = [j for j in summary.judgements if j.effect]
    if not found:
        return None
    figure, ax = plt.subplots(figsize=(7.5, 1.2 + 0.6 * len(found)))
    for row, j in enumerate(reversed(found)):
        assert j.effect
        ratio, p = j.effect.ratio, j.prediction
        ax.barh(
            row,
            width=2 * p.value * p.tolerance,
            height=0.5,
            left=p.value * (1 - p.tolerance),
            color=BOUND,
            alpha=0.2,
            label="predicted ± tolerance" if row == 0 else None,
        )
        ax.plot([p.value], [row], "|", color=BOUND, ms=14, mew=2)
        low, high = ratio.low or ratio.value, ratio.high or ratio.value
        error = [[ratio.value - low], [high - ratio.value]]
        ax.errorbar(
            ratio.value, row, xerr=error, fmt="o", color=BLUE, capsize=4,
            label="measured, 95 % interval" if row == 0 else None,
        )  # fmt: skip
    _ratio_axis(ax)
    claims = [j.claim for j in found]
    wheres = [f", {short(j.treatment, lab)}" * (claims.count(j.claim) > 1) for j in found]
    names = [
        f"{_wrapped(j.title)}\n({METRICS[j.metric].title}{where})"
        for j, where in zip(found, wheres, strict=True)
    ]
    ax.set_yticks(range(len(found)), names[::-1])
    ax.set_ylim(-0.6, len(found) - 0.4)
    ax.set_xlabel("treatment / baseline")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return "Each claim: the measured ratio on the predicted one."


def ratios(found: Sequence[tuple[str, Interval, bool]], path: Path) -> bool:
    """Draw (name, ratio, does it differ) one below the other; whether there was anything."""
    if not found:
        return False
    figure, ax = plt.subplots(figsize=(8, 1 + 0.2 * len(found)))
    for row, (_, ratio, differs) in enumerate(reversed(found)):
        low, high = ratio.low or ratio.value, ratio.high or ratio.value
        ax.errorbar(
            ratio.value, row, xerr=[[ratio.value - low], [high - ratio.value]], fmt="o", ms=4,
            capsize=2, color=BOUND if differs else BLUE,
        )  # fmt: skip
    _ratio_axis(ax)
    ax.set_yticks(range(len(found)), [name for name, *_ in reversed(found)], fontsize=7)
    ax.set_ylim(-0.6, len(found) - 0.4)
    ax.set_xlabel("B / A with its 95 % interval (orange: differs)")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


WIDE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
NARROW = (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4)


def _ratio_axis(ax: Axes) -> None:
    """A logarithmic axis with ticks of which several are in sight, and a line at 1."""
    ax.axvline(1, color=GREY, lw=1)
    ax.set_xscale("log")
    left, right = ax.get_xlim()
    ticks = [t for t in (WIDE if right / left > 8 else NARROW) if left <= t <= right]
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
    summary: Summary,
    metric: str,
    scale: float,
    label: str,
) -> None:
    found = [summary.over_repeats(point.key, metric) for point in points]
    centre = [f.value * scale if f else np.nan for f in found]
    reach = [(f.high - f.value) * scale if f and f.high is not None else 0 for f in found]
    ax.errorbar(x, centre, yerr=reach, fmt="o-", capsize=4, color=BLUE, label=label)


def sweep(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """Throughput and TPOT against requests in flight, measured on predicted."""
    swept = concurrency_sweep(points)
    if len(swept) < 2:
        return None
    x = [p.load.users for p in swept]
    _, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, metric, scale, label, bound in (
        (axes[0], "output_tokens_per_s", 1.0, "output throughput (tok/s)", "ceiling"),
        (axes[1], "tpot_mean_s", 1000.0, "TPOT, mean (ms)", "floor"),
    ):
        known = {f.point: f.prediction.value for f in summary.forecasts if f.metric == metric}
        if known:
            predicted = [known.get(p.key, np.nan) * scale for p in swept]
            ax.plot(x, predicted, "--", color=BOUND, label=f"predicted {bound} (roofline)")
        _errorbar(ax, x, swept, summary, metric, scale, "measured, 95 % interval")
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(v) for v in x])
        ax.set_xlabel("requests in flight")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False)
    return (
        "Throughput and time per output token against requests in flight. While the right curve is"
        " flat a larger batch is free; where it bends, each user starts to pay."
    )


def pareto(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """What the operator gets against what one user gets."""
    swept = concurrency_sweep(points)
    if len(swept) < 2:
        return None
    _, ax = plt.subplots(figsize=(5.5, 3.6))
    for point in swept:
        rows = summary.measurements.get(point.key, {}).values()
        both = [
            (1 / tpot, rate)
            for row in rows
            if (tpot := row.get("tpot_mean_s")) and (rate := row.get("output_tokens_per_s"))
        ]
        if not both:
            continue
        user, total = np.mean(both, axis=0)
        ax.plot([u for u, _ in both], [t for _, t in both], ".", color=BLUE, alpha=0.4)
        ax.plot([user], [total], "o", color=BLUE)
        ax.annotate(f"{point.load.users} in flight", (user, total), xytext=(7, 2),
                    textcoords="offset points")  # fmt: skip
    ax.axvline(
        1 / lab.slo.tpot_s, color=GREY, ls=":", label=f"SLO: TPOT {1000 * lab.slo.tpot_s:g} ms"
    )
    ax.margins(x=0.25)
    ax.set_ylim(0, 1.25 * ax.get_ylim()[1])
    ax.set_xlabel("one user's speed, 1 / TPOT (tok/s)")
    ax.set_ylabel("output throughput (tok/s)")
    ax.legend(frameon=False, loc="upper right")
    return (
        "The trade: up is better for whoever pays for the machine, right is better for whoever"
        " reads the answer. Small dots are single repeats."
    )


def static(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """Requests being decoded over time, fixed batches above continuous ones."""
    pairs = [p for p in points if p.load.kind == "waves"]
    chosen = [
        (wave, same)
        for wave in pairs
        for same in points
        if same.load.kind == "concurrent"
        and same.load.users == wave.load.users
        and (same.variant, same.workload) == (wave.variant, wave.workload)
    ]
    if not chosen:
        return None
    _, axes = plt.subplots(
        2, len(chosen), figsize=(9, 3.6), sharex=True, sharey=True, squeeze=False
    )
    for column, pair in enumerate(chosen):
        for row, (point, colour) in enumerate(zip(pair, (BOUND, BLUE), strict=True)):
            ax = axes[row][column]
            path = folder.trial_folder(point, 1) / "requests.jsonl.gz"
            if not path.exists():
                continue
            spans = [(r.chunks[0][0], r.chunks[-1][0]) for r in records.read(path) if r.chunks]
            edges = sorted([(a, 1) for a, _ in spans] + [(b, -1) for _, b in spans])
            times = [0.0, *(t for t, _ in edges)]
            ax.step(times, np.cumsum([0, *(d for _, d in edges)]), where="post", color=colour, lw=1)
            ax.fill_between(times, np.cumsum([0, *(d for _, d in edges)]), step="post",
                            color=colour, alpha=0.2)  # fmt: skip
            kind = "fixed batches" if row == 0 else "continuous"
            throughput = summary.value(point.key, "output_tokens_per_s")
            rate = f", {throughput:.0f} tok/s" if throughput else ""
            ax.set_title(f"{point.workload.name} lengths, {kind} ({point.load}){rate}", fontsize=9)
            if column == 0:
                ax.set_ylabel("in decode")
    for ax in axes[1]:
        ax.set_xlabel("time in the first repeat (s)")
        ax.set_xlim(0, lab.warmup_s + lab.window_s)
    return (
        "Requests in decode over time. With varying lengths a fixed batch runs empty while its"
        " longest answer is finished; continuous batching keeps the places filled."
    )


def roofline(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """Achieved decode FLOP/s over arithmetic intensity, under the machine's measured roof."""
    swept = concurrency_sweep(points)
    if not swept:
        return None
    ceilings = swept[0].ceilings
    ridge = ceilings.ridge_flops_per_byte
    _, ax = plt.subplots(figsize=(6, 3.8))
    x = np.geomspace(0.5, 4 * ridge, 200)
    roof = np.minimum(x * ceilings.memory_bandwidth_bytes_per_s, ceilings.bf16_flops_per_s)
    ax.plot(x, roof / 1e9, color=BOUND, label="measured roof")
    ax.axvline(ridge, color=GREY, ls=":", label=f"ridge, {ridge:.0f} FLOP/byte")
    for point in swept:
        rows = summary.measurements.get(point.key, {}).values()
        both = [
            (i, f)
            for row in rows
            if (i := row.get("intensity")) is not None and (f := row.get("flops_per_s")) is not None
        ]
        if both:
            at, rate = np.mean(both, axis=0)
            ax.plot([at], [rate / 1e9], "o", color=BLUE)
            ax.annotate(str(point.load.users), (at, rate / 1e9), xytext=(-4, 5), ha="right",
                        textcoords="offset points")  # fmt: skip
    ax.plot([], [], "o", color=BLUE, label="decode at 1, 2, 4 ... in flight")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("arithmetic intensity (FLOP/byte)")
    ax.set_ylabel("decode GFLOP/s")
    ax.legend(frameon=False, loc="upper left")
    return (
        "Decode on this machine's measured roofline. Left of the ridge memory bandwidth is the"
        " limit; a point's distance below the roof is what neither memory nor compute explains."
    )


def variants(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """The first claim's metric for every variant, workload by workload."""
    metric = METRICS[lab.claims[0].metric]
    measured = [p for p in points if summary.over_repeats(p.key, lab.claims[0].metric)]
    places = list(dict.fromkeys((p.workload.name, str(p.load)) for p in measured))
    if not places:
        return None
    scale, unit = (1000.0, "ms") if metric.unit == "s" else (1.0, metric.unit)
    width = 0.8 / len(lab.variants)
    wide = max(1.0 * len(places), min(0.3 * len(lab.variants) * len(places), 8))
    figure, ax = plt.subplots(figsize=(2.4 + wide, 3.4))
    for column, (variant, colour) in enumerate(zip(lab.variants, VARIANTS, strict=False)):
        mine = {(p.workload.name, str(p.load)): p for p in points if p.variant.name == variant.name}
        at = [i + (column - (len(lab.variants) - 1) / 2) * width for i in range(len(places))]
        found = [
            summary.over_repeats(mine[place].key, lab.claims[0].metric) if place in mine else None
            for place in places
        ]
        heights = [f.value * scale if f else np.nan for f in found]
        reach = [(f.high - f.value) * scale if f and f.high is not None else 0 for f in found]
        ax.bar(at, heights, width, yerr=reach, capsize=3, color=colour, label=variant.name)
    ax.set_xticks(range(len(places)), [f"{workload}\n{load}" for workload, load in places])
    ax.set_ylim(bottom=0)
    ax.set_ylabel(f"{metric.title} ({unit})")
    figure.legend(loc="outside right upper", frameon=False)
    return f"{metric.title} of each variant, with 95 % intervals, workload by workload."


def stall(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """The stall and the long prompt's own wait, over the token budget."""
    _, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, metric, label in (
        (axes[0], "stall_mean_s", "stall of the streams, mean (ms)"),
        (axes[1], "intruder_ttft_mean_s", "TTFT of the long prompt, mean (ms)"),
    ):
        known = {f.point: f.prediction.value for f in summary.forecasts if f.metric == metric}
        x = range(len(points))
        if known:
            predicted = [1000 * known.get(p.key, np.nan) for p in points]
            ax.plot(x, predicted, "_", ms=22, mew=2, color=BOUND, label="predicted floor")
        found = [summary.over_repeats(p.key, metric) for p in points]
        heights = [1000 * f.value if f else np.nan for f in found]
        reach = [1000 * (f.high - f.value) if f and f.high is not None else 0 for f in found]
        ax.bar(x, heights, 0.6, yerr=reach, capsize=4, color=BLUE, label="measured, 95 % interval")
        budgets = [p.flags.max_num_batched_tokens for p in points]
        ax.set_xticks(x, [f"{p.variant.name}\n{b}" for p, b in zip(points, budgets, strict=True)])
        ax.set_xlabel("variant, token budget")
        ax.set_ylabel(label)
        tops = [(h, r) for h, r in zip(heights, reach, strict=True) if h == h]
        ax.set_ylim(0, max([1, *(max(1.25 * h, 1.05 * (h + r)) for h, r in tops)]))
    if lab.slo.itl_s:
        label = f"SLO {1000 * lab.slo.itl_s:g} ms"
        axes[0].axhline(1000 * lab.slo.itl_s, color=GREY, ls=":", label=label)
    axes[0].legend(frameon=False, loc="upper left")
    return (
        "A smaller token budget shortens the stall of everybody else (left) and makes the long"
        " prompt wait longer for its first token (right)."
    )


def timeline(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """One intrusion as the streams felt it: a tick for every token of each stream."""
    drawn = []
    for point in points:
        path = folder.trial_folder(point, 1) / "requests.jsonl.gz"
        if not path.exists() or point.workload.intruder is None:
            continue
        every = list(records.read(path))
        longs = [r for r in every if point.workload.is_intruder(r.index) and r.ok and r.in_window]
        if longs:
            drawn.append((point, max(longs, key=lambda r: _lived_through(r, every)), every))
    if not drawn:
        return None
    _, axes = plt.subplots(
        len(drawn), 1, figsize=(9, 0.6 + 1.0 * len(drawn)), sharex=True, squeeze=False
    )
    before_s = 0.5
    after_s = max(2 * max(long.ttft_s or 0 for _, long, _ in drawn), 1.0)
    for ax, (point, long, every) in zip(axes[:, 0], drawn, strict=True):
        start, first = long.sent_s, long.chunks[0][0]
        ax.axvspan(0, first - start, color=BOUND, alpha=0.25, lw=0)
        streams = [r for r in every if not point.workload.is_intruder(r.index) and r.chunks]
        seats: list[float] = []  # when each row is free again: a user's next answer takes it
        for r in sorted(streams, key=lambda r: r.sent_s):
            row = next((i for i, free in enumerate(seats) if free <= r.sent_s), len(seats))
            seats[row : row + 1] = [r.chunks[-1][0]]
            at = [t - start for t, _ in r.chunks if -before_s < t - start < after_s]
            ax.plot(at, [row] * len(at), "|", color=BLUE, ms=7, mew=1)
        ax.set_ylabel(point.variant.name, rotation=0, ha="right", va="center")
        ax.set_yticks([])
        ax.set_ylim(-0.7, len(seats) - 0.3)
        ax.grid(False)
    axes[-1, 0].set_xlim(-before_s, after_s)
    axes[-1, 0].set_xlabel("seconds from the long prompt's arrival")
    return (
        "Every stream is a row, every token it receives a tick; shaded, from the long prompt's"
        " arrival to its first token. Without chunks the rows are empty while it is prefilled: that"
        " gap is what a reader sees. Small budgets spread it thin. Of a trial's long prompts, the"
        " one during which most streams were decoding."
    )


def _lived_through(long: RequestRecord, every: Sequence[RequestRecord]) -> int:
    """Streams that were decoding from a long prompt's arrival to its first token."""
    start, first = long.sent_s, long.chunks[0][0]
    return sum(r.chunks[0][0] <= start and r.chunks[-1][0] >= first for r in every if r.chunks)


def speculation(
    folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary
) -> str | None:
    """Acceptance by position, and the speed-up over load, measured and explained."""
    context = Context(folder, folder.run(), lab, list(points), summary.measurements)
    found = speculations.speed_ups(context)
    if not found:
        return None
    _, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
    kinds = list(dict.fromkeys((f.point.variant.name, f.point.workload.name) for f in found))
    marks = dict(zip(dict.fromkeys(w for _, w in kinds), "os^D", strict=False))
    colours = dict(zip(dict.fromkeys(v for v, _ in kinds), VARIANTS, strict=False))
    for kind in kinds:
        variant, workload = kind
        mine = sorted(
            (f for f in found if (f.point.variant.name, f.point.workload.name) == kind),
            key=lambda f: f.point.load.users,
        )
        style = {"color": colours[variant], "marker": marks[workload]}
        at = speculations.accepted_at(context, mine[0].point)
        axes[0].plot(range(1, len(at) + 1), at, **style, label=f"{variant}, {workload}")
        x = [f.point.load.users for f in mine]
        axes[1].plot(x, [f.measured for f in mine], **style, label=f"{variant}, {workload}")
        explained = [np.nan if f.explained is None else f.explained for f in mine]
        axes[1].plot(x, explained, **style, ls="none", mfc="none", ms=10)
    axes[0].set_xlabel("position drafted")
    axes[0].set_ylabel("share of drafts accepted that far")
    axes[0].set_ylim(0, 1.05)
    longest = max(len(speculations.accepted_at(context, f.point)) for f in found)
    axes[0].set_xticks(range(1, longest + 1))
    axes[1].axhline(1, color=GREY, lw=1)
    axes[1].set_xscale("log", base=2)
    users = sorted({f.point.load.users for f in found})
    axes[1].set_xticks(users, [str(n) for n in users])
    axes[1].set_xlabel("requests in flight")
    axes[1].set_ylabel("speed-up (TPOT without / with)")
    axes[1].set_ylim(bottom=0)
    axes[1].plot([], [], "o", color=GREY, mfc="none", ms=10, label="formula, measured parts")
    axes[1].legend(frameon=False, fontsize=8)
    return (
        "Left: how far ahead guesses are right, at one stream. Right: what that gains; below 1"
        " speculation loses. Open marks are Leviathan's formula with acceptance, draft cost and"
        " verification cost as measured."
    )


def preemption(
    folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary
) -> str | None:
    """Requests in decode and preemptions over the requests in flight."""
    mine = [p for p in points if p.workload.name == "growing"]
    if not mine:
        return None
    _, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    names = list(dict.fromkeys(p.variant.name for p in mine))
    for name, colour in zip(names, VARIANTS, strict=False):
        of = sorted((p for p in mine if p.variant.name == name), key=lambda p: p.load.users)
        x = [p.load.users for p in of]
        for ax, metric in ((axes[0], "batch"), (axes[1], "preemptions")):
            found = [summary.over_repeats(p.key, metric) for p in of]
            ax.plot(x, [f.value if f else np.nan for f in found], "o-", color=colour, label=name)
        full = of[0].prompt_tokens + of[0].output_tokens
        capacity = summary.over_repeats(of[0].key, "kv_capacity_tokens")
        if capacity:
            axes[1].axvspan(
                capacity.value / full, capacity.value / of[0].context_tokens,
                color=colour, alpha=0.15, lw=0, label=f"predicted onset, {name}",
            )  # fmt: skip
    for ax, label in ((axes[0], "requests in decode, mean"), (axes[1], "preemptions a trial")):
        ax.set_xlabel("requests in flight")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=8)
    return (
        "With the same memory the quantized cache keeps more requests running (left) and begins to"
        " preempt later (right); shaded, where capacity / request length puts the onset, from the"
        " longest to the mean length."
    )


def adapters(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """Throughput over the adapters in the batch, measured on what bytes predict."""
    mine = [p for p in points if p.variant.name == "lora" and p.load == points[0].load]
    of = [(p.workload.adapters.count if p.workload.adapters else 0, p) for p in mine
          if p.workload.adapters is None or p.workload.adapters.mix == "uniform"]  # fmt: skip
    of.sort(key=lambda pair: pair[0])
    found = [summary.over_repeats(p.key, "output_tokens_per_s") for _, p in of]
    if not any(found):
        return None
    _, ax = plt.subplots(figsize=(6, 3.6))
    x = range(len(of))
    heights = [f.value if f else np.nan for f in found]
    reach = [f.high - f.value if f and f.high is not None else 0 for f in found]
    ax.errorbar(x, heights, yerr=reach, fmt="o-", capsize=4, color=BLUE,
                label="measured, 95 % interval")  # fmt: skip
    base = next((p for p in points if p.variant.name == "base"), None)
    level = summary.over_repeats(base.key, "output_tokens_per_s") if base else None
    if level:
        shares = [1 + n * adapter_bytes(p) / p.shape.weight_bytes if n else 1.0 for n, p in of]
        ax.plot(x, [level.value / s for s in shares], "--", color=BOUND,
                label="base / bytes of the active adapters")  # fmt: skip
        ax.plot([-0.35], [level.value], "D", color=GREY, label="engine without LoRA")
    ax.set_xticks(x, ["base only" if n == 0 else str(n) for n, _ in of])
    ax.set_xlabel("adapters in the batch")
    ax.set_ylabel("output throughput (tok/s)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return (
        "What adapters cost: by their bytes hardly anything; the gap between the curves is the"
        " launches of the small operations that apply them."
    )


def tradeoff(folder: RunFolder, lab: Lab, points: Sequence[Point], summary: Summary) -> str | None:
    """Perplexity against speed, a dot for each kind of weights."""
    context = Context(folder, folder.run(), lab, list(points), summary.measurements)
    compared = quantization.compared(context)
    base = lab.variants[0].name
    at = {p.variant.name: p for p in points if p.workload.name == "decode" and p.load.users == 1}
    speed = {n: summary.over_repeats(p.key, "tpot_mean_s") for n, p in at.items()}
    plain = speed.get(base)
    if not compared or plain is None:
        return None
    _, ax = plt.subplots(figsize=(6.5, 4))
    for colour, name in zip(VARIANTS, [base, *compared], strict=False):
        figures = compared.get(name)
        ratio = next(f for f in figures if f.name == "perplexity_ratio") if figures else None
        found = speed.get(name)
        if found is None:
            continue
        x, y = plain.value / found.value, ratio.value if ratio else 1.0
        reach = [[y - (ratio.low or y)], [(ratio.high or y) - y]] if ratio else None
        size = at[name].shape.weight_bytes / 1e6
        ax.errorbar(x, y, yerr=reach, fmt="o", color=colour, capsize=4, ms=8,
                    label=f"{name}, {size:,.0f} MB")  # fmt: skip
    ax.axhline(1.02, color=GREY, ls=":", label="gate: 2 % more perplexity")
    ax.set_xlabel("decode speed-up, one stream")
    ax.set_ylabel(f"perplexity / that of {base}")
    ax.legend(frameon=False, fontsize=8)
    return "Speed against quality: right is faster, down is better."


PLOTS: dict[str, Draw] = {
    "effects": effects, "sweep": sweep, "pareto": pareto, "static": static, "roofline": roofline,
    "variants": variants, "stall": stall, "timeline": timeline, "speculation": speculation,
    "preemption": preemption, "adapters": adapters, "tradeoff": tradeoff,
}  # fmt: skip
