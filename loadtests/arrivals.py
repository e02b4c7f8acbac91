"""When requests are sent.

Closed loop: a user sends, waits for the whole answer, sends again. `Concurrent(users)` keeps that
many requests in flight; `Waves(size)` sends that many, waits for *all* of them, and sends the next:
static batching done by the client. Open loop: requests come on a schedule drawn beforehand,
whatever is still outstanding (`Poisson`, `Constant`).

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


class _Arrival(BaseModel, frozen=True, extra="forbid"):
    def __str__(self) -> str:
        fields = self.model_dump()
        level = next(v for k, v in fields.items() if k != "kind")
        short = f"{level:g}"
        return f"{fields['kind']}:{short if float(short) == level else repr(level)}"

    @property
    def name(self) -> str:
        """As a folder name: `concurrent-8`."""
        return str(self).replace(":", "-")

    @property
    def open_loop(self) -> bool:
        return False


class Concurrent(_Arrival, frozen=True):
    kind: Literal["concurrent"] = "concurrent"
    users: PositiveInt = Field(le=MAX_USERS)


class Waves(_Arrival, frozen=True):
    kind: Literal["waves"] = "waves"
    size: PositiveInt = Field(le=MAX_USERS)

    @property
    def users(self) -> int:
        return self.size


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


_KINDS: dict[str, type[_Arrival]] = {
    "concurrent": Concurrent, "waves": Waves, "poisson": Poisson, "constant": Constant,
}  # fmt: skip


def _from_text(value: Any) -> Any:
    """`concurrent:8` -> Concurrent(users=8); anything else passes on."""
    if not isinstance(value, str):
        return value
    kind, _, level = value.partition(":")
    if kind not in _KINDS or not level:
        known = ", ".join(f"{k}:<{_level_field(c)}>" for k, c in _KINDS.items())
        raise ValueError(f"{value!r} is no arrival; the known ones are {known}")
    return {"kind": kind, _level_field(_KINDS[kind]): level}


def _level_field(arrival: type[_Arrival]) -> str:
    return next(f for f in arrival.model_fields if f != "kind")


Arrival = Annotated[
    Annotated[Concurrent | Waves | Poisson | Constant, Field(discriminator="kind")],
    BeforeValidator(_from_text),
]


def parse(text: str) -> Concurrent | Waves | Poisson | Constant:
    """Read an arrival's text form; raises pydantic.ValidationError naming the known ones."""
    arrival: Concurrent | Waves | Poisson | Constant = TypeAdapter(Arrival).validate_python(text)
    return arrival
