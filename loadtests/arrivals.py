"""Defines arrivals: when requests are sent.

In a closed loop a user sends, waits for the whole response, and sends again. `Concurrent(users)`
keeps that many requests in flight; `Waves(size)` sends that many, waits for *all* of them, and
sends the next, which is static batching done by the client; `Sessions(users, gap_s)` keeps that
many conversations open, each of which rests after every answer; `LogNormal` draws these rests. In
an open loop requests are sent on a schedule drawn beforehand, whatever is still outstanding:
`Poisson`; `Constant`; `Gamma`, burstier than Poisson below a burstiness of 1 and smoother above;
`Replay`, at a trace's own times; `Capped`, at those times while no more than so many are in flight.
`Contended(users, every_s)` is both: that many users in a closed loop, and beside them a request of
an intruder every so many seconds. `Offered`, `Ramp` and `Day` are open loops whose rate is a
multiple of the capacity of the engine, which is found before they are sent: `capacity:1.3`
overloads a slow machine as much as a fast one.

Every arrival has a text form such as `concurrent:8`, in which it is also given on a command line.
"""

from __future__ import annotations

import bisect
import math
import random
from abc import ABC, abstractmethod
from functools import cached_property
from itertools import count, takewhile
from statistics import NormalDist, fmean
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

MAX_USERS = 1024  # Locust users of one process; an open loop with more outstanding falls behind
REPLAY_USERS = 256
OFFERED_USERS = 512
GAPS = 61  # drawn, in a cycle: a prime number, so that each turn of a session meets all of them


class _Arrival(BaseModel, ABC, frozen=True, extra="forbid"):
    def __str__(self) -> str:
        fields = self.model_dump()
        levels = [_short(v) for k, v in fields.items() if k != "kind"]
        return f"{fields['kind']}:{'/'.join(levels)}"

    @property
    def name(self) -> str:
        """The text form as a folder's name: `concurrent-8`."""
        return str(self).replace(":", "-").replace("/", "-")

    @property
    @abstractmethod
    def words(self) -> str:
        """What is sent, as a person would say it: `8 users`."""

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent on a schedule, whatever is outstanding."""
        return False

    @property
    def seats(self) -> int:
        """The number of Locust users it needs: each has at most one request in flight."""
        return int(getattr(self, "users"))  # noqa: B009  (every arrival has it, but not this base)


class Concurrent(_Arrival, frozen=True):
    """Each of `users` has one request in flight at any time."""

    kind: Literal["concurrent"] = "concurrent"
    users: PositiveInt = Field(le=MAX_USERS)

    @property
    def words(self) -> str:
        """`1 user`, `8 users`."""
        return f"{self.users} user{'s' if self.users > 1 else ''}"


class Waves(_Arrival, frozen=True):
    """A wave of `size` requests is sent at once when the whole wave before has ended."""

    kind: Literal["waves"] = "waves"
    size: PositiveInt = Field(le=MAX_USERS)

    @property
    def users(self) -> int:
        """The number of requests in a wave."""
        return self.size

    @property
    def words(self) -> str:
        """`waves of 8`."""
        return f"waves of {self.size}"


class Contended(_Arrival, frozen=True):
    """Beside `users` in a closed loop, an intruder sends a request every `every_s` seconds."""

    kind: Literal["contended"] = "contended"
    users: PositiveInt = Field(le=MAX_USERS)  # without the intruder
    every_s: PositiveFloat = Field(allow_inf_nan=False)

    @property
    def seats(self) -> int:
        """The number of Locust users, of which the last is the intruder."""
        return self.users + 1

    @property
    def words(self) -> str:
        """`4 streams, a long prompt every 2 s`."""
        streams = f"{self.users} stream{'s' if self.users > 1 else ''}"
        return f"{streams}, a long prompt every {self.every_s:g} s"


class OfSessions(_Arrival, frozen=True):
    """Each of `users` has one conversation after another, and sends its turns in their order.

    After every answer it thinks, or runs its tools, for `gap_s` on average. The users begin one
    after another, spread evenly over a gap.
    """

    users: PositiveInt = Field(le=MAX_USERS)
    gap_s: NonNegativeFloat = Field(allow_inf_nan=False)

    @property
    def words(self) -> str:
        """`5 sessions`."""
        return f"{self.users} session{'s' if self.users > 1 else ''}"

    def begins_s(self, user: int) -> float:
        """Return when a user, counted from 0, sends its first turn."""
        return user / self.users * self.gap_s

    @property
    @abstractmethod
    def gaps_s(self) -> tuple[float, ...]:
        """The gaps after the answers to requests 0, 1, 2 and so on; then they begin again."""


class Sessions(OfSessions, frozen=True):
    """All gaps are equal."""

    kind: Literal["sessions"] = "sessions"

    @property
    def words(self) -> str:
        """`5 sessions, 2 s between turns`."""
        return f"{super().words}, {self.gap_s:g} s between turns"

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """The gap after every answer."""
        return (self.gap_s,)


class LogNormal(OfSessions, frozen=True):
    """The gaps have a log-normal distribution: many short ones, and a few long ones.

    `sigma` is the standard deviation of their logarithm; their median is about exp(-sigma^2 / 2) of
    their mean. The same quantiles come again and again in one random order, so that two trials
    have as much rest.
    """

    kind: Literal["lognormal"] = "lognormal"
    sigma: PositiveFloat = Field(le=3)

    @property
    def words(self) -> str:
        """`5 sessions, log-normal gaps (2 s, sigma 1)`."""
        return f"{super().words}, log-normal gaps ({self.gap_s:g} s, sigma {self.sigma:g})"

    @cached_property
    def gaps_s(self) -> tuple[float, ...]:
        """The gaps after the answers to requests 0, 1, 2 and so on; then they begin again."""
        normal, rng = NormalDist(sigma=self.sigma), random.Random("gaps")
        drawn = [math.exp(normal.inv_cdf((i + 0.5) / GAPS)) for i in range(GAPS)]
        scale_s = self.gap_s / fmean(drawn)
        # sorting by random() gives the same order on every Python version
        return tuple(scale_s * gap for gap in sorted(drawn, key=lambda _: rng.random()))


class _OpenLoop(_Arrival, frozen=True):
    rate_per_s: PositiveFloat = Field(allow_inf_nan=False)

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent on a schedule: yes, on one drawn beforehand."""
        return True

    @property
    def users(self) -> int:
        """The number of Locust users: enough for all requests of a minute to be outstanding."""
        return min(MAX_USERS, max(16, round(self.rate_per_s * 60)))


