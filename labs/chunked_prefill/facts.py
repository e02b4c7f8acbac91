"""Which token budget keeps the streams flowing during a long prefill, and what a split would do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import scipy

from labs.harness.analysis.computed import Band, OnTwoEngines
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.lab_modules import Pair
from labs.harness.derived.offloading import OnOneCard, on_one_card
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.spec.lab import Point
from loadtests.arrivals import Contended

STALL, LONG_TTFT, STREAMS_TTFT = "stall_mean_s", "intruder_ttft_mean_s", "ttft_mean_s"
Within = Literal["yes", "no", "not valid", "no limit"]


@dataclass(frozen=True)
class Budget:
    """What one token budget did to the streams and to the long prompt among them."""

    variant: str
    budget_tokens: int
    piece_tokens: int  # of the prompt, in one step at most
    chunked: bool
    stall_s: Quantity  # of the streams, mean
    long_ttft_s: Quantity
    streams_ttft_s: Quantity  # of the streams' own prompts, mean
    streams_beside_whole: Quantity  # that TTFT / the one without chunks
    streams_are_valid: bool  # beside the one without chunks
    within_slo: Within  # whether the stall is
    every_s: float | None  # between two long prompts, as planned

    @property
    def is_late(self) -> bool:
        """Whether a long prompt takes longer than the time to the next."""
        return self.every_s is not None and (self.long_ttft_s.value or 0.0) > self.every_s


@dataclass(frozen=True)
class StallLine:
    """The stall over the tokens of a piece, by least squares."""

    fixed_s: Quantity
    token_s: Quantity
    tokens_per_s: Quantity  # of a prefill beside the streams
    r_squared: float


@dataclass(frozen=True)
class Handover:
    """What a second machine that does the prefill would have to send, and how soon."""

    kv: Quantity
    prefill_s: Quantity
    needed: Quantity  # of the link, to send it in the time of the prefill

    @property
    def example(self) -> OnOneCard:
        return on_one_card()

    @property
    def needed_by_example(self) -> Quantity:
        return Quantity(8 * (self.example.even.value or 0.0), "Gbit/s")


@dataclass(frozen=True)
class TokenBudgets:
    """Every token budget, the line of the stall, and the link that a split would need."""

    longest_gap_s: Quantity  # by the SLO
    budgets: tuple[Budget, ...]
    line: StallLine | None  # None: too few sizes of a piece, or the stall falls with them
    handover: Handover | None

    @property
    def best(self) -> Budget | None:
        """The budget within the SLO whose long prompt waits least."""
        fitting = (b for b in self.budgets if b.within_slo == "yes")
        return min(fitting, key=lambda b: (b.long_ttft_s.value or 0, b.variant), default=None)

    @property
    def are_valid(self) -> bool:
        return all(b.within_slo != "not valid" for b in self.budgets)

    @property
    def whole(self) -> Budget | None:
        """The budget that prefills the long prompt in one step."""
        return next((b for b in self.budgets if not b.chunked), None)

    @property
    def least(self) -> Budget | None:
        return min(self.budgets, key=lambda b: b.budget_tokens, default=None)

    @property
    def streams_pay(self) -> Literal["yes", "no", "open", "not valid", "unknown"]:
        """Whether the smallest budget lets the streams' own prompts wait longer."""
        least = self.least
        if not (least and self.whole and least.streams_beside_whole.known):
            return "unknown"
        if not least.streams_are_valid:
            return "not valid"
        low, high = least.streams_beside_whole.low, least.streams_beside_whole.high
        if high is not None and high < 1:
            return "no"
        return "yes" if low is not None and low > 1 else "open"

    @property
    def late(self) -> list[Budget]:
        return [b for b in self.budgets if b.is_late]


@dataclass(frozen=True)
class Foreseen:
    """What a load is forecast to come to."""

    stall_s: Quantity
    long_ttft_s: Quantity
    streams_ttft_s: Quantity
    tokens_per_s: Quantity


@dataclass(frozen=True)
class Split:
    """Forecasts of a prefill on a second engine, beside chunks on one and on two that share."""

    fast_gbit_per_s: float
    slow_gbit_per_s: float
    fast: Foreseen
    slow: Foreseen
    budget: str  # the variant with the smallest
    one: Foreseen
    two: Foreseen


@dataclass(frozen=True)
class Facts:
    token_budget: TokenBudgets
    split: Split | None  # None: it was not forecast
    forecast: bool  # whether what the plot of stalls shows was
    played: bool  # whether gaps were, over the whole of a trial


def facts(run: JudgedRun) -> Facts:
    metrics = (STALL, LONG_TTFT, STREAMS_TTFT)
    return Facts(
        token_budgets(run),
        split(run),
        forecast=any(run.forecast(p, metric) for p in run.points for metric in metrics),
        played=any(any(of.gaps_s) for of in run.played.values()),
    )


