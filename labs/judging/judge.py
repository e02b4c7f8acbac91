"""From measurements to verdicts: effects with intervals, then claims where they may be judged.

An effect is the ratio treatment / baseline. Repeats are paired (the same requests, the same block
of time), so the statistic is the mean of the log ratios over repeats, with Student's t interval:
with three to five repeats a bootstrap, over repeats or over repeats and then the requests in them,
covers the truth less often than it says, since so few repeats cannot show how much repeats vary (in
the tests' simulation fewer than 88 times in 100 for a nominal 95); t does. The
*noise floor* is the half-width the same interval would have if treatment and baseline were the
same thing (A/A), estimated from how much repeats of one point differ.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel
from scipy import stats

from labs.judging.metrics import METRICS, Repeats, by_repeat
from labs.lab import Claim, Forecast, Prediction

CONFIDENCE = 0.95
EQUIVALENCE_MARGIN = 0.03  # effects below 3 % change no decision
LARGEST_EQUIVALENCE_MARGIN = 0.05  # noise beyond this shows nothing, equality least of all
MOST_REPEATS = 100
NEGLIGIBLE_LOG = 1e-9  # logs that differ by less do not differ

VerdictKind = Literal["helps", "hurts", "no effect", "inconclusive", "not valid"]


class Caveat(BaseModel, frozen=True, extra="forbid"):
    """A named weakness, with advice; one that `blocks` allows no verdict."""

    name: str
    text: str
    blocks: bool = False
    point: str | None = None
    metrics: tuple[str, ...] = ()  # on which it allows none; where none is named, on any

    def hits(self, metric: str, *points: str) -> bool:
        here = self.point is None or self.point in points
        return self.blocks and here and (not self.metrics or metric in self.metrics)


class Interval(BaseModel, frozen=True, extra="forbid"):
    """A mean over repeats with its 95 % interval; the bounds are None with a single repeat."""

    value: float
    low: float | None
    high: float | None
    n: int


class Effect(BaseModel, frozen=True, extra="forbid"):
    """The ratio treatment / baseline."""

    ratio: Interval
    floor: float | None  # A/A half-width as a fraction: 0.02 means 2 %
    spread: float | None  # standard deviation of the log ratios


class Contrast(BaseModel, frozen=True, extra="forbid"):
    """The ratio of one figure in two places, and how likely chance alone is to part them so."""

    ratio: Interval
    p: float | None


class Judgement(BaseModel, frozen=True, extra="forbid"):
    """A claim at one pair of points."""

    claim: str
    title: str
    metric: str
    treatment: str
    baseline: str
    outcome: VerdictKind
    expected: bool | None  # did what the claim expects happen; None when undecided
    effect: Effect | None
    prediction: Prediction
    prediction_held: bool | None
    why: str


class ForecastResult(BaseModel, frozen=True, extra="forbid"):
    """A predicted absolute figure beside the measured one."""

    metric: str
    point: str
    measured: Interval | None
    prediction: Prediction
    held: bool | None


class ForecastAtPoint(BaseModel, frozen=True, extra="forbid"):
    """A point's figure as it was forecast in virtual time, beside what was measured."""

    point: str
    metric: str
    value: float
    low: float
    high: float
    measured: Interval | None

    @property
    def share(self) -> float | None:
        """Measured / forecast; None where either is missing or the forecast is 0."""
        return self.measured.value / self.value if self.measured and self.value else None

    @property
    def within(self) -> bool | None:
        """Whether the measured mean lies within the band."""
        return self.low <= self.measured.value <= self.high if self.measured else None


