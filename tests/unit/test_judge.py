"""Effects and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from labs.harness.analysis.text import times_with_interval
from labs.harness.analysis.verdicts import (
    REPEAT_FREEDOM,
    REPEAT_SPREAD,
    START_SPREAD,
    TWO_ONE_SIDED,
    Caveat,
    Effect,
    Influences,
    Interval,
    Judgement,
    PredictionOutcome,
    Sampling,
    VerdictKind,
    _explain,
    effect,
    effect_outcome,
    in_band,
    judge,
    judge_forecast,
    may_be_decided,
    mean_interval,
    prediction_outcome,
    repeats_to_decide,
    tally,
    verdict_kind,
)
from labs.harness.spec.lab import MARGIN, Arm, Claim, Forecast, Prediction
from tests.unit.builders import PREDICTION, make_claim

T2, T2_90 = 4.302653, 2.919986  # two-sided Student quantiles, 95 and 90%, 2 degrees of freedom


def make_ratio(value: float, low: float | None, high: float | None) -> Interval:
    return Interval(value=value, low=low, high=high, n=3)


# ------------------------------------------------------------------------------------ statistics


def test_mean_interval_is_students() -> None:
    interval = mean_interval([11.0, 12.0, 13.0])
    assert (interval.value, interval.n) == (12, 3)
    assert (interval.low, interval.high) == pytest.approx(
        (12 - T2 / math.sqrt(3), 12 + T2 / math.sqrt(3))
    )
    assert mean_interval([11.0, 12.0, 13.0], 0.9).high == pytest.approx(12 + T2_90 / math.sqrt(3))


def test_effect_is_the_ratio_of_the_geometric_means() -> None:
    arms = {1: 220.0, 2: 210.0, 3: 180.0}, {1: 100.0, 2: 100.0, 3: 100.0}
    logs = [math.log(r) for r in (2.2, 2.1, 1.8)]
    half = T2 * stdev(logs) / math.sqrt(3)  # all of the variance is one arm's
    measured = effect(*arms)
    assert measured
    assert measured.ratio.value == pytest.approx(math.exp(fmean(logs)))
    assert measured.ratio.low == pytest.approx(math.exp(fmean(logs) - half))
    assert measured.ratio.high == pytest.approx(math.exp(fmean(logs) + half))
    narrower = measured.interval(0.9)
    assert narrower.low == pytest.approx(math.exp(fmean(logs) - half * T2_90 / T2))
    assert (measured.ratio.n, measured.spread) == pytest.approx((3, stdev(logs)))


SLOW = {1: 1.0, 2: 2.0, 3: 1.1}  # the machine is half as fast in the second repeat
TREATED = {
    r: slow * ratio for (r, slow), ratio in zip(SLOW.items(), (1.19, 1.20, 1.21), strict=True)
}


def test_arms_that_were_played_together_are_paired() -> None:
    """What the machine's speed does to both, their ratio does not show."""
    apart, found = effect(TREATED, SLOW), effect(TREATED, SLOW, rounds={})
    assert apart
    assert found
    logs = [math.log(ratio) for ratio in (1.19, 1.20, 1.21)]
    half = T2 * stdev(logs) / math.sqrt(3)
    assert found.ratio.value == pytest.approx(apart.ratio.value)
    assert (found.ratio.low, found.ratio.high) == pytest.approx(
        (math.exp(fmean(logs) - half), math.exp(fmean(logs) + half))
    )
    assert found.spread == pytest.approx(stdev(logs))
    assert (found.freedom, found.paired, apart.paired) == (2, True, False)
    assert "paired" not in apart.model_dump()
    assert apart.ratio.low
    assert apart.ratio.low < 0.6
    alone = effect({1: 2.0}, {1: 1.0, 2: 9.0}, rounds={1: [0.1, -0.1]})
    assert alone
    assert alone.ratio == make_ratio(2.0, None, None).model_copy(update={"n": 1})


