"""Conclude which guesses were accepted, what they gained, and whether the text is the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np
import scipy
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from dashboards.palette import VARIANTS
from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import GREY, aside, plt, reach
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval
from labs.harness.judging.metrics import METRICS
from labs.harness.judging.text import number, point_label, times_with_interval
from labs.harness.spec import Point
from serving import metrics


def speculations(context: Context) -> list[tuple[Point, dict[str, Any]]]:
    """Lists the points that speculate, with their configuration."""
    configured = [(point, point.flags.speculative_config) for point in context.points]
    return [(point, config) for point, config in configured if config]


# -------------------------------------------------------------------------- what was accepted


@dataclass(frozen=True)
class Accepted:
    """Counts what the target accepted of the drafts at one point."""

    where: str
    shares: tuple[float, ...]  # of the drafts, accepted as far as position 1, 2, ...
    tokens_per_draft: float
    tokens_at_constant_share: float  # had every position the first one's share
    wasted_share: float | None  # of the drafted tokens


@dataclass(frozen=True)
class Draft:
    """Describes the derived draft model, by what its recipe measured on held-out text."""

    layers: int
    guessed_share: float
    guessed_untrained_share: float


@dataclass(frozen=True)
class Acceptance:
    """Holds what was accepted at every point that speculates, and the draft model."""

    points: tuple[Accepted, ...]
    draft: Draft | None


def accepted_at(context: Context, point: Point) -> list[float]:
    """Gives the share of drafts accepted at each position, all repeats together."""
    engines = [
        trial.engine.values
        for _, _, trial in context.folder.trials([point], context.lab)
        if trial and trial.engine
    ]
    drafts = sum(values.get(metrics.SPEC_DRAFTS, 0.0) for values in engines)
    shares: list[float] = []
    while drafts and any(metrics.position(len(shares)) in values for values in engines):
        name = metrics.position(len(shares))
        shares.append(sum(values.get(name, 0.0) for values in engines) / drafts)
    return shares


def acceptance(context: Context) -> Acceptance:
    """Sets acceptance by position beside the formula's single probability."""
    points = []
    for point, config in speculations(context):
        shares, length = accepted_at(context, point), context.mean(point, "acceptance_length")
        if not shares or length is None:
            continue
        rate = context.mean(point, "acceptance_rate")
        points.append(
            Accepted(
                where=point_label(point.key, context.lab),
                shares=tuple(shares),
                tokens_per_draft=length,
                tokens_at_constant_share=theory.accepted_length(
                    shares[0], config["num_speculative_tokens"]
                ),
                wasted_share=None if rate is None else 1 - rate,
            )
        )
    about = context.run.about.get("draft", {})
    draft = None
    if "acceptance_untrained" in about:
        draft = Draft(about["layers"], about["acceptance"], about["acceptance_untrained"])
    return Acceptance(tuple(points), draft)


def tell_acceptance(facts: Acceptance) -> Finding:
    rows = [
        [
            "Point",
            "Accepted at position 1, 2, ...",
            METRICS["acceptance_length"].title,
            "At constant a",
            "Wasted",
        ]
    ]
    rows += [
        [
            p.where,
            ", ".join(f"{share:.2f}" for share in p.shares),
            f"{p.tokens_per_draft:.2f}",
            f"{p.tokens_at_constant_share:.2f}",
            "–" if p.wasted_share is None else f"{p.wasted_share:.0%}",
        ]
        for p in facts.points
    ]
    draft_lines = [
        f"The draft has {draft.layers} of the target's layers and guessed"
        f" {draft.guessed_share:.0%} of held-out tokens. Before it was distilled it guessed"
        f" {draft.guessed_untrained_share:.1%} of them, and would only have cost time."
    ] if (draft := facts.draft) else []  # fmt: skip
    return Finding(
        title="What was accepted",
        rows=rows,
        lines=[
            *draft_lines,
            "A position counts as accepted if it and all positions before it were. *At constant a*"
            " is (1 - a^(g+1)) / (1 - a), with a of the first position; where later positions do"
            " better than that, correct guesses come in runs. *Wasted* is the share of drafted"
            " tokens that were rejected.",
            "Where n-gram lookup finds nothing to copy, it drafts nothing in that step; such steps"
            " are not counted here.",
        ],
    )


