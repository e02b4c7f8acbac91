"""Judges claims: effects with their intervals, and verdicts where a verdict is allowed.

An effect is the ratio treatment / baseline: the difference of the two means of the logarithms,
with Welch's interval. The estimators were chosen by simulation, on the variances of recorded runs
and with heavy tails (`tests/unit/test_intervals.py`): within a run the two arms of a repeat, half a
minute apart, correlate by 0.13, so pairing them costs degrees of freedom and buys nothing; pooling
the variance of arms that vary differently raises more than 5 false alarms in 100; a bootstrap over
so few repeats covers the truth less often than it says. The *noise floor* is the half-width that
the interval would have if treatment and baseline were the same thing (A/A), estimated from how much
the repeats of one point differ.

A lab may look at its figures more than once, to repeat what is undecided. With k looks each look's
interval has the confidence 1 - (1 - c) / k, so that all of them together cover with confidence c,
whatever the data (Bonferroni).

Where engines take turns, an engine's *start* shifts all of its trials. With four starts of each
engine or more the mean of a start is the unit; with fewer the interval is widened by what starts
were measured to differ by.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
ENOUGH_STARTS = 4  # of each engine, so that the spread of their means can be taken from themselves
START_SPREAD = 0.053
"""The standard deviation of the logarithm of TPOT from start to start of one engine.

