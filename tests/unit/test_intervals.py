"""Simulations that hold the intervals to their coverage, with the variances of recorded runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import scipy

from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.verdicts import (
    ENOUGH_STARTS,
    REPEAT_FREEDOM,
    REPEAT_SPREAD,
    START_SPREAD,
    Effect,
    Sampling,
    effect,
    mean_interval,
    over_repeats,
    verdict_kind,
)
from tests.unit.builders import make_lab

Floats = np.ndarray[Any, np.dtype[np.float64]]  # claims x repeats
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]

SPREADS = (
    .0015, .006, .010, .015, .0165, .022, .025, .031, .037, .043, .06, .078, .093, .11, .17,
)  # fmt: skip
"""Standard deviations of the logarithm from repeat to repeat: quantiles of the 122 arms of claims
in twelve recorded runs, with windows of about 3.5 s after a warm-up of 1 s."""


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return rng.normal(size=shape)


def heavy(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Student's t with 3 degrees of freedom, of variance 1."""
    logs: Floats = rng.standard_t(3, shape) / np.sqrt(3)
    return logs


NOISES = {"normal": normal, "heavy tails": heavy, "one in 24 slow by 30%": normal}


def two_arms(noise: str, repeats: int, claims: int) -> tuple[Floats, Floats]:
    """Simulate two arms without an effect, each with a spread of its own."""
    rng = np.random.default_rng(len(noise) + repeats)
    arms = []
    for spread in rng.choice(SPREADS, (2, claims, 1)):
        logs = NOISES[noise](rng, (claims, repeats)) * spread
        if noise.startswith("one in 24"):
            logs = logs + np.where(rng.random(logs.shape) < 1 / 24, np.log(1.3), 0)
        arms.append(logs)
    return arms[0], arms[1]


def alarms(interval: tuple[Floats, Floats]) -> float:
    """The share of intervals that exclude the truth, which is 0."""
    return float(np.mean((interval[0] > 0) | (interval[1] < 0)))


def drift(rng: np.random.Generator, steps: int, step_s: float) -> Floats:
    """The machine's speed: 5% within minutes, autocorrelated by a half after 2 s."""
    keep = 0.5 ** (step_s / 2)
    logs = np.empty((2000, steps))
    logs[:, 0] = rng.normal(0, 0.05, 2000)
    for i in range(1, steps):
        logs[:, i] = keep * logs[:, i - 1] + rng.normal(0, 0.05 * np.sqrt(1 - keep**2), 2000)
    return logs


REQUEST_S, IN_A_TRIAL = 1.0, 6


def played(
    rng: np.random.Generator, engines: int, in_turn: bool, repeats: int, noise: str
) -> tuple[Floats, Floats]:
    """Two of so many engines answer six requests each a repeat: claims x repeats x requests.

    The machine's speed wanders, anew in each repeat, and a request has noise and a length of its
    own, the length on both engines.
    """
    step_s, n = 0.1, IN_A_TRIAL
    arms: list[list[Floats]] = [[], []]
    for _ in range(repeats):
        speed = drift(rng, int(engines * n * REQUEST_S / step_s), step_s)
        slots = speed.reshape(len(speed), engines * n, -1).mean(2)
        by_engine = slots.reshape(len(speed), n, engines) if in_turn else (
            slots.reshape(len(speed), engines, n).transpose(0, 2, 1)
        )  # fmt: skip
        length = rng.normal(0, 0.1, (len(speed), n))
        for arm, engine in zip(arms, (0, engines - 1), strict=True):
            own = NOISES[noise](rng, (len(speed), n)) * 0.02
            arm.append(by_engine[:, :, engine] + length + own)
    a, b = (np.array(arm).transpose(1, 0, 2) for arm in arms)
    return a, b


