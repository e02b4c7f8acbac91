"""Conclude what a mixture of experts gains beside dense models, batch by batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from dashboards.palette import VARIANTS
from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import GREY, aside, draw_forecasts, legend_above, plt, reach
from labs.harness.facts.parts import IN_PART, Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.facts.sweep import concurrency_sweep
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval
from labs.harness.judging.text import number, ratio_number, times_with_interval
from labs.harness.spec import Point
from labs.mixture_of_experts.lab import ACTIVE, MIXTURE, TOTAL, experts_needed, step_s
from serving.models import Shape

# ----------------------------------------------------------------------------- what was served


@dataclass(frozen=True)
class Served:
    """Counts a served model: what memory holds of it, and what a token is multiplied with."""

    variant: str
    experts: int  # of a layer; 0 in a dense model
    per_token: int
    params: int
    active_params: int  # that a token is multiplied with
    held_bytes: int
    alone_bytes: float  # of weights that a step over one token reads


def served(context: Context) -> tuple[Served, ...]:
    """Counts each variant's shape, which its engine must say that it serves."""
    shapes = {p.variant.name: p.shape for p in context.points}
    return tuple(_counted(name, shape) for name, shape in shapes.items())


def _counted(variant: str, shape: Shape) -> Served:
    return Served(
        variant=variant,
        experts=shape.experts,
        per_token=shape.experts_per_token,
        params=shape.params,
        active_params=shape.matmul_params,
        held_bytes=shape.held_bytes,
        alone_bytes=shape.step_bytes(1),
    )


def tell_served(facts: tuple[Served, ...]) -> Finding:
    rows = [["Model", "Experts of a layer", "Parameters", "A token is multiplied with",
             "Weights in memory", "Weights that one token reads"]]  # fmt: skip
    rows += [
        [
            f"`{of.variant}`",
            f"{of.experts}, {of.per_token} for each token" if of.experts else "none: one MLP",
            f"{of.params / 1e6:,.0f} M",
            f"{of.active_params / 1e6:,.0f} M ({of.active_params / of.params:.0%})",
            f"{of.held_bytes / 1e6:,.0f} MB",
            f"{of.alone_bytes / 1e6:,.0f} MB ({of.alone_bytes / of.held_bytes:.0%})",
        ]
        for of in facts
    ]
    lines = [
        "Arithmetic, of the configurations that the engines say they serve: a trial counts only if"
        " the engine names the mixture's or the dense architecture, the files of that very"
        " configuration, and how many of its random weights are zero. An input embedding of its own"
        " lies in memory and is looked up; it is neither multiplied nor read as a whole.",
        "A mixture saves no memory: nobody knows beforehand which experts the next token needs.",
    ]
    return Finding(title="What was served?", rows=rows, lines=lines)


SERVED = Conclusion("shapes", served, tell_served)

# ------------------------------------------------------------------------------- batch by batch


@dataclass(frozen=True)
class Beside:
    """Compares the mixture with a dense model at a load: TPOT as measured, and by bytes."""

    measured: Interval | None  # mixture / dense; None where either was not measured
    by_bytes: float  # the same on the roofline, where the experts needed are those expected
    withheld: bool  # a caveat withholds verdicts there


@dataclass(frozen=True)
class AtLoad:
    """Holds what a step of the mixture needs at a load, and how long each model's takes."""

    users: int
    experts: int
    needed: float  # experts of a layer, expected
    read_bytes: float  # of the mixture's weights, expected
    tpots_s: dict[str, float | None]  # by variant
    total: Beside | None  # None where that model was left out
    active: Beside | None


def batches(context: Context) -> tuple[AtLoad, ...]:
    """Sets the three models side by side at each load of the sweep; empty without the mixture."""
    mine = [p for p in concurrency_sweep(context.points) if p.variant.name == MIXTURE.name]

    def beside(point: Point, dense: str) -> Beside | None:
        other = context.point(dense, point.workload.name, str(point.load))
        if other is None:
            return None
        effect = context.effect(point, other, "tpot_mean_s")
        return Beside(
            measured=effect.ratio if effect else None,
            by_bytes=step_s(point) / step_s(other),
            withheld=context.withholds("tpot_mean_s", point, other),
        )

    def tpot_s(point: Point, variant: str) -> float | None:
        return context.mean_at(variant, point.workload.name, point.load.users, "tpot_mean_s")

    return tuple(
        AtLoad(
            users=point.load.users,
            experts=point.shape.experts,
            needed=experts_needed(
                point.shape.experts, point.shape.experts_per_token, point.load.users
            ),
            read_bytes=point.shape.step_bytes(point.load.users),
            tpots_s={v.name: tpot_s(point, v.name) for v in context.lab.variants},
            total=beside(point, TOTAL),
            active=beside(point, ACTIVE),
        )
        for point in mine
        if point.shape.experts
    )


