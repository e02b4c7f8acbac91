"""What the plays of a forecast are planned from, and what they come to; a stand-in plays them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from labs.harness.analysis.computed import SEARCH, TWO_ENGINES
from labs.harness.derived.lab_modules import AskedDay
from labs.harness.forecast import forecast
from labs.harness.forecast.forecaster import ForecastError
from labs.harness.forecast.simulated_trials import NO_CAPACITIES, PLAYS_OF_CHANCE, VirtualTrials
from labs.harness.forecast.step_timing import Steps
from labs.harness.reports import markdown, tables
from labs.harness.spec.lab import Lab, Point, Variant
from loadtests.arrivals import Day
from loadtests.workload import Chat, Intruder, Prefix, Workload
from serving.hardware.gpus import DATASHEETS
from serving.metrics import KvUse
from serving.simulator import cards
from serving.simulator.fleet import Scaling
from serving.simulator.protocol import ForecastPlan, ForecastPlay, PlannedTrial
from serving.simulator.traffic import Delays, Play, VirtualAnswer
from tests.unit.builders import CEILINGS, SHAPE, make_lab, make_workload
from tests.unit.test_forecasting import TIMES

STEPS_S = (0.5, 0.25, 1.0)  # as expected, on a faster machine and on a slower one


class Playing:
    """A forecaster whose engines complete one request in each step of the window."""

    def __init__(self, completing: bool = True, one_engine: bool = True) -> None:
        self.completing, self.one_engine = completing, one_engine
        self.plans: list[ForecastPlan] = []

    def send(self, plan: ForecastPlan) -> None:
        self.plans.append(plan)

    def plays(self) -> Iterator[ForecastPlay]:
        for engine in self.plans[-1].engines:
            for trial in engine.trials:
                yield self.played(trial, engine.step_times.linear_s[0] * trial.pace)

    def played(self, trial: PlannedTrial, step_s: float) -> ForecastPlay:
        start_s = trial.traffic.warmup_s
        end_s = start_s + trial.traffic.window_s
        answers = [
            VirtualAnswer(
                index=index, asked_tokens=1, prompt_tokens=6, scheduled_s=start_s + index * step_s,
                sent_s=start_s + index * step_s, chunks=[(start_s + (index + 1) * step_s, 1)],
                in_window=True,
            )
            for index in range(int(trial.traffic.window_s / step_s) if self.completing else 0)
        ]  # fmt: skip
        play = Play(answers=answers, window_s=(start_s, end_s), answered_under_load=True)
        mean = 0.2 * trial.repeat if step_s == STEPS_S[0] else 0.9
        return ForecastPlay(
            key=trial.key, repeat=trial.repeat, play=play, counters={}, kv_capacity_tokens=1000,
            kv_use=KvUse(mean=mean, peak=2 * mean) if self.one_engine else None,
            found_tokens=[2 * n + trial.repeat for n in range(len(answers) - trial.repeat)],
            replicas=1.5 if trial.scaling else None,
        )  # fmt: skip


def make_setup(lab: Lab) -> Any:
    return SimpleNamespace(
        lab=lab, points=lab.points(SHAPE, CEILINGS), places={}, weights={}, datasheet=None,
        on_file=None, elsewhere=False, writer=None,
        model=SimpleNamespace(path=Path("model"), dummy=False),
        machine=SimpleNamespace(kind="cpu", slug="abacus"),
    )  # fmt: skip


def steps_of(points: Sequence[Point]) -> Any:
    steps = [(TIMES.model_copy(update={"linear_s": (s, s, s)}), None) for s in STEPS_S]
    return {p.key: tuple(steps) for p in points}


def make_trials(setup: Any, forecaster: Any) -> VirtualTrials:
    files = {w.name: [Path(f"{w.name}-{n}") for n in (1, 2)] for w in setup.lab.workloads}
    return VirtualTrials(setup, files, steps_of(setup.points), {}, 1.0, forecaster)


def forecast_of(
    lab: Lab,
    forecaster: Playing,
    monkeypatch: pytest.MonkeyPatch,
    reasons: Mapping[str, str] = MappingProxyType({}),
) -> Any:
    @contextmanager
    def started() -> Iterator[Playing]:
        yield forecaster

    monkeypatch.setattr(forecast, "started", started)
    monkeypatch.setattr(forecast, "write_prompts", lambda requests, _: requests)
    monkeypatch.setattr(forecast, "reason_against", lambda _, variant: reasons.get(variant.name))
    monkeypatch.setattr(forecast, "earlier_speeds", lambda _: [])
    monkeypatch.setattr(forecast, "steps_as_timed", lambda _, points, *__: steps_of(points))
    setup = make_setup(lab)
    files = make_trials(setup, forecaster).prompts
    quiet: Any = SimpleNamespace(waiting=lambda text: None)
    return forecast.forecast(setup, files, quiet)


def test_every_repeat_is_played_as_expected_and_the_first_at_both_ends_of_the_band() -> None:
    setup = make_setup(make_lab())
    found = make_trials(setup, forecaster := Playing()).played(setup.points, NO_CAPACITIES)
    assert [plays.point.key for plays in found] == [p.key for p in setup.points]
    for plays in found:
        assert [play.sent for play in plays.as_timed] == [8, 8]  # in 4 s
        assert [play.sent for play in plays.shifted] == [16, 4]
        assert plays.fewest_sent == 4
        assert plays.trial_s == pytest.approx(5)  # with the warm-up
    (plan,) = forecaster.plans
    assert [[t.repeat for t in e.trials] for e in plan.engines] == [[1, 2]] * 4 + [[1]] * 8


@pytest.mark.parametrize(
    ("workload", "apart"),
    [
        (make_workload("concurrent:1", "waves:2", "capacity:1.3"), 0),
        (make_workload("poisson:1"), 2),  # a schedule has times of its own
        (make_workload("contended:1/2", intruder=Intruder(prompt_tokens=64)), 2),  # as has a period
        (make_workload("sessions:2/1", chat=Chat(turns=2, grows_tokens=2)), 2),  # and a gap
    ],
)
def test_where_all_times_differ_by_a_factor_one_play_serves_for_the_band(
    workload: Workload, apart: int
) -> None:
    setup = make_setup(lab := make_lab(workloads=(workload,), window_s=40, repeats=1, claims=()))
    expected, faster, slower = ((TIMES.times(factor), None) for factor in (1, 0.5, 2))
    steps: Steps = {p.key: (expected, faster, slower) for p in setup.points}
    trials = replace(make_trials(setup, forecaster := Playing()), steps=steps)
    found = trials.played(setup.points, (1.0, 2.0, 0.5))
    assert len(forecaster.plans[0].engines) == (1 + apart) * len(found)
    for plays in found:
        ttft, served = (plays.bands(lab)[name] for name in ("ttft_p50_s", "requests_per_s"))
        assert (ttft.low, ttft.high) == pytest.approx((ttft.value / 2, 2 * ttft.value))
        assert (served.low, served.high) == pytest.approx((served.value / 2, 2 * served.value))


def test_figures_of_a_card_have_its_hosts_delays() -> None:
    setup = make_setup(make_lab())
    plans = []
    for setup.datasheet in (None, DATASHEETS["NVIDIA H100 80GB HBM3"]):
        make_trials(setup, forecaster := Playing()).played(setup.points, NO_CAPACITIES)
        plans += forecaster.plans
    assert [plan.delays for plan in plans] == [Delays(), cards.DELAYS]


def test_a_band_holds_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab(window_s=40)
    found = forecast_of(lab, Playing(), monkeypatch)
    for point in lab.points(SHAPE, CEILINGS):
        band = found.points[point.key]["ttft_p50_s"]
        assert (band.low, band.value, band.high) == pytest.approx((0.25, 0.5, 1.0))
        assert found.trial_s[point.key] == pytest.approx(41)


def test_what_each_request_finds_is_kept_where_chance_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fewest of any play, as far as all plays go; a slower machine's finds no other tokens."""
    workloads = (
        make_workload(
            name=name, primed=not by_chance, prefix=Prefix(tokens=4, groups=2, shuffled=by_chance)
        )
        for name, by_chance in (("shuffled", True), ("alike", False))
    )
    lab = make_lab(workloads=tuple(workloads))
    found = forecast_of(lab, Playing(), monkeypatch)
    assert found.least_found == {"on/shuffled/concurrent-1": (1, 3, 5, 7, 9, 11)}