def test_their_interval_rests_on_all_rounds() -> None:
    rounds = {r: (-0.02, 0.0, 0.02) for r in SLOW}
    found = effect(TREATED, SLOW, rounds=rounds)
    assert found
    logs = [math.log(ratio) for ratio in (1.19, 1.20, 1.21)]
    of_rounds = stdev((-0.02, 0.0, 0.02)) ** 2 / 3 + REPEAT_SPREAD**2  # expected of a repeat
    variance = (REPEAT_FREEDOM * of_rounds + 2 * stdev(logs) ** 2) / (REPEAT_FREEDOM + 2)
    half = 2.364624 * math.sqrt(variance / 3)  # Student's, of 7 degrees of freedom
    assert found.freedom == pytest.approx(7)
    assert found.ratio.value == pytest.approx(math.exp(fmean(logs)))
    assert found.ratio.high == pytest.approx(math.exp(fmean(logs) + half))
    del rounds[2]  # then the unit is the repeat
    assert effect(TREATED, SLOW, rounds=rounds) == effect(TREATED, SLOW, rounds={})


def test_more_repeats_bring_more_rounds() -> None:
    """So fewer of them are needed than where a repeat is the unit."""
    rounds = {r: (-0.08, -0.04, 0.04, 0.08) for r in SLOW}
    equal = {r: slow * 1.001 for r, slow in SLOW.items()}
    found = effect(equal, SLOW, rounds=rounds)
    assert found
    apart = found.model_copy(update={"paired": False})
    assert (repeats_to_decide(found, MARGIN), repeats_to_decide(apart, MARGIN)) == (4, 5)


def test_where_a_repeat_has_0_arms_are_not_paired() -> None:
    """It has no logarithm."""
    arms = {1: 0.0, 2: 3.0, 3: 2.0}, {1: 1.0, 2: 2.0, 3: 2.0}
    assert effect(*arms, rounds={}) == effect(*arms)


@pytest.mark.parametrize(
    ("beside", "paired"),
    [
        ({1: ("a/w/l",), 2: ("a/w/l", "c/w/l")}, True),
        ({1: ("a/w/l",), 2: ("c/w/l",)}, False),
        ({1: ("a/w/l",)}, False),
        ({}, False),
    ],
)
def test_they_are_paired_where_they_were_played_together_in_every_repeat(
    beside: dict[int, tuple[str, ...]], paired: bool
) -> None:
    metric, pair = "tpot_mean_s", ("b/w/l", "a/w/l")
    values: dict[str, Any] = {
        "a/w/l": {1: {metric: 1.0}, 2: {metric: 2.0}},
        "b/w/l": {1: {metric: 1.1}, 2: {metric: 2.1}, 3: {metric: 9.0}},
    }
    both = {"a/w/l": {1: ("b/w/l",), 2: ("b/w/l",)}}
    of = {r: {metric: {4: -0.1, 5: 0.0, 6: 0.1}} for r in (1, 2)}
    others = {r: {metric: {5: 0.2, 6: 0.1, 7: 0.0}} for r in (1, 2)}  # of two requests in common
    influences: dict[str, Influences] = {"b/w/l": of, "a/w/l": others}
    sampling = Sampling(beside={"b/w/l": beside, **both}, influences=influences)
    found = sampling.effect(values, pair, metric)
    assert found
    assert (found.paired, found.freedom == 3) == (paired, paired)
    one_sided = Sampling(beside={"b/w/l": beside}).effect(values, pair, metric)
    assert one_sided
    assert not one_sided.paired  # the other was played anew later


