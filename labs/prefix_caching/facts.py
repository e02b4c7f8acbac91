"""What TTFT consists of, and whether timing tells a stranger what was sent before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.analysis.verdicts import contrast
from labs.harness.derived.run_view import JudgedRun
from serving import metrics

TELLS_BELOW = 0.9  # a ratio of times this far from 1 can be told from a few requests


@dataclass(frozen=True)
class Timed:
    """How long a stranger's prompts took: those that a victim had sent before, and new ones."""

    known_s: Quantity  # median
    fresh_s: Quantity  # median
    ratio: Quantity  # known / fresh, paired by round

    @property
    def tells(self) -> Literal["yes", "no", "open"]:
        """Whether timing tells a known prompt from a fresh one."""
        ratio = self.ratio
        if ratio.value is None or ratio.low is None or ratio.high is None:
            return "open"
        if ratio.high < 1 and ratio.value < TELLS_BELOW:
            return "yes"
        return "open" if ratio.low < TELLS_BELOW else "no"


@dataclass(frozen=True)
class TimingLeak:
    """Whether timing shows a stranger what was sent before, without and with a salt."""

    prompt_tokens: int
    unsalted: Timed
    salted: Timed

    @property
    def passed(self) -> bool | None:
        """Whether a salt hides it.

        None where that is not settled, and where timing does not tell without a salt either: then
        there was nothing to hide, or nothing that this timing could see.
        """
        if self.salted.tells == "yes":
            return False
        return True if (self.salted.tells, self.unsalted.tells) == ("no", "yes") else None


@dataclass(frozen=True)
class Split:
    """The mean parts of the time to the first token, as the engine counts them."""

    queue_s: Quantity
    prefill_s: Quantity


@dataclass(frozen=True)
class Facts:
    timing_leak: TimingLeak | None  # None: the probe did not run
    alone: Split  # one prompt at a time, nothing cached
    four: Split  # four at once, nothing cached
    cached: Split  # one at a time, nine tenths of it cached


def facts(run: JudgedRun) -> Facts:
    return Facts(
        timing_leak(run) if run.finds("timing-leak") else None,
        alone=split(run, "off", users=1),
        four=split(run, "off", users=4),
        cached=split(run, "on", users=1),
    )


def timing_leak(run: JudgedRun) -> TimingLeak | None:
    """Divide the time to first token of known prompts by that of fresh ones, paired by round."""
    for variant in run.lab.variants:
        if probe := run.folder.probe_result("salt", variant.name):
            took_s = probe["took_s"]
            return TimingLeak(
                probe["prompt_tokens"],
                unsalted=known_and_fresh(took_s["shared, known"], took_s["shared, fresh"]),
                salted=known_and_fresh(took_s["salted, known"], took_s["salted, fresh"]),
            )
    return None


def known_and_fresh(known_s: Sequence[float], fresh_s: Sequence[float]) -> Timed:
    measured = contrast(dict(enumerate(known_s)), dict(enumerate(fresh_s)), paired=True)
    return Timed(
        Quantity(float(np.median(known_s)), "s"),
        Quantity(float(np.median(fresh_s)), "s"),
        Quantity.of(measured.ratio if measured else None, RATIO),
    )


def split(run: JudgedRun, variant: str, users: int) -> Split:
    """Read how long the prompts of nine tenths shared waited, and were prefilled."""
    point = run.point(variant, "share-90", f"concurrent:{users}")
    queue_s, prefill_s = (
        run.engine_mean(point, histogram, "s")
        for histogram in (metrics.QUEUE_TIME, metrics.PREFILL_TIME)
    )
    return Split(queue_s, prefill_s)