def tell_batches(facts: tuple[AtLoad, ...]) -> Finding:
    title = "How much of the gain is left in a batch?"
    if not facts:
        return Finding(title=title, lines=["No mixture of experts was served in this run."])
    variants = list(facts[0].tpots_s)
    rows = [["In flight", "Experts of a layer that a step needs", "Weights that it reads",
             *(f"TPOT, {name}" for name in variants),
             f"Mixture / {TOTAL}", "By bytes", f"Mixture / {ACTIVE}", "By bytes"]]  # fmt: skip
    rows += [
        [
            str(at.users),
            f"{at.needed:.3g} of {at.experts}",
            f"{at.read_bytes / 1e6:,.0f} MB",
            *(number(at.tpots_s[name], "s") for name in variants),
            *_cells(at.total),
            *_cells(at.active),
        ]
        for at in facts
    ]
    lines = [
        "A step over B tokens is expected to need E (1 - (1 - k/E)^B) of E experts, where each"
        " token goes to k of them that are drawn evenly. *By bytes* is the ratio of two steps on"
        " this machine's roofline, forecast before any engine started: the longer of reading the"
        " weights that are needed, keys and values, and of computing.",
        "TPOT also holds what a step takes beside reading, and the prompts of others that are"
        " prefilled between two tokens, for which all experts are read at any load.",
    ]
    return Finding(title=title, rows=rows, lines=lines)


def _cells(beside: Beside | None) -> tuple[str, str]:
    if beside is None:
        return "–", "–"
    by_bytes = f"{ratio_number(beside.by_bytes)}x"
    if beside.measured is None:
        return "–", by_bytes
    note = ", not valid" if beside.withheld else ""
    return times_with_interval(beside.measured) + note, by_bytes


BATCHES = Conclusion("batches", batches, tell_batches)

# ------------------------------------------------------------------------------------ the answer


def mixture_gains(run: JudgedRun) -> str | None:
    facts, counted = BATCHES.facts_of(run), SERVED.facts_of(run)
    alone = run.ratio("one-total")
    mixture = next((of for of in counted or () if of.experts), None)
    if not facts or not mixture or not alone:
        return None
    first, last = facts[0], facts[-1]
    small, total, active = (
        run.ratio("one-active"),
        _ratio_text(last.total),
        _ratio_text(last.active),
    )
    sentences = [
        "A mixture of experts leaves whole matrices out of a step and keeps them in memory. Of"
        f" {mixture.params / 1e6:,.0f} million parameters (random weights, tokens routed evenly) a"
        f" token is multiplied with {mixture.active_params / mixture.params:.0%}: with one request"
        f" TPOT is {alone} that of a dense model as large"
        + (f", {ratio_number(first.total.by_bytes)}x by bytes" if first.total else "")
        + (f", and {small} that of a dense model with the parameters of one token" if small else "")
        + "."
    ]
    if total and last.users > first.users:
        sentences.append(
            f"With {last.users} in flight a step is expected to need {last.needed:.3g} of"
            f" {last.experts} experts. TPOT beside the dense model as large is {total}"
            + (f"; beside the other it is {active}" if active else "")
            + "."
        )
    sentences.append(
        "What pruning gains is the lab weight-pruning's; what a mixture writes, random weights do"
        " not tell."
    )
    return " ".join(sentences)


def _ratio_text(beside: Beside | None) -> str:
    """Tells a measured ratio beside that by bytes and FLOP; empty where none counts."""
    if beside is None or beside.measured is None or beside.withheld:
        return ""
    by_bytes = ratio_number(beside.by_bytes)
    return f"{times_with_interval(beside.measured)} and by bytes and FLOP {by_bytes}x"


# --------------------------------------------------------------------------------------- its plot

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)  # labelled