def judged(a: Floats, b: Floats, together: bool) -> tuple[Floats, Floats]:
    """The intervals that a lab would give; a figure is the mean over a trial's requests."""
    low_high = []
    for of_a, of_b in zip(np.exp(a), np.exp(b), strict=True):
        means = [dict(enumerate(arm.mean(1), 1)) for arm in (of_a, of_b)]
        moved = of_a / of_a.mean(1, keepdims=True) - of_b / of_b.mean(1, keepdims=True)
        rounds = dict(enumerate(moved.tolist(), 1)) if together else None
        found = effect(*means, rounds=rounds)
        assert found
        low_high.append(np.log(bounds(found, 0.95)))
    low, high = np.array(low_high).T
    return low, high


@pytest.mark.parametrize("noise", ["normal", "heavy tails"])
@pytest.mark.parametrize(("engines", "repeats"), [(2, 3), (2, 5), (4, 3)])
def test_requests_that_take_turns_halve_the_interval_within_its_level(
    engines: int, repeats: int, noise: str
) -> None:
    rng = np.random.default_rng(engines + repeats)
    turns = judged(*played(rng, engines, True, repeats, noise), together=True)
    usual = judged(*played(rng, engines, False, repeats, noise), together=False)
    assert np.median(turns[1] - turns[0]) < np.median(usual[1] - usual[0]) / 2
    assert alarms(turns) < 0.055


LEVELS = (
    (0.3, 0.4), (0.5, 1.2), (0.5, 2), (0.5, 2.3), (0.7, 1.3), (0.7, 3), (1.3, 2.8), (1.4, 0),
    (1.7, 1.8), (1.7, 1.8), (1.8, 1.4), (2.2, 1.4), (2.3, 0.6), (2.5, 2.9), (2.5, 3.6), (2.8, 0),
    (2.9, 0), (3.3, 4.4), (3.4, 0), (3.6, 1.3), (3.8, 0), (3.8, 0.9), (3.9, 0), (4, 5), (4.1, 0),
    (4.6, 0), (4.9, 0), (4.9, 0), (5.3, 0), (5.3, 7.5), (5.4, 0), (5.4, 0.7), (5.4, 2.2),
    (5.5, 0), (5.5, 0), (5.8, 0), (5.8, 5.6), (5.9, 11.6), (6.5, 0), (6.9, 0), (7.1, 0), (7.7, 0),
    (7.7, 0), (7.8, 0), (7.8, 0), (8, 0), (8, 0), (8, 0), (8.1, 0), (8.6, 0), (9.2, 6.7),
    (9.2, 7.2), (9.8, 0), (10.1, 2.1), (10.7, 0), (10.8, 11.3), (11.5, 16), (11.9, 0), (12.5, 0),
    (12.5, 20.2), (13.5, 0), (13.7, 0), (14.1, 0), (14.1, 3.7), (15.5, 6.7), (15.5, 9.1),
    (16.2, 0), (20.4, 0),
)  # fmt: skip
"""Of each of the 68 paired claims on file, in percent of its ratio: the standard deviation of a
repeat that its rounds imply, and what its repeats vary by beyond that."""
ROUNDS = 5  # of a repeat, mostly


