"""How overload lowers goodput, what prevents that, and which signal alarms early."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from labs.harness.derived.tables import Figures, Row, Table, measured
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from loadtests.arrivals import Offered, Ramp
from loadtests.plan import QueueLimits
from serving.engines.vllm_flags import VllmFlags

# ------------------------------------------------------------------ what is served in time


LimitedBy = Literal["nobody", "engine", "client"]
"""Who turns requests away."""


@dataclass(frozen=True, kw_only=True)
class Admission(Table):
    """The capacity, as it was found and as it was forecast, and in rows every offered load."""

    limited_by: dict[str, LimitedBy]  # of each variant

    @property
    def without(self) -> Row | None:
        """The heaviest load without a limit."""
        return next((o for o in self.heaviest if self.limited_by[o.variant] == "nobody"), None)

    @property
    def limited(self) -> Row | None:
        """The heaviest load with a limit."""
        return next((o for o in self.heaviest if self.limited_by[o.variant] != "nobody"), None)

    @property
    def heaviest(self) -> list[Row]:
        return [offer for offer in self.rows if offer["times"].value == self["most"].value]


def admission(run: JudgedRun) -> Admission:
    """Measure each load of the variants that were sent all of them."""
    first, *_ = run.points
    capacity_per_s = run.values.get(first.key, {}).get(1, {}).get("requests_per_s")
    loaded = [p for p in run.points if len(p.workload.loads) > 1 and times_of(p)]
    offers = {p.key: offer(run, p) for p in measured(run, loaded, "goodput_per_s")}
    most = max((times for of in offers.values() if (times := of["times"].value)), default=None)
    return Admission(
        rows=tuple(Row(key, figures) for key, figures in offers.items()),
        figures={
            "capacity_per_s": Quantity.given(capacity_per_s, "req/s"),  # that set the rates
            "forecast_capacity_per_s": run.foreseen(first, "requests_per_s"),
            "slo_ttft_s": Quantity(run.lab.slo.ttft_s, "s"),
            "slo_tpot_s": Quantity(run.lab.slo.tpot_s, "s"),
            "window_s": Quantity(run.lab.window_s, "s"),  # of each trial, within its load
            "most": Quantity.given(most),  # the heaviest load, in multiples of the capacity
        },
        limited_by={p.variant.name: limited_by(p) for p in loaded},
    )


def times_of(point: Point) -> float | None:
    """Return a point's offered load in multiples of the capacity; None where it is none."""
    return point.load.times if isinstance(point.load, Offered) else None


def limited_by(point: Point) -> LimitedBy:
    if not point.flags.turns_away:
        return "nobody"
    return "client" if point.admission_by_client else "engine"


def offer(run: JudgedRun, point: Point) -> Figures:
    """Measure what a variant made of an offered load."""
    times, limited, trials = times_of(point) or 0.0, point.flags.turns_away, [*run.trials(point)]
    same_load = (p for p in run.points if (p.workload, p.load) == (point.workload, point.load))
    unlimited = next((p for p in same_load if not p.flags.turns_away), None)
    sent_per_s = [sum(r.in_window for r in t.records) / t.window_length_s for t in trials]
    late_s = [s for trial in trials if (s := late_from_s(trial)) is not None]
    t_star_s = run.lab.slo.ttft_s / (times - 1) if times > 1 and not limited else None
    goodput_per_s = run.quantity(point, "goodput_per_s")
    offered_per_s = mean(sent_per_s, "req/s", "not measured")
    return {
        "times": Quantity(times),  # the capacity
        "offered_per_s": offered_per_s,  # as it was sent
        "goodput_per_s": goodput_per_s,
        "in_time": (goodput_per_s / offered_per_s).in_unit("share"),  # of what was sent
        # of a limit: goodput / goodput without it
        "gain": run.ratio_of(point, unlimited if limited else None, "goodput_per_s"),
        "forecast_per_s": run.foreseen(point, "goodput_per_s"),
        "ttft_p50_s": run.quantity(point, "ttft_p50_s"),
        "turned_away": run.quantity(point, "turned_away_rate"),  # share of what was sent
        # when the first request was sent that waited longer than the SLO, measured and as t*
        "late_from_s": mean(late_s, "s", "nothing came too late"),
        "fluid_late_from_s": Quantity.given(t_star_s, "s", "the queue does not grow on and on"),
    }


# -------------------------------------------------------------------------- two classes of requests