def test_loads_are_multiples_of_the_capacity_that_each_step_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slower machine is offered less."""
    workload = make_workload("concurrent:2", "capacity:1.5")
    forecaster = Playing()
    found = forecast_of(make_lab(workloads=(workload,)), forecaster, monkeypatch)
    assert set(found.points) == {
        f"{v}/short/{load}" for v in ("off", "on") for load in ("concurrent-2", "capacity-1.5")
    }
    first, everything = forecaster.plans
    assert {t.key for e in first.engines for t in e.trials} == {"off/short/concurrent-2"}
    offered = {
        e.step_times.linear_s[0]: len(t.traffic.schedule_s)
        for e in everything.engines
        for t in e.trials
        if t.repeat == 1 and t.traffic.kind == "open"
    }
    expected, faster, slower = (offered[step_s] for step_s in STEPS_S)
    assert slower < expected < faster


def one_more(points: Sequence[Point]) -> list[Point]:
    (base,) = (p for p in points if p.key == "on/short/capacity-1.5")
    twice = base.variant.but("batch-2", {"max-num-seqs": 2, "max-num-queued-reqs": 3})
    return [replace(base, variant=twice)]


def test_settings_to_look_among_are_played_once_and_are_no_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As their step that of the first point is taken."""
    lab = make_lab(workloads=(make_workload("concurrent:2", "capacity:1.5"),), searched=one_more)
    found = forecast_of(lab, forecaster := Playing(), monkeypatch)
    (alone,) = found.searched
    assert not [key for key in found.points if "batch-2" in key]
    assert (alone.flags["max-num-seqs"], alone.flags["max-num-queued-reqs"]) == (2, 3)
    assert alone.figures["ttft_p50_s"] == pytest.approx(STEPS_S[0])
    (engine,) = forecaster.plans[-1].engines
    (trial,) = engine.trials
    assert (trial.repeat, trial.traffic.kind) == (1, "open")
    assert not forecast_of(make_lab(), Playing(), monkeypatch).searched


