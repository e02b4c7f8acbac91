"""Draw where answers part from those of the plain engine alone, and how nearly tied they were."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from dashboards.palette import BOUND, VARIANTS
from labs.determinism.facts import Facts, SameText
from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import GREY, legend_above, plt


def equal(run: JudgedRun, facts: Facts) -> bool:
    """Draw the answers still equal after each token, and the gaps where the others parted."""
    if (found := facts.same_text) is None:
        return False
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    _still_equal(left, found)
    _gaps(right, found)
    return True


def _still_equal(ax: Axes, found: SameText) -> None:
    positions = range(found.tokens + 1)
    for place, (way, colour) in enumerate(zip(found.ways, VARIANTS, strict=False)):
        shares = [100.0, *(100 * share for share in way.still_equal)]
        label = way.variant if way.asked == "alone" else f"{way.variant}, {way.asked}"
        ax.step(positions, shares, where="post", color=colour, label=label, lw=4 - place / 2)
        if way is found.of("16") and way.forecast:
            foreseen = [100.0, *(100 * share for share in way.forecast.still_equal)]
            ax.plot(positions, foreseen, "--", color=colour, label=f"{label}: forecast")
    ax.set(ylim=(0, 104), xlabel="tokens of the answer", ylabel="answers still equal (%)")
    legend_above(ax)


def _gaps(ax: Axes, found: SameText) -> None:
    """Draw cumulative shares; two equal tokens have a gap of 0, at the left end."""
    ax.plot(found.gaps, range(101), color=GREY, label="all positions")
    of_plain = [gap for way in found.ways if way.variant != "int8" for gap in way.parted_gaps]
    int8 = found.of("int8")
    for gaps, colour, label in (
        (sorted(of_plain), BOUND, "where they part"),
        (int8.parted_gaps if int8 else (), VARIANTS[6], "where those of int8 part"),
    ):
        if gaps:
            shares = [100 * (i + 1) / len(gaps) for i in range(len(gaps))]
            ax.step([0, *gaps], [0, *shares], where="post", color=colour, label=label)
    ax.set_xscale("symlog", linthresh=0.05)
    ax.set(xlim=(0, 10), ylim=(0, 104))
    ax.set(xlabel="gap of the two best tokens (nats)", ylabel="positions up to this gap (%)")
    legend_above(ax)


PLOTS: Mapping[str, OwnPlot] = {"equal": equal}