def test_effect_with_a_repeat_of_0_is_the_ratio_of_the_arithmetic_means() -> None:
    goodput = {1: 10.6, 2: 9.7, 3: 11.9, 4: 10.6}, {1: 0.94, 2: 0.0, 3: 3.44, 4: 0.0}
    measured = effect(*goodput)
    assert measured
    assert measured.of_means
    means, relative = zip(
        *((fmean(arm.values()), stdev(arm.values()) / fmean(arm.values())) for arm in goodput),
        strict=True,
    )
    assert measured.ratio.value == pytest.approx(means[0] / means[1])
    assert (measured.spread, measured.error) == pytest.approx(
        (math.hypot(*relative), math.hypot(*relative) / 2)
    )
    assert measured.freedom == pytest.approx(
        sum(r**2 / 4 for r in relative) ** 2 / sum((r**2 / 4) ** 2 / 3 for r in relative)
    )
    assert (measured.ratio.low, measured.ratio.high) == pytest.approx((0.926, 103.1), rel=1e-3)
    inverse = effect(*reversed(goodput))
    assert inverse
    assert inverse.ratio.high == pytest.approx(1 / (measured.ratio.low or 0))


def test_arithmetic_means_are_widened_for_starts_and_looks_too() -> None:
    arms = {1: 4.0, 2: 0.0, 3: 2.0, 4: 6.0}, {1: 2.0, 2: 1.0, 3: 2.0, 4: 3.0}
    once, twice = effect(*arms), effect(*arms, looks=2)
    few, enough = (
        effect(*arms, starts=[{r: math.ceil(r * starts / 4) for r in range(1, 5)}] * 2)
        for starts in (2, 4)
    )
    assert once
    assert twice
    assert few
    assert enough
    assert twice.ratio == once.interval(0.975)
    assert (few.error or 0) ** 2 == pytest.approx((once.error or 0) ** 2 + START_SPREAD**2)
    assert (few.starts, enough.starts, enough.error) == (2, 4, once.error)


def test_there_is_no_effect_without_a_repeat_or_where_all_had_0() -> None:
    assert effect({}, {2: 1.0}) is None
    assert effect({1: 0.0, 2: 0.0}, {1: 1.0, 2: 1.0}) is None


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
    assert measured.spread is None


@pytest.mark.parametrize(
    ("ratio", "spread", "repeats"),
    [
        (math.exp(0.1), 0.1, 7),  # t(6) / sqrt(7) = 0.92 is the first below 1
        (1.0, 0.019, 3),  # 2.48 x 0.019 lies within log 1.05
        (1.0, 0.5, None),  # never within a hundred
        (1.04, 0.001, 3),  # small, but shown to be: within the margin
        (1.0499, 0.01, None),  # as large as the margin: neither within nor beyond it
        (1.5, None, 3),
    ],
)
def test_repeats_that_would_decide(ratio: float, spread: float | None, repeats: int | None) -> None:
    interval = Interval(value=ratio, low=None, high=None, n=2)
    assert repeats_to_decide(Effect(ratio=interval, spread=spread), MARGIN) == repeats


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


# -------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("measured", "outcome"),
    [
        (make_ratio(1.2, 1.1, 1.3), "helps"),
        (make_ratio(0.8, 0.7, 0.9), "hurts"),
        (make_ratio(1.0, 0.98, 1.02), "no effect"),
        (make_ratio(1.02, 1.01, 1.049), "no effect"),  # not nothing, but less than the margin
        (make_ratio(1.06, 1.01, 1.11), "helps"),
        (make_ratio(1.04, 1.01, 1.07), "inconclusive"),  # neither within the margin nor beyond it
        (make_ratio(1.0, 0.98, 1.051), "inconclusive"),
        (make_ratio(1.0, 0.951, 1.02), "inconclusive"),  # 1 / 0.951 is more than 5%
        (make_ratio(1.1, 0.9, 1.3), "inconclusive"),
        (make_ratio(1.5, None, None), "inconclusive"),
    ],
)
def test_verdict(measured: Interval, outcome: VerdictKind) -> None:
    assert verdict_kind(measured, "output_tokens_per_s") == outcome
    swapped: dict[str, VerdictKind] = {"helps": "hurts", "hurts": "helps"}
    assert verdict_kind(measured, "ttft_p50_s") == swapped.get(outcome, outcome)  # lower is better