class Poisson(_OpenLoop, frozen=True):
    """Requests are sent at independent random times, `rate_per_s` on average."""

    kind: Literal["poisson"] = "poisson"

    @property
    def words(self) -> str:
        """`2 requests/s at random times`."""
        return f"{self.rate_per_s:g} requests/s at random times"

    def schedule(self, duration_s: float, rng: random.Random) -> list[float]:
        """Draw the send times in [0, duration_s): exponential gaps of mean 1 / rate."""
        times, at = [], rng.expovariate(self.rate_per_s)
        while at < duration_s:
            times.append(at)
            at += rng.expovariate(self.rate_per_s)
        return times


class Constant(_OpenLoop, frozen=True):
    """Requests are sent at equal intervals, `rate_per_s`."""

    kind: Literal["constant"] = "constant"

    @property
    def words(self) -> str:
        """`2 requests/s at equal intervals`."""
        return f"{self.rate_per_s:g} requests/s at equal intervals"

    def schedule(self, duration_s: float, rng: random.Random) -> list[float]:
        """List the send times in [0, duration_s), one every 1 / rate seconds."""
        return list(takewhile(lambda at: at < duration_s, (i / self.rate_per_s for i in count())))


class Gamma(_OpenLoop, frozen=True):
    """Gaps between requests have a gamma distribution, whose shape is `burstiness`.

    The coefficient of variation of the gaps is burstiness to the power -1/2, as with
    `vllm bench serve --burstiness`.
    """

    kind: Literal["gamma"] = "gamma"
    burstiness: PositiveFloat = Field(allow_inf_nan=False)

    @property
    def words(self) -> str:
        """`2 requests/s, burstiness 0.5`."""
        return f"{self.rate_per_s:g} requests/s, burstiness {self.burstiness:g}"

    def schedule(self, duration_s: float, rng: random.Random) -> list[float]:
        """Draw the send times in [0, duration_s)."""
        scale_s = 1 / (self.rate_per_s * self.burstiness)
        times, at = [], rng.gammavariate(self.burstiness, scale_s)
        while at < duration_s:
            times.append(at)
            at += rng.gammavariate(self.burstiness, scale_s)
        return times


