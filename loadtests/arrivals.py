"""When requests are sent.

Closed loop: a user sends, waits for the whole answer, sends again. `Concurrent(users)` keeps that
many requests in flight; `Waves(size)` sends that many, waits for *all* of them, and sends the next:
static batching done by the client. Open loop: requests come on a schedule drawn beforehand,
whatever is still outstanding: `Poisson`; `Constant`; `Gamma`, burstier than Poisson below a
burstiness of 1 and smoother above; `Replay`, at a trace's own times. `Contended(users, every_s)`
is both: that many users in closed loop, and beside them an intruder's request every so many
seconds.

Every arrival has a text form, `concurrent:8`, which is also how one is given on a command line.
"""

from __future__ import annotations

import random
from itertools import count, takewhile
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
)

MAX_USERS = 1024  # Locust users of one process: an open loop with more outstanding falls behind
REPLAY_USERS = 256


class _Arrival(BaseModel, frozen=True, extra="forbid"):
    def __str__(self) -> str:
        fields = self.model_dump()
        levels = [_short(v) for k, v in fields.items() if k != "kind"]
        return f"{fields['kind']}:{'/'.join(levels)}"

    @property
    def name(self) -> str:
        """As a folder name: `concurrent-8`."""
        return str(self).replace(":", "-").replace("/", "-")

    @property
    def open_loop(self) -> bool:
        return False

    @property
    def seats(self) -> int:
        """Locust users it needs: each has at most one request in flight."""
        return int(getattr(self, "users"))  # noqa: B009  (every arrival has it, its base has not)


class Concurrent(_Arrival, frozen=True):
    kind: Literal["concurrent"] = "concurrent"
    users: PositiveInt = Field(le=MAX_USERS)


class Waves(_Arrival, frozen=True):
    kind: Literal["waves"] = "waves"
    size: PositiveInt = Field(le=MAX_USERS)

    @property
    def users(self) -> int:
        return self.size


class Contended(_Arrival, frozen=True):
    kind: Literal["contended"] = "contended"
    users: PositiveInt = Field(le=MAX_USERS)  # the intruder not counted
    every_s: PositiveFloat = Field(allow_inf_nan=False)

    @property
    def seats(self) -> int:
        return self.users + 1  # the intruder takes the last one


class _OpenLoop(_Arrival, frozen=True):
    rate_per_s: PositiveFloat = Field(allow_inf_nan=False)

    @property
    def open_loop(self) -> bool:
        return True

    @property
    def users(self) -> int:
        """Enough users that one is always free, unless requests pile up a minute deep."""
        return min(MAX_USERS, max(16, round(self.rate_per_s * 60)))


class Poisson(_OpenLoop, frozen=True):
    kind: Literal["poisson"] = "poisson"

    def schedule(self, duration_s: float, rng: random.Random) -> list[float]:
        """Send times in [0, duration_s): exponential gaps of mean 1 / rate."""
        times, at = [], rng.expovariate(self.rate_per_s)
        while at < duration_s:
            times.append(at)
            at += rng.expovariate(self.rate_per_s)
        return times


class Constant(_OpenLoop, frozen=True):
    kind: Literal["constant"] = "constant"

    def schedule(self, duration_s: float, rng: random.Random) -> list[float]:
        """Send times in [0, duration_s), one every 1 / rate seconds."""
        return list(takewhile(lambda at: at < duration_s, (i / self.rate_per_s for i in count())))


class Gamma(_OpenLoop, frozen=True):
    """Gaps of a gamma distribution of this shape: their coefficient of variation is its -1/2 power.

    As in `vllm bench serve --burstiness`.
    """

    kind: Literal["gamma"] = "gamma"
    burstiness: PositiveFloat = Field(allow_inf_nan=False)

    def schedule(self, duration_s: float, rng: random.Random) -> list[float]:
        """Send times in [0, duration_s)."""
        scale_s = 1 / (self.rate_per_s * self.burstiness)
        times, at = [], rng.gammavariate(self.burstiness, scale_s)
        while at < duration_s:
            times.append(at)
            at += rng.gammavariate(self.burstiness, scale_s)
        return times


class Replay(_Arrival, frozen=True):
    """The times of the workload's trace, `speed` times as fast."""

    kind: Literal["replay"] = "replay"
    speed: PositiveFloat = Field(allow_inf_nan=False)

    @property
    def open_loop(self) -> bool:
        return True

    @property
    def users(self) -> int:
        return REPLAY_USERS


_KINDS: dict[str, type[_Arrival]] = {
    "concurrent": Concurrent, "waves": Waves, "poisson": Poisson, "constant": Constant,
    "gamma": Gamma, "replay": Replay, "contended": Contended,
}  # fmt: skip


def _from_text(value: Any) -> Any:
    """`concurrent:8` -> Concurrent(users=8); anything else passes on."""
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


AnyArrival = Concurrent | Waves | Poisson | Constant | Gamma | Replay | Contended
Arrival = Annotated[
    Annotated[AnyArrival, Field(discriminator="kind")],
    BeforeValidator(_from_text),
]


def parse(text: str) -> AnyArrival:
    """Read an arrival's text form; raises pydantic.ValidationError naming the known ones."""
    read: TypeAdapter[AnyArrival] = TypeAdapter(Arrival)
    return read.validate_python(text)
