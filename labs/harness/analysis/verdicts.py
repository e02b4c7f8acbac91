"""Judges claims and predictions: effects with their intervals, and what each of them shows.

An effect is the ratio treatment / baseline: the difference of the two means of the logarithms,
with Welch's interval. The estimators were chosen by simulation, on the variances of recorded runs
and with heavy tails: within a run the two arms of a repeat, half a minute apart, correlate by 0.13,
so pairing them costs degrees of freedom and buys nothing; pooling the variance of arms that vary
differently raises more than 5 false alarms in 100; a bootstrap over so few repeats covers the truth
less often than it says. `tests/unit/test_intervals.py` holds the intervals to their coverage.

Where both arms were played together, a request of each in turn, they meet the same machine within a
second or two. Then they are paired, request by request: in a round each engine answers the same
request, and adds its part to the log ratio of its repeat (`analysis.measure.influences`). Rounds
lie within repeats, and a repeat moves all of its own. By how much is a matter of the machine, and
two repeats say little of it: so it is also taken from all pairs on file (`_effect_of_pairs`). Where
rounds are not known, as for what an engine counts, the error is that of the repeats alone.

A lab may look at its figures more than once, to repeat what is undecided. With k looks each look's
interval has the confidence 1 - (1 - c) / k, so that all of them together cover with confidence c,
whatever the data (Bonferroni).

Where engines take turns, an engine's *start* shifts all of its trials. With four starts of each
engine or more the mean of a start is the unit; with fewer the interval is widened by what starts
were measured to differ by.

A figure that can be 0, such as goodput or preemptions, has no logarithm where it is. The effect is
then the ratio of the arithmetic means, with the interval of its logarithm by the delta method.

A *verdict* says what an effect shows, by the claim's own margin. What became of a *prediction* is
another question, and stricter: a wide interval bears nothing out (`prediction_outcome`). A ratio
near 1 is easily near another: so the effect, which is the ratio's logarithm, has to be foreseen as
well, where the comparison can resolve it (`effect_outcome`).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import scipy
from pydantic import BaseModel, Field

from labs.harness.analysis.metrics import METRICS, Repeats, by_repeat
from labs.harness.spec.lab import MARGIN, Claim, Forecast, Prediction
from labs.harness.spec.names import PairName, PointName

CONFIDENCE = 0.95
TWO_ONE_SIDED = 0.90  # an interval within which two one-sided tests at 5% place the figure
AGREEMENT = 1.25  # a figure bears out a prediction p from p / 1.25 to 1.25 p
EFFECT_AGREEMENT = 1.4  # an effect bears out a forecast one from 1 / 1.4 to 1.4 of its logarithm
A_COUNT = 1e-3  # a band narrower than this share of its figure has no width: a count is forecast
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
REPEAT_SPREAD = 0.017
"""The standard deviation of a repeat's log ratio of pairs, beyond what its rounds explain.

The maximum of the likelihood over the 68 paired claims of 18 runs on file, of three AMD EPYC with
two CPUs (95% from 0.013 to 0.024). One figure for all of them fits as well as one for each run
(likelihood ratio 10.8 on 17 degrees of freedom). No run on a GPU has paired claims yet.
"""
REPEAT_FREEDOM = 5
"""How many degrees of freedom the variance by rounds and `REPEAT_SPREAD` counts for.

