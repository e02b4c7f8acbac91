"""How overload lowers goodput, what prevents that, and which signal alarms early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal, get_args

from labs.harness.analysis.computed import Searched
from labs.harness.analysis.measure import in_time
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.signals import GRID_S, SIGNALS, UNITS, Series, late_from_s, series
from labs.harness.derived.alarms import Alarms, alarms, lightest, mean
from labs.harness.derived.alarms import watched as watched
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from loadtests.arrivals import Offered, Ramp
from serving.engines.vllm_flags import VllmFlags

# ------------------------------------------------------------------ what is served in time


@dataclass(frozen=True)
class Offer:
    """What a variant made of an offered load."""

    variant: str
    limited_by: Literal["nobody", "engine", "client"]  # who turns requests away
    times: float  # the capacity
    offered_per_s: Quantity  # as it was sent
    goodput_per_s: Quantity
    gain: Quantity  # of a limit: goodput / goodput without it
    forecast_per_s: Quantity  # goodput
    ttft_p50_s: Quantity
    turned_away: Quantity  # share of what was sent
    late_from_s: Quantity  # when the first request was sent that waited longer than the SLO
    fluid_late_from_s: Quantity  # t*, above the capacity and without a limit

    @property
    def in_time(self) -> Quantity:
        """The share of what was sent that was served within the SLO."""
        return (self.goodput_per_s / self.offered_per_s).in_unit("share")


@dataclass(frozen=True)
class Admission:
    """The capacity, as it was found and as it was forecast, and every offered load."""

    capacity_per_s: Quantity  # by which the rates were set
    forecast_capacity_per_s: Quantity
    slo_ttft_s: Quantity
    slo_tpot_s: Quantity
    window_s: Quantity  # of each trial, within its load
    offers: tuple[Offer, ...]

    @property
    def most(self) -> float:
        """The heaviest load, in multiples of the capacity."""
        return max((o.times for o in self.offers), default=0.0)

    @property
    def without(self) -> Offer | None:
        """The heaviest load without a limit."""
        return next((o for o in self.heaviest if o.limited_by == "nobody"), None)

    @property
    def limited(self) -> Offer | None:
        """The heaviest load with a limit."""
        return next((o for o in self.heaviest if o.limited_by != "nobody"), None)

    @property
    def heaviest(self) -> list[Offer]:
        return [offer for offer in self.offers if offer.times == self.most]


def admission(run: JudgedRun) -> Admission:
    """Measure each load of the variants that were sent all of them."""
    first, *_ = run.points
    capacity_per_s = run.values.get(first.key, {}).get(1, {}).get("requests_per_s")
    offers = (offer(run, p) for p in run.points if len(p.workload.loads) > 1)
    return Admission(
        Quantity.given(capacity_per_s, "req/s"),
        run.foreseen(first, "requests_per_s"),
        Quantity(run.lab.slo.ttft_s, "s"),
        Quantity(run.lab.slo.tpot_s, "s"),
        Quantity(run.lab.window_s, "s"),
        tuple(of for of in offers if of),
    )


def offer(run: JudgedRun, point: Point) -> Offer | None:
    goodput_per_s, trials = run.quantity(point, "goodput_per_s"), [*run.trials(point)]
    if not goodput_per_s.known or not trials or not isinstance(point.load, Offered):
        return None
    times, limited = point.load.times, point.flags.turns_away
    same_load = (p for p in run.points if (p.workload, p.load) == (point.workload, point.load))
    unlimited = next((p for p in same_load if not p.flags.turns_away), None)
    sent_per_s = [sum(r.in_window for r in t.records) / t.window_length_s for t in trials]
    late_s = [s for trial in trials if (s := late_from_s(trial)) is not None]
    t_star_s = run.lab.slo.ttft_s / (times - 1) if times > 1 and not limited else None
    return Offer(
        point.variant.name,
        ("client" if point.admission_by_client else "engine") if limited else "nobody",
        times,
        offered_per_s=Quantity(fmean(sent_per_s), "req/s"),
        goodput_per_s=goodput_per_s,
        gain=run.ratio_of(point, unlimited if limited else None, "goodput_per_s"),
        forecast_per_s=run.foreseen(point, "goodput_per_s"),
        ttft_p50_s=run.quantity(point, "ttft_p50_s"),
        turned_away=run.quantity(point, "turned_away_rate"),
        late_from_s=mean(late_s, "s", "nothing came too late"),
        fluid_late_from_s=Quantity.given(t_star_s, "s", "the queue does not grow on and on"),
    )


# -------------------------------------------------------------------------- two classes of requests


@dataclass(frozen=True)
class ClassServed:
    """What one class of requests got."""

    variant: str
    priority: int | None  # None: the engine knows no classes
    sent_per_s: Quantity
    in_time: Quantity  # share of those that were sent
    ttft_mean_s: Quantity


@dataclass(frozen=True)
class Classes:
    """The classes under the policy of priorities, and all requests without it."""

    times: float | None  # the capacity
    classes: tuple[ClassServed, ...]


def classes(run: JudgedRun) -> Classes:
    """Split the trials with priorities by class, and set the same load without them beside."""
    split = [p for p in run.points if p.workload.priorities and isinstance(p.load, Offered)]
    loads = [p.load for p in split]
    alike = [
        p
        for p in run.points
        if p.load in loads and not p.workload.priorities and not p.flags.turns_away
    ]
    served = [
        *(class_served(run, p, n) for p in split for n in sorted(set(p.workload.priorities))),
        *(class_served(run, p, None) for p in alike),
    ]
    times = [load.times for load in loads if isinstance(load, Offered)]
    return Classes(times[0] if times else None, tuple(of for of in served if of))


def class_served(run: JudgedRun, point: Point, priority: int | None) -> ClassServed | None:
    trials = [*run.trials(point)]
    sent = [
        (r, in_time(r, trial.slo))
        for trial in trials
        for r in trial.records
        if r.in_window and priority in (None, point.workload.priority(r.index))
    ]
    if not sent:
        return None
    ttft_s = [r.ttft_s for r, _ in sent if r.ok and r.ttft_s is not None]
    return ClassServed(
        point.variant.name,
        priority,
        Quantity(len(sent) / sum(trial.window_length_s for trial in trials), "req/s"),
        Quantity(fmean(is_in_time for _, is_in_time in sent), "share"),
        mean(ttft_s, "s", "no request was answered"),
    )


# ------------------------------------------------------------------------------- the best flags

Rate = Literal["goodput", "throughput"]


@dataclass(frozen=True)
class Limit:
    """How much an engine takes in before it, or the client in its place, turns requests away."""

    unit: Literal["nothing", "requests", "prompt tokens"] = "nothing"
    most: int = 0
    by_client: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure under the flood, as measured and as forecast."""

    measured: Quantity
    forecast: Quantity
    is_valid: bool = True  # whether nothing withholds a verdict on what was measured

    @property
    def valid(self) -> Quantity:
        return self.measured if self.is_valid else Quantity.missing("not valid", self.measured.unit)