def draw_batches(run: JudgedRun) -> str | None:
    """Draws TPOT over the batch beside its bounds, and the mixture's ratio to each dense model."""
    facts = BATCHES.facts_of(run)
    if not facts:
        return None
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    colours = dict(zip([v.name for v in run.lab.variants], VARIANTS, strict=False))
    forecast = False
    for place, (name, colour) in enumerate(colours.items()):
        forecast |= _draw_tpots(left, run, name, colour, aside(place, len(colours)), forecast)
    left.set_ylabel("TPOT (ms); dotted: at least, by bytes and FLOP")
    left.set_ylim(bottom=0)
    for place, dense in enumerate((TOTAL, ACTIVE)):
        if dense in colours:
            _draw_ratios(right, run, facts, dense, colours[dense], aside(place, 2))
    right.axhline(1, color=GREY, lw=0.8)
    right.set_yscale("log")
    low, high = right.get_ylim()
    ticks = [ratio for ratio in RATIOS if low <= ratio <= high]
    right.set_yticks(ticks, [f"{ratio:g}" for ratio in ticks])
    right.minorticks_off()
    right.set_ylabel("TPOT, mixture / dense; lines: by bytes")
    users = [at.users for at in facts]
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(users, [str(n) for n in users])
        ax.set_xlabel("requests in flight")
        legend_above(ax)
    return (
        "Left: TPOT of the mixture and of both dense models over the batch, with 95% intervals, and"
        " the least that reading and computing take. Right: the mixture's TPOT as a ratio to that"
        " of each dense model, with the line that follows from the experts that a batch needs,"
        " E (1 - (1 - k/E)^B)."
        + " Grey is what was forecast before any engine started, on the left with its band."
        * forecast
    )


def _draw_tpots(
    ax: Axes, run: JudgedRun, variant: str, colour: str, moved: float, labelled: bool
) -> bool:
    """Draws one model's TPOT, as forecast and as measured; tells whether any was forecast.

    `labelled`: the legend explains what a forecast looks like already.
    """
    points = [p for p in concurrency_sweep(run.points) if p.variant.name == variant]
    forecast = draw_forecasts(
        ax,
        [moved * p.load.users for p in points],
        [run.forecast(p, "tpot_mean_s") for p in points],
        1000,
        label="" if labelled else "forecast, with its band",
    )
    known = [(p, i) for p in points if (i := run.interval(p, "tpot_mean_s"))]
    if known:
        users = [moved * p.load.users for p, _ in known]
        values = [1000 * i.value for _, i in known]
        ax.errorbar(users, values, yerr=reach([i for _, i in known], 1000), fmt="o-", ms=4,
                    color=colour, capsize=3, label=variant)  # fmt: skip
    if points:
        batch = _between(points)
        least_ms = [1000 * _step_s(points[0], b) for b in batch]
        ax.plot(batch, least_ms, ":", lw=1.2, color=colour)
    return forecast


def _draw_ratios(
    ax: Axes, run: JudgedRun, facts: tuple[AtLoad, ...], dense: str, colour: str, moved: float
) -> None:
    sides = [(at.users, at.total if dense == TOTAL else at.active) for at in facts]
    known = [(users, of.measured) for users, of in sides if of and of.measured]
    if known:
        ratios = [ratio for _, ratio in known]
        ax.errorbar([moved * users for users, _ in known], [ratio.value for ratio in ratios],
                    yerr=reach(ratios), fmt="o", ms=4, color=colour, capsize=3,
                    label=f"mixture / {dense}")  # fmt: skip
    sweep = concurrency_sweep(run.points)
    ours, theirs = ([p for p in sweep if p.variant.name == v] for v in (MIXTURE.name, dense))
    for mine, other in itertools.product(ours, theirs):
        forecast = run.forecast_ratio(mine, other, "tpot_mean_s")
        if forecast and mine.load == other.load:
            ax.plot(moved * mine.load.users, forecast, "_", color=GREY, ms=13, mew=2, zorder=3)
    if ours and theirs:
        batch = _between(ours)
        ax.plot(batch, [_step_s(ours[0], b) / _step_s(theirs[0], b) for b in batch],
                "-", lw=1, color=colour)  # fmt: skip


def _between(points: list[Point]) -> list[float]:
    """Lists batches from the lightest to the heaviest load, evenly on a logarithmic axis."""
    users = [p.load.users for p in points]
    return [float(b) for b in np.geomspace(min(users), max(users), 40)]


def _step_s(point: Point, batch: float) -> float:
    return theory.decode_step_s(point.shape, point.ceilings, batch, point.context_tokens)


PUBLISHED: PublishedFigures = {
    "findings": {
        "shapes": (
            Published(figure="13 of 47 billion parameters for each token",
                      setting="Mixtral 8x7B, 2 of 8 experts",
                      source="Jiang et al., Mixtral of Experts, 2024"),
            Published(figure="3.3 of 30.5 billion parameters for each token",
                      setting="Qwen3-30B-A3B, 8 of 128 experts",
                      source="Qwen3 technical report, 2025"),
        ),
    },
}  # fmt: skip

PARTS = ReportParts(
    conclusions=(SERVED, BATCHES),
    answers={"CO-4": mixture_gains},
    kinds={"CO-4": IN_PART},
    plots={"batches": draw_batches},
    published=PUBLISHED,
    headline=Headline(
        claim="one-total",
        done="Multiplying a token with few of a model's weights, for a single user",
        figure="the time per token",
        on_front_page=False,
    ),
)
