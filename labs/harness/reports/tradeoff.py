"""Draw what quantized weights gain in speed and cost in quality."""

from __future__ import annotations

from typing import Protocol

from dashboards.palette import VARIANTS
from labs.harness.analysis.quality import MARGINS
from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.quality_summary import Quality
from labs.harness.derived.run_view import JudgedRun
from labs.harness.derived.weights import KindsOfWeights
from labs.harness.reports.drawing import GREY, draw_measured, plt


class OfWeights(Protocol):
    """Facts of a lab that compares kinds of weights."""

    @property
    def weights(self) -> KindsOfWeights: ...

    @property
    def quality(self) -> Quality | None: ...


def tradeoff(run: JudgedRun, facts: OfWeights) -> bool:
    """Draw perplexity against speed, a dot for each kind of weights."""
    quality, base = facts.quality, run.lab.variants[0].name
    at = {
        p.variant.name: p for p in run.points if p.workload.name == "decode" and p.load.users == 1
    }
    if not quality or base not in at or not facts.weights[base].tpot_s.known:
        return False
    _, ax = plt.subplots(figsize=(6.5, 4))
    forecast_label = "speed-up forecast before the run"
    for colour, name in zip(VARIANTS, [base, *quality.treatments], strict=False):
        gain = ratio = Quantity(1.0)
        if name != base:
            gain = facts.weights[name].speed_up if name in at else Quantity.missing("not served")
            ratio = quality.treatments[name].perplexity_ratio
        if gain.value is None or ratio.value is None:
            continue
        foreseen = run.forecast_ratio(at[base], at[name], "tpot_mean_s")
        if foreseen and name != base:
            ax.plot(foreseen, ratio.value, "|", color=GREY, ms=14, mew=2, label=forecast_label)
            forecast_label = "_nolegend_"
        label = f"{name}, {facts.weights[name].in_memory}"
        draw_measured(ax, [gain.value], [ratio], colour, label, fmt="o", capsize=4, ms=8)
    most = next(m.at_most for m in MARGINS if m.figure == "perplexity_ratio")
    ax.axhline(most, color=GREY, ls=":", label=f"gate: {most - 1:.0%} more perplexity")
    ax.set_xlabel("decode speed-up, one stream")
    ax.set_ylabel(f"perplexity / that of {base}")
    ax.legend(frameon=False, fontsize=8)
    return True