def classes(run: JudgedRun) -> Table:
    """Split the trials with priorities by class, and set the same load without them beside."""
    split = [p for p in run.points if p.workload.priorities and times_of(p)]
    loads = [p.load for p in split]
    alike = [
        p
        for p in run.points
        if p.load in loads and not p.workload.priorities and not p.flags.turns_away
    ]
    served = [
        *((p, class_served(run, p, n)) for p in split for n in sorted(set(p.workload.priorities))),
        *((p, class_served(run, p, None)) for p in alike),
    ]
    return Table(
        rows=tuple(Row(point.key, figures) for point, figures in served if figures),
        figures={"times": Quantity.given(times_of(split[0]) if split else None)},  # the capacity
    )


def class_served(run: JudgedRun, point: Point, priority: int | None) -> Figures | None:
    """Measure what a class of requests got, or all; None where none was sent."""
    trials = [*run.trials(point)]
    sent = [
        (r, in_time(r, trial.slo))
        for trial in trials
        for r in trial.records
        if r.in_window and priority in (None, point.workload.priority(r.index))
    ]
    if not sent:
        return None
    length_s = sum(trial.window_length_s for trial in trials)
    ttft_s = [r.ttft_s for r, _ in sent if r.ok and r.ttft_s is not None]
    return {
        "priority": Quantity.given(priority, why="the engine knows no classes"),
        "sent_per_s": Quantity(len(sent) / length_s, "req/s"),
        "in_time": Quantity(fmean(is_in_time for _, is_in_time in sent), "share"),  # of the sent
        "ttft_mean_s": mean(ttft_s, "s", "no request was answered"),
    }


# ------------------------------------------------------------------------------- the best flags

Rate = Literal["goodput", "throughput"]
OF_SETTING: Mapping[str, str] = {
    "goodput": "goodput_per_s",
    "throughput": "output_tokens_per_s",
    "tpot": "tpot_mean_s",
    "usd_per_million_tokens": "usd_per_million_tokens",
}
LONG_PROMPT_TOKENS = 1024


@dataclass(frozen=True)
class Setting:
    """What a batch and a limit make of the flood; the figures are those of `OF_SETTING`."""

    variant: str | None  # None: it was only forecast
    batch: int  # max-num-seqs
    limits: QueueLimits
    by_client: bool  # whether the client holds them in the engine's place
    measured: Figures
    forecast: Figures
    not_valid: tuple[str, ...] = ()  # measured figures whose verdicts something withholds

    @property
    def usd_at_one_an_hour(self) -> Quantity:
        """US dollars for a million output tokens of a machine that costs one dollar an hour."""
        rate = self.measured["throughput"].value
        usd = 1e6 / 3600 / rate if rate else None
        return Quantity.given(usd, why="no throughput was measured")

    @property
    def has_valid_goodput(self) -> bool:
        return "goodput" not in self.not_valid

    def valid(self, rate: Rate) -> float | None:
        return None if rate in self.not_valid else self.measured[rate].value


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
        return self.measured is not None and not self.measured.measured[self.rate].value


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
        """All of them, those first that were measured."""
        return self.tried + self.searched

    @property
    def is_priced(self) -> bool:
        """Whether the run was given a price."""
        return any(t.measured["usd_per_million_tokens"].known for t in self.tried)

    @property
    def goodput(self) -> Best:
        return self.best("goodput")

    @property
    def throughput(self) -> Best:
        return self.best("throughput")

    def best(self, rate: Rate) -> Best:
        def most(
            settings: Sequence[Setting], of: Callable[[Setting], float | None]
        ) -> Setting | None:
            known = [(value, s) for s in settings if (value := of(s)) is not None]
            best = max(known, key=lambda at: (at[0], at[1].variant or ""), default=None)
            return best[1] if best else None

        def forecast(setting: Setting) -> float | None:
            return setting.forecast[rate].value

        measured = most(self.tried, lambda setting: setting.valid(rate))
        return Best(
            rate,
            all(rate not in setting.not_valid for setting in self.tried),
            measured=measured,
            forecast=most(self.tried, forecast),
            searched=most(self.searched, forecast),
            at_edge=bool(measured and measured.batch == max(s.batch for s in self.tried)),
            batches=self.batches.get(rate),
        )


def best_flags(run: JudgedRun) -> BestFlags:
    """Read the points of the heaviest offered load, and what was forecast beside them."""
    most = max((times for p in run.points if (times := times_of(p))), default=None)
    heaviest = [p for p in run.points if most and times_of(p) == most]
    played = run.predictions.in_virtual_time
    pairs = {rate: batches(run, heaviest, rate) for rate in get_args(Rate)}
    return BestFlags(
        most,
        tuple(tried_setting(run, p) for p in heaviest),
        tuple(map(searched_setting, played.searched if played else ())),
        heaviest[0].prompt_tokens if heaviest else None,
        {rate: pair for rate, pair in pairs.items() if pair},
        long_prompt_usd(heaviest[0]) if heaviest else None,
    )