Fitted to the same claims it is 29, and 7 at the lower end of its 95%; less is taken, so that the
repeats of another machine count for more.
"""

VerdictKind = Literal["helps", "hurts", "no effect", "inconclusive", "not valid"]
PredictionOutcome = Literal["held", "refuted", "not broken", "broken", "open"]


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
    """A mean over `n` repeats with its 95% interval; the bounds are None with a single repeat."""

    value: float
    low: float | None
    high: float | None
    n: int

    def mapped(self, by: Callable[[float], float]) -> Interval:
        """Apply a rising function to the value and the bounds."""

        def bound(value: float | None) -> float | None:
            return None if value is None else by(value)

        return Interval(value=by(self.value), low=bound(self.low), high=bound(self.high), n=self.n)


class Effect(BaseModel, frozen=True, extra="forbid"):
    """The ratio treatment / baseline, and what its interval rests on."""

    ratio: Interval
    spread: float | None  # standard deviation of the log ratio of two single repeats
    error: float | None = None  # standard error of the log ratio; None with a single repeat
    freedom: float = 1.0  # degrees of freedom of `error`
    looks: int = 1  # at how many looks the run may have stopped
    starts: int | None = None  # least starts of an engine, where both took turns
    # whether it is of pairs, each of trials that were played together
    paired: Annotated[bool, Field(exclude_if=lambda paired: not paired)] = False
    # whether the ratio is of arithmetic means, as a repeat had 0; else it is of geometric means
    of_means: Annotated[bool, Field(exclude_if=lambda of_means: not of_means)] = False

    def interval(self, confidence: float) -> Interval:
        """Return the ratio with its interval, which covers at all looks with this confidence.

        The bounds are None where the error is not known.
        """
        if self.error is None:
            return self.ratio.model_copy(update={"low": None, "high": None})
        level = 1 - (1 - confidence) / self.looks
        half = _student(self.freedom, level) * self.error
        value = self.ratio.value
        return self.ratio.model_copy(
            update={"low": value * math.exp(-half), "high": value * math.exp(half)}
        )

    def with_interval(self) -> Effect:
        """Return the effect whose ratio has its 95% interval."""
        return self.model_copy(update={"ratio": self.interval(CONFIDENCE)})

    def resolves(self, ratio: float) -> bool:
        """Tell whether a ratio lies beyond the A/A floor: beyond what two twins would differ by.

        That is the half width of the 95% interval, as the comparison was made.
        """
        low, high = self.ratio.low, self.ratio.high
        if low is None or high is None or low <= 0 or ratio <= 0:
            return False
        return abs(math.log(ratio)) > math.log(high / low) / 2


Starts = Mapping[int, int]  # repeat -> the start of the engine that it was played on
# of a point: repeat -> metric -> request -> by how much it moves the logarithm of the figure
Influences = Mapping[int, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Sampling:
    """Says how the repeats of a run came about: on which starts, and with how many looks."""

    looks: int = 1
    starts: Mapping[str, Starts] = field(default_factory=dict)  # point -> where engines take turns
    # point -> repeat -> the points whose requests took turns with its own
    beside: Mapping[str, Mapping[int, Sequence[str]]] = field(default_factory=dict)
    influences: Mapping[str, Influences] = field(default_factory=dict)  # of points beside others

    def effect(
        self, values: Mapping[str, Repeats], pair: Sequence[str], metric: str
    ) -> Effect | None:
        """Compute the effect on a metric between two points, the treatment first.

        The starts do not matter where one engine serves both points.
        """
        arms = [by_repeat(values.get(point, {}), metric) for point in pair]
        turns = all(self.starts.get(point) for point in pair) and not _served_by_one(pair)
        starts = [self.starts[point] for point in pair] if turns else []
        shared = arms[0].keys() & arms[1].keys()
        if not shared or not all(self._together(pair, repeat) for repeat in shared):
            return effect(*arms, starts=starts, looks=self.looks)
        rounds = {repeat: self._rounds(pair, repeat, metric) for repeat in shared}
        return effect(*arms, looks=self.looks, rounds=rounds)

    def _rounds(self, pair: Sequence[str], repeat: int, metric: str) -> list[float]:
        """Return by how much each round moves the log ratio; none where that is not known."""
        of = [self.influences.get(p, {}).get(repeat, {}).get(metric, {}) for p in pair]
        return [of[0][request] - of[1][request] for request in of[0].keys() & of[1].keys()]

    def _together(self, pair: Sequence[str], repeat: int) -> bool:
        """Tell whether the trials of two points in a repeat were played together.

        Where one of them was played anew later, only the other says so.
        """
        beside = [self.beside.get(point, {}).get(repeat, ()) for point in pair]
        return all(other in of for of, other in zip(beside, reversed(pair), strict=True))

    def mean(self, point: str, repeats: Repeats, metric: str, confidence: float) -> Interval | None:
        """Compute a point's mean with an interval that covers at all looks with this confidence.

        Where engines take turns, the starts of its own count as they do in an effect.
        """
        values, starts = by_repeat(repeats, metric), self.starts.get(point, {})
        if not values:
            return None
        by_start = _means_by_start(values, starts) if starts else []
        units = by_start if len(by_start) >= ENOUGH_STARTS else list(values.values())
        few = len(by_start) if len(by_start) < ENOUGH_STARTS else 0
        level = 1 - (1 - confidence) / self.looks
        return mean_interval(units, level, METRICS[metric].most, few)


def _served_by_one(pair: Sequence[str]) -> bool:
    return len({PointName.parse(point).variant for point in pair}) == 1


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
    margin: float  # within which share of 1 the two sides are equal
    effect: Effect | None
    prediction: Prediction
    prediction_outcome: PredictionOutcome
    why: str

    @property
    def pair(self) -> PairName:
        """The two points, as predictions name them."""
        return PairName(self.treatment, self.baseline)

    @property
    def where(self) -> str:
        """The two points, as comparisons name them."""
        return f"{self.treatment} / {self.baseline}"

    @property
    def ratio(self) -> Interval | None:
        """The measured ratio, treatment / baseline."""
        return self.effect.ratio if self.effect else None

    @property
    def trivial(self) -> bool:
        """Whether the prediction is about 1: within the claim's margin nothing is at stake."""
        return is_within(self.prediction.value, self.margin)

    @property
    def foreseen(self) -> float | None:
        """The measured effect / the forecast one, of logarithms; below 0 it went the other way.

        None where nothing was at stake, or the forecast effect is below the A/A floor.
        """
        if self.outcome == "not valid" or not self.effect or self.trivial:
            return None
        p = self.prediction
        if p.kind != "point" or not self.effect.resolves(p.value):
            return None
        return math.log(self.effect.ratio.value) / math.log(p.value)