@dataclass(frozen=True)
class Setting:
    """What a batch and a limit make of the flood."""

    variant: str | None  # None: it was only forecast
    batch: int  # max-num-seqs
    limit: Limit
    goodput: Figure  # req/s
    throughput: Figure  # output tok/s
    tpot: Figure  # s, mean
    usd_per_million_tokens: Quantity  # where a price was given

    @property
    def usd_at_one_an_hour(self) -> Quantity:
        """US dollars for a million output tokens of a machine that costs one dollar an hour."""
        rate = self.throughput.measured.value
        usd = 1e6 / 3600 / rate if rate else None
        return Quantity.given(usd, why="no throughput was measured")

    def figure(self, rate: Rate) -> Figure:
        return self.goodput if rate == "goodput" else self.throughput


@dataclass(frozen=True)
class Batches:
    """The two batches that have most, both limited in requests, so that the batch alone differs."""

    variant: str
    batch: int  # max-num-seqs
    other: str
    other_batch: int
    ratio: Quantity  # variant / other, valid or missing

    @property
    def is_open(self) -> bool:
        """Whether the other may have as much, by the interval."""
        return self.ratio.known and not (self.ratio.low is not None and self.ratio.low > 1)


@dataclass(frozen=True)
class Best:
    """The settings that have most of a rate: as measured, as forecast for these, and of others."""

    rate: Rate
    all_are_valid: bool
    measured: Setting | None  # of those whose figures are valid
    forecast: Setting | None
    searched: Setting | None
    at_edge: bool  # whether no larger batch was offered than that of the best as measured
    batches: Batches | None  # None: no two, or a run from before they were compared

    @property
    def foreseen(self) -> Literal["the same", "another", "not forecast"]:
        """Whether the best by forecast of those that were measured came to be the best."""
        if not self.forecast or not self.measured:
            return "not forecast"
        return "the same" if self.forecast == self.measured else "another"

    @property
    def is_nothing(self) -> bool:
        """Whether even the best has none of it."""
        return self.measured is not None and not self.measured.figure(self.rate).measured.value