def test_a_verdict_goes_by_the_margin_of_its_claim() -> None:
    measured = make_ratio(1.06, 1.01, 1.11)
    assert verdict_kind(measured, "output_tokens_per_s", margin=0.12) == "no effect"
    assert verdict_kind(measured, "output_tokens_per_s", margin=0.08) == "inconclusive"


def test_the_default_margin_is_in_no_file_and_in_no_digest() -> None:
    assert "margin" not in make_claim().model_dump()
    assert make_claim(margin=0.1).model_dump()["margin"] == 0.1
    assert Claim.model_validate(make_claim().model_dump()).margin == MARGIN


@pytest.mark.parametrize(
    ("kind", "low", "high", "outcome"),
    [
        ("point", 1.6, 2.5, "held"),  # from 2 / 1.25 to 2 x 1.25
        ("point", 1.59, 2.4, "open"),
        ("point", 1.7, 2.51, "open"),
        ("point", 0.5, 9.0, "open"),  # so wide that it says nothing
        ("point", 1.3, 1.59, "refuted"),
        ("point", 2.51, 3.0, "refuted"),
        ("ceiling", 0.1, 0.2, "not broken"),  # far below: not borne out either
        ("ceiling", 1.9, 2.1, "open"),
        ("ceiling", 2.01, 9.0, "broken"),
        ("floor", 8.0, 9.0, "not broken"),
        ("floor", 1.9, 2.1, "open"),
        ("floor", 0.1, 1.99, "broken"),
        ("point", None, None, "open"),
        ("floor", None, None, "open"),
    ],
)
def test_what_became_of_a_prediction(
    kind: Any, low: float | None, high: float | None, outcome: PredictionOutcome
) -> None:
    prediction = Prediction(value=2.0, kind=kind, formula="")
    measured = Interval(value=2.0, low=low, high=high, n=2)
    assert prediction_outcome(prediction, measured) == outcome
    assert prediction_outcome(prediction, None) == "open"


@pytest.mark.parametrize(
    ("predicted", "measured", "off", "outcome", "foreseen"),
    [
        (2.0, 2.0, 0.02, "held", 1.0),
        (1.27, 1.52, 0.01, "refuted", 1.75),  # within 25%, and nearly twice the cost
        (1.27, 1.40, 0.03, "open", 1.41),
        (0.80, 0.93, 0.01, "refuted", 0.33),
        (1.27, 1.0, 0.01, "refuted", 0.0),
        (1.20, 0.99, 0.01, "refuted", -0.06),  # the other way
        (1.06, 1.02, 0.10, "held", None),  # below what two twins differ by: the ratio alone
        (1.04, 1.00, 0.01, "held", None),  # within the margin
        (1.00, 1.04, 0.03, "held", None),  # measured within it, too
        (1.00, 1.15, 0.16, "open", None),
        (1.00, 1.08, 0.05, "open", None),  # a clear effect, where none was predicted
        (1.00, 1.15, 0.05, "refuted", None),
        (1.00, 0.87, 0.05, "refuted", None),
        (8.0, 6.6, 0.01, "held", 0.91),
        (8.0, 5.0, 0.01, "refuted", 0.77),  # 40% of a large effect are no 25% of its ratio
    ],
)
def test_a_prediction_holds_where_its_effect_was_foreseen_too(
    predicted: float, measured: float, off: float, outcome: str, foreseen: float | None
) -> None:
    """The standard error of the logarithm is `off` / 1.96, so that the floor is `off`."""
    prediction = PREDICTION.model_copy(update={"value": predicted})
    ratio = Interval(value=measured, low=None, high=None, n=5)
    found = Effect(ratio=ratio, spread=None, error=off / 1.96, freedom=1e6).with_interval()
    assert effect_outcome(prediction, found, MARGIN) == outcome
    judgement = judged(FASTER).model_copy(update={"effect": found, "prediction": prediction})
    assert judgement.foreseen == (
        foreseen if foreseen is None else pytest.approx(foreseen, abs=0.01)
    )