@pytest.mark.parametrize("search", [one_more, None])
def test_where_all_loads_are_multiples_of_a_capacity_that_is_unknown_nothing_is_forecast(
    monkeypatch: pytest.MonkeyPatch, search: Any
) -> None:
    """The first point has none, so that nothing tells the capacity, nor the search its step."""
    alone = make_workload("concurrent:2", name="alone", only=("off",))
    lab = make_lab(
        workloads=(alone, make_workload("capacity:1.5")), searched=search, claims=(), evidence=()
    )
    reasons = {"off": "a compiled step was not timed"}
    found = forecast_of(lab, Playing(), monkeypatch, reasons)
    assert (found.points, found.searched, found.without) == ({}, (), reasons)


def test_limits_of_the_client_are_played_in_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    off = Variant(name="off")
    limited = off.but("on", {"max-num-queued-reqs": 3, "max-num-queued-tokens": 40})
    for by_client in (False, True):
        lab = make_lab(variants=(off, limited), admission_by_client=by_client)
        forecast_of(lab, forecaster := Playing(), monkeypatch)
        argv = {word for e in forecaster.plans[-1].engines for word in e.argv}
        held = {
            (t.traffic.most_requests, t.traffic.most_prompt_tokens)
            for e in forecaster.plans[-1].engines
            for t in e.trials
        }
        assert ("--max-num-queued-reqs" in argv) != by_client
        assert held == ({(None, None), (3, 40)} if by_client else {(None, None)})


@pytest.mark.parametrize("by_client", [False, True])
def test_limits_of_the_client_on_a_fleet_are_those_of_all_its_engines(by_client: bool) -> None:
    off = Variant(name="off")
    limited = off.but("on", {"max-num-queued-reqs": 3, "max-num-queued-tokens": 40})
    setup = make_setup(make_lab(variants=(off, limited), admission_by_client=by_client))
    trials = make_trials(setup, Playing())
    of_all = {}
    for point in setup.points:
        (engine,) = trials.of_a_fleet(point, 4, "round-robin")[0].engines
        (trial,) = engine.trials
        limits = (trial.traffic.most_requests, trial.traffic.most_prompt_tokens)
        of_all[point.variant.name] = limits
        of_each = point.variant.name == "on" and not by_client
        assert ("--max-num-queued-reqs" in engine.argv) == of_each
    assert of_all == {"off": (None, None), "on": (12, 160) if by_client else (None, None)}


