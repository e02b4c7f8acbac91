"""Conclude which token budget keeps the streams flowing during a long prefill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import (
    BANDS,
    GREY,
    PLAYED,
    draw_forecasts,
    legend_above,
    legend_of_all,
    plt,
    reach,
)
from labs.harness.facts.parts import IN_PART_FORECAST, Conclusion, Headline, Pair, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.filing.results import Band, Finding, OnTwoEngines
from labs.harness.judging.judge import Interval
from labs.harness.judging.text import number, times_with_interval, yes_or_no
from labs.harness.judging.timeline import GRID_S, Timeline, timeline
from labs.harness.spec import Point
from loadtests import records
from loadtests.arrivals import Contended
from loadtests.records import RequestRecord


@dataclass(frozen=True)
class Budget:
    """Holds what one token budget did to the streams and to the long prompt among them."""

    variant: str
    budget_tokens: int
    piece_tokens: int  # of the prompt, in one step at most
    chunked: bool
    stall_s: float  # of the streams, mean
    long_ttft_s: float
    streams_ttft_s: float | None  # of the streams' own prompts, mean
    streams_beside_whole: Interval | None  # that TTFT / the one without chunks
    within_slo: bool | None  # whether the stall is; None where the lab sets no limit
    every_s: float | None  # between two long prompts, as planned
    is_valid: bool  # whether nothing withholds a verdict on the stall and on the long prompt
    streams_are_valid: bool  # and on the streams' TTFT beside the one without chunks


@dataclass(frozen=True)
class StallLine:
    """Fits the stall over the tokens of a piece, by least squares."""

    fixed_s: float
    s_per_token: float
    r_squared: float


@dataclass(frozen=True)
class Handover:
    """Says what a second machine that does the prefill would have to send, and how soon."""

    kv_bytes: float
    prefill_s: float


@dataclass(frozen=True)
class TokenBudgets:
    """Holds every token budget, the line of the stall, and the link that a split would need."""

    longest_gap_s: float | None  # by the SLO
    budgets: tuple[Budget, ...]
    line: StallLine | None
    handover: Handover | None

    @property
    def best(self) -> Budget | None:
        """Picks the budget within the SLO whose long prompt waits least."""
        fitting = (b for b in self.budgets if b.within_slo and b.is_valid)
        return min(fitting, key=lambda b: (b.long_ttft_s, b.variant), default=None)

    @property
    def whole(self) -> Budget | None:
        """Finds the budget that prefills the long prompt in one step."""
        return next((b for b in self.budgets if not b.chunked), None)


def token_budgets(context: Context) -> TokenBudgets:
    """Measures every budget; a handover is the prompt's KV bytes over the time of its prefill.

    Source: DistServe (OSDI 2024).
    """
    limit_s = context.lab.slo.itl_s
    without = next((p for p in context.points if not p.flags.enable_chunked_prefill), None)
    budgets = []
    for point in context.points:
        stall_s, ttft_s = (context.mean(point, m) for m in ("stall_mean_s", "intruder_ttft_mean_s"))
        if stall_s is None or ttft_s is None or not point.workload.intruder:
            continue
        tokens = point.flags.max_num_batched_tokens
        prompt_tokens = point.workload.intruder.prompt_tokens
        beside = None
        if without and without.key != point.key:
            beside = context.effect(point, without, "ttft_mean_s")
        is_valid = not any(
            context.withholds(metric, point) for metric in ("stall_mean_s", "intruder_ttft_mean_s")
        )
        budgets.append(
            Budget(
                variant=point.variant.name,
                budget_tokens=tokens,
                piece_tokens=min(tokens - point.load.users, prompt_tokens),
                chunked=point.flags.enable_chunked_prefill,
                stall_s=stall_s,
                long_ttft_s=ttft_s,
                streams_ttft_s=context.mean(point, "ttft_mean_s"),
                streams_beside_whole=beside.ratio if beside else None,
                within_slo=None if limit_s is None else stall_s <= limit_s,
                every_s=point.load.every_s if isinstance(point.load, Contended) else None,
                is_valid=is_valid,
                streams_are_valid=not context.withholds("ttft_mean_s", point, without or point),
            )
        )
    whole_s = [b.long_ttft_s for b in budgets if not b.chunked][-1:]
    point = context.points[0]
    handover = None
    if whole_s and point.workload.intruder:
        moved = point.workload.intruder.prompt_tokens * point.shape.kv_bytes_per_token()
        handover = Handover(kv_bytes=moved, prefill_s=whole_s[0])
    return TokenBudgets(limit_s, tuple(budgets), _stall_line(budgets), handover)


def _stall_line(budgets: Sequence[Budget]) -> StallLine | None:
    """Fit the stall over the tokens of a piece; None with too few sizes, or where it falls."""
    if len({b.piece_tokens for b in budgets}) <= 2:
        return None
    fit = scipy.stats.linregress([b.piece_tokens for b in budgets], [b.stall_s for b in budgets])
    if fit.slope <= 0:
        return None
    return StallLine(float(fit.intercept), float(fit.slope), float(fit.rvalue**2))


def tell_budgets(facts: TokenBudgets) -> Finding:
    rows = [
        [
            "Variant",
            "Token budget",
            "Stall, mean",
            "TTFT of the long prompt",
            "TTFT of the streams, mean",
            "Relative to no chunks",
            "Stall within the SLO",
        ]
    ]
    rows += [
        [b.variant, str(b.budget_tokens), number(b.stall_s, "s"), number(b.long_ttft_s, "s"),
         number(b.streams_ttft_s, "s"),
         _beside_whole(b),
         yes_or_no(b.within_slo) if b.is_valid else "not valid"]
        for b in facts.budgets
    ]  # fmt: skip
    lines = []
    if facts.longest_gap_s is not None:
        best, gap = facts.best, number(facts.longest_gap_s, "s")
        lines.append(
            f"With gaps of at most {gap}, `{best.variant}` gives the long prompt its"
            f" first token soonest, after {number(best.long_ttft_s, 's')}."
            if best
            else f"No budget here keeps the gaps within {gap}: a decode step alone"
            " takes most of that, or the budgets are too large."
            if all(b.is_valid for b in facts.budgets)
            else f"No budget here whose figures are valid keeps the gaps within {gap}."
        )
    if price := streams_sentence(facts):
        lines.append(price)
    if late := [b for b in facts.budgets if b.every_s and b.long_ttft_s > b.every_s]:
        lines.append(
            f"With {', '.join(f'`{b.variant}`' for b in late)} a long prompt takes longer than the"
            " time between two. The next one follows at once, and so less often than elsewhere."
        )
    if line := facts.line:
        lines.append(
            f"The stall grows linearly with the tokens of a piece: {number(line.fixed_s, 's')}"
            f" + {1e3 * line.s_per_token:.3g} ms a token (R² {line.r_squared:.3f}), so prefill runs"
            f" at {1 / line.s_per_token:,.0f} tok/s beside the streams."
        )
    if facts.handover:
        lines.append(handover_sentence(facts.handover))
    return Finding(title="Which token budget?", rows=rows, lines=lines)


def _beside_whole(budget: Budget) -> str:
    if budget.streams_beside_whole is None:
        return "–"
    return (
        times_with_interval(budget.streams_beside_whole)
        if budget.streams_are_valid
        else "not valid"
    )


def streams_sentence(facts: TokenBudgets) -> str | None:
    """Tells what the smallest budget costs the streams; None where that was not measured."""
    least = min(facts.budgets, key=lambda b: b.budget_tokens, default=None)
    if not (least and least.streams_ttft_s and least.streams_beside_whole and facts.whole):
        return None
    if not least.streams_are_valid:
        return "What the smallest budget costs the streams is not valid."
    low, high = least.streams_beside_whole.low, least.streams_beside_whole.high
    if high is not None and high < 1:
        paid = "The streams do not pay: a new prompt of theirs has its first token sooner, too."
    else:
        settled = low is not None and low > 1
        paid = (
            f"{'The streams pay too' if settled else 'Whether the streams pay too is not settled'}:"
            " a new prompt of theirs waits while the pieces of the long one fill each step."
        )
    return (
        f"{paid} With `{least.variant}` their own first token takes"
        f" {number(least.streams_ttft_s, 's')} on average, without chunks"
        f" {number(facts.whole.streams_ttft_s, 's')}:"
        f" {times_with_interval(least.streams_beside_whole)}, the ratio of their geometric means."
    )


def handover_sentence(handover: Handover) -> str:
    moved, prefill_s = handover.kv_bytes, handover.prefill_s
    return (
        f"A second machine that does the prefill would have to send {moved / 1e6:,.1f} MB"
        f" of keys and values. In the {number(prefill_s, 's')} that the prefill takes here, that"
        f" needs {8 * moved / prefill_s / 1e9:.2f} Gbit/s: over a faster link, splitting prefill"
        " from decode adds less delay than it removes."
    )


TOKEN_BUDGET = Conclusion("token-budget", token_budgets, tell_budgets)

# ------------------------------------------------------------------------------------ the answers


def chunks_solve(run: JudgedRun) -> str | None:
    stall, ttft = run.ratio("stall-sixteenth"), run.ratio("ttft")
    budgets = TOKEN_BUDGET.facts_of(run)
    if not (stall and ttft and budgets and budgets.whole):
        return None
    gain = (
        f"A long prompt that is prefilled whole stops every running stream for"
        f" {number(budgets.whole.stall_s, 's')}. With a budget of a sixteenth of it the stall is"
        f" {stall}, and the prompt's own first token takes {ttft} as long."
    )
    price = streams_sentence(budgets)
    return f"{gain} {price}" if price else gain


def split(run: JudgedRun) -> str | None:
    """Answers whether a second machine for the prefill would pay."""
    budgets = TOKEN_BUDGET.facts_of(run)
    if not (budgets and budgets.whole and budgets.handover):
        return None
    answer = (
        f"On one engine a prefill stops the streams for {number(budgets.whole.stall_s, 's')}; on"
        f" two it would not affect them. {handover_sentence(budgets.handover)} The split itself was"
        " not run."
    )
    foreseen = split_sentence(run)
    return f"{answer} {foreseen}" if foreseen else answer


def split_sentence(run: Context) -> str | None:
    """Tells what a split is forecast to do beside chunks; None in runs without that forecast."""
    forecasts = run.predictions.in_virtual_time
    pairs = forecasts.on_two if forecasts else ()
    splits = {of.link_gbit_per_s: of for of in pairs if of.link_gbit_per_s is not None}
    shared = min((of for of in pairs if of.link_gbit_per_s is None), key=_budget(run), default=None)
    if not (forecasts and splits and shared):
        return None
    fast, slow = max(splits), min(splits)
    budget = shared.point.partition("/")[0]
    return (
        "*Forecast, not measured*, with a second machine as fast as this one: one prefills and one"
        f" decodes, {fast:g} Gbit/s between them: {_foreseen(splits[fast].bands)}. Over {slow:g}"
        f" Gbit/s the long prompt's first token comes after"
        f" {_seconds(splits[slow].bands, 'intruder_ttft_mean_s')}. With `{budget}` one engine is"
        f" forecast to give: {_foreseen(forecasts.points[shared.point])}; two that share the"
        f" requests: {_foreseen(shared.bands)}. What sending and receiving cost the engines is left"
        " out."
    )


def _budget(run: Context) -> Callable[[OnTwoEngines], int]:
    tokens = {p.key: p.flags.max_num_batched_tokens for p in run.points}
    return lambda of: tokens[of.point]


def _foreseen(bands: Mapping[str, Band]) -> str:
    throughput = bands.get("output_tokens_per_s")
    return (
        f"stall {_seconds(bands, 'stall_mean_s')}, TTFT of the long prompt"
        f" {_seconds(bands, 'intruder_ttft_mean_s')} and of the streams"
        f" {_seconds(bands, 'ttft_mean_s')},"
        f" {number(throughput.value if throughput else None, 'tok/s')}"
    )


def _seconds(bands: Mapping[str, Band], metric: str) -> str:
    return number(bands[metric].value if metric in bands else None, "s")


# -------------------------------------------------------------------------------------- its plots


def draw_stall(run: JudgedRun) -> str | None:
    """Draws the stall, the long prompt's own wait and that of the streams, over the budget."""
    points, lab, forecast = run.points, run.lab, False
    _, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for ax, metric, label in (
        (axes[0], "stall_mean_s", "stall of the streams, mean (ms)"),
        (axes[1], "intruder_ttft_mean_s", "long prompt's TTFT, mean (ms)"),
        (axes[2], "ttft_mean_s", "streams' own TTFT, mean (ms)"),
    ):
        known = {f.point: f.prediction.value for f in run.summary.forecasts if f.metric == metric}
        x = range(len(points))
        if known:
            predicted = [1000 * known.get(p.key, np.nan) for p in points]
            ax.plot(x, predicted, "_", ms=22, mew=2, color=BOUND, label="predicted floor")
        intervals = [run.interval(p, metric) for p in points]
        heights = [1000 * i.value if i else np.nan for i in intervals]
        bars = reach(intervals, 1000)
        ax.bar(x, heights, 0.6, yerr=bars, capsize=4, color=BLUE, label="measured, 95% interval")
        forecast |= draw_forecasts(ax, x, [run.forecast(p, metric) for p in points], 1000)
        budgets = [p.flags.max_num_batched_tokens for p in points]
        ax.set_xticks(x, [f"{p.variant.name}\n{b}" for p, b in zip(points, budgets, strict=True)])
        ax.set_xlabel("variant, token budget")
        ax.set_ylabel(label)
        tops = [(h, r) for h, r in zip(heights, bars[1], strict=True) if h == h]
        ax.set_ylim(0, max([1, *(max(1.25 * h, 1.05 * (h + r)) for h, r in tops)]))
    if lab.slo.itl_s:
        label = f"SLO {1000 * lab.slo.itl_s:g} ms"
        axes[0].axhline(1000 * lab.slo.itl_s, color=GREY, ls=":", label=label)
    legend_above(axes[0])
    return (
        "What a token budget shortens, the stall of everybody else (left), and what it may cost:"
        " how long the long prompt (middle) and the streams' own new prompts (right) wait for"
        " their first token." + BANDS * forecast
    )


