"""Conclude how overload lowers goodput, what prevents that, and which signal alarms early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from dashboards.palette import BLUE, BOUND, VARIANTS
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import GREY, plt, reach
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval
from labs.harness.judging.measure import Trial, in_time
from labs.harness.judging.signals import (
    BATCH,
    CALM_S,
    GRID_S,
    KV,
    MOST,
    TRAILING_S,
    TTFT,
    UNITS,
    Series,
    Watch,
    is_watched,
    late_from_s,
    series,
    thresholds,
    watch,
)
from labs.harness.judging.signals import SIGNALS as SIGNAL_NAMES
from labs.harness.judging.text import counted, interval, number
from labs.harness.spec import SLO, Point
from loadtests.arrivals import Offered, Ramp
from serving.engines.vllm import VllmFlags

# ------------------------------------------------------------------ what is served in time


@dataclass(frozen=True)
class Offer:
    """Holds what a variant made of an offered load."""

    variant: str
    limited: bool  # it, or the client in its place, turns requests away
    by_client: bool
    times: float  # the capacity
    offered_per_s: float  # as it was sent
    goodput_per_s: float
    goodput_interval: Interval | None
    forecast_per_s: float | None
    output_tokens_per_s: float | None
    ttft_p50_s: float | None
    turned_away: float | None  # share of what was sent
    late_from_s: float | None  # when the first request was sent that waited longer than the SLO
    fluid_late_from_s: float | None  # t*; None below the capacity and with a limit

    @property
    def title(self) -> str:
        return f"{self.variant} (client's limit)" if self.by_client else self.variant


@dataclass(frozen=True)
class Admission:
    """Holds the capacity, as it was found and as it was forecast, and every offered load."""

    capacity_per_s: float | None  # by which the rates were set
    forecast_capacity_per_s: float | None
    slo: SLO
    offers: tuple[Offer, ...]

    def offer(self, limited: bool, times: float) -> Offer | None:
        return next((o for o in self.offers if (o.limited, o.times) == (limited, times)), None)

    @property
    def most(self) -> float:
        """The heaviest load, in multiples of the capacity."""
        return max((o.times for o in self.offers), default=0.0)


def admission(context: Context) -> Admission:
    """Measures each load of the variants that were sent all of them."""
    first, *_ = context.points
    forecasts = _forecasts(context)
    of_first = context.values.get(first.key, {}).get(1, {})
    points = [p for p in context.points if isinstance(p.load, Offered)]
    several = {p.workload.name for p in points if len(p.workload.loads) > 1}
    return Admission(
        capacity_per_s=of_first.get("requests_per_s"),
        forecast_capacity_per_s=_forecast(forecasts, first, "requests_per_s"),
        slo=context.lab.slo,
        offers=tuple(
            offer
            for p in points
            if p.workload.name in several and (offer := _offer(context, p, forecasts))
        ),
    )


Forecasts = dict[str, dict[str, float]]  # point -> metric


def _forecasts(context: Context) -> Forecasts:
    played = context.predictions.in_virtual_time
    bands = played.points if played else {}
    return {key: {m: band.value for m, band in of.items()} for key, of in bands.items()}


def _forecast(forecasts: Forecasts, point: Point, metric: str) -> float | None:
    return forecasts.get(point.key, {}).get(metric)


def _offer(context: Context, point: Point, forecasts: Forecasts) -> Offer | None:
    goodput_per_s = context.mean(point, "goodput_per_s")
    trials = [trial for _, _, trial in context.folder.trials([point], context.lab) if trial]
    if goodput_per_s is None or not trials or not isinstance(point.load, Offered):
        return None
    limited, times = point.flags.turns_away, point.load.times
    late_s = [s for trial in trials if (s := late_from_s(trial)) is not None]
    over = times > 1 and not limited
    return Offer(
        variant=point.variant.name,
        limited=limited,
        by_client=limited and point.admission_by_client,
        times=times,
        offered_per_s=fmean(_sent_per_s(trial) for trial in trials),
        goodput_per_s=goodput_per_s,
        goodput_interval=context.interval(point, "goodput_per_s"),
        forecast_per_s=_forecast(forecasts, point, "goodput_per_s"),
        output_tokens_per_s=context.mean(point, "output_tokens_per_s"),
        ttft_p50_s=context.mean(point, "ttft_p50_s"),
        turned_away=context.mean(point, "turned_away_rate"),
        late_from_s=fmean(late_s) if late_s else None,
        fluid_late_from_s=context.lab.slo.ttft_s / (times - 1) if over else None,
    )


def _sent_per_s(trial: Trial) -> float:
    return sum(r.in_window for r in trial.records) / trial.window_length_s


def tell_admission(facts: Admission) -> Finding:
    rows = [
        ["Variant", "Load", "Offered", "Goodput", "95% interval", "Forecast", "Turned away",
         "TTFT, p50, mean of repeats", "First late after", "t*"]
    ]  # fmt: skip
    rows += [
        [o.title, f"{o.times:g}x", number(o.offered_per_s, "req/s"),
         number(o.goodput_per_s, "req/s"), interval(o.goodput_interval, "req/s"),
         number(o.forecast_per_s, "req/s"), number(o.turned_away, "share"),
         number(o.ttft_p50_s, "s"), number(o.late_from_s, "s"), number(o.fluid_late_from_s, "s")]
        for o in facts.offers
    ]  # fmt: skip
    capacity = number(facts.capacity_per_s, "req/s")
    forecast = number(facts.forecast_capacity_per_s, "req/s")
    lines = [
        f"The capacity is {capacity}: what the engine without a limit completed in a closed loop"
        " with a full batch, in the first repeat, before any other trial. All rates are multiples"
        f" of it. The forecast's own capacity is {forecast}, and its loads are multiples of that.",
        f"Goodput counts requests sent in the window with a TTFT of at most"
        f" {number(facts.slo.ttft_s, 's')} and a TPOT of at most {number(facts.slo.tpot_s, 's')}."
        " *First late after* is the time from the trial's beginning to the send of the first"
        " request whose TTFT exceeded that; t* = SLO mu / (lambda - mu) predicts it, for a queue"
        " without a limit (fluid model: capacity mu, offered rate lambda).",
    ]
    return Finding(title="What is served in time, as the load rises", rows=rows, lines=lines)


ADMISSION = Conclusion("admission", admission, tell_admission)

# -------------------------------------------------------------------------- two classes of requests


@dataclass(frozen=True)
class ClassServed:
    """Holds what one class of requests got."""

    variant: str
    priority: int | None  # None: the engine knows no classes
    sent_per_s: float
    in_time: float  # share of those that were sent
    ttft_mean_s: float | None


@dataclass(frozen=True)
class Classes:
    """Holds the classes under the policy of priorities, and all requests without it."""

    times: float | None  # the capacity
    classes: tuple[ClassServed, ...]


def classes(context: Context) -> Classes:
    """Splits the trials with priorities by class, and sets the same load without them beside."""
    split = [p for p in context.points if p.workload.priorities and isinstance(p.load, Offered)]
    served = []
    for point in split:
        for priority in sorted(set(point.workload.priorities)):
            served += _class_served(context, point, priority)
    loads = {str(p.load) for p in split}
    for point in context.points:
        plain = not point.workload.priorities and not point.flags.turns_away
        if plain and str(point.load) in loads:
            served += _class_served(context, point, None)
    times = [p.load.times for p in split if isinstance(p.load, Offered)]
    return Classes(times[0] if times else None, tuple(served))


def _class_served(context: Context, point: Point, priority: int | None) -> list[ClassServed]:
    sent, served, ttft_s, seconds = 0, 0, list[float](), 0.0
    for _, _, trial in context.folder.trials([point], context.lab):
        if trial is None:
            continue
        seconds += trial.window_length_s
        for r in trial.records:
            if not r.in_window or priority not in (None, point.workload.priority(r.index)):
                continue
            sent += 1
            served += in_time(r, trial.slo)
            ttft_s += [r.ttft_s] if r.ok and r.ttft_s is not None else []
    if not sent:
        return []
    mean_s = fmean(ttft_s) if ttft_s else None
    name = point.variant.name
    return [ClassServed(name, priority, sent / seconds, served / sent, mean_s)]


def tell_classes(facts: Classes) -> Finding:
    rows = [["Variant", "Class", "Sent", "In time", "TTFT, mean"]]
    rows += [
        [c.variant, "all alike" if c.priority is None else f"priority {c.priority}",
         number(c.sent_per_s, "req/s"), number(c.in_time, "share"), number(c.ttft_mean_s, "s")]
        for c in facts.classes
    ]  # fmt: skip
    lines = [
        "The class with the lower number is served first. A priority adds no capacity: what one"
        " class gains, the other loses in waiting."
    ]
    at = f", at {facts.times:g}x the capacity" if facts.times else ""
    return Finding(title=f"Two classes of requests{at}", rows=rows, lines=lines)


CLASSES = Conclusion("classes", classes, tell_classes)

# ------------------------------------------------------------------------------- the best flags


@dataclass(frozen=True)
class Flags:
    """Holds what a batch and a limit made of a flood, as forecast and as measured."""

    variant: str
    batch: int  # max-num-seqs
    limit: str  # by which flag, and how much
    goodput_per_s: float | None
    forecast_goodput_per_s: float | None
    output_tokens_per_s: float | None
    forecast_tokens_per_s: float | None
    tpot_mean_s: float | None
    usd_per_million_tokens: float | None  # where a price was given
    goodput_is_valid: bool  # whether nothing withholds a verdict on it
    tokens_are_valid: bool

    @property
    def valid_goodput_per_s(self) -> float | None:
        return self.goodput_per_s if self.goodput_is_valid else None

    @property
    def valid_tokens_per_s(self) -> float | None:
        return self.output_tokens_per_s if self.tokens_are_valid else None


@dataclass(frozen=True)
class ForecastFlags:
    """Holds what a batch and a limit would make of the flood, by forecast alone."""

    batch: int  # max-num-seqs
    limit: int  # max-num-queued-reqs
    goodput_per_s: float | None
    output_tokens_per_s: float | None
    tpot_mean_s: float | None


@dataclass(frozen=True)
class BestFlags:
    """Holds all variants that were sent the flood, and what else was forecast for it."""

    times: float | None  # the capacity
    flags: tuple[Flags, ...]
    searched: tuple[ForecastFlags, ...] = ()  # none in older runs

    def best(self, of: Callable[[Flags], float | None]) -> Flags | None:
        """Picks the variant of which this is most; None where none has it."""
        known = [f for f in self.flags if of(f) is not None]
        return max(known, key=lambda f: (of(f) or 0.0, f.variant), default=None)

    def best_searched(
        self, of: Callable[[ForecastFlags], float | None]
    ) -> tuple[ForecastFlags, float] | None:
        """Picks the setting that was only forecast of which this is most, and how much that is."""
        known = [(value, i) for i, f in enumerate(self.searched) if (value := of(f)) is not None]
        if not known:
            return None
        value, place = max(known)
        return self.searched[place], value


def best_flags(context: Context) -> BestFlags:
    """Reads the points of the heaviest offered load."""
    offered = [p for p in context.points if isinstance(p.load, Offered)]
    most = max((p.load.times for p in offered if isinstance(p.load, Offered)), default=None)
    forecasts = _forecasts(context)
    return BestFlags(
        most,
        tuple(
            Flags(
                variant=p.variant.name,
                batch=p.flags.max_num_seqs,
                limit=_limit(p),
                goodput_per_s=context.mean(p, "goodput_per_s"),
                forecast_goodput_per_s=_forecast(forecasts, p, "goodput_per_s"),
                output_tokens_per_s=context.mean(p, "output_tokens_per_s"),
                forecast_tokens_per_s=_forecast(forecasts, p, "output_tokens_per_s"),
                tpot_mean_s=context.mean(p, "tpot_mean_s"),
                usd_per_million_tokens=context.mean(p, "usd_per_million_tokens"),
                goodput_is_valid=not context.withholds("goodput_per_s", p),
                tokens_are_valid=not context.withholds("output_tokens_per_s", p),
            )
            for p in offered
            if isinstance(p.load, Offered) and p.load.times == most
        ),
        _searched(context),
    )


def _searched(context: Context) -> tuple[ForecastFlags, ...]:
    played = context.predictions.in_virtual_time
    return tuple(
        ForecastFlags(
            batch=flags.max_num_seqs,
            limit=flags.max_num_queued_reqs or 0,
            goodput_per_s=point.figures.get("goodput_per_s"),
            output_tokens_per_s=point.figures.get("output_tokens_per_s"),
            tpot_mean_s=point.figures.get("tpot_mean_s"),
        )
        for point in (played.searched if played else ())
        for flags in [VllmFlags(point.flags)]
    )


def _limit(point: Point) -> str:
    requests, tokens = point.flags.max_num_queued_reqs, point.flags.max_num_queued_tokens
    by_client = " (client's)" if point.admission_by_client else ""
    if requests is not None:
        return f"{requests} requests{by_client}"
    return "none" if tokens is None else f"{tokens} prompt tokens{by_client}"


def tell_best_flags(facts: BestFlags) -> Finding:
    priced = any(f.usd_per_million_tokens is not None for f in facts.flags)
    rows = [
        ["Variant", "max-num-seqs", "Limit", "Goodput, forecast", "Measured",
         "Throughput, forecast", "Measured", "TPOT, mean", *(["$/M tokens"] if priced else [])]
    ]  # fmt: skip
    rows += [
        [f.variant, str(f.batch), f.limit, number(f.forecast_goodput_per_s, "req/s"),
         number(f.goodput_per_s, "req/s"), number(f.forecast_tokens_per_s, "tok/s"),
         number(f.output_tokens_per_s, "tok/s"), number(f.tpot_mean_s, "s"),
         *([number(f.usd_per_million_tokens, "USD")] if priced else [])]
        for f in facts.flags
    ]  # fmt: skip
    rows += [
        ["forecast alone", str(f.batch), f"{f.limit} requests", number(f.goodput_per_s, "req/s"),
         "–", number(f.output_tokens_per_s, "tok/s"), "–", "–", *(["–"] if priced else [])]
        for f in facts.searched
    ]  # fmt: skip
    lines = [
        _agreement("most goodput", facts.best(lambda f: f.forecast_goodput_per_s),
                   facts.best(lambda f: f.valid_goodput_per_s),
                   all(f.goodput_is_valid for f in facts.flags)),
        _agreement("most throughput, so the fewest dollars a token,",
                   facts.best(lambda f: f.forecast_tokens_per_s),
                   facts.best(lambda f: f.valid_tokens_per_s),
                   all(f.tokens_are_valid for f in facts.flags)),
        foreseen_goodput(facts),
        foreseen_throughput(facts),
        *([MEASURE] if facts.searched else []),
    ]  # fmt: skip
    at = f", at {facts.times:g}x the capacity" if facts.times else ""
    title = f"Which flags serve most in time, and which most for the money{at}"
    return Finding(title=title, rows=rows, lines=[line for line in lines if line])


def _agreement(what: str, forecast: Flags | None, measured: Flags | None, all_valid: bool) -> str:
    if measured is None:
        return ""
    among = "these" if all_valid else "those whose figures are valid"
    came = f"Of {among}, `{measured.variant}` has the {what} as measured"
    if forecast is None:
        return f"{came}; none was forecast."
    same = forecast.variant == measured.variant
    return f"{came}; the forecast was {'the same' if same else f'`{forecast.variant}`'}."


MEASURE = (
    "To measure another setting in the place of `capped`:"
    ' `SET="variants.capped.flags.max-num-seqs=<batch>'
    ' variants.capped.flags.max-num-queued-reqs=<limit>"`.'
)


def foreseen_goodput(facts: BestFlags) -> str:
    """Tells the best setting of all that were forecast for goodput; "" without a search."""
    alone = facts.best_searched(lambda f: f.goodput_per_s)
    return _foreseen(facts, "goodput", "req/s", alone, lambda f: f.forecast_goodput_per_s)


def foreseen_throughput(facts: BestFlags) -> str:
    """Tells the best setting of all that were forecast for throughput; "" without a search."""
    alone = facts.best_searched(lambda f: f.output_tokens_per_s)
    return _foreseen(facts, "throughput", "tok/s", alone, lambda f: f.forecast_tokens_per_s)


def _foreseen(
    facts: BestFlags,
    what: str,
    unit: str,
    alone: tuple[ForecastFlags, float] | None,
    forecast: Callable[[Flags], float | None],
) -> str:
    if alone is None:
        return ""
    best, value = alone
    among = f"Of {len(facts.searched)} more settings that were forecast, one play each"
    found = (
        f"{among}, max-num-seqs {best.batch} with a limit of {best.limit} requests has the most"
        f" {what}, {number(value, unit)}"
    )
    measured = facts.best(forecast)
    if measured is None:
        return f"{found}."
    expected = forecast(measured) or 0.0
    than = f"the most that is forecast for a measured variant, {number(expected, unit)}"
    compared = f"{'more' if value > expected else 'no more'} than {than} (`{measured.variant}`)"
    return f"{found}: {compared}."


BEST_FLAGS = Conclusion("best-flags", best_flags, tell_best_flags)

# ----------------------------------------------------------------- which signal sees it coming


@dataclass(frozen=True)
class Signal:
    """Holds how early a signal left the range that it has under a steady load."""

    name: str
    unit: str
    highest_steady: float  # that it reached under the steady load
    highest: float  # that it reached on the ramp
    lead_s: float | None  # from its alarm to the breach, mean; None: no alarm before the breach
    alarms: int  # trials in which it rose above its steady range before the breach


@dataclass(frozen=True)
class Signals:
    """Holds every signal on the ramp."""

    steady_times: float | None  # the capacity: the steady load
    ramp: str  # in words
    trials: int  # in which the SLO was broken
    breach_s: float | None  # when the first request was sent that came too late, mean
    saturated_s: float | None  # when the load passed the capacity, by the plan
    signals: tuple[Signal, ...]

    @property
    def leading(self) -> Signal | None:
        """The signal that was earliest; one that failed in any trial is left out."""
        sure = [s for s in self.signals if s.lead_s is not None and s.alarms == self.trials]
        return max(sure, key=lambda s: s.lead_s or 0.0, default=None)


def signals(context: Context) -> Signals:
    """Reads four signals along a ramp: each alarms above the highest it had at a steady load.

    The steady load is the lightest one that the same variant was offered. So no signal's threshold
    was chosen by what the ramp showed.
    """
    ramps = [p for p in context.points if isinstance(p.load, Ramp)]
    if not ramps:
        return Signals(None, "", 0, None, None, ())
    (ramp, *_) = ramps
    steady = [
        p for p in context.points
        if isinstance(p.load, Offered) and p.variant.name == ramp.variant.name
    ]  # fmt: skip
    lightest = min(steady, key=lambda p: getattr(p.load, "times", 0.0), default=None)
    calm = [series(t) for t in _trials(context, lightest)] if lightest else []
    rising = [(t, series(t)) for t in _trials(context, ramp)]
    broken = [(t, s, at) for t, s in rising if (at := late_from_s(t)) is not None]
    first, last = getattr(ramp.load, "first", 0.0), getattr(ramp.load, "last", 0.0)
    length_s = context.lab.warmup_s + context.lab.window_s
    passes = first < 1 < last
    return Signals(
        steady_times=getattr(lightest.load, "times", None) if lightest else None,
        ramp=ramp.load.words,
        trials=len(broken),
        breach_s=fmean(at for *_, at in broken) if broken else None,
        saturated_s=(1 - first) / (last - first) * length_s if passes else None,
        signals=tuple(
            _signal(name, calm, [s for _, s in rising], [(s, at) for _, s, at in broken])
            for name in SIGNAL_NAMES
        )
        if calm and rising
        else (),
    )


def _trials(context: Context, point: Point) -> Iterator[Trial]:
    return (t for _, _, t in context.folder.trials([point], context.lab) if t)


def _signal(
    name: str,
    calm: Sequence[Series],
    rising: Sequence[Series],
    broken: Sequence[tuple[Series, float]],
) -> Signal:
    """Compares a signal on the ramp with the steady load; `broken` holds when the SLO was too."""
    highest_steady = max(max(readings[name]) for readings in calm)
    leads_s = []
    for readings, breach_s in broken:
        alarm = next((i for i, v in enumerate(readings[name]) if v > highest_steady), None)
        if alarm is not None and alarm * GRID_S < breach_s:
            leads_s.append(breach_s - alarm * GRID_S)
    return Signal(
        name=name,
        unit=UNITS[name],
        highest_steady=highest_steady,
        highest=max(max(readings[name]) for readings in rising),
        lead_s=fmean(leads_s) if leads_s else None,
        alarms=len(leads_s),
    )


def tell_signals(facts: Signals) -> Finding:
    rows = [["Signal", "Highest at the steady load", "Highest on the ramp", "Alarms", "Lead, mean"]]
    rows += [
        [s.name, number(s.highest_steady, s.unit), number(s.highest, s.unit),
         f"{s.alarms} of {facts.trials}", number(s.lead_s, "s")]
        for s in facts.signals
    ]  # fmt: skip
    lines = []
    if facts.breach_s is not None:
        passed = f" (it passes the capacity at {number(facts.saturated_s, 's')})"
        lines.append(
            f"On {facts.ramp}{passed if facts.saturated_s is not None else ''} the first request"
            f" that waited longer than the SLO was sent after {number(facts.breach_s, 's')}, mean"
            f" of {facts.trials} trials."
        )
    if facts.steady_times is not None:
        lines.append(
            "A signal alarms when it rises above the highest value that it had at"
            f" {facts.steady_times:g}x the capacity; its lead is the time from then to that send."
            " A batch or a cache that was full once under the steady load cannot alarm, because it"
            " cannot rise further. The slowest TTFT is that of the answers of the last"
            f" {TRAILING_S:g} s."
        )
    return Finding(title="Which signal sees the overload coming", rows=rows, lines=lines)


SIGNALS = Conclusion("signals", signals, tell_signals)

# ------------------------------------------------- with thresholds that were set beforehand


@dataclass(frozen=True)
class Alarm:
    """Holds what one signal said in all trials of a load, as measured and as forecast."""

    signal: str
    threshold: float
    crossed_s: float | None  # mean over the trials in which it led the breach
    lead_s: float | None
    led: int  # trials
    false_alarms: int  # in all trials
    forecast_lead_s: float | None
    forecast_led: int
    forecast_false_alarms: int


@dataclass(frozen=True)
class Alarms:
    """Holds the alarms under a load whose rate changes within a trial."""

    load: str  # in words
    length_s: float  # of a trial
    trials: int
    broken: int  # in which the SLO was broken
    breach_s: float | None  # mean
    forecast_trials: int
    forecast_broken: int
    forecast_breach_s: float | None
    alarms: tuple[Alarm, ...]


def alarms(context: Context) -> tuple[Alarms, ...]:
    """Watch each load whose rate changes, in its trials and in those in virtual time."""
    played = context.predictions.in_virtual_time
    expected = played.watches if played else {}
    alarms_of_loads = []
    for point in context.points:
        trials = list(_trials(context, point)) if is_watched(point.load) else []
        if trials:
            came = [watch(trial) for trial in trials]
            foreseen = expected.get(point.key, ())
            limits = thresholds(trials[0])
            alarms_of_loads.append(
                Alarms(
                    load=point.load.words,
                    length_s=trials[0].summary.window_s[1],
                    trials=len(came),
                    broken=len(_breaches_s(came)),
                    breach_s=_mean(_breaches_s(came)),
                    forecast_trials=len(foreseen),
                    forecast_broken=len(_breaches_s(foreseen)),
                    forecast_breach_s=_mean(_breaches_s(foreseen)),
                    alarms=tuple(_alarm(n, limits[n], came, foreseen) for n in SIGNAL_NAMES),
                )
            )
    return tuple(alarms_of_loads)


def _breaches_s(watches: Sequence[Watch]) -> list[float]:
    return [w.breach_s for w in watches if w.breach_s is not None]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _alarm(name: str, threshold: float, came: Sequence[Watch], foreseen: Sequence[Watch]) -> Alarm:
    measured, forecast = ([w.signals[name] for w in of] for of in (came, foreseen))
    leads_s, expected_s = (
        [w.lead_s for w in of if w.lead_s is not None] for of in (measured, forecast)
    )
    return Alarm(
        signal=name,
        threshold=threshold,
        crossed_s=_mean([w.crossed_s for w in measured if w.crossed_s is not None]),
        lead_s=_mean(leads_s),
        led=len(leads_s),
        false_alarms=sum(w.false_alarms for w in measured),
        forecast_lead_s=_mean(expected_s),
        forecast_led=len(expected_s),
        forecast_false_alarms=sum(w.false_alarms for w in forecast),
    )


def tell_alarms(facts: tuple[Alarms, ...]) -> Finding:
    rows = [
        ["Load", "Signal", "Threshold", "Reached after, mean", "Lead, mean", "Led in",
         "False alarms", "Forecast: lead", "Forecast: led in", "Forecast: false alarms"]
    ]  # fmt: skip
    lines = []
    for of in facts:
        rows += [
            [of.load, a.signal, number(a.threshold, UNITS[a.signal]), number(a.crossed_s, "s"),
             number(a.lead_s, "s"), f"{a.led} of {of.broken}", str(a.false_alarms),
             number(a.forecast_lead_s, "s"), f"{a.forecast_led} of {of.forecast_broken}",
             str(a.forecast_false_alarms) if of.forecast_trials else "–"]
            for a in of.alarms
        ]  # fmt: skip
        lines.append(
            f"On {of.load}, within {number(of.length_s, 's')}, the SLO was broken in {of.broken} of"
            f" {of.trials} trials, first after {number(of.breach_s, 's')} on average. The forecast:"
            f" in {of.forecast_broken} of {of.forecast_trials}, after"
            f" {number(of.forecast_breach_s, 's')}."
        )
    lines.append(
        "The thresholds were set beforehand: as many requests waiting as a batch has places,"
        f" {MOST:.0%} of the batch and of the KV cache, and half of the TTFT that the SLO allows."
        " The SLO is broken once a request has waited longer than it allows; a signal leads by the"
        f" time from its alarm to then. An alarm that was over before it, for more than {CALM_S:g}"
        " s, was false; so is any where nothing came too late. A trial compresses what takes hours:"
        " the leads are those of this trial, and shorter the faster a load rises."
    )
    return Finding(title="How long before the SLO is broken each signal alarms", rows=rows,
                   lines=lines)  # fmt: skip


ALARMS = Conclusion("alarms", alarms, tell_alarms)

# ------------------------------------------------------------------------------------ the answers


def why_admit(run: JudgedRun) -> str | None:
    facts = ADMISSION.facts_of(run)
    if facts is None:
        return None
    without, limited = facts.offer(False, facts.most), facts.offer(True, facts.most)
    if without is None or limited is None:
        return None
    when = ""
    if without.late_from_s is not None:
        when = (
            f" Without a limit the first request that came too late was sent after"
            f" {number(without.late_from_s, 's')} (by the fluid model, t* is"
            f" {number(without.fluid_late_from_s, 's')})."
        )
    return (
        f"Of {number(limited.offered_per_s, 'req/s')} offered ({facts.most:g}x the capacity),"
        f" {number(without.goodput_per_s, 'req/s')} were served within the SLO without a limit, and"
        f" {number(limited.goodput_per_s, 'req/s')} with"
        f" {'one that the client holds' if limited.by_client else 'one'}, which turned"
        f" {number(limited.turned_away, 'share')} away.{when}"
    )


def chat_service(run: JudgedRun) -> str | None:
    facts = BEST_FLAGS.facts_of(run)
    best = facts and facts.best(lambda f: f.valid_goodput_per_s)
    if not facts or not best:
        return None
    forecast = facts.best(lambda f: f.forecast_goodput_per_s)
    foreseen = f" The forecast's choice was `{forecast.variant}`." if forecast else ""
    among = ", ".join(f"`{f.variant}`" for f in facts.flags if f.goodput_is_valid)
    if not best.goodput_per_s:
        return f"Under the heaviest load nothing was served within the SLO, with any of {among}."
    return (
        f"Under the heaviest load `{best.variant}` (max-num-seqs {best.batch}, limit {best.limit})"
        f" served most within the SLO, {number(best.goodput_per_s, 'req/s')} at a TPOT of"
        f" {number(best.tpot_mean_s, 's')}, among {among}.{foreseen}"
        f" {foreseen_goodput(facts)}".rstrip()
    )


def document_service(run: JudgedRun) -> str | None:
    facts = BEST_FLAGS.facts_of(run)
    best = facts and facts.best(lambda f: f.valid_tokens_per_s)
    if not facts or not best:
        return None
    forecast = facts.best(lambda f: f.forecast_tokens_per_s)
    foreseen = f" The forecast's choice was `{forecast.variant}`." if forecast else ""
    dollars = number(best.usd_per_million_tokens, "USD")
    price = f", ${dollars} a million tokens" if best.usd_per_million_tokens is not None else ""
    return (
        f"The price per token falls as throughput rises. `{best.variant}` (max-num-seqs"
        f" {best.batch}) had the highest throughput,"
        f" {number(best.output_tokens_per_s, 'tok/s')}{price}, at a TPOT of"
        f" {number(best.tpot_mean_s, 's')}.{foreseen} {foreseen_throughput(facts)}".rstrip()
    )


def scaling_signal(run: JudgedRun) -> str | None:
    facts = SIGNALS.facts_of(run)
    if facts is None or not facts.signals:
        return _leads(run).strip() or None
    if not facts.trials:  # nothing came too late
        return _leads(run).strip() or None
    early = [s for s in facts.signals if s.lead_s is not None]
    never = [s.name for s in facts.signals if s.lead_s is None]
    clauses = [
        f"{s.name}, {number(s.lead_s, 's')} ahead"
        + (f" (in {s.alarms} of {facts.trials} trials)" if s.alarms < facts.trials else "")
        for s in early
    ]
    alarms = f"these alarmed: {'; '.join(clauses)}" if clauses else "no signal alarmed"
    silent = f" These did not: {', '.join(never)}." if clauses and never else ""
    return (
        "By the rule that a signal alarms above its highest value under the steady load, before"
        f" the first request that came too late was sent {alarms}.{silent}{_leads(run)}"
    )


def _leads(run: JudgedRun) -> str:
    """Tells which signal led by most where thresholds were set beforehand; "" where none did."""
    lead_sentences = []
    for of in ALARMS.facts_of(run) or ():
        led = [a for a in of.alarms if a.lead_s is not None and a.led == of.broken]
        if led:
            first = max(led, key=lambda a: a.lead_s or 0.0)
            expected = number(first.forecast_lead_s, "s")
            lead_sentences.append(
                f" By thresholds that were set beforehand, on {of.load}, {first.signal} alarmed"
                f" first: {number(first.lead_s, 's')} before a request had waited as long as the"
                f" SLO allows (forecast {expected}), with"
                f" {counted(first.false_alarms, 'false alarm')}."
            )
    return "".join(lead_sentences)


# -------------------------------------------------------------------------------------- its plots


def draw_goodput(run: JudgedRun) -> str | None:
    """Draws goodput over offered load, in multiples of the capacity, beside the fluid model."""
    facts = run.once(admission)
    if not facts.capacity_per_s or not facts.offers:
        return None
    capacity = facts.capacity_per_s
    _, ax = plt.subplots(figsize=(7.5, 4.2))
    names = list(dict.fromkeys(o.variant for o in facts.offers))
    for name, colour in zip(names, VARIANTS, strict=False):
        mine = sorted((o for o in facts.offers if o.variant == name), key=lambda o: o.times)
        x = [o.offered_per_s / capacity for o in mine]
        y = [o.goodput_per_s / capacity for o in mine]
        bars = reach([o.goodput_interval for o in mine], 1 / capacity)
        ax.errorbar(x, y, yerr=bars, fmt="o-", capsize=4, color=colour, label=name)
        expected = facts.forecast_capacity_per_s
        forecast = [o for o in mine if o.forecast_per_s is not None]
        if expected and forecast:
            y = [(o.forecast_per_s or 0.0) / expected for o in forecast]
            x, label = [o.times for o in forecast], f"{name}, forecast"
            ax.plot(x, y, "x:", color=colour, label=label)
    most = 1.05 * max(facts.most, *(o.offered_per_s / capacity for o in facts.offers))
    ax.plot([0, 1, most], [0, 1, 1], color=BOUND, lw=1, ls="--", label="min(offered, capacity)")
    ax.set_xlim(0, most)
    ax.set_ylim(0, None)
    ax.set_xlabel("offered load / capacity")
    ax.set_ylabel("goodput / capacity")
    ax.legend(frameon=False, fontsize=8)
    return (
        "Requests served within the SLO, over those offered, both in multiples of the capacity that"
        " was found. On the dashed line every request that the engine can serve is in time."
    )


def draw_ramp(run: JudgedRun) -> str | None:
    """Draws the signals of the ramp's first trial under one another, and the breach."""
    ramp = next((p for p in run.points if isinstance(p.load, Ramp)), None)
    trial = next(_trials(run, ramp), None) if ramp else None
    if trial is None:
        return None
    readings, facts, breach_s = series(trial), run.once(signals), late_from_s(trial)
    _, axes = plt.subplots(4, 1, figsize=(8, 6.4), sharex=True)
    thresholds = {s.name: s.highest_steady for s in facts.signals}
    for ax, name in zip(axes, SIGNAL_NAMES, strict=True):
        scale = 100 if name in (BATCH, KV) else 1
        y = [scale * v for v in readings[name]]
        ax.step([i * GRID_S for i in range(len(y))], y, where="post", color=BLUE, lw=1.2)
        if name in thresholds:
            ax.axhline(scale * thresholds[name], color=GREY, lw=1, ls=":")
        if breach_s is not None:
            ax.axvline(breach_s, color=BOUND, lw=1.2)
        ax.set_ylabel(f"{name}\n({'%' if scale == 100 else 's' if name == TTFT else 'requests'})")
        ax.set_ylim(0, None)
    axes[-1].set_xlabel("time in the first trial (s)")
    axes[-1].set_xlim(0, trial.summary.window_s[1])
    return (
        f"Four signals on {trial.point.load.words}. Dotted: the highest value at the steady load,"
        " above which a signal alarms. Orange: the send of the first request that came too late."
    )


PARTS = ReportParts(
    conclusions=(ADMISSION, CLASSES, BEST_FLAGS, SIGNALS, ALARMS),
    watched=lambda points: [p for p in points if is_watched(p.load)],
    answers={
        "SO-2": why_admit,
        "SD-2": chat_service,
        "SD-3": document_service,
        "SA-5": scaling_signal,
    },
    plots={"goodput": draw_goodput, "ramp": draw_ramp},
    headline=Headline(
        claim="overload",
        done="Turning requests away beyond a limit, at twice the capacity",
        figure="the requests served in time",
    ),
)