ACCEPTANCE = Conclusion("acceptance", acceptance, tell_acceptance)

# ------------------------------------------------------------------------------- what it gained


Outcome = Literal["wins", "loses", "undecided", "not valid"]


@dataclass(frozen=True)
class SpeedUp:
    """Holds a point's speed-up as measured, and as Leviathan's formula explains it.

    The costs are in steps of the target at the same batch; None where a part was not measured.
    """

    point: Point
    where: str
    measured: Interval  # TPOT without / with speculation
    tokens_per_step: float | None
    draft_cost: float | None
    verify_cost: float | None
    explained: float | None
    is_valid: bool  # whether nothing withholds a verdict on it

    @property
    def outcome(self) -> Outcome:
        """Says whether speculation wins; it is undecided where the interval includes 1."""
        ratio = self.measured
        if not self.is_valid:
            return "not valid"
        if ratio.low is None or ratio.high is None or ratio.low <= 1 <= ratio.high:
            return "undecided"
        return "wins" if ratio.value > 1 else "loses"


@dataclass(frozen=True)
class Curve:
    """Traces the speed-up of a variant on a workload over the requests in flight."""

    variant: str
    workload: str
    speed_ups: tuple[SpeedUp, ...]  # in the order of the requests in flight

    @property
    def turn(self) -> tuple[int, int, bool] | None:
        """Finds the loads between which it turns, and whether it wins beyond them.

        They are the last load told before and the first told after the turn; loads between them are
        those where speculation is undecided, or the figures not valid.
        """
        decided_loads = [
            (p.point.load.users, p.outcome == "wins")
            for p in self.speed_ups
            if p.outcome in ("wins", "loses")
        ]
        for (before, one), (after, other) in pairwise(decided_loads):
            if one != other:
                return before, after, other
        return None


@dataclass(frozen=True)
class SpeedUps:
    """Holds every speculating point that was measured beside the plain engine."""

    points: tuple[SpeedUp, ...]

    @property
    def curves(self) -> list[Curve]:
        at: dict[tuple[str, str], list[SpeedUp]] = {}
        for p in sorted(self.points, key=lambda p: p.point.load.users):
            kind = (p.point.variant.name, p.point.workload.name)
            at.setdefault(kind, []).append(p)
        return [Curve(*kind, tuple(measured)) for kind, measured in at.items()]


def speed_ups(context: Context) -> SpeedUps:
    """Compares TPOT without / with speculation with Leviathan's formula of measured parts.

    v is read off the plain engine's own TPOT over concurrency (linear between the loads measured,
    nothing beyond them), c off the draft served alone, by the engine's clock: at a millisecond a
    step tokens reach the client in clumps. A step's tokens are the engine's count over all steps:
    an n-gram's steps without a draft count as steps of one token.
    """
    plain = {
        p.load.users: tpot_s
        for p in context.points
        if p.variant.name == "none" and (tpot_s := context.mean(p, "tpot_mean_s"))
        and p.workload.name in ("story", "crowd")
    }  # fmt: skip
    loads = sorted(plain)
    alone_s = [
        s for p in context.points if p.variant.weights == "draft" and (s := step_s(context, p))
    ]
    single = context.point("none", "story", "concurrent:1")
    target_s = step_s(context, single) if single else None
    measured = []
    for point, config in speculations(context):
        base = context.point("none", point.workload.name, str(point.load))
        gain = context.effect(base, point, "tpot_mean_s") if base else None
        if base is None or gain is None:
            continue
        g, batch = config["num_speculative_tokens"], point.load.users
        verify = draft = explained = None
        if loads and loads[0] <= batch and batch * (g + 1) <= loads[-1]:
            many, few = np.interp([batch * (g + 1), batch], loads, [plain[n] for n in loads])
            verify = float(many / few)
        if config["method"] == "ngram":
            draft = 0.0
        elif alone_s and target_s:
            draft = alone_s[0] / target_s
        length = tokens_a_step(context, point)
        if length and verify is not None and draft is not None:
            explained = length / (g * draft + verify)
        where = point_label(point.key, context.lab)
        is_valid = not context.withholds("tpot_mean_s", base, point)
        measured.append(
            SpeedUp(point, where, gain.ratio, length, draft, verify, explained, is_valid)
        )
    return SpeedUps(tuple(measured))