@dataclass(frozen=True)
class BestFlags:
    """All variants that were sent the flood, and what else was forecast for it."""

    times: float | None  # the capacity
    tried: tuple[Setting, ...]
    searched: tuple[Setting, ...]  # none in older runs
    prompt_tokens: float | None  # of a request, on average
    batches: dict[Rate, Batches] = field(default_factory=dict)  # none in older runs
    # US dollars at one an hour, by the arithmetic of a long prompt at the machine's ceiling
    usd_per_million_prompt_tokens: Quantity | None = None

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Those that were measured, then those that were only forecast."""
        return (*self.tried, *self.searched)

    @property
    def is_priced(self) -> bool:
        """Whether the run was given a price."""
        return any(t.usd_per_million_tokens.known for t in self.tried)

    @property
    def goodput(self) -> Best:
        return self.best("goodput")

    @property
    def throughput(self) -> Best:
        return self.best("throughput")

    def best(self, rate: Rate) -> Best:
        def most(settings: Sequence[Setting], kind: Literal["valid", "forecast"]) -> Setting | None:
            known = [(of, s) for s in settings if (of := getattr(s.figure(rate), kind)).known]
            best = max(known, key=lambda at: (at[0].value, at[1].variant or ""), default=None)
            return best[1] if best else None

        measured = most(self.tried, "valid")
        return Best(
            rate,
            all(setting.figure(rate).is_valid for setting in self.tried),
            measured=measured,
            forecast=most(self.tried, "forecast"),
            searched=most(self.searched, "forecast"),
            at_edge=bool(measured and measured.batch == max(s.batch for s in self.tried)),
            batches=self.batches.get(rate),
        )


def best_flags(run: JudgedRun) -> BestFlags:
    """Read the points of the heaviest offered load, and what was forecast beside them."""
    loads = {p.key: p.load.times for p in run.points if isinstance(p.load, Offered)}
    most = max(loads.values(), default=None)
    heaviest = [p for p in run.points if loads.get(p.key, 0) == most]
    played = run.predictions.in_virtual_time
    found = BestFlags(
        most,
        tuple(tried_setting(run, p) for p in heaviest),
        tuple(map(searched_setting, played.searched if played else ())),
        heaviest[0].prompt_tokens if heaviest else None,
    )
    pairs = {rate: batches(run, heaviest, rate) for rate in get_args(Rate)}
    found = replace(found, batches={rate: pair for rate, pair in pairs.items() if pair})
    if not heaviest:
        return found
    prompt_s = theory.prefill_s(heaviest[0].shape, heaviest[0].ceilings, LONG_PROMPT_TOKENS)
    usd = 1e6 * prompt_s / LONG_PROMPT_TOKENS / 3600
    return replace(found, usd_per_million_prompt_tokens=Quantity(usd, "USD"))


def batches(run: JudgedRun, points: Sequence[Point], rate: Rate) -> Batches | None:
    """Compare the two batches that have most under a limit in requests; None without two."""
    metric = "goodput_per_s" if rate == "goodput" else "output_tokens_per_s"
    rates = [
        (of.value, p)
        for p in points
        if p.flags.max_num_queued_reqs is not None and not run.withholds(metric, p)
        if (of := run.quantity(p, metric)).value is not None
    ]
    first, *others = (p for _, p in sorted(rates, key=lambda at: -at[0])) if rates else (None,)
    other = next((p for p in others if first and batch(p) != batch(first)), None)
    if not (first and other):
        return None
    ratio = run.ratio_of(first, other, metric)
    return Batches(first.variant.name, batch(first), other.variant.name, batch(other), ratio)


def batch(point: Point) -> int:
    return point.flags.max_num_seqs


LONG_PROMPT_TOKENS = 1024
RATES = ("goodput_per_s", "output_tokens_per_s", "tpot_mean_s")  # of a setting


def tried_setting(run: JudgedRun, point: Point) -> Setting:
    goodput, throughput, tpot = (
        Figure(run.quantity(point, m), run.foreseen(point, m), not run.withholds(m, point))
        for m in RATES
    )
    limit = limit_of(point.flags, point.admission_by_client)
    price = run.quantity(point, "usd_per_million_tokens")
    batch = point.flags.max_num_seqs
    return Setting(point.variant.name, batch, limit, goodput, throughput, tpot, price)


def searched_setting(searched: Searched) -> Setting:
    flags, alone = VllmFlags(searched.flags), "forecast alone"
    goodput, throughput, tpot = (
        Figure(
            Quantity.missing(alone, METRICS[m].unit),
            Quantity.given(searched.figures.get(m), METRICS[m].unit, "not forecast"),
        )
        for m in RATES
    )
    price = Quantity.missing(alone, "USD")
    limit = limit_of(flags)
    return Setting(None, flags.max_num_seqs, limit, goodput, throughput, tpot, price)


def limit_of(flags: VllmFlags, by_client: bool = False) -> Limit:
    if flags.max_num_queued_reqs is not None:
        return Limit("requests", flags.max_num_queued_reqs, by_client)
    if flags.max_num_queued_tokens is not None:
        return Limit("prompt tokens", flags.max_num_queued_tokens, by_client)
    return Limit()


# ----------------------------------------------------------------- which signal sees it coming


@dataclass(frozen=True)
class Signal:
    """How early a signal left the range that it has under a steady load."""

    name: str
    highest_steady: Quantity  # that it reached under the steady load
    highest: Quantity  # that it reached on the ramp
    lead_s: Quantity  # from its alarm to the breach, mean
    alarms: int  # trials in which it rose above its steady range before the breach


@dataclass(frozen=True)
class Signals:
    """Every signal on the ramp."""

    steady_times: float | None  # the capacity: the steady load
    ramp: str | None  # the key of its point
    trials: int  # in which the SLO was broken
    breach_s: Quantity  # when the first request was sent that came too late, mean
    saturated_s: Quantity  # when the load passed the capacity, by the plan
    signals: tuple[Signal, ...]

    @property
    def is_late(self) -> bool:
        """Whether anything came too late on the ramp, so that a signal can have led."""
        return bool(self.signals) and self.breach_s.known

    @property
    def early(self) -> list[Signal]:
        """The signals that alarmed before the breach."""
        return [signal for signal in self.signals if signal.lead_s.known]

    @property
    def silent(self) -> list[Signal]:
        return [signal for signal in self.signals if not signal.lead_s.known]


def signals(run: JudgedRun) -> Signals:
    """Read four signals along a ramp: each alarms above the highest it had at a steady load.

    The steady load is the lightest one that the same variant was offered. So no signal's threshold
    was chosen by what the ramp showed.
    """
    ramp = ramp_of(run)
    healthy = lightest(run, ramp) if ramp else None
    calm = [series(trial) for trial in run.trials(healthy)]
    rising = [(series(trial), late_from_s(trial)) for trial in run.trials(ramp)]
    breaches_s = [at for _, at in rising if at is not None]
    return Signals(
        healthy.load.times if healthy and isinstance(healthy.load, Offered) else None,
        ramp.key if ramp else None,
        len(breaches_s),
        mean(breaches_s, "s", "nothing came too late"),
        saturated_s(run, ramp),
        tuple(signal(name, calm, rising) for name in SIGNALS) if calm and rising else (),
    )


def ramp_of(run: Context) -> Point | None:
    return next((p for p in run.points if isinstance(p.load, Ramp)), None)


def saturated_s(run: Context, ramp: Point | None) -> Quantity:
    """Return when a ramp passes the capacity, by its plan."""
    if ramp is None or not isinstance(ramp.load, Ramp) or not ramp.load.first < 1 < ramp.load.last:
        return Quantity.missing("the load does not pass the capacity", "s")
    length_s = run.lab.warmup_s + run.lab.window_s
    return Quantity((1 - ramp.load.first) / (ramp.load.last - ramp.load.first) * length_s, "s")


def signal(
    name: str, calm: Sequence[Series], rising: Sequence[tuple[Series, float | None]]
) -> Signal:
    """Compare a signal on the ramp, in each trial with its breach, with the steady load."""
    highest_steady = max(max(readings[name]) for readings in calm)
    leads_s = []
    for readings, breach_s in rising:
        alarm = next((i for i, v in enumerate(readings[name]) if v > highest_steady), None)
        if alarm is not None and breach_s is not None and alarm * GRID_S < breach_s:
            leads_s.append(breach_s - alarm * GRID_S)
    return Signal(
        name,
        Quantity(highest_steady, UNITS[name]),
        Quantity(max(max(readings[name]) for readings, _ in rising), UNITS[name]),
        mean(leads_s, "s", "no alarm before the breach"),
        len(leads_s),
    )


# ------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Facts:
    admission: Admission | None
    classes: Classes | None
    best_flags: BestFlags | None
    signals: Signals | None
    alarms: tuple[Alarms, ...] | None


def facts(run: JudgedRun) -> Facts:
    return Facts(
        admission(run) if run.finds("admission") else None,
        classes(run) if run.finds("classes") else None,
        best_flags(run) if run.finds("best-flags") else None,
        signals(run) if run.finds("signals") else None,
        alarms(run) if run.finds("alarms") else None,
    )