class ForecastResult(BaseModel, frozen=True, extra="forbid"):
    """A forecast figure beside the measured one, and what became of the forecast."""

    metric: str
    point: str
    measured: Interval | None
    prediction: Prediction
    outcome: PredictionOutcome

    @property
    def share(self) -> Interval | None:
        """Measured / predicted; None where either is missing or the prediction is 0."""
        p = self.prediction.value
        return self.measured.mapped(lambda v: v / p) if self.measured and p else None


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
        """Measured / forecast, infinite where only the forecast is 0.

        None where nothing was measured, or where both are 0, which says nothing of a forecast.
        """
        if self.measured is None or not (self.value or self.measured.value):
            return None
        return self.measured.value / self.value if self.value else math.inf

    @property
    def within(self) -> bool | None:
        """Whether what was measured agrees with the band; None where nothing was."""
        return in_band(self.measured, self.low, self.high) if self.measured else None


# ------------------------------------------------------------------------------------ statistics


def mean_interval(
    values: Sequence[float],
    confidence: float = CONFIDENCE,
    most: float = math.inf,
    starts: int = 0,
) -> Interval:
    """Compute the mean over repeats and its Student-t interval.

    Where that would reach below zero, which no time, rate, count or share can, the interval is that
    of the mean's logarithm, by the delta method: from mean / f to mean f, with f = exp(half width /
    mean). It ends at `most`, beyond which the figure cannot be, so that this takes nothing from its
    coverage. Where `starts` says on how many starts of an engine the values were measured, it is
    widened by what starts differ by.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(value=mean, low=None, high=None, n=len(values))
    error, freedom = float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1.0
    if starts:
        of_starts = ((START_SPREAD * mean) ** 2 / starts, START_FREEDOM)
        error, freedom = _standard_error([(error**2, len(values) - 1), of_starts])
    half = _student(freedom, confidence) * error
    low, high = mean - half, mean + half
    if min(values) >= 0 and mean > 0 and half > mean:
        factor = math.exp(half / mean)
        low, high = mean / factor, mean * factor
    return Interval(value=mean, low=low, high=min(high, most), n=len(values))


def share(hits: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Compute a share of independent cases with Wilson's interval (1927)."""
    bounds = scipy.stats.binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return Interval(value=hits / n, low=float(bounds.low), high=float(bounds.high), n=n)


