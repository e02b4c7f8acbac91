"""When requests are sent."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest
import scipy
from pydantic import ValidationError

from loadtests.arrivals import (
    Arrival,
    Capped,
    Concurrent,
    Constant,
    Contended,
    Day,
    Gamma,
    LogNormal,
    Offered,
    Poisson,
    Ramp,
    Replay,
    Sessions,
    Waves,
    send_times,
)
from tests.cases import each
from tests.unit.builders import parse

RATE_PER_S, DURATION_S, SEEDS = 20.0, 100.0, range(40)


@pytest.mark.parametrize(
    ("text", "arrival"),
    [
        ("concurrent:8", Concurrent(users=8)),
        ("waves:32", Waves(size=32)),
        ("concurrent:1024", Concurrent(users=1024)),
        ("poisson:2.5", Poisson(rate_per_s=2.5)),
        (f"poisson:{1 / 3!r}", Poisson(rate_per_s=1 / 3)),
        ("constant:0.25", Constant(rate_per_s=0.25)),
        ("gamma:8/0.5", Gamma(rate_per_s=8, burstiness=0.5)),
        ("replay:2", Replay(speed=2)),
        ("capped:1/8", Capped(speed=1, users=8)),
        ("contended:4/2.5", Contended(users=4, every_s=2.5)),
        ("sessions:5/0", Sessions(users=5, gap_s=0)),
        ("sessions:5/2.5", Sessions(users=5, gap_s=2.5)),
        ("lognormal:5/2/1", LogNormal(users=5, gap_s=2, sigma=1)),
        ("capacity:1.3", Offered(times=1.3)),
        ("ramp:0.5/2.5", Ramp(first=0.5, last=2.5)),
        ("day:0.3/1.4", Day(night=0.3, peak=1.4)),
    ],
)
def test_text_form_reads_back(text: str, arrival: Arrival) -> None:
    assert parse(text) == arrival
    assert str(arrival) == text
    assert arrival.name == text.replace(":", "-").replace("/", "-")


@each("text", ["bursty:3", "concurrent", "8", "", "contended:4", "concurrent:4/2"])
def test_unknown_arrival_names_the_known_ones(text: str) -> None:
    with pytest.raises(ValidationError, match=r"concurrent:<users>, .*, ramp:<first>/<last>"):
        parse(text)


@pytest.mark.parametrize(
    "text",
    ["concurrent:0", "waves:0", "concurrent:1025", "waves:1025", "concurrent:1.5", "poisson:0",
     "constant:-1", "poisson:nan", "poisson:inf", "poisson:many", "contended:0/2", "contended:4/0",
     "gamma:8/0", "gamma:0/1", "replay:0",
     "contended:4/inf", "sessions:0/2", "sessions:4/-1",
     "lognormal:5/2/0", "lognormal:5/2/4"],
)  # fmt: skip
def test_level_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        parse(text)


@pytest.mark.parametrize(("rate_per_s", "users"), [(0.1, 16), (2, 120), (100, 1024)])
def test_open_loop_has_a_minute_of_users(rate_per_s: float, users: int) -> None:
    assert Poisson(rate_per_s=rate_per_s).users == users


def test_schedules_are_open_loop() -> None:
    opened = ["poisson:1", "constant:1", "gamma:1/1", "replay:1", "capacity:1", "ramp:1/2"]
    texts = ("concurrent:1", "waves:1", *opened, "contended:1/1")
    assert [t for t in texts if parse(t).open_loop] == opened


def test_an_intruder_takes_a_seat_beside_the_users() -> None:
    assert (parse("contended:4/2").users, parse("contended:4/2").seats) == (4, 5)
    for text in ("concurrent:8", "waves:8", "poisson:2", "constant:100"):
        assert parse(text).seats == parse(text).users


def test_sessions_begin_one_after_another_within_a_gap() -> None:
    arrival = Sessions(users=4, gap_s=2)
    assert [*map(arrival.begins_s, range(4))] == [0, 0.5, 1, 1.5]


@each("sigma", [0.5, 1.0, 1.5])
def test_drawn_gaps_are_log_normal_with_their_mean(sigma: float) -> None:
    arrival = LogNormal(users=5, gap_s=2, sigma=sigma)
    logs = np.log(arrival.gaps_s)
    assert np.mean(arrival.gaps_s) == pytest.approx(2)
    assert np.std(logs) == pytest.approx(sigma, rel=0.05)
    assert scipy.stats.kstest((logs - logs.mean()) / sigma, "norm").pvalue > 0.9
    assert abs(np.corrcoef(arrival.gaps_s[:-1], arrival.gaps_s[1:])[0, 1]) < 0.25  # in no order


def test_gaps_that_are_not_drawn_are_equal() -> None:
    assert Sessions(users=5, gap_s=2).gaps_s == (2,)


def poisson(seed: int) -> list[float]:
    return Poisson(rate_per_s=RATE_PER_S).schedule(DURATION_S, random.Random(seed))


def test_poisson_gaps_are_exponential() -> None:
    gaps = [b - a for seed in SEEDS for a, b in pairwise([0.0, *poisson(seed)])]
    assert scipy.stats.kstest(gaps, "expon", args=(0, 1 / RATE_PER_S)).pvalue > 0.01


def test_poisson_is_the_same_for_the_same_seed_on_any_machine() -> None:
    times = Poisson(rate_per_s=2).schedule(100, random.Random("0/times"))
    assert times == Poisson(rate_per_s=2).schedule(100, random.Random("0/times"))
    assert times[:3] == pytest.approx([0.688749306561378, 1.8077633022658763, 2.6677460242122457])
    assert all(0 <= t < 100 for t in times)
    assert times != Poisson(rate_per_s=2).schedule(100, random.Random("1/times"))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_their_mean_and_burstiness(burstiness: float) -> None:
    arrival = Gamma(rate_per_s=RATE_PER_S, burstiness=burstiness)
    drawn = [arrival.schedule(DURATION_S, random.Random(seed)) for seed in SEEDS]
    gaps = [b - a for times in drawn for a, b in pairwise([0.0, *times])]
    assert np.mean(gaps) == pytest.approx(1 / RATE_PER_S, rel=0.05)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)
    assert all(0 <= t < DURATION_S for times in drawn for t in times)
    assert drawn[0] == arrival.schedule(DURATION_S, random.Random(0))


def test_constant_spacing_is_exact() -> None:
    assert Constant(rate_per_s=4).schedule(1.5, random.Random()) == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert Constant(rate_per_s=0.25).schedule(10, random.Random()) == [0, 4, 8]


def test_a_multiple_of_the_capacity_is_poisson_at_that_rate() -> None:
    times = Offered(times=1.5).schedule(100, random.Random("0/times"), 4.0)
    assert times == Poisson(rate_per_s=6).schedule(100, random.Random("0/times"))
    assert send_times(Offered(times=1.5), 100, 0, 4.0) == times
    assert send_times(Poisson(rate_per_s=6), 100, 0, None) == times


def test_twice_the_capacity_on_a_machine_half_as_fast_is_the_same_in_its_own_time() -> None:
    fast, slow = (Offered(times=2).schedule(d, random.Random(1), c) for d, c in ((10, 8), (20, 4)))
    assert slow == pytest.approx([2 * at for at in fast])


def test_a_load_of_an_unknown_capacity_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity:2 needs"):
        send_times(Offered(times=2), 10, 0, None)


def test_closed_loops_and_traces_have_no_times_to_draw() -> None:
    for text in ("concurrent:8", "waves:8", "contended:4/2", "replay:1", "sessions:8/2"):
        assert send_times(parse(text), 10, 0, None) is None


@pytest.mark.parametrize(("first", "last"), [(0.5, 2.5), (2.5, 0.5), (1.0, 1.0)])
def test_a_ramp_rises_evenly(first: float, last: float) -> None:
    """In each quarter as many come as the mean rate there says: a uniform variable, transformed."""
    ramp, capacity_per_s = Ramp(first=first, last=last), 50.0
    times = [t for seed in SEEDS for t in ramp.schedule(DURATION_S, random.Random(seed), 50.0)]
    share = np.array(times) / DURATION_S
    passed = (first * share + (last - first) * share**2 / 2) / ((first + last) / 2)
    assert scipy.stats.kstest(passed, "uniform").pvalue > 0.01
    expected = capacity_per_s * (first + last) / 2 * DURATION_S * len(SEEDS)
    assert abs(len(times) - expected) < 4 * math.sqrt(expected)
    assert min(times) >= 0
    assert max(times) < DURATION_S


def test_a_day_has_its_night_and_two_peaks() -> None:
    """Shares of the day in which as many come as the rate there says, and a seed repeats it."""
    day, capacity_per_s = Day(night=0.2, peak=1.4), 20.0
    assert [round(day.times_at(hour), 3) for hour in (0, 4, 11, 14, 20, 24)] == [
        0.56, 0.2, 0.92, 0.68, 1.4, 0.56,
    ]  # fmt: skip
    times = [t for seed in SEEDS for t in day.schedule(240.0, random.Random(seed), capacity_per_s)]
    hours = np.array(times) / 10
    for begins, ends in ((3, 5), (10, 12), (19, 21)):
        came = np.count_nonzero((hours >= begins) & (hours < ends))
        grid = np.linspace(begins, ends, 401)
        expected = np.mean([day.times_at(h) for h in grid]) * capacity_per_s * 20 * len(SEEDS)
        assert abs(came - expected) < 4 * math.sqrt(expected)
    assert day.schedule(60, random.Random(1), 5.0) == day.schedule(60, random.Random(1), 5.0)
    with pytest.raises(ValidationError, match="peak"):
        Day(night=1, peak=0.5)
