"""Judges claims: effects with their intervals, and verdicts where a verdict is allowed.

An effect is the ratio treatment / baseline. Repeats are paired (the same requests, the same block
of time), so the statistic is the mean of the log ratios over repeats, with Student's t interval.
With three to five repeats a bootstrap, over repeats or over repeats and then the requests in them,
covers the truth less often than it claims (in the tests' simulation fewer than 88 times in 100 for
a nominal 95), since so few repeats do not show how much repeats vary; t covers it. The *noise
floor* is the half-width that the same interval would have if treatment and baseline were the same
thing (A/A), estimated from how much the repeats of one point differ.
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
LARGEST_EQUIVALENCE_MARGIN = 0.05  # noise beyond 5 % does not show that two things are equal
MOST_REPEATS = 100
NEGLIGIBLE_LOG = 1e-9  # logs that differ by less do not differ

VerdictKind = Literal["helps", "hurts", "no effect", "inconclusive", "not valid"]


class Caveat(BaseModel, frozen=True, extra="forbid"):
    """A caveat is a named weakness with advice; one that `blocks` allows no verdict."""

    name: str
    text: str
    blocks: bool = False
    point: str | None = None
    metrics: tuple[str, ...] = ()  # that it blocks; all where none is named

    def hits(self, metric: str, *points: str) -> bool:
        """Whether it blocks a verdict about this metric at these points."""
        at_points = self.point is None or self.point in points
        return self.blocks and at_points and (not self.metrics or metric in self.metrics)


class Interval(BaseModel, frozen=True, extra="forbid"):
    """A mean over `n` repeats with its 95 % interval; the bounds are None with a single repeat."""

    value: float
    low: float | None
    high: float | None
    n: int


class Effect(BaseModel, frozen=True, extra="forbid"):
    """The ratio treatment / baseline, with the noise floor it must exceed."""

    ratio: Interval
    floor: float | None  # A/A half-width as a fraction: 0.02 means 2 %
    spread: float | None  # standard deviation of the log ratios


class Contrast(BaseModel, frozen=True, extra="forbid"):
    """The ratio of one figure in two places, and the p-value of their being equal."""

    ratio: Interval
    p: float | None


class Judgement(BaseModel, frozen=True, extra="forbid"):
    """The verdict on a claim at one pair of points, and what it rests on."""

    claim: str
    title: str
    metric: str
    treatment: str
    baseline: str
    outcome: VerdictKind
    expected: bool | None  # whether the claim came true; None while undecided
    effect: Effect | None
    prediction: Prediction
    prediction_held: bool | None
    why: str


class ForecastResult(BaseModel, frozen=True, extra="forbid"):
    """A forecast figure beside the measured one, and whether the forecast held."""

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
    """Compute the mean over repeats and its Student-t interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(value=mean, low=None, high=None, n=len(values))
    half = _t(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(value=mean, low=mean - half, high=mean + half, n=len(values))


def over_repeats(repeats: Repeats, metric: str) -> Interval | None:
    """Compute the mean over the repeats that have the metric, on which every verdict rests."""
    values = by_repeat(repeats, metric)
    return mean_interval(list(values.values())) if values else None


def figure(repeats: Repeats, pooled: Mapping[str, float], metric: str) -> Interval | None:
    """Return a point's figure as the table of metrics wants it shown, or None without data.

    A pooled percentile is taken from `pooled`, which holds the point's percentiles over the samples
    of all repeats together, and has no interval. Any other metric is the mean over the repeats.
    """
    if not METRICS[metric].statistic.pooled:
        return over_repeats(repeats, metric)
    value, n = pooled.get(metric), len(by_repeat(repeats, metric))
    return None if value is None else Interval(value=value, low=None, high=None, n=n)


def effect(treatment: Mapping[int, float], baseline: Mapping[int, float]) -> Effect | None:
    """Compute the effect over the repeats that both sides have (repeat number -> value).

    Repeats with a value of zero or less are left out, since they have no logarithm. Returns None
    where no repeat remains.
    """
    shared = sorted(set(treatment) & set(baseline))
    logs = [
        math.log(treatment[r] / baseline[r]) for r in shared if treatment[r] > 0 and baseline[r] > 0
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
    """Estimate the half-width of an A/A interval with as many repeats, as a fraction.

    The logs of one point's repeats have the pooled standard deviation s, so the difference of two
    means of n repeats has the half-width t s sqrt(2 / n). Returns None with one repeat.
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
    """Compare two columns (repeat number -> positive value) that may come from two runs.

    Where both sides were sent the same requests in a repeat they are `paired`, and Student's t is
    taken over the log ratios; otherwise Welch's t over the difference of the mean logs. Returns
    None where there is nothing to compare.
    """
    shared = sorted(set(treatment) & set(baseline))
    if paired and shared:
        logs = [math.log(treatment[r] / baseline[r]) for r in shared]
        mean, counts, constant = float(np.mean(logs)), len(logs), np.ptp(logs) < NEGLIGIBLE_LOG
        test = None if counts < 2 or constant else stats.ttest_1samp(logs, 0.0)
    elif not paired and treatment and baseline:
        a, b = ([math.log(v) for v in arm.values()] for arm in (treatment, baseline))
        mean, counts = float(np.mean(a) - np.mean(b)), min(len(a), len(b))
        constant = max(np.ptp(a), np.ptp(b)) < NEGLIGIBLE_LOG
        with warnings.catch_warnings():  # one arm may be an exact count, the same in every repeat
            warnings.simplefilter("ignore", RuntimeWarning)
            test = None if counts < 2 or constant else stats.ttest_ind(a, b, equal_var=False)
    else:
        return None
    value = math.exp(mean)
    if test is None:  # a single repeat, or figures that do not vary, such as an exact count
        bound = value if counts > 1 else None
        p_value = 1.0 if abs(mean) < NEGLIGIBLE_LOG else 0.0
        ratio = Interval(value=value, low=bound, high=bound, n=counts)
        return Contrast(ratio=ratio, p=p_value if counts > 1 else None)
    low, high = (math.exp(float(b)) for b in test.confidence_interval(CONFIDENCE))
    return Contrast(ratio=Interval(value=value, low=low, high=high, n=counts), p=float(test.pvalue))


def repeats_to_decide(effect: Effect) -> int | None:
    """Estimate the least number of repeats that would give a verdict; None past `MOST_REPEATS`.

    Effect and spread are taken to stay as measured, and the floor to shrink with the square root of
    the number of repeats.
    """
    if effect.spread is None:
        return 3
    size, measured = abs(math.log(effect.ratio.value)), effect.ratio.n
    for n in range(measured + 1, MOST_REPEATS + 1):
        half = _t(n) * effect.spread / math.sqrt(n)
        floor = math.log1p(effect.floor or 0.0) * math.sqrt(measured / n)
        if max(half, floor) < size or size + half < math.log1p(EQUIVALENCE_MARGIN):
            return n
    return None


def _t(n: int) -> float:
    """Return the two-sided Student quantile for the mean of n values."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))


# -------------------------------------------------------------------------------------- verdicts


def verdict_kind(effect: Effect, metric: str) -> VerdictKind:
    """Decide what an effect shows of a metric.

    It *helps* or *hurts* where the interval excludes 1 and the effect exceeds the noise floor. It
    has *no effect* where the interval lies inside a margin around 1: the floor, but at least 3 %
    and at most 5 %, since noisier repeats do not show that two things are equal. Otherwise it is
    *inconclusive*.
    """
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
    """Whether the measured interval agrees with the prediction; None without an interval."""
    if measured.low is None or measured.high is None:
        return None
    if prediction.kind == "ceiling":
        return measured.low <= prediction.value * (1 + prediction.tolerance)
    if prediction.kind == "floor":
        return measured.high >= prediction.value * (1 - prediction.tolerance)
    low, high = (prediction.value * (1 + s * prediction.tolerance) for s in (-1, 1))
    return measured.low <= high and measured.high >= low


def holds_at(prediction: Prediction, value: float) -> bool:
    """Whether the value alone, without an interval, is within the prediction's tolerance."""
    return bool(holds(prediction, Interval(value=value, low=value, high=value, n=1)))


def judge(
    claim: Claim,
    treatment: str,
    baseline: str,
    values: Mapping[str, Repeats],
    prediction: Prediction,
    caveats: Sequence[Caveat],
) -> Judgement:
    """Judge a claim at one pair of points.

    `values[point][repeat][metric]` holds the measurements.
    """
    measured = effect(
        *(by_repeat(values.get(point, {}), claim.metric) for point in (treatment, baseline))
    )
    blocking = [c for c in caveats if c.hits(claim.metric, treatment, baseline)]
    outcome: VerdictKind = "inconclusive"
    expected = held = None
    if blocking:
        outcome, why = "not valid", "; ".join(sorted({c.name for c in blocking}))
    elif measured is None:
        why = "no repeat has both sides measured" + _samples_needed(claim.metric)
    else:
        outcome, held = verdict_kind(measured, claim.metric), holds(prediction, measured.ratio)
        why = _explain(measured, outcome)
        if outcome != "inconclusive":
            direction = "unchanged" if outcome == "no effect" else None
            direction = direction or ("rises" if measured.ratio.value > 1 else "falls")
            expected = direction == claim.expect
    return Judgement(
        claim=claim.name,
        title=claim.title,
        metric=claim.metric,
        treatment=treatment,
        baseline=baseline,
        outcome=outcome,
        expected=expected,
        effect=measured,
        prediction=prediction,
        prediction_held=held,
        why=why,
    )


def _samples_needed(metric: str) -> str:
    statistic = METRICS[metric].statistic
    if statistic.q is None:
        return ""
    return (
        f": a p{statistic.q} takes {statistic.least_samples} samples in a trial, widen `window_s`"
    )


def _explain(effect: Effect, outcome: VerdictKind) -> str:
    if effect.ratio.low is None:
        return "one repeat gives no interval: ask for more with SET=repeats=3"
    if outcome == "inconclusive":
        repeats = repeats_to_decide(effect)
        advice = f"more than {MOST_REPEATS} repeats would settle it"
        if repeats:
            advice = f"about {repeats} repeats would settle it (SET=repeats={repeats})"
        reason = "the interval neither excludes 1 nor lies near it"
        if effect.ratio.low > 1 or (effect.ratio.high or 1) < 1:
            reason = f"the effect does not exceed the noise floor of {effect.floor or 0:.0%}"
        return f"{reason}; {advice}"
    return f"noise floor {effect.floor or 0:.1%}"


def judge_forecast(
    forecast: Forecast,
    point: str,
    repeats: Repeats,
    prediction: Prediction,
) -> ForecastResult:
    """Compare the mean over a point's repeats with what was forecast for it."""
    measured = over_repeats(repeats, forecast.metric)
    held = holds(prediction, measured) if measured else None
    return ForecastResult(
        metric=forecast.metric, point=point, measured=measured, prediction=prediction, held=held
    )