def draw_timeline(run: JudgedRun) -> str | None:
    """Draws one intrusion as the streams felt it: a tick for every token of each stream.

    Where plays are kept, their gaps over the whole trial stand beside the measured ones.
    """
    drawn = []
    for point in run.points:
        path = run.folder.trial_folder(point, 1) / "requests.jsonl.gz"
        if not path.exists() or point.workload.intruder is None:
            continue
        all_records = list(records.read(path))
        long_prompts = [
            r for r in all_records if point.workload.is_intruder(r.index) and r.ok and r.in_window
        ]
        if long_prompts:
            most_felt = max(long_prompts, key=lambda r: _streams_stalled_by(r, all_records))
            drawn.append((point, most_felt, all_records))
    if not drawn:
        return None
    played = [run.played.get(point.key) for point, _, _ in drawn]
    beside = any(any(of.gaps_s) for of in played if of)
    figure, axes = plt.subplots(
        len(drawn),
        2 if beside else 1,
        figsize=(12 if beside else 9, 0.6 + 1.0 * len(drawn)),
        sharex="col",
        squeeze=False,
    )
    before_s = 0.5
    after_s = max(2 * max(long.ttft_s or 0 for _, long, _ in drawn), 1.0)
    for ax, (point, long, all_records) in zip(axes[:, 0], drawn, strict=True):
        start, first = long.sent_s, long.chunks[0][0]
        ax.axvspan(0, first - start, color=BOUND, alpha=0.25, lw=0)
        streams = [r for r in all_records if not point.workload.is_intruder(r.index) and r.chunks]
        seats: list[float] = []  # when each row is free again: a user's next answer takes it
        for r in sorted(streams, key=lambda r: r.sent_s):
            row = next((i for i, free in enumerate(seats) if free <= r.sent_s), len(seats))
            seats[row : row + 1] = [r.chunks[-1][0]]
            at = [t - start for t, _ in r.chunks if -before_s < t - start < after_s]
            # one line for all ticks of a row, as each mark would take several times as much text
            ticks = np.array([(row - TICK, row + TICK, math.nan)] * len(at)).ravel()
            ax.plot(np.repeat(at, 3), ticks, color=BLUE, lw=1)
        ax.set_ylabel(point.variant.name, rotation=0, ha="right", va="center")
        ax.set_yticks([])
        ax.set_ylim(-0.7, len(seats) - 0.3)
        ax.grid(False)
    axes[-1, 0].set_xlim(-before_s, after_s)
    axes[-1, 0].set_xlabel("seconds from the long prompt's arrival")
    if beside:
        measured = [timeline(point, all_records) for point, _, all_records in drawn]
        _draw_gaps([*axes[:, 1]], measured, played)
        legend_of_all(figure, axes[:, 1])
    return (
        "Every stream is a row, every token it receives a tick; shaded, from the long prompt's"
        " arrival to its first token. Without chunks the rows are empty while it is prefilled: that"
        " gap is what a reader sees. Small budgets spread it thin. Of a trial's long prompts, the"
        " one during which most streams were decoding." + GAPS * beside
    )