@pytest.mark.parametrize("true_ratio", [1.6, 2.5])
def test_a_wrong_prediction_seldom_holds(true_ratio: float) -> None:
    """The truth lies on the edge of what bears out a prediction of 2."""
    effects = simulated(5, 2000, ratio=true_ratio, seed=5, noise=0.03)
    held = [prediction_outcome(PREDICTION, e.interval(TWO_ONE_SIDED)) == "held" for e in effects]
    assert fmean(held) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(held))


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
    assert judged(FASTER).prediction_outcome == "held"  # 2.0 x
    same = judged(SAME, expect="unchanged")
    assert (same.outcome, same.expected, same.why) == ("no effect", True, "within 5%")
    assert same.prediction_outcome == "refuted"


def test_predictions_of_about_1_are_counted_apart() -> None:
    about_1 = PREDICTION.model_copy(update={"value": 1 / 1.049})
    found = [
        judge(make_claim(expect=expect), "on", "off", values, prediction, [])
        for expect, values, prediction in (
            ("rises", FASTER, PREDICTION),
            ("rises", SAME, PREDICTION),
            ("unchanged", SAME, about_1),
            ("unchanged", {}, about_1),
        )
    ]
    assert [j.trivial for j in found] == [False, False, True, True]
    counted = tally(found)
    assert (counted.claims, counted.decided) == (4, 3)
    assert counted.predictions == {"held": 1, "refuted": 1}
    assert counted.trivial == {"held": 1, "open": 1}
    strict = judge(make_claim(margin=0.01), "on", "off", SAME, about_1, [])
    assert not strict.trivial


def test_inconclusive_says_how_many_repeats_would_settle_it() -> None:
    values = rates(on=[120.0, 140.0, 100.0], off=[100.0, 100.0, 100.0])
    assert "(SET=repeats=7)" in judged(values).why


def test_inconclusive_never_asks_for_as_few_repeats_as_there_are() -> None:
    # a gain of 4% whose interval excludes 1, but reaches beyond the margin
    measured = effect({1: 1.03, 2: 1.045, 3: 1.04}, dict.fromkeys((1, 2, 3), 1.0))
    assert measured
    assert (measured.ratio.low or 0) > 1
    assert verdict_kind(measured.ratio, "output_tokens_per_s") == "inconclusive"
    assert (repeats_to_decide(measured, MARGIN) or 101) > measured.ratio.n


def test_one_repeat_is_inconclusive_and_says_what_to_ask_for() -> None:
    judgement = judged(rates(on=[200.0], off=[100.0]))
    assert (judgement.outcome, judgement.expected, judgement.prediction_outcome) == (
        "inconclusive",
        None,
        "open",
    )
    assert "SET=repeats=3" in judgement.why


def test_missing_side_is_inconclusive() -> None:
    for values in (rates(on=[None, None], off=[1.0, 2.0]), rates(off=[1.0, 2.0])):
        judgement = judged(values)
        assert (judgement.outcome, judgement.effect) == ("inconclusive", None)


ZERO: list[float | None] = [0.0, 0.0, 0.0]
SOME: list[float | None] = [4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("on", "off", "why", "again"),
    [
        (ZERO, SOME, "of the treatment had 0", True),
        (SOME, ZERO, "of the baseline had 0", True),
        (ZERO, ZERO, "of the baseline had 0", False),
        ([None], SOME, "no repeat", False),
        ([4.0, 30.0, 0.0], SOME, "would settle it", True),
        ([200.0, 202.0, 198.0], [100.0, 101.0, 99.5], "beyond 5%", False),
    ],
)
def test_a_side_of_nothing_but_0_says_so_and_is_measured_again_beside_one_that_has_more(
    on: list[float | None], off: list[float | None], why: str, again: bool
) -> None:
    values = rates(on=on, off=off)
    judgement = judged(values)
    assert why in judgement.why
    assert may_be_decided(judgement, values) is again