def coverage_of_pairs(levels: Sequence[tuple[float, float]], repeats: int, noise: str) -> float:
    """Draw claims without an effect: log ratios of repeats, and of each round beside its own."""
    rng, covered = np.random.default_rng(68), []
    for of_rounds, own in np.repeat(levels, 6000 // (repeats * len(levels)), axis=0) / 100:
        drawn = of_rounds * math.sqrt(ROUNDS) * NOISES[noise](rng, (repeats, ROUNDS))
        drawn += own * rng.normal(size=(repeats, 1))
        means = drawn.mean(1)
        ratios = dict(enumerate(np.exp(means).tolist()))
        moved = dict(enumerate((drawn - means[:, None]).tolist()))
        found = effect(ratios, dict.fromkeys(ratios, 1.0), rounds=moved)
        assert found
        low, high = bounds(found, 0.95)
        covered.append(low <= 1 <= high)
    return fmean(covered)


@pytest.mark.parametrize("noise", ["normal", "heavy tails"])
@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_pairs_cover_on_the_two_levels_of_the_runs_on_file(repeats: int, noise: str) -> None:
    """Whether repeats move by what each claim showed, or all by what fits them best."""
    fitted = [(of_rounds, 100 * REPEAT_SPREAD) for of_rounds, _ in LEVELS]
    steady = [level for level in fitted if level[0] < 1.5]  # the repeats vary more than the rounds
    assert 0.93 <= coverage_of_pairs(LEVELS, repeats, noise) <= 0.97
    assert 0.93 <= coverage_of_pairs(fitted, repeats, noise) <= 0.98
    assert 0.93 <= coverage_of_pairs(steady, repeats, noise) <= 0.985


def test_pairs_cover_nearly_as_often_on_a_machine_that_is_twice_as_unsteady() -> None:
    """What is expected of a repeat is then too little, and its own variance makes up for most."""
    levels = [(of_rounds, 200 * REPEAT_SPREAD) for of_rounds, _ in LEVELS]
    assert 0.91 <= coverage_of_pairs(levels, 3, "normal") <= 0.96


def test_repeats_are_averaged_with_what_is_expected_of_them() -> None:
    """Two rounds each have two degrees of freedom, which is all that the expectation counts for."""
    logs, moved = {1: 0.2, 2: -0.2}, {1: [0.02, -0.02], 2: [0.02, -0.02]}
    ratios = {r: math.exp(log) for r, log in logs.items()}
    found = effect(ratios, {1: 1.0, 2: 1.0}, rounds=moved)
    assert found
    # the variance of (0.2, -0.2) is 0.08, of (0.02, -0.02) 0.0008, of a mean of these two 0.0004
    variance = (2 * (0.0004 + REPEAT_SPREAD**2) + 0.08) / 3
    assert found.error == pytest.approx(math.sqrt(variance / 2))
    assert found.freedom == pytest.approx(3)
    many = effect(ratios, {1: 1.0, 2: 1.0}, rounds={r: [*of, 0.0] * 9 for r, of in moved.items()})
    assert many
    assert many.freedom == pytest.approx(1 + REPEAT_FREEDOM)


# ------------------------------------------------------------------------------- what was chosen


def columns(arms: tuple[Floats, Floats]) -> list[list[dict[int, float]]]:
    """Turn logarithms into what `effect` takes."""
    return [[dict(enumerate(row, 1)) for row in np.exp(arm).tolist()] for arm in arms]


def bounds(found: Effect, confidence: float) -> tuple[float, float]:
    interval = found.interval(confidence)
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_covers_as_often_as_it_says(noise: str, confidence: float) -> None:
    covered = []
    for a, b in zip(*columns(two_arms(noise, 5, 1000)), strict=True):
        found = effect(a, b)
        assert found
        low, high = bounds(found, confidence)
        covered.append(low <= 1 <= high)
    assert confidence - 0.02 <= fmean(covered) <= confidence + 0.025


def test_the_interval_is_scipys_welch() -> None:
    a, b = {1: 1.0, 2: 1.2, 3: 1.1}, {1: 2.0, 2: 2.1, 4: 2.6, 5: 2.2}
    found = effect(a, b)
    assert found
    logs = (np.log(list(arm.values())) for arm in (a, b))
    expected = scipy.stats.ttest_ind(*logs, equal_var=False).confidence_interval(0.9)
    assert bounds(found, 0.9) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert found.ratio.n == 3


@pytest.mark.parametrize("noise", NOISES)
def test_two_looks_keep_false_alarms_under_five_in_a_hundred(noise: str) -> None:
    """A claim that is undecided after five repeats is looked at again after ten."""

    def judged(a: dict[int, float], b: dict[int, float], repeats: int, looks: int) -> Effect:
        few = ({r: v for r, v in arm.items() if r <= repeats} for arm in (a, b))
        found = effect(*few, looks=looks)
        assert found
        return found

    def false_alarms(looks: int) -> float:
        alarms = []
        for a, b in zip(*columns(two_arms(noise, 10, 1000)), strict=True):
            verdicts = (
                verdict_kind(judged(a, b, repeats, looks).ratio, "output_tokens_per_s")
                for repeats in (5, 10)
            )
            decided = next((verdict for verdict in verdicts if verdict != "inconclusive"), None)
            alarms.append(decided in ("helps", "hurts"))
        return fmean(alarms)

    assert false_alarms(2) < 0.05
    assert false_alarms(1) > false_alarms(2) + 0.01


def test_an_effect_is_as_wide_as_its_looks_demand() -> None:
    a, b = {1: 1.0, 2: 1.2, 3: 1.1}, {1: 2.0, 2: 2.1, 3: 2.6}
    once, twice = effect(a, b), effect(a, b, looks=2)
    assert once
    assert twice
    assert bounds(twice, 0.95) == pytest.approx(bounds(once, 0.975))
    assert (twice.ratio.low, twice.ratio.high) == pytest.approx(bounds(once, 0.975))
    lab = make_lab()
    looked = [
        lab.model_copy(update={"repeats": 5, "most_repeats": most}).looks for most in (0, 5, 10)
    ]
    assert looked == [1, 1, 2]


def counts(rng: np.random.Generator, mean: float, shape: tuple[int, int], bursts: bool) -> Any:
    """Draw counts: Poisson's, or with half again as much spread where they come in bursts."""
    return rng.negative_binomial(2, 2 / (2 + mean), shape) if bursts else rng.poisson(mean, shape)


@pytest.mark.parametrize("bursts", [False, True])
@pytest.mark.parametrize("repeats", [3, 5, 10])
@pytest.mark.parametrize(("above", "below"), [(10.0, 1.0), (3.0, 3.0), (5.0, 0.5)])
def test_small_counts_of_which_some_are_0_are_covered_as_often_as_is_said(
    above: float, below: float, repeats: int, bursts: bool
) -> None:
    rng, covered = np.random.default_rng(repeats), []
    arms = (counts(rng, mean, (1500, repeats), bursts) for mean in (above, below))
    for a, b in zip(*arms, strict=True):
        if not (a.any() and b.any()) or (a.all() and b.all()):
            continue  # without a ratio, or with one of geometric means
        found = effect(dict(enumerate(a.tolist())), dict(enumerate(b.tolist())))
        assert found
        assert found.of_means
        low, high = bounds(found, 0.95)
        covered.append(low <= above / below <= high)
    assert len(covered) > 300
    assert fmean(covered) >= 0.935


WITHIN_START = 0.018


def on_starts(starts: int, repeats: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """One arm: its repeats in blocks, one a start of the engine, without an effect."""
    shifts = rng.normal(0, START_SPREAD, starts)
    of = {r: 1 + (r - 1) * starts // repeats for r in range(1, repeats + 1)}
    values = {r: float(np.exp(shifts[s - 1] + rng.normal(0, WITHIN_START))) for r, s in of.items()}
    return values, of


def coverage_over_starts(starts: int, repeats: int) -> float:
    rng, covered = np.random.default_rng(starts), []
    for _ in range(500):
        (a, on_a), (b, on_b) = (on_starts(starts, repeats, rng) for _ in range(2))
        found = effect(a, b, starts=(on_a, on_b))
        assert found
        low, high = bounds(found, 0.95)
        covered.append(low <= 1 <= high)
    return fmean(covered)


@pytest.mark.parametrize(("starts", "repeats"), [(1, 5), (2, 5), (3, 5), (4, 5), (4, 10), (6, 6)])
def test_the_interval_covers_what_starts_of_an_engine_differ_by(starts: int, repeats: int) -> None:
    assert coverage_over_starts(starts, repeats) >= 0.93


def test_with_four_starts_their_means_are_the_unit() -> None:
    on = {r: 1 + (r - 1) // 2 for r in range(1, 9)}
    a = {r: 2.0 + 0.1 * on[r] for r in on}  # the same within a start
    b = {r: 1.0 + 0.1 * on[r] for r in on}
    by_start, few = effect(a, b, starts=(on, on)), effect(a, b, starts=({**on, 7: 3, 8: 3}, on))
    of_a, of_b = ({s: arm[2 * s] for s in range(1, 5)} for arm in (a, b))
    means = effect(of_a, of_b)
    assert by_start
    assert few
    assert means
    assert bounds(by_start, 0.95) == pytest.approx(bounds(means, 0.95))
    assert (by_start.starts, few.starts, means.starts) == (ENOUGH_STARTS, 3, None)
    assert (few.error or 0) > START_SPREAD * np.sqrt(1 / 3 + 1 / 4)


@pytest.mark.parametrize(
    ("pair", "starts"), [(("on/short/1", "off/short/1"), 2), (("on/short/1", "on/short/2"), None)]
)
def test_starts_shift_both_points_of_one_engine_alike(
    pair: tuple[str, str], starts: int | None
) -> None:
    values: Mapping[str, Mapping[int, Mapping[str, float | None]]] = {
        point: {r: {"x": 1.0 + r / 10} for r in (1, 2, 3)} for point in pair
    }
    sampling = Sampling(starts={point: {1: 1, 2: 2, 3: 2} for point in pair})
    found = sampling.effect(values, pair, "x")
    assert found
    assert found.starts == starts


# -------------------------------------------------------------------------------------- of means


def rates(variation: float) -> Draw:
    """Rates of mean 1 with a gamma distribution."""
    shape = 1 / variation**2
    return lambda rng, size: rng.gamma(shape, 1 / shape, size)


def shares(mean: float) -> Draw:
    """Shares with a beta distribution."""
    return lambda rng, size: rng.beta(2 * mean, 2 * (1 - mean), size)


@pytest.mark.parametrize(
    ("draw", "mean", "most"),
    [
        *((rates(variation), 1.0, math.inf) for variation in (0.3, 0.6, 1.0)),
        *((shares(mean), mean, 1.0) for mean in (0.05, 0.5, 0.97)),
    ],
)
@pytest.mark.parametrize("repeats", [3, 5])
def test_the_interval_of_a_mean_stays_where_its_figure_can_be(
    draw: Draw, mean: float, most: float, repeats: int
) -> None:
    """It covers at least as often as Student's, which reaches below 0 or above 1."""
    values = draw(np.random.default_rng(repeats), (1000, repeats))
    covered, by_student = 0, 0
    for row in values:
        found = mean_interval(list(row), most=most)
        assert found.low is not None
        assert found.high is not None
        assert 0 <= found.low <= found.value <= found.high <= most
        covered += found.low <= mean <= found.high
        half = scipy.stats.t.ppf(0.975, repeats - 1) * row.std(ddof=1) / math.sqrt(repeats)
        by_student += abs(row.mean() - mean) <= half
    assert covered >= by_student


def test_every_figure_over_repeats_keeps_to_its_metrics_bounds() -> None:
    for name, metric in METRICS.items():
        high = min(metric.most, 100.0)
        found = over_repeats({1: {name: high}, 2: {name: 0.3 * high}}, name)
        assert found
        assert found.low is not None
        assert found.high is not None
        assert 0 < found.low < found.high <= metric.most


def test_an_interval_of_zeros_or_of_a_difference_is_left_as_it_is() -> None:
    assert mean_interval([0.0, 0.0, 0.0]).low == 0
    assert mean_interval([1.0, 1.0, 1.0], most=1).high == 1
    below = mean_interval([-1.0, 1.0, 0.5])
    assert below.low is not None
    assert below.low < -1