def test_without_a_capacity_no_multiple_of_it_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = make_workload("concurrent:2", "capacity:1.5")
    forecaster = Playing(completing=False)
    found = forecast_of(make_lab(workloads=(workload,)), forecaster, monkeypatch)
    assert set(found.points) == {"off/short/concurrent-2", "on/short/concurrent-2"}
    assert found.watches == {}


def test_streams_beside_long_prompts_are_played_at_several_speeds() -> None:
    workload = make_workload("contended:2/1", intruder=Intruder(prompt_tokens=64))
    setup = make_setup(make_lab(workloads=(workload,)))
    make_trials(setup, forecaster := Playing()).played(setup.points, NO_CAPACITIES)
    trials = forecaster.plans[0].engines[0].trials
    assert len({trial.pace for trial in trials}) == len(trials) == PLAYS_OF_CHANCE
    assert {trial.repeat for trial in trials} == {1, 2}


def test_what_is_watched_is_that_of_the_expected_step(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = make_workload("concurrent:2", "ramp:0.5/1.5")
    sizes = {"max-num-seqs": 4, "num-gpu-blocks-override": 100, "block-size": 16}
    flags = {"max-model-len": 128, **sizes}
    lab = make_lab(name="overload", findings=("alarms",), workloads=(workload,), flags=flags)
    found = forecast_of(lab, Playing(), monkeypatch)
    assert {key: len(of) for key, of in found.watches.items()} == {
        "off/short/ramp-0.5-1.5": 2, "on/short/ramp-0.5-1.5": 2,
    }  # fmt: skip


def test_a_trace_is_played_to_its_end_by_engines_without_a_stated_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No finding asks for its signals, which have no thresholds there."""
    trace = tuple((0.5 * i, 8, 4) for i in range(9))
    lab = make_lab(name="overload", findings=("alarms",)).replaying(trace)
    assert not any("max-num-seqs" in flags for flags in lab.all_flags)
    forecaster = Playing()
    found = forecast_of(lab, forecaster, monkeypatch)
    assert set(found.points) == {"off/trace/replay-1", "on/trace/replay-1"}
    assert found.watches == {}
    (plan,) = forecaster.plans
    assert {len(t.traffic.schedule_s) for e in plan.engines for t in e.trials} == {len(trace)}


def test_the_cache_in_use_has_a_band_as_other_figures_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A faster and a slower step use 0.9 of it where the two plays, as timed, use 0.2 and 0.4."""
    without = forecast_of(make_lab(), Playing(one_engine=False), monkeypatch)
    assert without.kv_use == without.kv_bands == {}
    found = forecast_of(make_lab(), Playing(), monkeypatch)
    assert found.kv_bands.keys() == found.kv_use.keys() == found.points.keys()
    for key, bands in found.kv_bands.items():
        assert bands["mean"].value == pytest.approx(found.kv_use[key].mean) == pytest.approx(0.3)
        assert bands["peak"].value == pytest.approx(found.kv_use[key].peak) == pytest.approx(0.6)
        assert bands["mean"].low <= 0.3
        assert bands["mean"].high == pytest.approx(0.9)
    told = markdown.fragment([tables.in_virtual_time(make_lab(), found)])
    assert re.search(r"\| 30% \(\d+% to 90%\) \|", told)


def test_the_first_play_of_what_a_lab_draws_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own: dict[str, Any] = {
        "variants": (Variant(name="base", flags={}),), "claims": (), "evidence": (),
        "workloads": (make_workload("waves:8", "concurrent:8", "poisson:2"),),
        "plots": ("static",),
    }  # fmt: skip
    found = forecast_of(make_lab(name="continuous-batching", **own), Playing(), monkeypatch)
    assert [*found.timelines] == ["base/short/waves-8", "base/short/concurrent-8"]
    line = found.timelines["base/short/waves-8"]
    assert line.decoding_s[:2] == ((1.5, 1.5), (2.0, 2.0))  # at the expected step of 0.5 s
    assert forecast_of(make_lab(**own), Playing(), monkeypatch).timelines == {}


def beside_a_long_prompt() -> Lab:
    """Streams beside a long prompt of 32 tokens, which one engine cuts and one prefills whole."""
    return make_lab(
        name="chunked-prefill",
        variants=tuple(
            Variant(name=n, flags={"enable-chunked-prefill": cut, "max-num-batched-tokens": tokens})
            for n, cut, tokens in (("small", True, 8), ("large", True, 64), ("whole", False, 64))
        ),
        workloads=(make_workload("contended:2/1", intruder=Intruder(prompt_tokens=32)),),
        claims=(), evidence=(), findings=("token-budget",),
    )  # fmt: skip


def test_a_split_and_two_of_the_cutting_engine_are_played_after_everything_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forecaster = Playing()
    found = forecast_of(beside_a_long_prompt(), forecaster, monkeypatch)
    assert [(two.point.partition("/")[0], two.link_gbit_per_s) for two in found.on_two] == [
        ("whole", 1), ("whole", 10), ("whole", 100), ("small", None),
    ]  # fmt: skip
    _, *on_two = forecaster.plans
    split, shared = on_two[0].engines[0], on_two[-1].engines[0]
    assert split.handover
    assert split.handover.bytes_per_token == SHAPE.kv_bytes_per_token()
    assert split.handover.link_bytes_per_s == 125e6
    assert (shared.handover, shared.replicas) == (None, 2)
    assert {t.routing.rule for e in on_two[-1].engines for t in e.trials} == {"least-loaded"}
    assert [[len(e.trials) for e in plan.engines] for plan in on_two] == [
        [PLAYS_OF_CHANCE, 1, 1]
    ] * 4
    # two servers prepare requests side by side, and one alone those of a split pair
    assert [plan.delays.serial_s for plan in on_two] == [0.002] * 3 + [0.001]
    throughput = found.on_two[0].bands["output_tokens_per_s"]
    assert throughput.low < throughput.value < throughput.high
    assert "on_two" in found.model_dump()
    assert "on_two" not in forecast_of(make_lab(), Playing(), monkeypatch).model_dump()


def test_a_days_requests_are_played_on_a_number_of_engines_that_follows_them(
    tmp_path: Path,
) -> None:
    """All of them are of the mean length; an answer is one token, a step after it was sent."""
    setup, forecaster = make_setup(make_lab()), Playing()
    point = setup.points[0]
    trials = make_trials(setup, forecaster)
    trials = replace(trials, prompts={point.workload.name: [tmp_path / "short.prompts"]})
    scaling = Scaling(rule="queue", start_s=7, threshold=2)
    asked = AskedDay("queue", point, Day(night=0.5, peak=2), 20, 3, scaling)
    (found,) = trials.days([asked], capacity_per_s=4)
    assert (found.name, found.start_s, found.replicas) == ("queue", 7, 1.5)
    assert (found.requests, found.late) == (20 / STEPS_S[0], 0)
    (engine,) = forecaster.plans[-1].engines
    (trial,) = engine.trials
    assert (engine.replicas, trial.scaling) == (3, scaling)
    sent = [json.loads(line) for line in trial.requests.read_text().splitlines()]
    assert len(sent) == len(trial.traffic.schedule_s) > 20
    assert {request["prompt_tokens"] for request in sent} == {round(point.prompt_tokens)}


@pytest.mark.parametrize(("kind", "on_cuda"), [("cpu", False), ("gpu", True)])
def test_a_gpus_engine_schedules_as_on_cuda(kind: str, on_cuda: bool) -> None:
    setup = make_setup(make_lab())
    setup.machine.kind = kind
    make_trials(setup, forecaster := Playing()).played(setup.points, NO_CAPACITIES)
    assert {engine.on_cuda for engine in forecaster.plans[0].engines} == {on_cuda}


@pytest.mark.parametrize("part", [SEARCH, TWO_ENGINES])
def test_where_what_stands_beside_the_points_cannot_be_played_their_forecasts_stay(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part == SEARCH:
        workload = make_workload("concurrent:2", "capacity:1.5")
        lab, before = make_lab(workloads=(workload,), searched=one_more), 2  # capacity, points
    else:
        lab, before = beside_a_long_prompt(), 1

    class PointsOnly(Playing):
        def send(self, plan: ForecastPlan) -> None:
            super().send(plan)
            if len(self.plans) > before:
                raise ForecastError("no such flag")

    found = forecast_of(lab, PointsOnly(), monkeypatch)
    assert len(found.points) == len(lab.points(SHAPE, CEILINGS))
    assert (found.searched, found.on_two) == ((), ())
    assert found.without == {part: "no such flag"}
