"""Draw what the samples of a prompt cost, and what they solve."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND, VARIANTS
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.derived.tables import Row
from labs.harness.reports.drawing import GREY, draw_measured, legend_above, plt
from labs.many_samples.facts import Facts, Voting


def sampling(run: JudgedRun, facts: Facts) -> bool:
    """Draw the seconds of a prompt's samples, and beside them what the samples solve."""
    costs = [c for c in facts.sampling_cost.rows if c["until_all_s"].known]
    if not costs:
        return False
    costs.sort(key=lambda c: (_count(c, "samples"), _count(c, "requests") > 1, c.variant))
    columns, width = (2, 8) if facts.voting else (1, 5)
    _, axes = plt.subplots(1, columns, figsize=(width, 3.6), squeeze=False)
    _costs(axes[0][0], run, costs)
    if facts.voting:
        _solved(axes[0][1], facts.voting)
    return True


def _costs(ax: Axes, run: JudgedRun, costs: list[Row]) -> None:
    """Draw the seconds of each way to ask, and its forecast."""
    points = {p.key: p for p in run.points}
    seconds = [c["until_all_s"].value or 0 for c in costs]
    colours = {v.name: colour for v, colour in zip(run.lab.variants, VARIANTS, strict=False)}
    for variant in dict.fromkeys(cost.variant for cost in costs):
        x = [x for x, cost in enumerate(costs) if cost.variant == variant]
        heights, label = [seconds[i] for i in x], f"prefix cache {variant}"
        ax.bar(x, heights, 0.7, color=colours[variant], label=label)
    highest_s = max(seconds)
    for place, cost in enumerate(costs):
        point = points[cost.name]
        rate = run.forecast(point, "output_tokens_per_s")
        if rate and rate.value and rate.low and rate.high:
            tokens = point.sequences * point.output_tokens
            ax.vlines(place, tokens / rate.high, tokens / rate.low, color=GREY, alpha=0.4, lw=9)
            ax.plot(place, tokens / rate.value, "_", color=GREY, ms=13, mew=2)
            highest_s = max(highest_s, tokens / rate.low)
    ax.set_xticks(range(len(costs)), [_asked(cost) for cost in costs])
    ax.set_xlabel("samples of a prompt")
    ax.set_ylabel("until all are complete (s)")
    ax.set_ylim(0, 1.05 * highest_s)
    legend_above(ax)


def _asked(cost: Row) -> str:
    samples, requests = _count(cost, "samples"), _count(cost, "requests")
    if samples == 1:
        return "1"
    return f"{samples}\n{f'n={samples}' if requests < samples else 'apart'}"


def _count(row: Row, column: str) -> int:
    return round(row[column].value or 0)


def _solved(ax: Axes, voting: Voting) -> None:
    x = [_count(b, "samples") for b in voting.rows]
    for shares, colour, label in (
        ([b["passed"] for b in voting.rows], VARIANTS[2], "pass@n: one is right"),
        ([b["voted"] for b in voting.rows], BLUE, "vote"),
    ):
        draw_measured(ax, x, shares, colour, label, 100, fmt="o-", capsize=4)
    greedy = 100 * (voting["greedy"].value or 0)
    ax.axhline(greedy, ls="--", lw=1, color=BOUND, label="one greedy answer")
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [str(n) for n in x])
    ax.set_ylim(0, 100)
    ax.set_xlabel("samples of a task")
    ax.set_ylabel("tasks solved (%)")
    ax.legend(frameon=False, fontsize=8, loc="upper left")


PLOTS: Mapping[str, OwnPlot] = {"sampling": sampling}