def step_s(context: Context, point: Point) -> float | None:
    """Averages the seconds between a sequence's steps, by the engine's own clock."""
    steps = [
        trial.engine.histograms[metrics.ITL]
        for _, _, trial in context.folder.trials([point], context.lab)
        if trial and trial.engine and metrics.ITL in trial.engine.histograms
    ]
    count = sum(h.count for h in steps)
    return sum(h.sum for h in steps) / count if count else None


def tokens_a_step(context: Context, point: Point) -> float | None:
    """Counts output tokens a decode step and sequence, with steps that drafted nothing.

    Each of those steps is one sample of the engine's inter-token latency. Its counter of accepted
    tokens would say too much: it takes in those that an answer's end cuts off its last draft.
    """
    tokens = steps = 0.0
    for _, _, trial in context.folder.trials([point], context.lab):
        if trial and trial.engine and metrics.ITL in trial.engine.histograms:
            first = trial.engine.histograms[metrics.TTFT].count
            tokens += trial.engine.values[metrics.GENERATION_TOKENS] - first
            steps += trial.engine.histograms[metrics.ITL].count
    return tokens / steps if steps else None


def tell_speed_up(facts: SpeedUps) -> Finding:
    """Shows the speed-up beside the formula with measured parts, and where it crosses 1."""
    rows = [
        [
            "Point",
            "Speed-up",
            "Outcome",
            "Tokens per step, drafts or none",
            "c",
            "v",
            "Tokens / (g c + v)",
        ]
    ]
    rows += [
        [
            p.where,
            times_with_interval(p.measured),
            p.outcome,
            number(p.tokens_per_step),
            number(p.draft_cost),
            number(p.verify_cost),
            "–" if p.explained is None else f"{p.explained:.2f}x",
        ]
        for p in facts.points
    ]
    return Finding(
        title="Where does it win?",
        rows=rows,
        lines=[
            *turn_sentences(facts),
            "Speed-up is TPOT without / with speculation at the same load, with a 95% interval; it"
            " *wins* or *loses* where the interval excludes 1, and is *undecided* elsewhere."
            + " Where it is *not valid*, see validity."
            * any(not p.is_valid for p in facts.points),
            "c is a step of the draft served alone / a step of the target, both at one stream, by"
            " the engine's clock; v is the plain engine's TPOT at B (g + 1) / that at B. Where the"
            " speed-up is less than the last column, the difference is the cost of proposing and"
            " rejecting: sampling, bookkeeping, and starting the draft. Where it is more, v is too"
            " large, since the TPOT of more requests in flight contains their prefills.",
        ],
    )


def turn_sentences(facts: SpeedUps) -> list[str]:
    """Says at which of the measured loads each curve wins or loses, and between which it turns."""
    lines = []
    for curve in facts.curves:
        clauses: list[str] = []
        for outcome, loads in groupby(curve.speed_ups, key=lambda p: p.outcome):
            at = (
                f"at {p.point.load.users}{' in flight' if p is curve.speed_ups[0] else ''} with"
                f" {times_with_interval(p.measured)}"
                for p in loads
            )
            clauses.append(f"{outcome} {', '.join(at)}")
        turns = ""
        if turn := curve.turn:
            before, after, gains = turn
            start = "win" if gains else "lose"
            turns = f". It starts to {start} between {before} and {after} in flight"
        lines.append(f"`{curve.variant}` on {curve.workload}: {'; '.join(clauses)}{turns}.")
    return lines


SPEED_UP = Conclusion("speed-up", speed_ups, tell_speed_up)

# ------------------------------------------------------------------------- is it the same text


@dataclass(frozen=True)
class SameText:
    """Counts a point's answers that equal the plain engine's, with a 95% Wilson interval."""

    where: str
    compared: int
    same: int
    low_share: float
    high_share: float


