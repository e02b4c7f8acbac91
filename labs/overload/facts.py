"""How overload lowers goodput, what prevents that, and which signal alarms early."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from labs.harness.facts.context import Context, JudgedRun
from labs.harness.judging.measure import Trial, in_time
from labs.harness.judging.metrics import METRICS
from labs.harness.judging.quantity import Quantity
from labs.harness.judging.signals import (
    GRID_S,
    SIGNALS,
    UNITS,
    Series,
    Watch,
    is_watched,
    late_from_s,
    series,
    thresholds,
    watch,
)
from labs.harness.spec import Point
from loadtests.arrivals import Offered, Ramp
from serving.engines.vllm import VllmFlags

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
    offers: tuple[Offer, ...]

    @property
    def most(self) -> float:
        """The heaviest load, in multiples of the capacity."""
        return max((o.times for o in self.offers), default=0.0)

    @property
    def without(self) -> Offer | None:
        """The heaviest load without a limit."""
        return self._heaviest(limited=False)

    @property
    def limited(self) -> Offer | None:
        """The heaviest load with a limit."""
        return self._heaviest(limited=True)

    def _heaviest(self, limited: bool) -> Offer | None:
        wanted = (self.most, limited)
        return next((o for o in self.offers if (o.times, o.limited_by != "nobody") == wanted), None)


def admission(run: JudgedRun) -> Admission:
    """Measure each load of the variants that were sent all of them."""
    first, *_ = run.points
    capacity_per_s = run.values.get(first.key, {}).get(1, {}).get("requests_per_s")
    several = {p.workload.name for p in run.points if len(p.workload.loads) > 1}
    offers = (_offer(run, p) for p in run.points if p.workload.name in several)
    return Admission(
        _given(capacity_per_s, "req/s"),
        forecast(run, first, "requests_per_s"),
        Quantity(run.lab.slo.ttft_s, "s"),
        Quantity(run.lab.slo.tpot_s, "s"),
        tuple(offer for offer in offers if offer),
    )


def forecast(run: JudgedRun, point: Point, metric: str) -> Quantity:
    """Return what was forecast of a point before any engine started, without its band."""
    known = run.forecast(point, metric)
    return _given(known.value if known else None, METRICS[metric].unit, "not forecast")


def _given(value: float | None, unit: str, why: str = "not measured") -> Quantity:
    return Quantity(value, unit, why="" if value is not None else why)


def _mean(values: Sequence[float], unit: str, why: str) -> Quantity:
    return _given(fmean(values) if values else None, unit, why)


def _offer(run: JudgedRun, point: Point) -> Offer | None:
    goodput_per_s, trials = run.quantity(point, "goodput_per_s"), [*_trials(run, point)]
    if not goodput_per_s.known or not trials or not isinstance(point.load, Offered):
        return None
    times, limited = point.load.times, point.flags.turns_away
    late_s = [s for trial in trials if (s := late_from_s(trial)) is not None]
    t_star_s = run.lab.slo.ttft_s / (times - 1) if times > 1 and not limited else None
    return Offer(
        point.variant.name,
        ("client" if point.admission_by_client else "engine") if limited else "nobody",
        times,
        offered_per_s=Quantity(fmean(_sent_per_s(trial) for trial in trials), "req/s"),
        goodput_per_s=goodput_per_s,
        gain=run.ratio_of(point, _unlimited(run, point) if limited else None, "goodput_per_s"),
        forecast_per_s=forecast(run, point, "goodput_per_s"),
        ttft_p50_s=run.quantity(point, "ttft_p50_s"),
        turned_away=run.quantity(point, "turned_away_rate"),
        late_from_s=_mean(late_s, "s", "nothing came too late"),
        fluid_late_from_s=_given(t_star_s, "s", "the queue does not grow on and on"),
    )


def _unlimited(run: Context, point: Point) -> Point | None:
    """Find the same load of a variant that turns nobody away."""
    load = (point.workload, point.load)
    alike = (p for p in run.points if (p.workload, p.load) == load and not p.flags.turns_away)
    return next(alike, None)


def _trials(run: Context, point: Point | None) -> Iterator[Trial]:
    return (t for _, _, t in run.folder.trials([point] if point else [], run.lab) if t)


def _sent_per_s(trial: Trial) -> float:
    return sum(r.in_window for r in trial.records) / trial.window_length_s


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
    loads = {str(p.load) for p in split}
    asked: list[tuple[Point, int | None]] = [
        (p, priority) for p in split for priority in sorted(set(p.workload.priorities))
    ]
    asked += [
        (p, None) for p in run.points
        if not p.workload.priorities and not p.flags.turns_away and str(p.load) in loads
    ]  # fmt: skip
    served = (_class_served(run, point, priority) for point, priority in asked)
    times = [p.load.times for p in split if isinstance(p.load, Offered)]
    return Classes(times[0] if times else None, tuple(of for of in served if of))


def _class_served(run: JudgedRun, point: Point, priority: int | None) -> ClassServed | None:
    trials = [*_trials(run, point)]
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
        _mean(ttft_s, "s", "no request was answered"),
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


@dataclass(frozen=True)
class Best:
    """The settings that have most of a rate: as measured, as forecast for these, and of others."""

    rate: Rate
    all_are_valid: bool
    measured: Setting | None  # of those whose figures are valid
    forecast: Setting | None
    searched: Setting | None

    @property
    def foreseen(self) -> Literal["the same", "another", "not forecast"]:
        """Whether the best by forecast of those that were measured came to be the best."""
        if not self.forecast or not self.measured:
            return "not forecast"
        return "the same" if self.forecast == self.measured else "another"

    @property
    def is_nothing(self) -> bool:
        """Whether even the best has none of it."""
        return self.measured is not None and not figure(self.rate, self.measured).measured.value


def figure(rate: Rate, setting: Setting) -> Figure:
    return setting.goodput if rate == "goodput" else setting.throughput


@dataclass(frozen=True)
class BestFlags:
    """All variants that were sent the flood, and what else was forecast for it."""

    times: float | None  # the capacity
    tried: tuple[Setting, ...]
    searched: tuple[Setting, ...]  # none in older runs

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
        return self._best("goodput")

    @property
    def throughput(self) -> Best:
        return self._best("throughput")

    def _best(self, rate: Rate) -> Best:
        return Best(
            rate,
            all(figure(rate, setting).is_valid for setting in self.tried),
            _most(self.tried, lambda setting: figure(rate, setting).valid),
            _most(self.tried, lambda setting: figure(rate, setting).forecast),
            _most(self.searched, lambda setting: figure(rate, setting).forecast),
        )


def _most(settings: Sequence[Setting], of: Callable[[Setting], Quantity]) -> Setting | None:
    """Pick the setting of which this is most; None where none has it."""
    known = [setting for setting in settings if of(setting).known]
    return max(known, key=lambda s: (of(s).value or 0.0, s.variant or ""), default=None)


def best_flags(run: JudgedRun) -> BestFlags:
    """Read the points of the heaviest offered load."""
    loads = {p.key: p.load.times for p in run.points if isinstance(p.load, Offered)}
    most = max(loads.values(), default=None)
    flood = [p for p in run.points if p.key in loads and loads[p.key] == most]
    played = run.predictions.in_virtual_time
    searched = [
        _searched(VllmFlags(point.flags), point.figures)
        for point in (played.searched if played else ())
    ]
    return BestFlags(most, tuple(_tried(run, p) for p in flood), tuple(searched))


def _tried(run: JudgedRun, point: Point) -> Setting:
    def figure(metric: str) -> Figure:
        return Figure(
            run.quantity(point, metric),
            forecast(run, point, metric),
            not run.withholds(metric, point),
        )

    return Setting(
        point.variant.name,
        point.flags.max_num_seqs,
        _limit(point.flags, point.admission_by_client),
        figure("goodput_per_s"),
        figure("output_tokens_per_s"),
        figure("tpot_mean_s"),
        run.quantity(point, "usd_per_million_tokens"),
    )


def _searched(flags: VllmFlags, figures: Mapping[str, float]) -> Setting:
    def figure(metric: str) -> Figure:
        unit = METRICS[metric].unit
        return Figure(
            Quantity.missing("forecast alone", unit),
            _given(figures.get(metric), unit, "not forecast"),
        )

    return Setting(
        None,
        flags.max_num_seqs,
        _limit(flags, by_client=False),
        figure("goodput_per_s"),
        figure("output_tokens_per_s"),
        figure("tpot_mean_s"),
        Quantity.missing("forecast alone", "USD"),
    )


def _limit(flags: VllmFlags, by_client: bool) -> Limit:
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
    steady = {
        p.load.times: p
        for p in reversed(run.points)
        if ramp and p.variant.name == ramp.variant.name and isinstance(p.load, Offered)
    }
    lightest = min(steady, default=None)
    calm = [series(t) for t in _trials(run, steady[lightest] if lightest else None)]
    rising = [(series(t), late_from_s(t)) for t in _trials(run, ramp)]
    broken = [(readings, at) for readings, at in rising if at is not None]
    return Signals(
        lightest,
        ramp.key if ramp else None,
        len(broken),
        _mean([at for _, at in broken], "s", "nothing came too late"),
        _given(_saturated_s(run, ramp), "s", "the load does not pass the capacity"),
        tuple(_signal(name, calm, [s for s, _ in rising], broken) for name in SIGNALS)
        if calm and rising
        else (),
    )


def ramp_of(run: Context) -> Point | None:
    return next((p for p in run.points if isinstance(p.load, Ramp)), None)


def _saturated_s(run: Context, ramp: Point | None) -> float | None:
    if ramp is None or not isinstance(ramp.load, Ramp) or not ramp.load.first < 1 < ramp.load.last:
        return None
    length_s = run.lab.warmup_s + run.lab.window_s
    return (1 - ramp.load.first) / (ramp.load.last - ramp.load.first) * length_s


def _signal(
    name: str,
    calm: Sequence[Series],
    rising: Sequence[Series],
    broken: Sequence[tuple[Series, float]],
) -> Signal:
    """Compare a signal on the ramp with the steady load; `broken` holds when the SLO was too."""
    highest_steady = max(max(readings[name]) for readings in calm)
    leads_s = []
    for readings, breach_s in broken:
        alarm = next((i for i, v in enumerate(readings[name]) if v > highest_steady), None)
        if alarm is not None and alarm * GRID_S < breach_s:
            leads_s.append(breach_s - alarm * GRID_S)
    return Signal(
        name,
        Quantity(highest_steady, UNITS[name]),
        Quantity(max(max(readings[name]) for readings in rising), UNITS[name]),
        _mean(leads_s, "s", "no alarm before the breach"),
        len(leads_s),
    )


# ------------------------------------------------- with thresholds that were set beforehand


@dataclass(frozen=True)
class Said:
    """What a signal said in all trials of a load, measured or in virtual time."""

    crossed_s: Quantity  # mean over the trials in which it led the breach
    lead_s: Quantity  # mean
    led: int  # trials
    false_alarms: int | None  # in all trials; None without any


@dataclass(frozen=True)
class Alarm:
    """What one signal said, as measured and as forecast."""

    signal: str
    threshold: Quantity
    measured: Said
    forecast: Said


@dataclass(frozen=True)
class Breaches:
    """In how many trials the SLO was broken, and when."""

    trials: int
    broken: int
    breach_s: Quantity  # mean


@dataclass(frozen=True)
class Alarms:
    """The alarms under a load whose rate changes within a trial."""

    point: str
    length_s: Quantity  # of a trial
    measured: Breaches
    forecast: Breaches
    alarms: tuple[Alarm, ...]

    @property
    def is_forecast(self) -> bool:
        return self.forecast.trials > 0

    @property
    def first(self) -> Alarm | None:
        """The signal that led by most; one that failed in any trial is left out."""
        sure = [a for a in self.alarms if a.measured.led == self.measured.broken > 0]
        return max(sure, key=lambda a: a.measured.lead_s.value or 0.0, default=None)


def alarms(run: JudgedRun) -> tuple[Alarms, ...]:
    """Watch each load whose rate changes, in its trials and in those in virtual time."""
    return tuple(of for point in watched(run.points) if (of := _alarms(run, point)))


def watched(points: Sequence[Point]) -> Sequence[Point]:
    return [p for p in points if is_watched(p.load)]


def _alarms(run: JudgedRun, point: Point) -> Alarms | None:
    trials = [*_trials(run, point)]
    if not trials:
        return None
    played, limits = run.predictions.in_virtual_time, thresholds(trials[0])
    came = [watch(trial) for trial in trials]
    foreseen = played.watches.get(point.key, ()) if played else ()
    return Alarms(
        point.key,
        Quantity(trials[0].summary.window_s[1], "s"),
        _breaches(came),
        _breaches(foreseen),
        tuple(
            Alarm(name, Quantity(limits[name], UNITS[name]), _said(name, came),
                  _said(name, foreseen))
            for name in SIGNALS
        ),
    )  # fmt: skip


def _breaches(watches: Sequence[Watch]) -> Breaches:
    breaches_s = [w.breach_s for w in watches if w.breach_s is not None]
    return Breaches(len(watches), len(breaches_s), _mean(breaches_s, "s", "the SLO was kept"))


def _said(name: str, watches: Sequence[Watch]) -> Said:
    said = [w.signals[name] for w in watches]
    leads_s = [of.lead_s for of in said if of.lead_s is not None]
    return Said(
        _mean([of.crossed_s for of in said if of.crossed_s is not None], "s", "no alarm in time"),
        _mean(leads_s, "s", "no alarm in time"),
        len(leads_s),
        sum(of.false_alarms for of in said) if said else None,
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