def test_a_ratio_of_arithmetic_means_is_held_against_their_forecast() -> None:
    of_means = PREDICTION.model_copy(update={"value": 3.0})
    some_0, none_0 = (
        judge(make_claim(), "on", "off", values, PREDICTION, [], prediction_of_means=of_means)
        for values in (rates(on=SOME, off=[1.0, 0.0, 2.0]), FASTER)
    )
    assert (some_0.prediction.value, none_0.prediction.value) == (3, 2)
    assert judged(rates(on=SOME, off=[1.0, 0.0, 2.0])).prediction == PREDICTION


def test_a_percentile_of_too_few_samples_is_refused_with_how_many_it_takes() -> None:
    few = {point: {1: {"ttft_p99_s": None}} for point in ("on", "off")}
    judgement = judged(few, metric="ttft_p99_s")
    assert (judgement.outcome, judgement.effect) == ("inconclusive", None)
    assert "200 samples" in judgement.why
    assert "samples" not in judged({}, metric="output_tokens_per_s").why


@pytest.mark.parametrize("point", ["on", "off", None])
def test_blocking_caveat_allows_no_verdict(point: str | None) -> None:
    found = judged(FASTER, Caveat(name="errors", text="", blocks=True, point=point))
    assert (found.outcome, found.why) == ("not valid", "errors")
    assert (found.expected, found.prediction_outcome) == (None, "open")


def test_caveat_elsewhere_or_one_that_does_not_block_leaves_the_verdict() -> None:
    elsewhere = Caveat(name="errors", text="", blocks=True, point="third")
    minor = Caveat(name="slow first trial", text="", point="on")
    assert judged(FASTER, elsewhere, minor).outcome == "helps"


def test_forecast_is_compared_with_the_mean_over_repeats() -> None:
    forecast = Forecast(name="f", metric="batch", arm=Arm(), predict=lambda point: PREDICTION)
    values = {r: {"batch": x} for r, x in enumerate((2.0, 2.2, None))}
    found = judge_forecast(forecast, "on", values, PREDICTION)
    assert found.measured
    assert (found.measured.value, found.measured.n) == pytest.approx((2.1, 2))
    assert found.outcome == "open"  # 1.5 to 2.7
    assert judge_forecast(forecast, "on", {}, PREDICTION).outcome == "open"
    steady = {r: {"batch": x} for r, x in enumerate((2.0, 2.01, 2.02))}
    assert judge_forecast(forecast, "on", steady, PREDICTION).outcome == "held"


def test_a_forecast_is_judged_by_an_interval_as_wide_as_a_claims() -> None:
    """Of two looks each has half the error, and few starts of an engine widen it."""
    forecast = Forecast(name="f", metric="batch", arm=Arm(), predict=lambda point: PREDICTION)
    values = {r: {"batch": 2.0 + 0.15 * (r % 3)} for r in range(1, 7)}
    starts = {count: {r: 1 + r % count for r in range(1, 7)} for count in (1, 3, 6)}

    def outcome(sampling: Sampling, p: float) -> str:
        prediction = PREDICTION.model_copy(update={"value": p})
        return judge_forecast(forecast, "on", values, prediction, sampling).outcome

    def high(sampling: Sampling) -> float:
        interval = sampling.mean("on", values, "batch", 0.9)
        assert interval
        assert interval.high
        return interval.high

    once, twice = Sampling(), Sampling(looks=2)
    plain = mean_interval([row["batch"] for row in values.values()], 0.9).high
    assert high(once) == plain
    assert high(twice) > high(once)
    of_one, of_three, of_six = (high(Sampling(starts={"on": s})) for s in starts.values())
    assert of_one > of_three > high(once)
    assert of_six == pytest.approx(plain)  # a start for each: their own spread is in it
    assert high(Sampling(starts={"off": starts[1]})) == high(once)
    edge = 1.25 * (high(once) + high(twice)) / 2  # between the two ends
    for p in (edge, 1 / 1.25 * (high(once) + high(twice)) / 2):
        assert {outcome(once, p), outcome(twice, p)} in ({"held", "open"}, {"refuted", "open"})
    assert (
        judge_forecast(forecast, "on", values, PREDICTION, twice).measured
        == judge_forecast(forecast, "on", values, PREDICTION).measured
    )  # the figure that is shown everywhere