def over_repeats(repeats: Repeats, metric: str) -> Interval | None:
    """Compute the mean over the repeats that have the metric, on which every verdict rests."""
    values, most = by_repeat(repeats, metric), METRICS[metric].most
    return mean_interval(list(values.values()), most=most) if values else None


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
    rounds: Mapping[int, Sequence[float]] | None = None,
) -> Effect | None:
    """Compute the effect from the repeats of both arms (repeat number -> value).

    `starts` holds the engine start of each repeat of both arms, where engines take turns. Where a
    repeat has 0, the ratio is that of the arithmetic means: by the delta method the logarithm of an
    arm's mean has the variance s^2 / (n mean^2). For counts with a mean of 1 to 10 the interval
    covers in 94 of 100 cases or more, and over three to five repeats mostly in 97 or more, as a
    simulation shows (`tests/unit/test_intervals.py`). `rounds` is given where both arms were
    played together: by how much each round moves the log ratio of its repeat, if that is known.
    Returns None where an arm has no repeat, or 0 in all of them.
    """
    arms: list[Mapping[int, float]] = [treatment, baseline]
    if not all(any(arm.values()) for arm in arms):
        return None
    of_means = not all(v > 0 for arm in arms for v in arm.values())
    if rounds is not None and not of_means:
        shared = treatment.keys() & baseline.keys()
        logs = {r: math.log(treatment[r] / baseline[r]) for r in shared}
        return _effect_of_pairs(logs, rounds, looks)
    if not of_means:
        arms = [{r: math.log(v) for r, v in arm.items()} for arm in arms]
    units = [list(arm.values()) for arm in arms]
    counts = [len(values) for values in units]
    several = min(counts) > 1
    variances = [_variance(u, of_means) for u in units] if several else []
    spread = math.hypot(*map(math.sqrt, variances)) if several else None
    terms, least_starts = [], None
    if starts:
        by_start = [_means_by_start(*arm) for arm in zip(arms, starts, strict=True)]
        least_starts = min(map(len, by_start))
        if least_starts >= ENOUGH_STARTS:
            units = by_start
            variances = [_variance(u, of_means) for u in units] if several else []
        else:
            per_start = sum(1 / len(means) for means in by_start)
            terms = [(START_SPREAD**2 * per_start, START_FREEDOM)]
    error, freedom = None, 1.0
    if several:
        terms += [(v / len(u), len(u) - 1) for v, u in zip(variances, units, strict=True)]
        error, freedom = _standard_error(terms)
    above, below = (float(np.mean(u)) for u in units)
    value = above / below if of_means else math.exp(above - below)
    return Effect(
        ratio=Interval(value=value, low=None, high=None, n=min(counts)),
        spread=spread,
        error=error,
        freedom=freedom,
        looks=looks,
        starts=least_starts,
        of_means=of_means,
    ).with_interval()


def _effect_of_pairs(
    logs: Mapping[int, float], rounds: Mapping[int, Sequence[float]], looks: int
) -> Effect:
    """Compute the effect from the log ratio of each repeat, with Student's interval of the mean.

    Rounds are nested in repeats (a random effect of each). The variance of a repeat is expected to
    be that of its rounds plus `REPEAT_SPREAD` squared. With the variance that the repeats show it
    is averaged, each by its degrees of freedom, and the interval has those of both: a moderated t
    (Smyth 2004). On the two levels of the paired claims on file it covers in 95 to 97 of 100 cases
    from two repeats on, and in 93 on a machine whose repeats move twice as much
    (`tests/unit/test_intervals.py`).
    """
    mean, repeats = float(np.mean([*logs.values()])), len(logs)
    error, freedom, spread = None, 1.0, None
    if repeats > 1:
        variance, freedom = _variance([*logs.values()], False), repeats - 1.0
        known = [rounds[repeat] for repeat in logs if len(rounds.get(repeat, ())) > 1]
        if len(known) == repeats:
            of_rounds = sum(len(of) - 1 for of in known)
            each = sum(_variance(of, False) * (len(of) - 1) for of in known) / of_rounds
            expected = each * float(np.mean([1 / len(of) for of in known])) + REPEAT_SPREAD**2
            prior = min(REPEAT_FREEDOM, of_rounds)
            both = prior + freedom
            variance, freedom = (prior * expected + freedom * variance) / both, both
        error, freedom = _standard_error([(variance / repeats, freedom)])
        spread = error * math.sqrt(repeats)
    return Effect(
        ratio=Interval(value=math.exp(mean), low=None, high=None, n=repeats),
        spread=spread,
        error=error,
        freedom=freedom,
        looks=looks,
        paired=True,
    ).with_interval()


