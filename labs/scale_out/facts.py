"""How long a replica takes to serve, beside the lead of each signal; and what a day made of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.signals import MOST as MOST_FULL
from labs.harness.derived.alarms import Alarms, alarms
from labs.harness.derived.alarms import watched as watched
from labs.harness.derived.lab_modules import AskedDay
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec.lab import Point
from loadtests.arrivals import HOURS, Day
from serving.engines.vllm import Vllm
from serving.simulator.fleet import Scaling

DAY, DAY_S, MOST = Day(night=0.3, peak=3.0), 300.0, 4
STARTS_S = (Vllm.start_s or 0.0, 5.0)  # what a start is expected to take; a spare that is waiting
FILLED = 0.75  # of the replicas' capacity, by the plan


# ------------------------------------------------------------------------------- one real joining


@dataclass(frozen=True)
class Start:
    """How long a replica took from the order until it served, with nothing else in flight."""

    how: str
    took_s: Quantity


@dataclass(frozen=True)
class Joined:
    """One overload in whose middle a second replica was started, counted by request."""

    rate_per_s: Quantity
    capacity_per_s: Quantity
    serves_s: Quantity  # from the order until it serves
    first_s: Quantity  # and until it had answered its first request
    ordered_after_s: Quantity  # since the first request was sent
    sent: int
    answered: int
    by_first: int  # replica
    by_second: int
    late_before: Quantity  # share of what was sent before it had answered
    late_after: Quantity  # and of what was sent last
    last_s: Quantity  # for so long

    @property
    def lost(self) -> int:
        return self.sent - self.answered

    @property
    def adds_up(self) -> bool:
        """Whether the replicas have completed exactly what clients were answered."""
        return self.by_first + self.by_second == self.answered


LAST_S = 5.0


def joined(probe: dict[str, Any], slo_s: float) -> Joined:
    requests, decided_s, first_s = probe["requests"], probe["decided_s"], probe["first_s"]

    def late(from_s: float, to_s: float) -> Quantity:
        sent = [r for r in requests if from_s <= r["sent_s"] < to_s]
        missed = sum(r["ttft_s"] is None or r["ttft_s"] > slo_s for r in sent)
        return Quantity.given(missed / len(sent) if sent else None, "share", "nothing was sent")

    by_first, by_second = map(round, probe["completed_by"])
    return Joined(
        rate_per_s=Quantity(probe["rate_per_s"], "req/s"),
        capacity_per_s=Quantity(probe["capacity_per_s"], "req/s"),
        serves_s=Quantity(probe["serves_s"] - decided_s, "s"),
        first_s=Quantity(first_s - decided_s, "s"),
        ordered_after_s=Quantity(decided_s, "s"),
        sent=len(requests),
        answered=sum(r["e2e_s"] is not None for r in requests),
        by_first=by_first,
        by_second=by_second,
        late_before=late(0, first_s),
        late_after=late(probe["ends_s"] - LAST_S, math.inf),
        last_s=Quantity(LAST_S, "s"),
    )


def starts(probe: dict[str, Any]) -> Iterator[Start]:
    for how, took in probe["starts"].items():
        known = isinstance(took, float)
        yield Start(how, Quantity(took, "s") if known else Quantity.missing(str(took), "s"))


# ------------------------------------------------------------------------------------------- a day


def days(points: Sequence[Point]) -> list[AskedDay]:
    """Ask how a day goes on as many replicas as its peak needs, and on a number that follows it."""
    one = next((p for p in points if p.flags.replicas == 1), None)
    if one is None:
        return []
    places = one.flags.max_num_seqs
    always = [("always", Scaling(rule="plan", start_s=0.0, plan=((0.0, MOST),)))]
    rules = [
        (rule, scaling)
        for start_s in STARTS_S
        for rule, scaling in (
            ("queue", Scaling(rule="queue", start_s=start_s, threshold=places, places=places)),
            ("kv", Scaling(rule="kv", start_s=start_s, threshold=MOST_FULL, places=places)),
            ("yesterday", Scaling(rule="plan", start_s=start_s, plan=plan())),
        )
    ]
    return [AskedDay(name, one, DAY, DAY_S, MOST, scaling) for name, scaling in [*always, *rules]]


def plan() -> tuple[tuple[float, int], ...]:
    """Plan the replicas by yesterday's rates: the most that any rate of the next hour needs."""
    hours = [hour / 2 for hour in range(2 * round(HOURS[-1][0]))]

    def wanted(hour: float) -> int:
        rates = [DAY.times_at(min(hour + ahead, HOURS[-1][0])) for ahead in (0.0, 0.5, 1.0)]
        return min(MOST, math.ceil(max(rates) / FILLED))

    return tuple((hour / HOURS[-1][0] * DAY_S, wanted(hour)) for hour in hours)


@dataclass(frozen=True)
class Followed:
    """What became of the day by one rule: replica-hours of a day against requests out of time."""

    rule: str
    start_s: Quantity
    late: Quantity  # share
    replica_hours: Quantity


@dataclass(frozen=True)
class Days:
    """One day by each rule; two starts of a rule are a slow one and a fast one."""

    length_s: Quantity
    each: tuple[Followed, ...]

    @property
    def always(self) -> Followed | None:
        return self.of("always")

    @property
    def queue(self) -> Followed | None:
        return self.of("queue")

    @property
    def yesterday(self) -> Followed | None:
        return self.of("yesterday")

    def of(self, rule: str) -> Followed | None:
        """The day by a rule, with the slow start."""
        return next((day for day in self.each if day.rule == rule), None)


def followed(run: JudgedRun) -> Iterator[Followed]:
    played = run.predictions.in_virtual_time
    for day in played.days if played else ():
        hours = Quantity(HOURS[-1][0] * day.replicas)
        yield Followed(day.name, Quantity(day.start_s, "s"), Quantity(day.late, "share"), hours)


# ------------------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Facts:
    alarms: tuple[Alarms, ...]
    starts: tuple[Start, ...]
    joined: Joined | None
    slow_enough_s: Quantity  # a rise by one replica's capacity, for one ordered at the capacity
    days: Days


def facts(run: JudgedRun) -> Facts:
    probe = run.folder.probe_result("joining", "one")
    slo_s = run.lab.slo.ttft_s
    joining = joined(probe, slo_s) if probe else None
    return Facts(
        alarms=alarms(run),
        starts=tuple(starts(probe)) if probe else (),
        joined=joining,
        slow_enough_s=joining.first_s * joining.first_s / 2 / slo_s
        if joining
        else Quantity.missing("no replica joined", "s"),
        days=Days(Quantity(DAY_S, "s"), tuple(followed(run))),
    )