def same_text(context: Context) -> tuple[SameText, ...]:
    """Compares answers with the plain engine's at one stream, character for character.

    Requests pair up by repeat and index.
    """
    texts: dict[str, dict[tuple[int, int], str]] = {}
    for point, result, trial in context.folder.trials(context.points, context.lab):
        if trial and point.workload.keep_text:
            texts.setdefault(point.key, {}).update(
                {(result.repeat, r.index): r.text for r in trial.records if r.text is not None}
            )
    points = []
    for point in context.points:
        base = context.point("none", point.workload.name, "concurrent:1")
        if base is None or base.key == point.key or point.key not in texts:
            continue
        speculated, plain = texts[point.key], texts.get(base.key, {})
        both = sorted(speculated.keys() & plain.keys())
        same = sum(speculated[key] == plain[key] for key in both)
        if both:
            wilson = scipy.stats.binomtest(same, len(both)).proportion_ci(method="wilson")
            where = point_label(point.key, context.lab)
            points.append(SameText(where, len(both), same, float(wilson.low), float(wilson.high)))
    return tuple(points)


def tell_same_text(facts: tuple[SameText, ...]) -> Finding:
    rows = [["Point", "Answers compared", "The same", "95% interval"]]
    rows += [
        [p.where, str(p.compared), f"{p.same / p.compared:.0%}",
         f"{p.low_share:.0%} to {p.high_share:.0%}"]
        for p in facts
    ]  # fmt: skip
    return Finding(
        title="Is it the same text?",
        rows=rows,
        lines=[
            "Greedy completions are compared with those that the plain engine writes one at a time."
            " `none` can differ although it does not speculate: another batch size adds"
            " numbers in another order, so a near tie between two tokens may be decided the other"
            " way. The same happens where a verification puts g + 1 tokens into one step.",
        ],
    )


SAME_TEXT = Conclusion("same-text", same_text, tell_same_text)

# --------------------------------------------------------------------- its answer and its plot


def speculation_wins(run: JudgedRun) -> str | None:
    facts = SPEED_UP.facts_of(run)
    if not facts or not facts.points:
        return None
    winning = [p for p in facts.points if p.outcome == "wins"]
    best = max(winning, key=lambda p: p.measured.value, default=None)
    loads = "measured load" if all(p.is_valid for p in facts.points) else "load that is valid"
    most = f"Speculation wins at no {loads}."
    if best:
        most = (
            f"The largest speed-up is {times_with_interval(best.measured)}, by"
            f" `{best.point.variant.name}` on {best.point.workload.name}, with"
            f" {best.point.load.users} in flight."
        )
    return " ".join([most, *turn_sentences(facts)])


def draw_speculation(run: JudgedRun) -> str | None:
    """Draws acceptance by position, and the speed-up over load, each workload in a column."""
    points = run.once(speed_ups).points
    if not points:
        return None
    workloads = list(dict.fromkeys(p.point.workload.name for p in points))
    colours = dict(zip(dict.fromkeys(p.point.variant.name for p in points), VARIANTS, strict=False))
    size = (max(5.5, 2.4 * len(workloads)), 5.4)
    figure, rows = plt.subplots(
        2, len(workloads), figsize=size, sharex="row", sharey="row", squeeze=False
    )
    for workload, above, below in zip(workloads, *rows, strict=True):
        mine = [p for p in points if p.point.workload.name == workload]
        above.set_title(workload, fontsize=9)
        _draw_acceptance(above, run, mine, colours)
        _draw_gain(below, run, mine, colours)
    rows[0][0].set_ylabel("share of drafts\naccepted that far")
    rows[1][0].set_ylabel("speed-up\n(TPOT without / with)")
    rows[1][0].set_ylim(bottom=0)
    users = sorted({p.point.load.users for p in points})
    rows[1][0].set_xscale("log", base=2)  # of all columns, which share their axes
    rows[1][0].set_xticks(users, [str(n) for n in users])
    rows[1][0].set_xlim(users[0] / 1.4, users[-1] * 1.4)
    handles = [Line2D([], [], color=colour, marker="o", label=v) for v, colour in colours.items()]
    handles += [Line2D([], [], color=GREY, **FORMULA, label="formula, measured parts")]
    if any(_forecast_speed_up(run, p.point) for p in points):
        handles += [Line2D([], [], color=GREY, **FORESEEN, label="forecast before the run")]
    columns = len(handles) if len(workloads) > 2 else 3
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    return (
        "Above: how far ahead guesses are right, at one stream. Below: what that gains, with"
        " 95% intervals; below 1 speculation loses. Open marks are Leviathan's formula with"
        " acceptance, draft cost and verification cost as measured."
        + " What is not valid is left out."
        * any(not p.is_valid for p in points)
    )