Measured in the run 20261125T223333Z-99b06140 on file, of an AMD EPYC with two CPUs: seven engines
started twice, up to 15 minutes apart; within a start it was 0.018. Measured on a CPU; no run on a
GPU has enough starts yet.
"""
START_FREEDOM = 7  # the degrees of freedom of `START_SPREAD`

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
    spread: float | None  # standard deviation of the log ratio of two single repeats
    error: float | None = None  # standard error of the log ratio; None with a single repeat
    freedom: float = 1.0  # degrees of freedom of `error`
    looks: int = 1  # at how many looks the run may have stopped
    starts: int | None = None  # least starts of an engine, where both took turns

    def interval(self, confidence: float) -> Interval:
        """Return the ratio with its interval, which covers at all looks with this confidence.

        The bounds are None where the error is not known.
        """
        if self.error is None:
            return self.ratio.model_copy(update={"low": None, "high": None})
        level = 1 - (1 - confidence) / self.looks
        half = float(stats.t.ppf(0.5 + level / 2, self.freedom)) * self.error
        value = self.ratio.value
        return self.ratio.model_copy(
            update={"low": value * math.exp(-half), "high": value * math.exp(half)}
        )


Starts = Mapping[int, int]  # repeat -> the start of the engine that it was played on


@dataclass(frozen=True)
class Sampling:
    """Says how the repeats of a run came about: on which starts, and with how many looks."""

    looks: int = 1
    starts: Mapping[str, Starts] = field(default_factory=dict)  # point -> where engines take turns

    def effect(
        self, values: Mapping[str, Repeats], pair: Sequence[str], metric: str
    ) -> Effect | None:
        """Compute the effect on a metric between two points, the treatment first.

        The starts do not matter where one engine serves both points.
        """
        arms = [by_repeat(values.get(point, {}), metric) for point in pair]
        one_engine = len({point.partition("/")[0] for point in pair}) == 1
        turns = not one_engine and all(self.starts.get(point) for point in pair)
        starts = [self.starts[point] for point in pair] if turns else []
        return effect(*arms, starts=starts, looks=self.looks)


SAMPLED_ONCE = Sampling()  # all engines resident together, one look


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


def effect(
    treatment: Mapping[int, float],
    baseline: Mapping[int, float],
    *,
    starts: Sequence[Starts] = (),
    looks: int = 1,
) -> Effect | None:
    """Compute the effect from the repeats of both arms (repeat number -> value).

    `starts` holds the engine start of each repeat of both arms, where engines take turns. Repeats
    with a value of zero or less are left out, since they have no logarithm. Returns None where an
    arm has no repeat.
    """
    arms = [{r: math.log(v) for r, v in arm.items() if v > 0} for arm in (treatment, baseline)]
    if not all(arms):
        return None
    units = [list(arm.values()) for arm in arms]
    counts = [len(logs) for logs in units]
    several = min(counts) > 1
    spread = math.hypot(*(float(np.std(logs, ddof=1)) for logs in units)) if several else None
    terms, least_starts = [], None
    if starts:
        by_start = [_means_by_start(*arm) for arm in zip(arms, starts, strict=True)]
        least_starts = min(map(len, by_start))
        if least_starts >= ENOUGH_STARTS:
            units = by_start
        else:
            per_start = sum(1 / len(means) for means in by_start)
            terms = [(START_SPREAD**2 * per_start, START_FREEDOM)]
    error, freedom = None, 1.0
    if several:
        terms += [(float(np.var(u, ddof=1)) / len(u), len(u) - 1) for u in units]
        error, freedom = _standard_error(terms)
    value = math.exp(float(np.mean(units[0]) - np.mean(units[1])))
    found = Effect(
        ratio=Interval(value=value, low=None, high=None, n=min(counts)),
        floor=noise_floor(treatment, baseline),
        spread=spread,
        error=error,
        freedom=freedom,
        looks=looks,
        starts=least_starts,
    )
    return found.model_copy(update={"ratio": found.interval(CONFIDENCE)})


def _means_by_start(logs: Mapping[int, float], starts: Starts) -> list[float]:
    """Average the repeats of each start; those on an unknown start count as one more."""
    of_start: dict[int, list[float]] = {}
    for repeat, log in logs.items():
        of_start.setdefault(starts.get(repeat, 0), []).append(log)
    return [float(np.mean(values)) for values in of_start.values()]


def _standard_error(terms: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Add variances, each with its degrees of freedom.

    Returns the root of the sum and its degrees of freedom (Welch 1947, Satterthwaite 1946).
    """
    total = sum(variance for variance, _ in terms)
    if math.sqrt(total) < NEGLIGIBLE_LOG:  # figures that do not vary, such as an exact count
        return 0.0, 1.0
    return math.sqrt(total), total**2 / sum(v**2 / freedom for v, freedom in terms)


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
    treatment: Mapping[int, float], baseline: Mapping[int, float], *, paired: bool
) -> Contrast | None:
    """Compare two columns (repeat number -> positive value) that may come from two runs.

    Where both sides were sent the same requests in a repeat, or took turns within seconds, they are
    `paired`, and Student's t is taken over the log ratios; otherwise Welch's t over the difference
    of the mean logs. Two runs of one lab share the lengths of their requests at each load: in two
    runs on file throughput correlated by 0.85 and requests/s by 0.93 from repeat to repeat, which
    the pairing takes out. Returns None where there is nothing to compare.
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

    Effect and spread are taken to stay as measured, and all of the spread to be in one arm.
    """
    if effect.spread is None:
        return 3
    size, level = abs(math.log(effect.ratio.value)), 1 - (1 - CONFIDENCE) / effect.looks
    for n in range(effect.ratio.n + 1, MOST_REPEATS + 1):
        half = _t(n, level) * effect.spread / math.sqrt(n)
        if half < size or size + half < math.log1p(EQUIVALENCE_MARGIN):
            return n
    return None


def _t(n: int, confidence: float = CONFIDENCE) -> float:
    """Return the two-sided Student quantile for the mean of n values."""
    return float(stats.t.ppf(0.5 + confidence / 2, n - 1))


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
    sampling: Sampling = SAMPLED_ONCE,
) -> Judgement:
    """Judge a claim at one pair of points.

    `values[point][repeat][metric]` holds the measurements.
    """
    measured = sampling.effect(values, (treatment, baseline), claim.metric)
    blocking = [c for c in caveats if c.hits(claim.metric, treatment, baseline)]
    outcome: VerdictKind = "inconclusive"
    expected = held = None
    if blocking:
        outcome, why = "not valid", "; ".join(sorted({c.name for c in blocking}))
    elif measured is None:
        why = "a side has no repeat with this figure" + _samples_needed(claim.metric)
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
        if effect.starts is not None and effect.starts < ENOUGH_STARTS:
            advice = (
                f"{ENOUGH_STARTS} starts of each engine may settle it (SET=starts={ENOUGH_STARTS})"
            )
        elif repeats:
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