GAPS = (
    " On the right the whole of that trial: at each moment the longest gap between tokens that a"
    " stream is in; above it the long prompts, each from its arrival to its first token." + PLAYED
)


TICK = 0.35  # of a row, up and down from its middle
MOST_GAPS_DRAWN = 300  # in a row of the picture, which is no finer; pages hold it as text


def longest_of_each(gaps_s: Sequence[float | None], together: int) -> list[float]:
    """Return the longest gap of so many readings at a time, in ms; NaN where there is none."""
    return [
        1000 * max((s for s in gaps_s[i : i + together] if s is not None), default=math.nan)
        for i in range(0, len(gaps_s), together)
    ]


def _draw_gaps(
    column: Sequence[Axes], measured: Sequence[Timeline], played: Sequence[Timeline | None]
) -> None:
    """Draws the streams' gaps over a trial, a row a point, measured and forecast on one axis."""
    gaps_s = [s for of in (*measured, *played) if of for s in of.gaps_s if s]
    least_ms, most_ms = 1000 * min(gaps_s), 1000 * max(gaps_s)
    for ax, came, foreseen in zip(column, measured, played, strict=True):
        _draw_gaps_of(ax, came, "measured", BLUE, BOUND, 0.92)
        if foreseen:
            _draw_gaps_of(ax, foreseen, "forecast", GREY, GREY, 0.8)
        ax.set_yscale("log")
        ax.set_ylim(0.7 * least_ms, most_ms * (most_ms / least_ms) ** 0.6)  # bars are above
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylabel("gap (ms)")
    column[-1].set_xlabel("seconds in the trial")