FORMULA: dict[str, Any] = {"marker": "o", "ls": "none", "mfc": "none", "ms": 10}
FORESEEN: dict[str, Any] = {"marker": "_", "ls": "none", "ms": 9, "mew": 2}


def _draw_acceptance(
    ax: Axes, run: JudgedRun, points: Sequence[SpeedUp], colours: Mapping[str, str]
) -> None:
    """Draws the share of drafts accepted by position, of a workload's point of least load."""
    for variant, colour in colours.items():
        if mine := _by_load(points, variant):
            at = accepted_at(run, mine[0].point)
            ax.plot(range(1, len(at) + 1), at, "o-", color=colour)
    ax.set_xlabel("position drafted")
    ax.set_ylim(0, 1.05)
    ax.xaxis.set_major_locator(MultipleLocator(1))


def _draw_gain(
    ax: Axes, run: JudgedRun, points: Sequence[SpeedUp], colours: Mapping[str, str]
) -> None:
    """Draws a workload's speed-up over load: measured, explained, forecast."""
    for place, (variant, colour) in enumerate(colours.items()):
        mine = _by_load(points, variant)
        x = [aside(place, len(colours)) * p.point.load.users for p in mine]
        ax.errorbar(
            x, [p.measured.value if p.is_valid else np.nan for p in mine],
            yerr=reach([p.measured for p in mine]),
            capsize=3, color=colour, marker="o",
        )  # fmt: skip
        explained = [np.nan if p.explained is None else p.explained for p in mine]
        ax.plot(x, explained, color=colour, **FORMULA)
        foreseen = [_forecast_speed_up(run, p.point) or np.nan for p in mine]
        ax.plot(x, foreseen, color=GREY, **FORESEEN)
    ax.axhline(1, color=GREY, lw=1)
    ax.set_xlabel("requests in flight")


def _by_load(points: Sequence[SpeedUp], variant: str) -> list[SpeedUp]:
    """Lists a variant's points in the order of their loads."""
    mine = (p for p in points if p.point.variant.name == variant)
    return sorted(mine, key=lambda p: p.point.load.users)


def _forecast_speed_up(run: JudgedRun, point: Point) -> float | None:
    """Divides the plain engine's forecast TPOT by this point's; None without both."""
    plain = run.point("none", point.workload.name, str(point.load))
    return run.forecast_ratio(plain, point, "tpot_mean_s") if plain else None


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "claims": {
        "draft-story": (
            Published(figure="2 to 3x faster", source="Leviathan et al., ICML 2023"),
            Published(figure="up to 6.5x faster", source="EAGLE-3"),
            Published(
                figure="158 to 373 tok/s",
                setting="8B on one H100, a batch of one",
                source="EAGLE-3",
            ),
            Published(
                figure="2.03x faster",
                setting="1 in flight, 1.71x with 4, 1.66x with 16",
                source="EAGLE-3.1",
            ),
        ),
        "draft-crowd": (
            Published(figure="1.38x faster", setting="a batch of 64", source="EAGLE-3"),
            Published(
                figure="1.4 to 1.8x slower", setting="many requests a second", source="vLLM, 2024"
            ),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(ACCEPTANCE, SPEED_UP, SAME_TEXT),
    answers={"SO-5": speculation_wins},
    plots={"speculation": draw_speculation},
    published=PUBLISHED,
    headline=Headline(
        claim="ngram-quote",
        done="Guessing tokens ahead by copying from the context, where text is quoted",
        figure="the time per token",
        on_front_page=False,
    ),
)
