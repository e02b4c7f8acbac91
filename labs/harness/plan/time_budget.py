"""Keep to the time that one call of a command has, and leave the rest to the next call.

On a machine where a command is ended after ten minutes, say, an engine that starts in the ninth is
time lost. So nothing is begun that does not fit into what is left, by the lab's own estimate of a
trial and by how long the last starts took. Whatever a call can do first is begun all the same:
otherwise a call that is too short for it would never get anywhere.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from labs.harness.spec.lab import LabError

MOST_AGAIN, MOST_AGAIN_QUICK = 2, 1  # how often a disturbed trial is measured again
PER_TRIAL_S = 2.0  # drain and bookkeeping, for the estimate of the time remaining
LAST = 3  # so many of the latest starts say how long the next one may take
PREPARATION_S = {"gpu": 45.0, "cpu": 30.0}  # from a lab's begin to its first engine, at first
START_S = {"gpu": 150.0, "cpu": 45.0}  # of an engine, while none has been started
START_TIMEOUT_S = 240.0  # an engine that needs longer has failed, where a call is bounded
PROBE_S = 60.0  # of a probe, while none has been run
CLOSING_S = 15.0  # for ending the engines, and for what is written then


class TimeUsedUp(LabError):
    """Signals that the next step does not fit into this call; the next call continues with it."""


def _latest(seconds: Iterable[float] = ()) -> deque[float]:
    return deque(seconds, maxlen=LAST)


@dataclass
class Clock:
    """Tells what still fits into a call, and how long the last preparations and starts took."""

    ends: float = math.inf  # on the monotonic clock
    starts_s: deque[float] = field(default_factory=_latest)
    preparations_s: deque[float] = field(default_factory=_latest)
    played: bool = False  # a trial or a probe, in this call
    longest_probe_s: float | None = None  # of this call

    @classmethod
    def of(
        cls, seconds: float | None, starts_s: Iterable[float], preparations_s: Iterable[float]
    ) -> Clock:
        """Start the clock of a call that may last `seconds`, with what earlier calls measured."""
        ends = math.inf if seconds is None else time.monotonic() + seconds - CLOSING_S
        return cls(ends, _latest(starts_s), _latest(preparations_s))

    @property
    def bounded(self) -> bool:
        return self.ends < math.inf

    @property
    def left_s(self) -> float:
        return self.ends - time.monotonic()

    @property
    def start_timeout_s(self) -> float | None:
        """The longest that engines that start together may take; None: an engine's own limit."""
        return START_TIMEOUT_S if self.bounded else None

    def start_s(self, kind: str) -> float:
        """Return how long the next start may take on this kind of machine.

        It is that of one engine, or of several at the same time.
        """
        return max(self.starts_s, default=START_S[kind])

    def preparation_s(self, kind: str) -> float:
        """Return how long a lab may take to begin: checks, prompts, forecast."""
        return max(self.preparations_s, default=PREPARATION_S[kind])

    @property
    def probe_s(self) -> float:
        """Return how long the next probe may take."""
        return PROBE_S if self.longest_probe_s is None else self.longest_probe_s

    def probed(self, seconds: float) -> None:
        """Note that a probe has been run, and how long it took."""
        self.longest_probe_s = max(self.longest_probe_s or 0.0, seconds)
        self.played = True

    def fits(self, seconds: float) -> bool:
        return not self.played or seconds <= self.left_s

    def require(self, seconds: float, what: str) -> None:
        """Check that this still fits. Raises TimeUsedUp."""
        if not self.fits(seconds):
            raise TimeUsedUp(
                f"{what} needs about {seconds:.0f} s and {max(0.0, self.left_s):.0f} s are left"
            )