def long_prompt_usd(point: Point) -> Quantity:
    """Price a million tokens of a long prompt at the machine's ceiling, at one dollar an hour."""
    prompt_s = theory.prefill_s(point.shape, point.ceilings, LONG_PROMPT_TOKENS)
    return Quantity(1e6 * prompt_s / LONG_PROMPT_TOKENS / 3600, "USD")


def batches(run: JudgedRun, points: Sequence[Point], rate: Rate) -> Batches | None:
    """Compare the two batches that have most under a limit in requests; None without two."""
    metric = OF_SETTING[rate]
    limited = [
        p
        for p in points
        if p.flags.max_num_queued_reqs is not None and not run.withholds(metric, p)
    ]
    known = measured(run, limited, metric)
    if not known:
        return None
    first, *others = sorted(known, key=lambda p: -(run.mean(p, metric) or 0.0))
    other = next((p for p in others if batch(p) != batch(first)), None)
    if other is None:
        return None
    ratio = run.ratio_of(first, other, metric)
    return Batches(first.variant.name, batch(first), other.variant.name, batch(other), ratio)


def batch(point: Point) -> int:
    return point.flags.max_num_seqs


def tried_setting(run: JudgedRun, point: Point) -> Setting:
    return Setting(
        point.variant.name,
        batch(point),
        limits_of(point.flags),
        point.admission_by_client and point.flags.turns_away,
        measured={name: run.quantity(point, metric) for name, metric in OF_SETTING.items()},
        forecast={name: run.foreseen(point, metric) for name, metric in OF_SETTING.items()},
        not_valid=tuple(n for n, metric in OF_SETTING.items() if run.withholds(metric, point)),
    )


def searched_setting(searched: Searched) -> Setting:
    flags, units = VllmFlags(searched.flags), {n: METRICS[m].unit for n, m in OF_SETTING.items()}
    return Setting(
        None,
        flags.max_num_seqs,
        limits_of(flags),
        by_client=False,
        measured={name: Quantity.missing("forecast alone", unit) for name, unit in units.items()},
        forecast={
            name: Quantity.given(searched.figures.get(OF_SETTING[name]), unit, "not forecast")
            for name, unit in units.items()
        },
    )


def limits_of(flags: VllmFlags) -> QueueLimits:
    return QueueLimits(
        requests=flags.max_num_queued_reqs, prompt_tokens=flags.max_num_queued_tokens
    )


# ----------------------------------------------------------------- which signal sees it coming


def signals(run: JudgedRun) -> Table:
    """Read four signals along a ramp: each alarms above the highest it had at a steady load.

    The steady load is the lightest one that the same variant was offered. So no signal's threshold
    was chosen by what the ramp showed.
    """
    ramp = ramp_of(run)
    healthy = lightest(run, ramp) if ramp else None
    calm = [series(trial) for trial in run.trials(healthy)]
    rising = [(series(trial), late_from_s(trial)) for trial in run.trials(ramp)]
    breaches_s = [at for _, at in rising if at is not None]
    return Table(
        rows=tuple(Row(name, signal(name, calm, rising)) for name in SIGNALS if calm and rising),
        figures={
            "steady_times": Quantity.given(times_of(healthy) if healthy else None),  # the capacity
            "trials": Quantity(len(breaches_s)),  # in which the SLO was broken
            # when the first request was sent that came too late, and the load passed the capacity
            "breach_s": mean(breaches_s, "s", "nothing came too late"),
            "saturated_s": saturated_s(run, ramp),
        },
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
) -> Figures:
    """Say how early a signal left the range that it has under a steady load, in each trial."""
    highest_steady = max(max(readings[name]) for readings in calm)
    leads_s = []
    for readings, breach_s in rising:
        alarm = next((i for i, v in enumerate(readings[name]) if v > highest_steady), None)
        if alarm is not None and breach_s is not None and alarm * GRID_S < breach_s:
            leads_s.append(breach_s - alarm * GRID_S)
    return {
        "highest_steady": Quantity(highest_steady, UNITS[name]),
        "highest": Quantity(max(max(readings[name]) for readings, _ in rising), UNITS[name]),
        "lead_s": mean(leads_s, "s", "no alarm before the breach"),  # from it to the breach
        "alarms": Quantity(len(leads_s)),  # trials in which it alarmed before the breach
    }


# ------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Facts:
    admission: Admission | None
    classes: Table | None
    best_flags: BestFlags | None
    signals: Table | None
    alarms: tuple[Alarms, ...] | None


def facts(run: JudgedRun) -> Facts:
    return Facts(
        admission(run) if run.finds("admission") else None,
        classes(run) if run.finds("classes") else None,
        best_flags(run) if run.finds("best-flags") else None,
        signals(run) if run.finds("signals") else None,
        alarms(run) if run.finds("alarms") else None,
    )
