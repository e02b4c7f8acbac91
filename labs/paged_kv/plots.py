"""Draw how many requests each allocation runs at once."""

from __future__ import annotations

from collections.abc import Mapping

from dashboards.palette import BLUE, BOUND
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import GREY, draw_forecasts, plt, reach
from labs.paged_kv.facts import Facts


def allocator(run: JudgedRun, facts: Facts) -> bool:
    """Draw how many requests run at once for each allocation: replayed, forecast, measured."""
    if facts.allocator is None or not facts.allocator.all:
        return False
    allocated = facts.allocator.all[::-1]  # from the smallest block to contiguous
    places = range(len(allocated))
    _, ax = plt.subplots(figsize=(7.5, 3.8))
    ax.plot(places, [a.running for a in allocated], "o-", color=BLUE, mfc="white", lw=1,
            label="replayed")  # fmt: skip
    ax.plot(places, [a.admitted for a in allocated], "x", color=BOUND,
            label="by arithmetic: capacity / held")  # fmt: skip
    ax.axhline(facts.allocator.users, color=GREY, ls=":", lw=1, label="all in flight")
    mixed = {p.variant.name: p for p in run.points if p.workload.name == "mixed"}
    served = [(x, mixed[a.variant]) for x, a in enumerate(allocated) if a.variant in mixed]
    known = [run.forecast(p, "batch") for _, p in served]
    draw_forecasts(ax, [x for x, _ in served], known)
    means = [(x, m) for x, p in served if (m := run.interval(p, "batch"))]
    bars = reach([m for _, m in means])
    ax.errorbar([x for x, _ in means], [m.value for _, m in means], yerr=bars, fmt="D",
                color=BLUE, capsize=4, zorder=4, label="measured")  # fmt: skip
    ax.set_xticks(places, [str(a.block or "contiguous") for a in allocated])
    stretch_tokens = facts.allocator.stretch_tokens
    ax.set_xlabel(f"tokens in a block; contiguous: {stretch_tokens} for each request")
    ax.set_ylabel("requests at once")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8)
    return True


PLOTS: Mapping[str, OwnPlot] = {"allocator": allocator}