class OfTrace(_Arrival, frozen=True):
    """Requests are sent at the times of the workload's trace, `speed` times as fast."""

    speed: PositiveFloat = Field(allow_inf_nan=False)

    @property
    def words(self) -> str:
        """`the trace at 2x its speed`."""
        return f"the trace at {self.speed:g}x its speed"

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent on a schedule: yes, on the trace's."""
        return True


class Replay(OfTrace, frozen=True):
    """Requests are sent at the times of the workload's trace, whatever is outstanding."""

    kind: Literal["replay"] = "replay"

    @property
    def users(self) -> int:
        """The number of Locust users, hence of requests that can be outstanding."""
        return REPLAY_USERS


class Capped(OfTrace, frozen=True):
    """As `Replay`, but a request that is due waits while `users` are in flight."""

    kind: Literal["capped"] = "capped"
    users: PositiveInt = Field(le=MAX_USERS)

    @property
    def words(self) -> str:
        """`the trace at 1x its speed, at most 8 in flight`."""
        return f"{super().words}, at most {self.users} in flight"


class OfCapacity(_Arrival, frozen=True):
    """An open loop whose rate is a multiple of a capacity in requests/s, which is found first."""

    @property
    def open_loop(self) -> bool:
        """Whether requests are sent on a schedule: yes, once the capacity is known."""
        return True

    @property
    def users(self) -> int:
        """The number of Locust users, hence of requests that can be outstanding.

        A trial has no more of them than requests.
        """
        return OFFERED_USERS

    @abstractmethod
    def schedule(self, duration_s: float, rng: random.Random, capacity_per_s: float) -> list[float]:
        """Draw the send times in [0, duration_s), where the capacity is so many requests/s."""


class Offered(OfCapacity, frozen=True):
    """Requests are sent at independent random times, `times` the capacity on average."""

    kind: Literal["capacity"] = "capacity"
    times: PositiveFloat = Field(le=100, allow_inf_nan=False)

    @property
    def words(self) -> str:
        """`1.3x the capacity`."""
        return f"{self.times:g}x the capacity"

    def schedule(self, duration_s: float, rng: random.Random, capacity_per_s: float) -> list[float]:
        """Draw the send times in [0, duration_s), at this multiple of so many requests/s."""
        return Poisson(rate_per_s=self.times * capacity_per_s).schedule(duration_s, rng)


class Ramp(OfCapacity, frozen=True):
    """Requests are sent at random times, at a rate that rises evenly within a trial.

    It rises from `first` to `last` times the capacity: an inhomogeneous Poisson process.
    """

    kind: Literal["ramp"] = "ramp"
    first: PositiveFloat = Field(le=100, allow_inf_nan=False)
    last: PositiveFloat = Field(le=100, allow_inf_nan=False)

    @property
    def words(self) -> str:
        """`a ramp from 0.5x to 1.5x the capacity`."""
        return f"a ramp from {self.first:g}x to {self.last:g}x the capacity"

    def schedule(self, duration_s: float, rng: random.Random, capacity_per_s: float) -> list[float]:
        """Draw the send times in [0, duration_s) by inverting the expected number of requests.

        By t it is first t + (last - first) t^2 / (2 duration), times the capacity.
        """
        bend = (self.last - self.first) / (2 * duration_s)
        times, expected = list[float](), 0.0
        while True:
            expected += rng.expovariate(capacity_per_s)
            inside = self.first**2 + 4 * bend * expected
            if inside < 0:  # a falling rate: no more requests are expected
                return times
            at = 2 * expected / (self.first + math.sqrt(inside))
            if at >= duration_s:
                return times
            times.append(at)