def token_budgets(run: Context) -> TokenBudgets:
    limit_s = run.lab.slo.itl_s
    contended = over_time(run.points)
    whole = next((p for p in contended if not p.flags.enable_chunked_prefill), None)
    measured = [p for p in contended if run.mean(p, STALL) and run.mean(p, LONG_TTFT)]
    budgets = tuple(budget(run, point, whole) for point in measured)
    return TokenBudgets(
        Quantity.given(limit_s, "s", "the lab sets no limit"),
        budgets,
        stall_line(budgets),
        handover(run, whole) if whole else None,
    )


def budget(run: Context, point: Point, whole: Point | None) -> Budget:
    assert point.workload.intruder
    tokens = point.flags.max_num_batched_tokens
    stall_s = run.quantity(point, STALL)
    valid = not any(run.withholds(metric, point) for metric in (STALL, LONG_TTFT))
    return Budget(
        variant=point.variant.name,
        budget_tokens=tokens,
        piece_tokens=min(tokens - point.load.users, point.workload.intruder.prompt_tokens),
        chunked=point.flags.enable_chunked_prefill,
        stall_s=stall_s,
        long_ttft_s=run.quantity(point, LONG_TTFT),
        streams_ttft_s=run.quantity(point, STREAMS_TTFT),
        streams_beside_whole=run.measured_ratio(point, whole, STREAMS_TTFT),
        streams_are_valid=not run.withholds(STREAMS_TTFT, point, whole or point),
        within_slo=within(stall_s, run.lab.slo.itl_s) if valid else "not valid",
        every_s=point.load.every_s if isinstance(point.load, Contended) else None,
    )


def within(stall_s: Quantity, limit_s: float | None) -> Within:
    if limit_s is None:
        return "no limit"
    return "yes" if stall_s.value is not None and stall_s.value <= limit_s else "no"


def stall_line(budgets: Sequence[Budget]) -> StallLine | None:
    if len({b.piece_tokens for b in budgets}) <= 2:
        return None
    fit = scipy.stats.linregress(
        [b.piece_tokens for b in budgets], [b.stall_s.value for b in budgets]
    )
    if fit.slope <= 0:
        return None
    fixed_s, token_s = Quantity(float(fit.intercept), "s"), Quantity(float(fit.slope), "s")
    return StallLine(fixed_s, token_s, Quantity(1, "tok/s") / token_s, float(fit.rvalue**2))


def handover(run: Context, whole: Point) -> Handover:
    """Divide a prompt's KV bytes by the time of its prefill (DistServe, OSDI 2024)."""
    assert whole.workload.intruder
    moved = whole.workload.intruder.prompt_tokens * whole.shape.kv_bytes_per_token()
    prefill_s = run.quantity(whole, LONG_TTFT)
    return Handover(
        Quantity(moved / 1e6, "MB"), prefill_s, Quantity(8 * moved / 1e9, "Gbit/s") / prefill_s
    )


def split(run: JudgedRun) -> Split | None:
    """Read what a split is forecast to do beside chunks."""
    forecasts = run.predictions.in_virtual_time
    pairs = forecasts.on_two if forecasts else ()
    splits = {of.link_gbit_per_s: of for of in pairs if of.link_gbit_per_s is not None}
    shared = [of for of in pairs if of.link_gbit_per_s is None]
    if not (forecasts and splits and shared):
        return None
    tokens = {p.key: p.flags.max_num_batched_tokens for p in run.points}

    def budget_tokens(of: OnTwoEngines) -> int:
        return tokens[of.point]

    two, fast, slow = min(shared, key=budget_tokens), max(splits), min(splits)
    return Split(
        fast,
        slow,
        fast=foreseen(splits[fast].bands),
        slow=foreseen(splits[slow].bands),
        budget=two.point.partition("/")[0],
        one=foreseen(forecasts.points[two.point]),
        two=foreseen(two.bands),
    )


def foreseen(bands: Mapping[str, Band]) -> Foreseen:
    stall_s, long_s, streams_s, tokens_per_s = (
        Quantity.given(bands[m].value if m in bands else None, METRICS[m].unit, "not forecast")
        for m in (STALL, LONG_TTFT, STREAMS_TTFT, "output_tokens_per_s")
    )
    return Foreseen(stall_s, long_s, streams_s, tokens_per_s)


def over_time(points: Sequence[Point]) -> list[Point]:
    return [p for p in points if p.workload.intruder]


LINKS_GBIT_PER_S = (1, 10, 100)  # Ethernet of an office, and of two kinds of servers


def on_two(points: Sequence[Point]) -> list[Pair]:
    """Ask for a split of the engine without chunks, and for two of each that cuts the prompt."""
    chunked = [p for p in over_time(points) if p.flags.enable_chunked_prefill]
    whole = [p for p in over_time(points) if not p.flags.enable_chunked_prefill]
    cutting = [
        p
        for p in chunked
        if p.workload.intruder
        and p.flags.max_num_batched_tokens < p.workload.intruder.prompt_tokens
    ]
    return [
        *(Pair(p, link) for p in whole[:1] for link in LINKS_GBIT_PER_S),
        *(Pair(p, None) for p in cutting),
    ]