def _variance(values: Sequence[float], of_means: bool) -> float:
    """Estimate the variance of a logarithm: the values are logarithms, or figures `of_means`."""
    variance = float(np.var(values, ddof=1))
    return variance / float(np.mean(values)) ** 2 if of_means else variance


def _means_by_start(values: Mapping[int, float], starts: Starts) -> list[float]:
    """Average the repeats of each start; those on an unknown start count as one more."""
    of_start: dict[int, list[float]] = {}
    for repeat, value in values.items():
        of_start.setdefault(starts.get(repeat, 0), []).append(value)
    return [float(np.mean(found)) for found in of_start.values()]


def _standard_error(terms: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Add variances, each with its degrees of freedom.

    Returns the root of the sum and its degrees of freedom (Welch 1947, Satterthwaite 1946).
    """
    total = sum(variance for variance, _ in terms)
    if math.sqrt(total) < NEGLIGIBLE_LOG:  # figures that do not vary, such as an exact count
        return 0.0, 1.0
    return math.sqrt(total), total**2 / sum(v**2 / freedom for v, freedom in terms)


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
        test = None if counts < 2 or constant else scipy.stats.ttest_1samp(logs, 0.0)
    elif not paired and treatment and baseline:
        a, b = ([math.log(v) for v in arm.values()] for arm in (treatment, baseline))
        mean, counts = float(np.mean(a) - np.mean(b)), min(len(a), len(b))
        constant = max(np.ptp(a), np.ptp(b)) < NEGLIGIBLE_LOG
        test = None if counts < 2 or constant else welchs_test(a, b)
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


def welchs_test(a: Sequence[float], b: Sequence[float]) -> Any:
    """Run Welch's t-test of two arms; one may be an exact count, the same in every repeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return scipy.stats.ttest_ind(a, b, equal_var=False)


def repeats_to_decide(effect: Effect, margin: float) -> int | None:
    """Estimate the least number of repeats that would give a verdict; None past `MOST_REPEATS`.

    Effect and spread are taken to stay as measured, and all of the spread to be in one arm.
    """
    if effect.spread is None:
        return 3
    size, level = abs(math.log(effect.ratio.value)), 1 - (1 - CONFIDENCE) / effect.looks
    for n in range(effect.ratio.n + 1, MOST_REPEATS + 1):
        freedom = effect.freedom + n - effect.ratio.n if effect.paired else n - 1
        half = _student(freedom, level) * effect.spread / math.sqrt(n)
        if max(half, math.log1p(margin)) < size or size + half < math.log1p(margin):
            return n
    return None


def _student(freedom: float, confidence: float) -> float:
    """Return the two-sided quantile of Student's t, 40 times as fast as `stats.t.ppf` does."""
    return float(scipy.special.stdtrit(freedom, 0.5 + confidence / 2))


# -------------------------------------------------------------------------------------- verdicts


def in_band(measured: Interval, low: float, high: float) -> bool:
    """Tell whether the mean lies within a forecast's band.

    A band without a width worth naming is the forecast of a count, and the measured interval is to
    meet it, where several repeats give one.
    """
    exact = math.isclose(low, high, rel_tol=A_COUNT)
    if exact and measured.low is not None and measured.high is not None:
        meet = measured.low <= high and low <= measured.high
        return meet or math.isclose(measured.value, low, rel_tol=A_COUNT)
    return low <= measured.value <= high


def is_within(ratio: float, margin: float) -> bool:
    """Whether a ratio differs from 1 by no more than the margin: 5% is from 1 / 1.05 to 1.05."""
    return ratio > 0 and abs(math.log(ratio)) <= math.log1p(margin)


def is_clear(ratio: Interval, margin: float) -> bool:
    """Whether there is an effect: the interval excludes 1, and the ratio exceeds the margin."""
    if ratio.low is None or ratio.high is None:
        return False
    return not (ratio.low <= 1 <= ratio.high or is_within(ratio.value, margin))


def verdict_kind(ratio: Interval, metric: str, margin: float = MARGIN) -> VerdictKind:
    """Decide what a ratio of a metric shows.

    It *helps* or *hurts* where the interval excludes 1 and the ratio exceeds the margin. It has *no
    effect* where the whole interval lies within the margin. Otherwise it is *inconclusive*.
    """
    if ratio.low is None or ratio.high is None:
        return "inconclusive"
    if is_within(ratio.low, margin) and is_within(ratio.high, margin):
        return "no effect"
    if not is_clear(ratio, margin):
        return "inconclusive"
    return "helps" if (ratio.value > 1) == (METRICS[metric].better == "higher") else "hurts"


def borne_out_between(prediction: Prediction) -> tuple[float, float]:
    """Return the least and the largest figure that bear a prediction out.

    For a point these are p / 1.25 and 1.25 p; for a bound, whatever lies on its own side.
    """
    p = prediction.value
    if prediction.kind == "point":
        return p / AGREEMENT, p * AGREEMENT
    return (-math.inf, p) if prediction.kind == "ceiling" else (p, math.inf)


def prediction_outcome(prediction: Prediction, measured: Interval | None) -> PredictionOutcome:
    """Decide what became of a prediction, by the 90% interval of what was measured.

    A point has *held* where the whole interval bears it out (two one-sided tests at 5%, TOST:
    Schuirmann 1987), and is *refuted* where none of it does. A bound is *not broken* or *broken*
    by the same rule: it never holds, since a figure far away from it bears nothing out. Else, and
    without an interval, it is *open*.
    """
    if measured is None or measured.low is None or measured.high is None:
        return "open"
    least, largest = borne_out_between(prediction)
    if least <= measured.low and measured.high <= largest:
        return "held" if prediction.kind == "point" else "not broken"
    if measured.high < least or measured.low > largest:
        return "refuted" if prediction.kind == "point" else "broken"
    return "open"


def effect_outcome(prediction: Prediction, effect: Effect, margin: float) -> PredictionOutcome:
    """Decide what became of a predicted ratio: of the ratio, and of the effect, its logarithm.

    It has *held* where both did, and is *refuted* where either is. The effect is borne out where
    the 90% interval lies within its 1 / 1.4 to 1.4, and refuted where none of it does. Where the
    predicted effect is below the A/A floor, the ratio alone decides. It does where none is
    predicted, too, unless a clear one was measured: that has not held, and it is refuted where
    none of the 90% interval lies within the margin.
    """
    measured, p = effect.interval(TWO_ONE_SIDED), prediction.value
    of_ratio = prediction_outcome(prediction, measured)
    none_predicted = is_within(p, margin)
    if prediction.kind != "point" or measured.low is None or measured.high is None:
        return of_ratio
    if not (is_clear(effect.ratio, margin) if none_predicted else effect.resolves(p)):
        return of_ratio
    least, largest = sorted((p ** (1 / EFFECT_AGREEMENT), p**EFFECT_AGREEMENT))
    if none_predicted:
        least, largest = 1 / (1 + margin), 1 + margin
    if of_ratio == "refuted" or measured.high < least or measured.low > largest:
        return "refuted"
    borne_out = least <= measured.low and measured.high <= largest
    return of_ratio if borne_out else "open"


class Tally(NamedTuple):
    """Counts claims, those that are decided, and what became of their predictions.

    Predictions of about 1 are counted apart, since it takes no theory to make them.
    """

    claims: int
    decided: int
    predictions: Counter[PredictionOutcome]
    trivial: Counter[PredictionOutcome]


def tally(judgements: Sequence[Judgement]) -> Tally:
    """Count what became of claims and of their predictions."""
    return Tally(
        len(judgements),
        sum(j.expected is not None for j in judgements),
        Counter(j.prediction_outcome for j in judgements if not j.trivial),
        Counter(j.prediction_outcome for j in judgements if j.trivial),
    )


def judge(
    claim: Claim,
    treatment: str,
    baseline: str,
    values: Mapping[str, Repeats],
    prediction: Prediction,
    caveats: Sequence[Caveat],
    sampling: Sampling = SAMPLED_ONCE,
    prediction_of_means: Prediction | None = None,
) -> Judgement:
    """Judge a claim at one pair of points.

    `values[point][repeat][metric]` holds the measurements. `prediction_of_means` is what a ratio of
    arithmetic means is held against, where there is one.
    """
    measured = sampling.effect(values, (treatment, baseline), claim.metric)
    blocking = [c for c in caveats if c.hits(claim.metric, treatment, baseline)]
    outcome: VerdictKind = "inconclusive"
    expected = None
    if measured and measured.of_means and prediction_of_means:
        prediction = prediction_of_means
    prediction_came_to: PredictionOutcome = "open"
    if blocking:
        outcome, why = "not valid", "; ".join(sorted({c.name for c in blocking}))
    elif measured is None:
        why = _without_ratio(values, treatment, baseline, claim.metric)
    else:
        outcome = verdict_kind(measured.ratio, claim.metric, claim.margin)
        prediction_came_to = effect_outcome(prediction, measured, claim.margin)
        why = _explain(measured, outcome, claim.margin)
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
        margin=claim.margin,
        effect=measured,
        prediction=prediction,
        prediction_outcome=prediction_came_to,
        why=why,
    )


