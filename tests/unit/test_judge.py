"""Effects and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from labs.judging.judge import (
    Caveat,
    Effect,
    Interval,
    Judgement,
    VerdictKind,
    effect,
    holds,
    judge,
    judge_forecast,
    mean_interval,
    noise_floor,
    repeats_to_decide,
    verdict_kind,
)
from labs.lab import Arm, Forecast, Prediction
from tests.unit.builders import PREDICTION, make_claim

Requests = np.ndarray[Any, np.dtype[np.float64]]  # repeats x requests
T2, T4 = 4.302653, 2.776445  # two-sided 95 % Student quantiles, 2 and 4 degrees of freedom
INF = float("inf")


def make_effect(
    value: float, low: float | None, high: float | None, floor: float = 0.0, n: int = 3
) -> Effect:
    return Effect(ratio=Interval(value=value, low=low, high=high, n=n), floor=floor, spread=0.1)


# ------------------------------------------------------------------------------------ statistics


def test_mean_interval_is_students() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.value, interval.n) == (2, 3)
    assert (interval.low, interval.high) == pytest.approx(
        (2 - T2 / math.sqrt(3), 2 + T2 / math.sqrt(3))
    )


def test_effect_is_the_ratio_of_the_geometric_means() -> None:
    arms = {1: 220.0, 2: 210.0, 3: 180.0}, {1: 100.0, 2: 100.0, 3: 100.0}
    logs = [math.log(r) for r in (2.2, 2.1, 1.8)]
    half = T2 * stdev(logs) / math.sqrt(3)  # all of the variance is one arm's
    measured = effect(*arms)
    assert measured
    assert measured.ratio.value == pytest.approx(math.exp(fmean(logs)))
    assert measured.ratio.low == pytest.approx(math.exp(fmean(logs) - half))
    assert measured.ratio.high == pytest.approx(math.exp(fmean(logs) + half))
    assert (measured.ratio.n, measured.spread) == pytest.approx((3, stdev(logs)))


def test_effect_takes_every_repeat_with_a_logarithm() -> None:
    measured = effect({1: 2.0, 2: 8.0, 4: 0.0}, {1: 1.0, 2: 1.0, 3: 1.0})
    assert measured
    assert (measured.ratio.value, measured.ratio.n) == pytest.approx((4, 2))
    assert effect({}, {2: 1.0}) is None
    assert effect({1: 0.0}, {1: 1.0}) is None


def test_counts_that_do_not_vary_have_an_interval_without_width() -> None:
    measured = effect({1: 64.0, 2: 64.0}, {1: 32.0, 2: 32.0})
    assert measured
    ratio = measured.ratio
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


def test_one_repeat_gives_a_ratio_without_interval() -> None:
    measured = effect({1: 3.0}, {1: 2.0})
    assert measured
    ratio = measured.ratio
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, None, None))
    assert (measured.floor, measured.spread) == (None, None)


def test_noise_floor_is_the_half_width_between_two_copies_of_one_thing() -> None:
    one = {1: 1.0, 2: math.exp(0.1), 3: math.exp(-0.1)}  # s = 0.1
    other = {1: 9.0, 2: 9 * math.exp(0.2), 3: 9 * math.exp(-0.2)}  # s = 0.2
    pooled = math.sqrt((0.1**2 + 0.2**2) / 2)
    assert noise_floor(one, other) == pytest.approx(math.expm1(T4 * pooled * math.sqrt(2 / 3)))
    assert noise_floor({1: 1.0}, {1: 2.0}) is None


@pytest.mark.parametrize(
    ("ratio", "spread", "repeats"),
    [
        (math.exp(0.1), 0.1, 7),  # t(6) / sqrt(7) = 0.92 is the first below 1
        (1.0, 0.01, 3),  # 2.48 x 0.01 lies within log 1.03
        (1.0, 0.5, None),  # never within a hundred
        (1.5, None, 3),
    ],
)
def test_repeats_that_would_decide(ratio: float, spread: float | None, repeats: int | None) -> None:
    interval = Interval(value=ratio, low=None, high=None, n=2)
    assert repeats_to_decide(Effect(ratio=interval, floor=None, spread=spread)) == repeats


def simulated(
    n: int, pairs: int, ratio: float, seed: int, drift: float = 0.0, noise: float = 0.05
) -> list[Effect]:
    """Lognormal repeats; both sides share the machine's drift."""
    rng = np.random.default_rng(seed)
    effects = []
    for _ in range(pairs):
        shared, treated, untreated = rng.normal(0, [[drift], [noise], [noise]], (3, n))
        treatment = dict(enumerate(ratio * np.exp(shared + treated)))
        one = effect(treatment, dict(enumerate(np.exp(shared + untreated))))
        assert one
        effects.append(one)
    return effects