class Day(OfCapacity, frozen=True):
    """A trial is a day, compressed: requests are sent at random times, at a rate of each hour.

    The rate is `night` times the capacity at four in the morning and `peak` times at eight in the
    evening, with a lower peak before noon (`HOURS`): an inhomogeneous Poisson process.
    """

    kind: Literal["day"] = "day"
    night: PositiveFloat = Field(le=100, allow_inf_nan=False)
    peak: PositiveFloat = Field(le=100, allow_inf_nan=False)

    @model_validator(mode="after")
    def _the_peak_is_higher(self) -> Self:
        if self.night >= self.peak:
            raise ValueError(
                f"a day's peak ({self.peak:g}) must be above its night ({self.night:g}):"
                " day:NIGHT/PEAK, such as day:0.3/1.4"
            )
        return self

    @property
    def words(self) -> str:
        """`a day from 0.3x to 1.4x the capacity`."""
        return f"a day from {self.night:g}x to {self.peak:g}x the capacity"

    def times_at(self, hour: float) -> float:
        """Return the rate at an hour from 0 to 24, in multiples of the capacity."""
        after = bisect.bisect_right(HOURS, hour, hi=len(HOURS) - 1, key=lambda point: point[0])
        (begins, low), (ends, high) = HOURS[after - 1], HOURS[after]
        height = low + (high - low) * (hour - begins) / (ends - begins)
        return self.night + (self.peak - self.night) * height

    def schedule(self, duration_s: float, rng: random.Random, capacity_per_s: float) -> list[float]:
        """Draw the send times in [0, duration_s) by thinning (Lewis and Shedler 1979)."""
        at_peak = Poisson(rate_per_s=self.peak * capacity_per_s).schedule(duration_s, rng)
        return [
            at for at in at_peak
            if rng.random() * self.peak < self.times_at(24 * at / duration_s)
        ]  # fmt: skip


HOURS = (
    (0.0, 0.3), (4.0, 0.0), (9.0, 0.5), (11.0, 0.6), (14.0, 0.4), (17.0, 0.6), (20.0, 1.0),
    (22.0, 0.7), (24.0, 0.3),
)  # fmt: skip
"""A synthetic day: (hour, height), from 0 at night to 1 at the peak, straight between them."""

_KINDS: dict[str, type[_Arrival]] = {
    "concurrent": Concurrent, "waves": Waves, "poisson": Poisson, "constant": Constant,
    "gamma": Gamma, "replay": Replay, "contended": Contended, "capacity": Offered, "ramp": Ramp,
    "day": Day, "capped": Capped, "sessions": Sessions, "lognormal": LogNormal,
}  # fmt: skip


def _from_text(value: Any) -> Any:
    """Read `concurrent:8` as the fields of Concurrent(users=8); leave other values as they are."""
    if not isinstance(value, str):
        return value
    kind, _, text = value.partition(":")
    levels = text.split("/")
    if kind not in _KINDS or not text or len(levels) != len(_level_fields(_KINDS[kind])):
        forms = (f"{k}:{'/'.join(f'<{f}>' for f in _level_fields(c))}" for k, c in _KINDS.items())
        raise ValueError(f"{value!r} is no arrival; the known ones are {', '.join(forms)}")
    return {"kind": kind, **dict(zip(_level_fields(_KINDS[kind]), levels, strict=True))}


def _level_fields(arrival: type[_Arrival]) -> list[str]:
    return [f for f in arrival.model_fields if f != "kind"]


def _short(level: float) -> str:
    short = f"{level:g}"
    return short if float(short) == level else repr(level)


AnyArrival = (
    Concurrent
    | Waves
    | Poisson
    | Constant
    | Gamma
    | Replay
    | Contended
    | Offered
    | Ramp
    | Day
    | Capped
    | Sessions
    | LogNormal
)
Arrival = Annotated[
    Annotated[AnyArrival, Field(discriminator="kind")],
    BeforeValidator(_from_text),
]


def send_times(
    arrival: AnyArrival, duration_s: float, seed: int, capacity_per_s: float | None
) -> list[float] | None:
    """Draw when a trial's requests are due; None in a closed loop and of a trace, which has times.

    `capacity_per_s` is needed where the rate is a multiple of it. One seed and rate give the same
    times to the load generator and to the forecast.
    """
    rng = random.Random(f"{seed}/times")
    if isinstance(arrival, OfCapacity):
        if not capacity_per_s:
            raise ValueError(f"{arrival} needs a capacity, and none was found")
        return arrival.schedule(duration_s, rng, capacity_per_s)
    if isinstance(arrival, Poisson | Constant | Gamma):
        return arrival.schedule(duration_s, rng)
    return None
