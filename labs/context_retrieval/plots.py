"""The plots of context retrieval."""

from __future__ import annotations

from dashboards.palette import BOUND
from labs.context_retrieval.facts import Facts
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import plt


def retrieval(_run: JudgedRun, facts: Facts) -> bool:
    """Draw the share of needles found by length and depth, a map for each variant."""
    found = facts.retrieval
    if not found:
        return False
    lengths = sorted({at.length_tokens for at in found[0].places})
    depths = sorted({at.depth for at in found[0].places})
    _, axes = plt.subplots(1, len(found), figsize=(2.3 * len(found) + 0.6, 2.1), sharey=True,
                           squeeze=False)  # fmt: skip
    for ax, of in zip(axes[0], found, strict=True):
        places = {(at.length_tokens, at.depth): at for at in of.places}
        shares = [[places[n, d].correct / places[n, d].asked for d in depths] for n in lengths]
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
        ax.grid(False)
        for (length, depth), at in places.items():
            column, row = depths.index(depth), lengths.index(length)
            ax.text(column, row, f"{at.correct}/{at.asked}", ha="center", va="center", fontsize=8)
            if not at.is_reached:
                ax.plot(column + 0.36, row - 0.32, "o", mfc="none", color=BOUND, ms=4)
        ax.set_title(of.variant, fontsize=9)
        ax.set_xticks(range(len(depths)), [f"{d:g}" for d in depths], fontsize=8)
        ax.set_yticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
    axes[0][0].set_ylabel("tokens of text")
    axes[0][len(found) // 2].set_xlabel("depth of the needle (0: the beginning, 1: the end)")
    return True


PLOTS = {"retrieval": retrieval}