@pytest.mark.parametrize("n", [3, 5])
def test_interval_covers_the_true_ratio_in_95_of_100(n: int) -> None:
    effects = simulated(n, 2000, ratio=1.3, seed=n)
    covered = [(e.ratio.low or INF) <= 1.3 <= (e.ratio.high or 0) for e in effects]
    assert 0.93 <= fmean(covered) <= 0.97


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_two_copies_of_one_thing_seldom_differ(n: int, drift: float) -> None:
    effects = simulated(n, 2000, ratio=1.0, seed=n, drift=drift)
    alarms = [verdict_kind(e, "output_tokens_per_s") in ("helps", "hurts") for e in effects]
    assert fmean(alarms) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(effects))


def hierarchical(on: Requests, off: Requests, seed: int) -> Interval:
    """The percentile bootstrap over pairs of repeats, and over the requests within each."""
    rng, (repeats, requests) = np.random.default_rng(seed), on.shape
    pairs = rng.integers(repeats, size=(300, repeats, 1))
    treated, untreated = (
        side[pairs, rng.integers(requests, size=(300, repeats, requests))].mean(axis=2)
        for side in (on, off)
    )
    means = np.log(treated / untreated).mean(axis=1)
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    value = np.exp(np.log(on.mean(axis=1) / off.mean(axis=1)).mean())
    return Interval(value=float(value), low=low, high=high, n=repeats)


def test_over_so_few_repeats_a_hierarchical_bootstrap_would_cover_too_seldom() -> None:
    """Why the interval is Welch's: three repeats of 40 requests, a true ratio of 1.3."""
    rng = np.random.default_rng(3)
    covered_by_welch: list[bool] = []
    covered_by_bootstrap: list[bool] = []
    for seed in range(400):
        repeats = np.exp(rng.normal(0, 0.05, (2, 3, 1)))
        on, off = repeats * np.exp(rng.normal(0, 0.1, (2, 3, 40)))
        means = (dict(enumerate(side.mean(axis=1))) for side in (1.3 * on, off))
        measured = effect(*means)
        assert measured
        for interval, covered in (
            (measured.ratio, covered_by_welch),
            (hierarchical(1.3 * on, off, seed), covered_by_bootstrap),
        ):
            covered.append((interval.low or INF) <= 1.3 <= (interval.high or 0))
    assert 0.93 <= fmean(covered_by_welch) <= 0.98
    assert fmean(covered_by_bootstrap) < 0.88


def test_large_effect_is_found() -> None:
    effects = simulated(3, 300, ratio=2.0, seed=0)
    assert fmean(verdict_kind(e, "output_tokens_per_s") == "helps" for e in effects) > 0.95


# -------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("measured", "outcome"),
    [
        (make_effect(1.2, 1.1, 1.3), "helps"),
        (make_effect(0.8, 0.7, 0.9), "hurts"),
        (make_effect(1.0, 0.98, 1.02), "no effect"),
        (make_effect(1.02, 1.01, 1.029), "helps"),  # small, but there
        (make_effect(1.0, 0.98, 1.031), "inconclusive"),
        (make_effect(1.0, 0.97, 1.02), "inconclusive"),  # 1 / 0.97 is more than 3 %
        (make_effect(1.1, 0.9, 1.3, 0.02), "inconclusive"),
        (make_effect(1.02, 0.99, 1.045, 0.10), "no effect"),  # within the floor, up to 5 % of it
        (make_effect(1.05, 1.01, 1.09, 0.10), "inconclusive"),  # noise hides more than it shows
        (make_effect(1.5, None, None, n=1), "inconclusive"),
    ],
)
def test_outcome(measured: Effect, outcome: VerdictKind) -> None:
    assert verdict_kind(measured, "output_tokens_per_s") == outcome
    swapped: dict[str, VerdictKind] = {"helps": "hurts", "hurts": "helps"}
    assert verdict_kind(measured, "ttft_p50_s") == swapped.get(outcome, outcome)  # lower is better


@pytest.mark.parametrize(
    ("kind", "low", "high", "held"),
    [
        ("point", 1.4, 1.6, True),  # meets 2 - 25 %
        ("point", 1.3, 1.49, False),
        ("point", 2.49, 3.0, True),
        ("point", 2.51, 3.0, False),
        ("ceiling", 0.1, 0.2, True),
        ("ceiling", 2.49, 9.0, True),
        ("ceiling", 2.51, 9.0, False),
        ("floor", 8.0, 9.0, True),
        ("floor", 0.1, 1.51, True),
        ("floor", 0.1, 1.49, False),
        ("point", None, None, None),
    ],
)
def test_prediction_holds(
    kind: Any, low: float | None, high: float | None, held: bool | None
) -> None:
    prediction = Prediction(value=2.0, kind=kind, tolerance=0.25, formula="")
    assert holds(prediction, Interval(value=2.0, low=low, high=high, n=2)) is held


