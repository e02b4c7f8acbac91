"""How long before a breach of the SLO each signal alarms, by thresholds set beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.signals import (
    SIGNALS,
    UNITS,
    Watch,
    is_watched,
    series,
    thresholds,
    watch,
)
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec.lab import Point
from loadtests.arrivals import Offered


def mean(values: Sequence[float], unit: str, why: str) -> Quantity:
    return Quantity.given(fmean(values) if values else None, unit, why)


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
    also_healthy: int = 0  # trials of the lightest steady load in which it was reached, too


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
        """The signal that led by most; one that failed, or that a healthy load sets off, is not."""
        every = self.measured.broken
        return longest([a for a in self.sound if a.measured.led == every > 0])

    @property
    def second(self) -> Alarm | None:
        """The signal that led by most after that one."""
        return longest([a for a in self.sound if a.measured.lead_s.known and a != self.first])

    @property
    def sound(self) -> list[Alarm]:
        """The signals that no healthy load sets off."""
        return [a for a in self.alarms if not a.also_healthy]

    @property
    def set_off(self) -> list[Alarm]:
        """The signals that a healthy load sets off as well: they tell of load, not of too much."""
        return [a for a in self.alarms if a.also_healthy]


def longest(alarms: Sequence[Alarm]) -> Alarm | None:
    """Find the alarm with the longest lead."""
    return max(alarms, key=lambda a: a.measured.lead_s.value or 0.0, default=None)


def alarms(run: JudgedRun) -> tuple[Alarms, ...]:
    """Watch each load whose rate changes, in its trials and in those in virtual time."""
    found = []
    played = run.predictions.in_virtual_time
    for point in watched(run.points):
        if trials := [*run.trials(point)]:
            came = [watch(trial) for trial in trials]
            foreseen = played.watches.get(point.key, ()) if played else ()
            limits, healthy = thresholds(trials[0]), lightest(run, point)
            calm = [series(trial) for trial in run.trials(healthy)] if healthy else []
            said = tuple(
                Alarm(
                    name,
                    Quantity(limits[name], UNITS[name]),
                    said_by(name, came),
                    said_by(name, foreseen),
                    sum(max(readings[name]) >= limits[name] for readings in calm),
                )
                for name in SIGNALS
            )
            length_s = Quantity(trials[0].summary.window_s[1], "s")
            found.append(Alarms(point.key, length_s, breaches(came), breaches(foreseen), said))
    return tuple(found)


def lightest(run: JudgedRun, point: Point) -> Point | None:
    """Find the point of the same variant with the lightest steady load below the capacity."""
    steady = {
        p.load.times: p
        for p in run.points
        if p.variant == point.variant and isinstance(p.load, Offered) and p.load.times < 1
    }
    return steady[min(steady)] if steady else None


def watched(points: Sequence[Point]) -> Sequence[Point]:
    return [p for p in points if is_watched(p.load)]


def breaches(watches: Sequence[Watch]) -> Breaches:
    breaches_s = [w.breach_s for w in watches if w.breach_s is not None]
    return Breaches(len(watches), len(breaches_s), mean(breaches_s, "s", "the SLO was kept"))


def said_by(name: str, watches: Sequence[Watch]) -> Said:
    said = [w.signals[name] for w in watches]
    leads_s = [of.lead_s for of in said if of.lead_s is not None]
    return Said(
        mean([of.crossed_s for of in said if of.crossed_s is not None], "s", "no alarm in time"),
        mean(leads_s, "s", "no alarm in time"),
        len(leads_s),
        sum(of.false_alarms for of in said) if said else None,
    )