def _without_ratio(
    values: Mapping[str, Repeats], treatment: str, baseline: str, metric: str
) -> str:
    """Say why there is no ratio: a side has no figure at all, or nothing but 0."""
    arms = [by_repeat(values.get(point, {}), metric).values() for point in (treatment, baseline)]
    if not all(arms):
        return "a side has no repeat with this figure" + _samples_needed(metric)
    zero = [
        f"the {side}"
        for side, arm in zip(("treatment", "baseline"), arms, strict=True)
        if not any(arm)
    ]
    return f"every repeat of {' and of '.join(zero)} had 0, so there is no ratio"


def may_be_decided(judgement: Judgement, values: Mapping[str, Repeats]) -> bool:
    """Tell whether further repeats may decide a claim.

    They may where a ratio has too wide an interval, and where only one side has 0 in every repeat.
    """
    if judgement.outcome != "inconclusive":
        return False
    if judgement.effect:
        return True
    arms = [
        by_repeat(values.get(point, {}), judgement.metric).values()
        for point in (judgement.treatment, judgement.baseline)
    ]
    return all(arms) and any(any(arm) for arm in arms)


def _samples_needed(metric: str) -> str:
    statistic = METRICS[metric].statistic
    if statistic.q is None:
        return ""
    return (
        f": a p{statistic.q} takes {statistic.least_samples} samples in a trial, widen `window_s`"
    )