Values = Mapping[str, Mapping[int, Mapping[str, float | None]]]


def rates(**points: list[float | None]) -> Values:
    return {
        point: {r: {"output_tokens_per_s": v} for r, v in enumerate(values, 1)}
        for point, values in points.items()
    }


FASTER = rates(on=[200.0, 202.0, 198.0], off=[100.0, 101.0, 99.5])
SAME = rates(on=[100.0, 101.0, 99.5], off=[100.0, 101.0, 99.6])


def judged(values: Values, *caveats: Caveat, **claim: Any) -> Judgement:
    return judge(make_claim(**claim), "on", "off", values, PREDICTION, caveats)


@pytest.mark.parametrize(
    ("values", "expect", "outcome", "expected"),
    [
        (FASTER, "rises", "helps", True),
        (FASTER, "falls", "helps", False),
        (FASTER, "unchanged", "helps", False),
        (SAME, "unchanged", "no effect", True),
        (SAME, "rises", "no effect", False),
        (rates(on=[90.0, 140.0, 100.0], off=[100.0, 100.0, 100.0]), "rises", "inconclusive", None),
    ],
)
def test_claim_is_as_expected_or_not(
    values: Values, expect: str, outcome: VerdictKind, expected: bool | None
) -> None:
    judgement = judged(values, expect=expect)
    assert (judgement.outcome, judgement.expected) == (outcome, expected)


def test_prediction_is_judged_apart_from_the_claim() -> None:
    assert judged(FASTER).prediction_held is True  # 2.0 x
    assert judged(SAME, expect="unchanged").prediction_held is False


def test_inconclusive_says_how_many_repeats_would_settle_it() -> None:
    values = rates(on=[120.0, 140.0, 100.0], off=[100.0, 100.0, 100.0])
    assert "about 7 repeats would settle it (SET=repeats=7)" in judged(values).why


def test_inconclusive_never_asks_for_as_few_repeats_as_there_are() -> None:
    pairs = [(1.0, 1.02), (1.03, 1.07), (0.97, 1.037)]
    measured = effect(*({r: p[i] for r, p in enumerate(pairs)} for i in (1, 0)))
    assert measured
    assert verdict_kind(measured, "output_tokens_per_s") == "inconclusive"
    assert (repeats_to_decide(measured) or 101) > measured.ratio.n


def test_one_repeat_is_inconclusive_and_says_what_to_ask_for() -> None:
    judgement = judged(rates(on=[200.0], off=[100.0]))
    assert (judgement.outcome, judgement.expected, judgement.prediction_held) == (
        "inconclusive",
        None,
        None,
    )
    assert "SET=repeats=3" in judgement.why


def test_missing_side_is_inconclusive() -> None:
    for values in (rates(on=[None, None], off=[1.0, 2.0]), rates(off=[1.0, 2.0])):
        judgement = judged(values)
        assert (judgement.outcome, judgement.effect) == ("inconclusive", None)


def test_a_percentile_of_too_few_samples_is_refused_with_how_many_it_takes() -> None:
    few = {point: {1: {"ttft_p99_s": None}} for point in ("on", "off")}
    judgement = judged(few, metric="ttft_p99_s")
    assert (judgement.outcome, judgement.effect) == ("inconclusive", None)
    assert "a p99 takes 200 samples" in judgement.why
    assert "samples" not in judged({}, metric="output_tokens_per_s").why


@pytest.mark.parametrize("point", ["on", "off", None])
def test_blocking_caveat_allows_no_verdict(point: str | None) -> None:
    found = judged(FASTER, Caveat(name="errors", text="", blocks=True, point=point))
    assert (found.outcome, found.why) == ("not valid", "errors")
    assert (found.expected, found.prediction_held) == (None, None)


def test_caveat_elsewhere_or_one_that_does_not_block_leaves_the_verdict() -> None:
    elsewhere = Caveat(name="errors", text="", blocks=True, point="third")
    minor = Caveat(name="slow first trial", text="", point="on")
    assert judged(FASTER, elsewhere, minor).outcome == "helps"


def test_forecast_is_compared_with_the_mean_over_repeats() -> None:
    forecast = Forecast(name="f", metric="x", arm=Arm(), predict=lambda point: PREDICTION)
    values = {r: {"x": x} for r, x in enumerate((2.0, 2.2, None))}
    found = judge_forecast(forecast, "on", values, PREDICTION)
    assert found.measured
    assert (found.measured.value, found.measured.n, found.held) == pytest.approx((2.1, 2, True))
    assert judge_forecast(forecast, "on", {}, PREDICTION).held is None
