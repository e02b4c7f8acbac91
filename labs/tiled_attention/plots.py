"""Draw how attention grows with its length, and what its length costs a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND, ORANGE, VARIANTS
from labs.harness.analysis.verdicts import Interval
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import (
    GREY,
    draw_forecasts,
    legend_above,
    plt,
    reach,
    write_plainly,
)
from labs.tiled_attention.facts import Contexts, Facts, Growth, Length, Prompts, is_of_prompts
from serving.hardware.attention import Kernel


def growth(run: JudgedRun, facts: Facts) -> bool:
    """Draw memory and time of both kernels over N, on logarithmic axes."""
    if not (of := facts.tiling) or not of.lengths:
        return False
    _, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    _kernels(left, of.lengths, of.memory, "memory")
    _kernels(right, of.lengths, of.time, "time_s")
    formula = [
        (n.tokens, n.formula_memory.value)
        for n in of.lengths
        if n.formula_memory.known and n.kernels["untiled"]["memory"].known
    ]
    if formula:
        left.plot(*zip(*formula, strict=True), "_", color=BOUND, ms=14, mew=2, zorder=4,
                  label="2 heads N^2 4 bytes")  # fmt: skip
    left.set_ylabel("memory beyond the inputs (MB)")
    right.set_ylabel("time of one layer (s)")
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=8)
        write_plainly(ax.yaxis)
    return True


def _kernels(
    ax: Axes, lengths: Sequence[Length], growths: Mapping[Kernel, Growth], figure: str
) -> None:
    kernels: tuple[tuple[Kernel, str, str, str], ...] = (
        ("untiled", "without tiles", ORANGE, "o"),
        ("tiled", "with tiles", BLUE, "s"),
    )
    for kernel, name, colour, marker in kernels:
        at = [(n.tokens, n.kernels[kernel][figure]) for n in lengths]
        known = [(tokens, q.value) for tokens, q in at if q.known]
        grows = growths[kernel].power.value
        power = "" if grows is None else f", N^{grows:.2f}"
        if known:
            ax.loglog(*zip(*known, strict=True), f"{marker}-", color=colour, lw=1, base=2,
                      label=f"{name}{power}")  # fmt: skip
    ax.set_xlabel("tokens, N")
    ax.set_xticks([n.tokens for n in lengths], [f"{n.tokens:,}" for n in lengths])
    ax.minorticks_off()
    ax.set_yscale("log", base=10)


def lengths(run: JudgedRun, facts: Facts) -> bool:
    """Draw TTFT over the prompt, and TPOT over the context, with what was fitted."""
    if not facts.long_prompts or not facts.long_contexts:
        return False
    _, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    _prompts(left, run, facts.long_prompts)
    _contexts(right, run, facts.long_contexts)
    for ax in (left, right):
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        legend_above(ax)
    return True


def _prompts(ax: Axes, run: JudgedRun, of: Prompts) -> None:
    points = [p for p in run.points if is_of_prompts(p)]
    draw_forecasts(
        ax, [p.prompt_tokens for p in points], [run.forecast(p, "ttft_mean_s") for p in points]
    )
    measured = [(p.prompt_tokens, run.interval(p, "ttft_mean_s")) for p in points]
    _bars(ax, measured, BLUE, "measured")
    if fit := of.fit:
        x = np.linspace(0, 1.03 * (of.longest["tokens"].value or 0), 60)
        ax.plot(x, [fit.at(n) for n in x], "-", color=BLUE, lw=1, label="a + b N + c N^2")
        ax.plot(x, fit.fixed.value + fit.each.value * x, ":", color=GREY, lw=1.2,
                label="a + b N of it")  # fmt: skip
    ax.set_xlabel("prompt tokens, N")
    ax.set_ylabel("TTFT, mean (s)")


def _contexts(ax: Axes, run: JudgedRun, variants: Sequence[Contexts]) -> None:
    points = [p for p in run.points if not is_of_prompts(p)]
    known = [run.forecast(p, "tpot_mean_s") for p in points]
    draw_forecasts(ax, [p.context_tokens for p in points], known, scale=1000)
    for of, colour in zip(variants, VARIANTS, strict=False):
        measured = [
            (p.context_tokens, run.interval(p, "tpot_mean_s"))
            for p in points
            if p.variant.name == of.variant
        ]
        _bars(ax, measured, colour, of.variant if len(variants) > 1 else "measured", 1000)
        if of.line:
            ends = np.array([0, 1.03 * (of.rows[-1]["tokens"].value or 0)])
            at_ms = 1000 * (of.line.fixed.value + of.line.each.value * ends)
            ax.plot(ends, at_ms, "-", color=colour, lw=1)
    first = variants[0].rows
    least = [(s["tokens"].value or 0.0, 1000 * (s["least_s"].value or 0.0)) for s in first]
    ax.plot(*zip(*least, strict=True), "--", color=BOUND, lw=1.2,
            label="its bytes at the bandwidth")  # fmt: skip
    ax.set_xlabel("tokens of context")
    ax.set_ylabel("TPOT, mean (ms)")


def _bars(
    ax: Axes, at: Sequence[tuple[float, Interval | None]], colour: str, label: str, scale: float = 1
) -> None:
    known = [(x, interval) for x, interval in at if interval]
    bars = reach([interval for _, interval in known], scale)
    ax.errorbar([x for x, _ in known], [scale * interval.value for _, interval in known],
                yerr=bars, fmt="D", color=colour, capsize=4, zorder=4, label=label)  # fmt: skip


PLOTS: Mapping[str, OwnPlot] = {"growth": growth, "lengths": lengths}
