"""Draw what a decode step and the long prompt's prefill are made of, variant by variant."""

from __future__ import annotations

from collections.abc import Mapping

from labs.harness.derived.lab_modules import OwnPlot
from labs.harness.derived.run_view import JudgedRun
from labs.harness.reports.drawing import draw_parts, plt
from labs.single_stream.facts import Facts


def flags(_: JudgedRun, facts: Facts) -> bool:
    variants = facts.flags.variants
    decode = {v.variant: v.decode.parts for v in variants if v.decode and v.tpot_s.known}
    prefill = {v.variant: v.prefill.parts for v in variants if v.prefill and v.ttft_s.known}
    measured = [
        (passes, label)
        for passes, label in (
            (decode, "TPOT, mean (ms)"), (prefill, "TTFT of the long prompt, mean (ms)")
        )
        if passes
    ]  # fmt: skip
    if not measured:
        return False
    figure, axes = plt.subplots(
        1, len(measured), figsize=(9.5 / 2 * len(measured), 3.8), squeeze=False
    )
    for ax, (passes, label) in zip(axes[0], measured, strict=True):
        draw_parts(ax, passes)
        ax.tick_params(axis="x", rotation=30 if len(variants) > 3 else 0)
        ax.set_ylabel(label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center",
                  ncols=2 * len(measured), frameon=False)  # fmt: skip
    return True


PLOTS: Mapping[str, OwnPlot] = {"flags": flags}