@pytest.mark.parametrize(
    ("measured", "low", "high", "agrees"),
    [
        ((1.3, 1.1, 1.5), 1.0, 1.2, False),  # the mean decides
        ((1.1, 0.5, 2.0), 1.0, 1.2, True),
        ((0.9711, 0.9706, 0.9716), 0.9714, 0.9714, True),  # a count: the interval holds it
        ((0.97, 0.97, 0.97), 0.9714, 0.9714, False),
        ((0.9396, 0.9396, 0.9396), 0.94009, 0.94011, True),  # both are printed as 94%
        ((0.99, 0.97, 1.0), 0.98, 0.9801, True),  # hardly any width: the interval meets it
        ((0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2), 0.3, 0.3, True),
    ],
)
def test_a_figure_agrees_with_a_band(
    measured: tuple[float, float, float], low: float, high: float, agrees: bool
) -> None:
    value, *ends = measured
    assert in_band(Interval(value=value, low=ends[0], high=ends[1], n=3), low, high) is agrees


def test_a_small_ratio_keeps_two_digits() -> None:
    small = Interval(value=0.0876, low=0.0849, high=0.104, n=4)
    assert times_with_interval(small) == "0.088x (0.085 to 0.10)"
    assert times_with_interval(small.model_copy(update={"low": None})) == "0.088x (of one repeat)"


@pytest.mark.parametrize(
    ("starts", "looks", "low", "high"),
    [
        (1, 1, 0.84, 1.19), (2, 1, 0.88, 1.13), (3, 1, 0.90, 1.11),
        (1, 2, 0.81, 1.24), (2, 2, 0.86, 1.16), (3, 2, 0.88, 1.13),
    ],
)  # fmt: skip
def test_on_few_starts_equality_within_the_margin_cannot_be_shown(
    starts: int, looks: int, low: float, high: float
) -> None:
    """As docs/reading-a-report.md says: not even by engines whose repeats are all but alike."""
    alike = {r: 1 + 1e-6 * r for r in range(1, 11)}
    on = {r: 1 + (r - 1) * starts // 10 for r in alike}
    found = effect(alike, alike, starts=(on, on), looks=looks)
    assert found
    assert found.ratio.low == pytest.approx(low, abs=0.005)
    assert found.ratio.high == pytest.approx(high, abs=0.005)
    assert high > 1 + 2 * MARGIN


@pytest.mark.parametrize(
    ("starts", "looks", "spread"), [(4, 1, 0.028), (4, 2, 0.023), (8, 1, 0.045), (8, 2, 0.039)]
)
def test_on_four_starts_or_more_equality_can_be_shown_where_they_spread_little(
    starts: int, looks: int, spread: float
) -> None:
    def upheld(of: float) -> bool:
        ends = [math.exp((-1) ** r * of * math.sqrt((starts - 1) / starts)) for r in range(starts)]
        arm, on = dict(enumerate(ends)), {r: r for r in range(starts)}
        found = effect(arm, arm, starts=(on, on), looks=looks)
        assert found
        assert found.ratio.high
        return math.log(found.ratio.high) < math.log1p(MARGIN)

    assert upheld(0.97 * spread)
    assert not upheld(1.03 * spread)


@pytest.mark.parametrize(
    ("repeats", "setting"), [(3, 'SET="starts=4 repeats=4"'), (5, "SET=starts=4")]
)
def test_more_starts_are_advised_with_repeats_enough_for_them(repeats: int, setting: str) -> None:
    """An engine of three repeats, as in a quick run on a GPU, would be started three times."""
    arm = {r: 1 + 0.001 * r for r in range(repeats)}
    found = effect(arm, arm, starts=[dict.fromkeys(arm, 1)] * 2)
    assert found
    assert _explain(found, "inconclusive", MARGIN).endswith(f"may settle it ({setting})")
