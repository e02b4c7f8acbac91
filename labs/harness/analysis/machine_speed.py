"""Compute how fast the machine was during a run, from the reference steps around its trials.

A reference step is the same work each time (`serving/hardware/reference_step.py`), so a longer one
means a slower machine. One is timed before and one after each trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np
from pydantic import BaseModel

from serving.hardware.reference_step import ReferenceStep, middle

MOST_CHANGED = 0.25
"""The least change of a step's time, up or down, that counts as a jump. It is 3.5 standard
deviations of the ratio of two steps; one step has 5% within 100 s on a quiet virtual machine."""

DISTURBING = 1.5
"""The least ratio of a step's times before and after a trial, up or down, at which the trial is
measured again: six standard deviations on a quiet virtual machine."""

MOST_SPREAD = 2.0
"""The largest spread that earlier runs are believed: a damaged one must not undo a forecast."""

Part = Literal["reading", "computing"]
PARTS: tuple[Part, ...] = ("reading", "computing")


@dataclass(frozen=True)
class TimedTrial:
    """Holds the reference steps just before and just after a trial of a point."""

    point: str
    started_unix_s: float
    before: ReferenceStep
    after: ReferenceStep


class PartSpeed(BaseModel, frozen=True, extra="forbid"):
    """Describes the times of one part of the reference step over a run."""

    median_s: float
    low_s: float  # the 10th percentile
    high_s: float  # the 90th
    trend: float | None  # change of the time from the first trial to the last, by a fitted line


class MachineSpeed(BaseModel, frozen=True, extra="forbid"):
    """Describes the reference steps of a run."""

    steps: int
    reading: PartSpeed
    computing: PartSpeed

    def of(self, part: Part) -> PartSpeed:
        """Return the times of one part."""
        return self.reading if part == "reading" else self.computing


def part_s(step: ReferenceStep, part: Part) -> float:
    """Return the seconds of a part of the step."""
    return step.reading_s if part == "reading" else step.computing_s


def machine_speed(trials: Sequence[TimedTrial]) -> MachineSpeed | None:
    """Describe the machine's speed over these trials; None where no reference step was timed."""
    if not trials:
        return None
    reading, computing = (_part_speed(trials, part) for part in PARTS)
    return MachineSpeed(steps=2 * len(trials), reading=reading, computing=computing)


def _part_speed(trials: Sequence[TimedTrial], part: Part) -> PartSpeed:
    times_s = [part_s(step, part) for t in trials for step in (t.before, t.after)]
    starts_s = [t.started_unix_s for t in trials for _ in range(2)]
    low_s, high_s = (float(np.percentile(times_s, q)) for q in (10, 90))
    trend, length_s = None, max(starts_s) - min(starts_s)
    if length_s > 0:
        slope, _ = np.polyfit(starts_s - np.min(starts_s), np.log(times_s), 1)
        trend = math.expm1(float(slope) * length_s)
    return PartSpeed(median_s=median(times_s), low_s=low_s, high_s=high_s, trend=trend)


def at_forecast(steps: Sequence[ReferenceStep], run: MachineSpeed) -> dict[Part, float]:
    """Return how many times as long each part took beside the stand-in step as beside the trials.

    It is the ratio of two medians, above 1 where the machine was slower while the forecast was
    made. Empty where no reference step was timed then.
    """
    then = middle(steps)
    if then is None:
        return {}
    return {part: part_s(then, part) / run.of(part).median_s for part in PARTS}


@dataclass(frozen=True)
class Jump:
    """A change of the machine's speed around a trial: how many times as long a part took."""

    part: Part
    ratio: float
    beside: bool = False  # on both sides of the trial, against the run's median; else after it


def jump(trial: TimedTrial, run: MachineSpeed) -> Jump | None:
    """Find how the machine's speed jumped around a trial; None where it did not.

    It jumped where a part took longer or shorter by more than MOST_CHANGED after the trial than
    before it, or on both sides of it (their geometric mean) than in the run's median.
    """
    for part in PARTS:
        before_s, after_s = (part_s(step, part) for step in (trial.before, trial.after))
        if _changed(after_s / before_s):
            return Jump(part, after_s / before_s)
        beside = math.sqrt(before_s * after_s) / run.of(part).median_s
        if _changed(beside):
            return Jump(part, beside, beside=True)
    return None


def large_jump(trial: TimedTrial) -> Jump | None:
    """Find how the machine's speed jumped along a trial by more than DISTURBING; None: it did not.

    It takes no other trial to tell.
    """
    for part in PARTS:
        ratio = part_s(trial.after, part) / part_s(trial.before, part)
        if max(ratio, 1 / ratio) > DISTURBING:
            return Jump(part, ratio)
    return None


def _changed(ratio: float) -> bool:
    return max(ratio, 1 / ratio) > 1 + MOST_CHANGED


def usual_spread(earlier: Sequence[MachineSpeed], trials: int) -> float:
    """Tell how far a machine's speed usually moves between one moment and the mean of later trials.

    A factor of 1 or more: with 80% probability a step takes, in the mean of so many trials,
    between 1 / factor and factor times as long as it took once before them. For each run, half the
    distance from the 10th to the 90th percentile of the logarithm of a part's time is the spread of
    one moment. Both moments spread, the later one less by averaging over trials as if they were
    independent of each other. The median over runs counts, and both parts alike, since a step reads
    and computes. 1 where there is no earlier run; MOST_SPREAD at most.
    """
    spreads = [
        math.log(speed.high_s / speed.low_s) / 2
        for run in earlier
        for speed in (run.reading, run.computing)
        if 0 < speed.low_s <= speed.high_s < math.inf
    ]
    if not spreads:
        return 1.0
    between = median(spreads) * math.sqrt(1 + 1 / trials)
    return min(math.exp(between), MOST_SPREAD)


def relative_speed(this: MachineSpeed, other: MachineSpeed) -> dict[Part, float]:
    """Divide this run's speed by the other's, part by part: 0.8 where a step took 1.25 as long."""
    return {part: other.of(part).median_s / this.of(part).median_s for part in PARTS}


def relative_speed_text(this: str, ratios: dict[Part, float], other: str) -> str:
    """Write `B ran at 0.80x of A's speed at reading, 0.90x at computing (reference steps)`."""
    return (
        f"{this} ran at {ratios['reading']:.2f}x of {other} speed at reading and"
        f" {ratios['computing']:.2f}x at computing (reference steps beside the trials)"
    )