def _draw_gaps_of(
    ax: Axes, of: Timeline, source: str, gap_colour: str, prompt_colour: str, height: float
) -> None:
    together = max(1, math.ceil(len(of.gaps_s) / MOST_GAPS_DRAWN))
    gaps_ms = longest_of_each(of.gaps_s, together)
    edges_s = GRID_S * together * np.arange(len(gaps_ms) + 1)
    ax.stairs(gaps_ms, edges_s, baseline=None, color=gap_colour, label=f"longest gap, {source}")
    ax.broken_barh(
        [(start_s, end_s - start_s) for start_s, end_s in of.prefills_s],
        (height, 0.08),
        transform=ax.get_xaxis_transform(),
        color=prompt_colour,
        lw=0,
        label=f"long prompts, {source}",
    )


def _with_a_long_prompt(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if p.workload.intruder]


LINKS_GBIT_PER_S = (1, 10, 100)  # Ethernet of an office, and of two kinds of servers


def _on_two_engines(points: Sequence[Point]) -> list[Pair]:
    """Asks for a split of the engine without chunks, and for two of each that cuts the prompt."""
    contended = _with_a_long_prompt(points)
    whole = [p for p in contended if not p.flags.enable_chunked_prefill]
    cutting = [
        p
        for p in contended
        if p.flags.enable_chunked_prefill
        and p.workload.intruder
        and p.flags.max_num_batched_tokens < p.workload.intruder.prompt_tokens
    ]
    return [
        *(Pair(p, link) for p in whole[:1] for link in LINKS_GBIT_PER_S),
        *(Pair(p, None) for p in cutting),
    ]


def _streams_stalled_by(long: RequestRecord, all_records: Sequence[RequestRecord]) -> int:
    """Counts streams that were decoding from a long prompt's arrival to its first token."""
    start, first = long.sent_s, long.chunks[0][0]
    return sum(
        r.chunks[0][0] <= start and r.chunks[-1][0] >= first for r in all_records if r.chunks
    )


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "claims": {
        "stall-sixteenth": (
            Published(
                figure="2.6x capacity",
                setting="Mistral-7B on an A100, 5.6x for Falcon-180B",
                source="Sarathi-Serve, OSDI 2024",
            ),
            Published(
                figure="up to 28x a step",
                setting="a step with a whole prefill beside decoding",
                source="Sarathi-Serve, OSDI 2024",
            ),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(TOKEN_BUDGET,),
    answers={"SO-3": chunks_solve, "SA-1": split},
    kinds={"SA-1": IN_PART_FORECAST},
    plots={"stall": draw_stall, "timeline": draw_timeline},
    over_time=_with_a_long_prompt,
    on_two=_on_two_engines,
    published=PUBLISHED,
    headline=Headline(
        claim="stall-sixteenth",
        done="Cutting a long prompt into sixteen pieces",
        figure="the time that everybody else's text stands still",
    ),
)