# ------------------------------------------------------------------------------------ statistics


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student-t interval over repeats."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(value=mean, low=None, high=None, n=len(values))
    half = _t(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(value=mean, low=mean - half, high=mean + half, n=len(values))


def over_repeats(repeats: Repeats, metric: str) -> Interval | None:
    """The mean over the repeats that have the metric, on which every verdict rests."""
    values = by_repeat(repeats, metric)
    return mean_interval(list(values.values())) if values else None


def figure(repeats: Repeats, pooled: Mapping[str, float], metric: str) -> Interval | None:
    """A point's figure as the table of metrics wants it shown; None where there is none.

    A pooled percentile (`pooled` has the point's) is of the samples of all repeats together and
    has no interval; any other metric is the mean over the repeats.
    """
    if not METRICS[metric].statistic.pooled:
        return over_repeats(repeats, metric)
    value, n = pooled.get(metric), len(by_repeat(repeats, metric))
    return None if value is None else Interval(value=value, low=None, high=None, n=n)


def effect(treatment: Mapping[int, float], baseline: Mapping[int, float]) -> Effect | None:
    """Effect from the repeats both have (repeat number -> value); None when there is none.

    Values must be positive: a ratio of logarithms knows no zero.
    """
    both = sorted(set(treatment) & set(baseline))
    logs = [
        math.log(treatment[r] / baseline[r]) for r in both if treatment[r] > 0 and baseline[r] > 0
    ]
    if not logs:
        return None
    log = mean_interval(logs)
    ratio = Interval(
        value=math.exp(log.value),
        low=None if log.low is None else math.exp(log.low),
        high=None if log.high is None else math.exp(log.high),
        n=len(logs),
    )
    spread = float(np.std(logs, ddof=1)) if len(logs) > 1 else None
    return Effect(ratio=ratio, floor=noise_floor(treatment, baseline), spread=spread)


def noise_floor(*arms: Mapping[int, float]) -> float | None:
    """Half-width of an A/A interval with as many repeats, as a fraction; None with one repeat.

    Repeats of one point vary with pooled standard deviation s (of logs); the difference of two
    means of n such repeats has the half-width t s sqrt(2 / n).
    """
    arms_logs = [[math.log(v) for v in arm.values() if v > 0] for arm in arms]
    arms_logs = [logs for logs in arms_logs if len(logs) > 1]
    if not arms_logs:
        return None
    freedom = sum(len(logs) - 1 for logs in arms_logs)
    pooled = math.sqrt(sum(float(np.var(logs, ddof=0)) * len(logs) for logs in arms_logs) / freedom)
    n = min(len(logs) for logs in arms_logs)
    return math.expm1(_t(freedom + 1) * pooled * math.sqrt(2 / n))


def contrast(
    treatment: Mapping[int, float], baseline: Mapping[int, float], paired: bool
) -> Contrast | None:
    """Ratio of two columns (repeat number -> value, positive) that may come from two runs.

    Paired where both were sent the same requests in a repeat: Student's t over the log ratios.
    Otherwise Welch's interval of the difference of the mean logs. None where there is nothing.
    """
    both = sorted(set(treatment) & set(baseline))
    if paired and both:
        logs = [math.log(treatment[r] / baseline[r]) for r in both]
        mean, counts, still = float(np.mean(logs)), len(logs), np.ptp(logs) < NEGLIGIBLE_LOG
        test = None if counts < 2 or still else stats.ttest_1samp(logs, 0.0)
    elif not paired and treatment and baseline:
        ours, theirs = ([math.log(v) for v in arm.values()] for arm in (treatment, baseline))
        mean, counts = float(np.mean(ours) - np.mean(theirs)), min(len(ours), len(theirs))
        still = max(np.ptp(ours), np.ptp(theirs)) < NEGLIGIBLE_LOG
        with warnings.catch_warnings():  # one arm may be an exact count, the same in every repeat
            warnings.simplefilter("ignore", RuntimeWarning)
            test = None if counts < 2 or still else stats.ttest_ind(ours, theirs, equal_var=False)
    else:
        return None
    value = math.exp(mean)
    if test is None:  # a single repeat, or figures that do not vary: an exact count, say
        bound = value if counts > 1 else None
        same = 1.0 if abs(mean) < NEGLIGIBLE_LOG else 0.0
        ratio = Interval(value=value, low=bound, high=bound, n=counts)
        return Contrast(ratio=ratio, p=same if counts > 1 else None)
    low, high = (math.exp(float(b)) for b in test.confidence_interval(CONFIDENCE))
    return Contrast(ratio=Interval(value=value, low=low, high=high, n=counts), p=float(test.pvalue))


def repeats_to_decide(effect: Effect) -> int | None:
    """The least number of repeats that would give a verdict, if effect and spread stay as measured.

    The floor shrinks with the square root of the repeats. None past a hundred.
    """
    if effect.spread is None:
        return 3
    size, have = abs(math.log(effect.ratio.value)), effect.ratio.n
    for n in range(have + 1, MOST_REPEATS + 1):
        half = _t(n) * effect.spread / math.sqrt(n)
        floor = math.log1p(effect.floor or 0.0) * math.sqrt(have / n)
        if max(half, floor) < size or size + half < math.log1p(EQUIVALENCE_MARGIN):
            return n
    return None


def _t(n: int) -> float:
    """Two-sided Student quantile for n values."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))


# -------------------------------------------------------------------------------------- verdicts


def verdict_kind(effect: Effect, metric: str) -> VerdictKind:
    """helps / hurts: the interval excludes 1 and the effect exceeds the floor. no effect: the
    interval lies inside the larger of 3 % and the floor, of which 5 % count at most: between
    noisier repeats nothing is shown to be equal. Else inconclusive."""
    ratio = effect.ratio
    if ratio.low is None or ratio.high is None:
        return "inconclusive"
    floor = effect.floor or 0.0
    if (ratio.low > 1 or ratio.high < 1) and abs(math.log(ratio.value)) > math.log1p(floor):
        better = METRICS[metric].better == "higher"
        return "helps" if (ratio.value > 1) == better else "hurts"
    margin = max(min(floor, LARGEST_EQUIVALENCE_MARGIN), EQUIVALENCE_MARGIN)
    if ratio.low >= 1 / (1 + margin) and ratio.high <= 1 + margin:
        return "no effect"
    return "inconclusive"


def holds(prediction: Prediction, measured: Interval) -> bool | None:
    """Does the measured interval agree with the prediction? None without an interval."""
    if measured.low is None or measured.high is None:
        return None
    if prediction.kind == "ceiling":
        return measured.low <= prediction.value * (1 + prediction.tolerance)
    if prediction.kind == "floor":
        return measured.high >= prediction.value * (1 - prediction.tolerance)
    low, high = (prediction.value * (1 + s * prediction.tolerance) for s in (-1, 1))
    return measured.low <= high and measured.high >= low


def holds_at(prediction: Prediction, value: float) -> bool:
    """Is the value itself, whatever its interval, within the prediction's tolerance?"""
    return bool(holds(prediction, Interval(value=value, low=value, high=value, n=1)))


def judge(
    claim: Claim,
    treatment: str,
    baseline: str,
    values: Mapping[str, Repeats],
    prediction: Prediction,
    caveats: Sequence[Caveat],
) -> Judgement:
    """Judge a claim at one pair; `values[point][repeat][metric]` holds the measurements."""
    found = effect(
        *(by_repeat(values.get(point, {}), claim.metric) for point in (treatment, baseline))
    )
    blocking = [c for c in caveats if c.hits(claim.metric, treatment, baseline)]
    outcome: VerdictKind = "inconclusive"
    expected = held = None
    if blocking:
        outcome, why = "not valid", "; ".join(sorted({c.name for c in blocking}))
    elif found is None:
        why = "no repeat has both sides measured" + _samples_needed(claim.metric)
    else:
        outcome, held = verdict_kind(found, claim.metric), holds(prediction, found.ratio)
        why = _explain(found, outcome)
        if outcome != "inconclusive":
            direction = "unchanged" if outcome == "no effect" else None
            direction = direction or ("rises" if found.ratio.value > 1 else "falls")
            expected = direction == claim.expect
    return Judgement(
        claim=claim.name,
        title=claim.title,
        metric=claim.metric,
        treatment=treatment,
        baseline=baseline,
        outcome=outcome,
        expected=expected,
        effect=found,
        prediction=prediction,
        prediction_held=held,
        why=why,
    )


def _samples_needed(metric: str) -> str:
    how = METRICS[metric].statistic
    if how.q is None:
        return ""
    return f": a p{how.q} takes {how.least_samples} samples in a trial, widen `window_s`"


def _explain(effect: Effect, outcome: VerdictKind) -> str:
    if effect.ratio.low is None:
        return "one repeat gives no interval: ask for more with SET=repeats=3"
    if outcome == "inconclusive":
        more = repeats_to_decide(effect)
        need = f"more than {MOST_REPEATS} repeats would settle it"
        if more:
            need = f"about {more} repeats would settle it (SET=repeats={more})"
        what = "the interval neither excludes 1 nor lies near it"
        if effect.ratio.low > 1 or (effect.ratio.high or 1) < 1:
            what = f"the effect does not exceed the noise floor of {effect.floor or 0:.0%}"
        return f"{what}; {need}"
    return f"noise floor {effect.floor or 0:.1%}"


def judge_forecast(
    forecast: Forecast,
    point: str,
    repeats: Repeats,
    prediction: Prediction,
) -> ForecastResult:
    """Hold the mean over the repeats of a point against what was forecast for it."""
    measured = over_repeats(repeats, forecast.metric)
    held = holds(prediction, measured) if measured else None
    return ForecastResult(
        metric=forecast.metric, point=point, measured=measured, prediction=prediction, held=held
    )