def _explain(effect: Effect, outcome: VerdictKind, margin: float) -> str:
    if effect.ratio.low is None or effect.ratio.high is None:
        return "one repeat gives no interval: ask for more with SET=repeats=3"
    if outcome != "inconclusive":
        return f"{'within' if outcome == 'no effect' else 'beyond'} {100 * margin:g}%"
    repeats = repeats_to_decide(effect, margin)
    advice = f"more than {MOST_REPEATS} repeats would settle it"
    if effect.starts is not None and effect.starts < ENOUGH_STARTS:
        setting = f"SET=starts={ENOUGH_STARTS}"
        if effect.ratio.n < ENOUGH_STARTS:  # no engine is started more often than it has repeats
            setting = f'SET="starts={ENOUGH_STARTS} repeats={ENOUGH_STARTS}"'
        advice = f"{ENOUGH_STARTS} starts of each engine may settle it ({setting})"
    elif repeats:
        advice = f"about {repeats} repeats would settle it (SET=repeats={repeats})"
    reason = f"the interval neither excludes 1 nor lies within {100 * margin:g}% of it"
    if not effect.ratio.low <= 1 <= effect.ratio.high:
        reason = f"the effect neither exceeds {100 * margin:g}% nor is shown to lie within that"
    return f"{reason}; {advice}"


def judge_forecast(
    forecast: Forecast,
    point: str,
    repeats: Repeats,
    prediction: Prediction,
    sampling: Sampling = SAMPLED_ONCE,
) -> ForecastResult:
    """Compare the mean over a point's repeats with what was forecast for it.

    What became of the forecast is decided by an interval that is as wide as those of claims.
    """
    return ForecastResult(
        metric=forecast.metric,
        point=point,
        measured=over_repeats(repeats, forecast.metric),
        prediction=prediction,
        outcome=prediction_outcome(
            prediction, sampling.mean(point, repeats, forecast.metric, TWO_ONE_SIDED)
        ),
    )
