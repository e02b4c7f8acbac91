"""Engines that take turns, as on a GPU: there and back, and one that does not start costs its own
trials alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs.harness.analysis.computed import PointForecasts
from labs.harness.analysis.probes import Probe
from labs.harness.derived.design import sampling_of, starts_on_file, took_turns
from labs.harness.derived.summarize import summarise
from labs.harness.forecast.request_counts import Counts
from labs.harness.plan.time_budget import PER_TRIAL_S, Clock, TimeUsedUp
from labs.harness.runner import run as running
from labs.harness.runner.engines import Engines, order_of_engines, resident_groups
from labs.harness.runner.harness import Harness
from labs.harness.runner.trials import Trials, interleave
from labs.harness.spec.lab import Point, Variant
from labs.harness.storage.recorded import Session, TrialResult, Undecided
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from serving.engines.base import EngineError
from tests.unit.builders import SHAPE, make_lab, write_run

A, B, C = (Variant(name=name) for name in "ABC")


class NotedEngines(Engines):
    """Engines whose starts are noted; those named in `dead` do not start."""

    def __init__(
        self, setup: Any, folder: RunFolder, prometheus: Any, progress: Any, on_file: dict[str, int]
    ) -> None:
        super().__init__(setup, folder.path, prometheus, {}, progress, on_file)
        self.noted, self.dead = list[str](), set[str]()
        self.interrupted_at = ""  # the trials of this variant

    def _start(self, variant: Variant) -> Any:
        self.noted.append(variant.name)
        engine: Any = SimpleNamespace(stop=lambda: None, died=lambda: None)
        self._serving[variant.name] = engine
        return engine

    def _wait(self, variant: Variant, engine: Any) -> None:
        if variant.name in self.dead:
            raise EngineError("no kernel")


class NotedTrials(Trials):
    """Trials that are noted, and take no time."""

    def __init__(self, setup: Any, folder: RunFolder, engines: NotedEngines, progress: Any) -> None:
        nothing: Any = None
        super().__init__(
            setup, folder, folder.path, engines, nothing, nothing, nothing, progress, in_turn=True
        )
        self.noted, self.engines = engines.noted, engines

    def play(self, point: Point, repeat: int, beside: Sequence[Point] = ()) -> None:
        for each in (point, *beside):
            if each.variant.name == self.engines.interrupted_at:
                raise KeyboardInterrupt
            self.noted.append(str(repeat))
            start = self.engines.starts[each.variant.name] if self._in_turn else None
            self._write(each, TrialResult(point=each.key, repeat=repeat, start=start))


class Noted(Harness):
    """A harness without processes, that tells in which order engines start and trials play."""

    def __init__(self, folder: RunFolder) -> None:
        lab, points, self.steps = folder.run().rebuilt_lab(), folder.run().points(), list[str]()
        setup: Any = SimpleNamespace(
            lab=lab, points=points, endpoint=None, machine=folder.run().machine, clock=Clock()
        )
        progress: Any = SimpleNamespace(message=self.steps.append, expect=lambda seconds: None)
        prometheus: Any = SimpleNamespace(forget=lambda kind: None)
        on_file = starts_on_file(folder, points, lab)
        engines = NotedEngines(setup, folder, prometheus, progress, on_file)
        self.noted, self.dead = engines.noted, engines.dead
        trials = NotedTrials(setup, folder, engines, progress)
        counts = Counts(folder.path.name, exporter_port=1)
        groups = [[v] for v in lab.variants]
        super().__init__(setup, folder, progress, prometheus, engines, trials, counts, groups)

    def _probe(self, variant: Variant) -> None:
        self.noted += self._probes_due(variant)

    def goes(self, repeats: int, starts: int = 1) -> str:
        """Through all engines in turn; what was noted."""
        for trip in order_of_engines(self.groups, range(1, repeats + 1), starts):
            for group, some in trip:
                self.play_repeats(group, some)
        return " ".join(self.noted)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of `off` and `on` under two loads, of which no trial is on file."""
    folder = write_run(tmp_path)
    for path in folder.path.rglob("trial.json"):
        path.unlink()
    return folder


def test_engines_in_turn_are_visited_there_and_back() -> None:
    def visits(groups: list[list[Variant]], repeats: int, starts: int) -> list[str]:
        trips = order_of_engines(groups, range(1, repeats + 1), starts)
        return [
            " ".join(f"{''.join(v.name for v in group)}{some}" for group, some in trip)
            for trip in trips
        ]

    assert visits([[A], [B], [C]], 3, starts=2) == ["A[1, 2] B[1, 2] C[1, 2]", "C[3] B[3] A[3]"]
    assert visits([[A], [B]], 5, starts=4) == [
        "A[1, 2] B[1, 2]", "B[3] A[3]", "A[4] B[4]", "B[5] A[5]",
    ]  # fmt: skip
    assert visits([[A], [B]], 2, starts=1) == ["A[1, 2] B[1, 2]"]
    assert visits([[A], [B]], 1, starts=4) == ["A[1] B[1]"]
    assert visits([[A, B, C]], 3, starts=2) == ["ABC[1]", "ABC[2]", "ABC[3]"]


def test_the_order_of_turns_is_drawn_from_the_seed() -> None:
    lab = make_lab()

    def order(seed: int) -> list[str]:
        setup: Any = SimpleNamespace(
            lab=lab.model_copy(update={"seed": seed}),
            endpoint=None,
            machine=SimpleNamespace(kind="gpu"),
            model=SimpleNamespace(shape=SHAPE),
            weights={},
        )
        return [variant.name for (variant,) in resident_groups(setup)]

    orders = [order(seed) for seed in range(20)]
    assert orders == [order(seed) for seed in range(20)]
    assert {frozenset(o) for o in orders} == {frozenset(v.name for v in lab.variants)}
    firsts = [o[0] for o in orders]
    assert all(firsts.count(v.name) >= 3 for v in lab.variants)


def test_a_resumed_run_goes_on_with_its_engines_as_they_were(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever memory is free by then."""
    run, lab, points = folder.run(), folder.run().rebuilt_lab(), folder.run().points()
    setup: Any = SimpleNamespace(
        lab=lab, points=points, endpoint=None, machine=run.machine,
        model=SimpleNamespace(shape=SHAPE),
    )  # fmt: skip

    def groups(free_bytes: float) -> int:
        monkeypatch.setattr("labs.harness.runner.engines.available_bytes", lambda: free_bytes)
        return len(resident_groups(setup, took_turns(folder, points, lab)))

    assert (groups(2**60), groups(1)) == (1, 2)  # nothing is on file
    failed = TrialResult(point=points[0].key, repeat=1, failed="no memory")
    write_json(folder.trial_folder(points[0], 1) / "trial.json", failed)
    assert (groups(2**60), groups(1)) == (1, 2)
    for start, count in ((None, 1), (2, 2)):
        result = TrialResult(point=points[1].key, repeat=1, start=start)
        write_json(folder.trial_folder(points[1], 1) / "trial.json", result)
        assert (groups(2**60), groups(1)) == (count, count)


def set_lab(folder: RunFolder, **fields: Any) -> None:
    lab = {**folder.run().lab, **fields}
    write_json(folder.path / "run.json", folder.run().model_copy(update={"lab": lab}))


def write_session(folder: RunFolder, resident: bool, there_and_back: bool) -> None:
    session = Session(
        engine_start_s=1,
        load_s=1,
        wall_s=4,
        resident=resident,
        there_and_back=there_and_back,
        agreement=[],
        prometheus=None,
    )
    write_json(folder.path / "session.json", session)


def starts_of(folder: RunFolder) -> dict[str, dict[int, int]]:
    run = folder.run()
    starts = sampling_of(folder, run.points(), run.rebuilt_lab()).starts
    return {point: dict(of_point) for point, of_point in starts.items()}


def test_every_trip_starts_its_engines_anew_and_trials_know_their_start(folder: RunFolder) -> None:
    set_lab(folder, repeats=4)
    assert Noted(folder).goes(4, starts=2) == "off 1 1 2 2 on 1 1 2 2 on 3 3 4 4 off 3 3 4 4"
    assert set(starts_of(folder)) == {p.key for p in folder.run().points()}
    assert all(of == {1: 1, 2: 1, 3: 2, 4: 2} for of in starts_of(folder).values())
    assert Noted(folder).goes(4, starts=2) == ""  # all of it is on file


def test_a_later_sitting_goes_on_counting_starts(folder: RunFolder) -> None:
    set_lab(folder, repeats=2)
    Noted(folder).goes(2, starts=2)
    (folder.path / "trials/on/short/concurrent-1/2/trial.json").unlink()
    assert Noted(folder).goes(2, starts=2) == "on 2"
    assert starts_of(folder)["on/short/concurrent-1"] == {1: 1, 2: 3}
    assert starts_of(folder)["on/short/concurrent-2"] == {1: 1, 2: 2}


def _interrupt(as_expected: bool) -> None:
    assert as_expected
    raise KeyboardInterrupt


class Halted(Engines):
    """Engines of A, B and C without processes; `now` has the names of those that are suspended."""

    def __init__(self, kind: str, endpoint: object = None) -> None:
        setup: Any = SimpleNamespace(machine=SimpleNamespace(kind=kind), endpoint=endpoint)
        nothing: Any = None
        super().__init__(setup, Path(), nothing, {}, nothing)
        self.now = set[str]()
        for v in (A, B, C):
            engine: Any = SimpleNamespace(
                suspend=partial(self.now.add, v.name), resume=partial(self.now.discard, v.name)
            )
            self._serving[v.name] = engine


def test_on_a_cpu_engines_are_suspended_while_others_are_measured() -> None:
    engines = Halted("cpu")
    with engines.others_suspended([B]):
        assert engines.now == {"A", "C"}
    assert not engines.now
    with pytest.raises(KeyboardInterrupt), engines.others_suspended([A, C]):
        _interrupt(engines.now == {"B"})
    assert not engines.now
    for kind, endpoint in (("gpu", None), ("cpu", object())):
        running = Halted(kind, endpoint)
        with running.others_suspended([B]):
            assert not running.now


def test_the_trials_of_an_engine_that_does_not_start_fail_with_its_reason(
    folder: RunFolder,
) -> None:
    harness = Noted(folder)
    harness.dead.add("on")
    assert harness.goes(2) == "off 1 1 2 2 on"
    for point, repeat in interleave(harness.setup, harness.setup.lab.variants):
        found = folder.trial_result(point, repeat)
        assert found
        assert found.failed == ("no kernel" if point.variant.name == "on" else None)
    assert harness.steps == ["no kernel"]
    on, last = harness.setup.lab.variants[1:], harness.setup.points[-1]
    harness.play_trials(on, [(last, 1)], probe=False)
    assert harness.noted[-1] == "on"
    assert harness.noted.count("on") == 1  # it is not tried again


def test_engines_that_do_not_start_together_take_turns(folder: RunFolder) -> None:
    """So that what cannot start costs its own trials, not the run."""
    harness = Noted(folder)
    variants = list(harness.setup.lab.variants)
    harness.groups, harness.trials._in_turn = [variants], False
    harness.dead.add("on")
    harness.play_lab()
    failed = {
        point.variant.name: result.failed
        for point, repeat in interleave(harness.setup, variants)
        if (result := folder.trial_result(point, repeat))
    }
    assert failed == {"off": None, "on": "no kernel"}
    dead, in_turn, again = harness.steps
    assert dead == again == "no kernel"
    assert "take turns" in in_turn
    assert [len(group) for group in harness.groups] == [1, 1]
    assert harness.trials._in_turn


def test_where_trials_were_played_together_a_failing_group_is_not_taken_apart(
    folder: RunFolder,
) -> None:
    """The trials of one run are compared with one another."""
    harness = Noted(folder)
    harness.groups = [list(harness.setup.lab.variants)]
    point = harness.setup.points[0]
    played = TrialResult(point=point.key, repeat=1)
    write_json(folder.trial_folder(point, 1) / "trial.json", played)
    harness.dead.add("on")
    harness.play_lab()
    assert len(harness.groups) == 1
    assert harness.steps == ["no kernel"]


def test_a_variant_that_is_probed_alone_has_its_turn(folder: RunFolder) -> None:
    """It has no trials whose last repeat could tell that the probes are due."""
    set_lab(folder, probes=["needles"], probed=["on"])
    harness = Noted(folder)
    setup: Any = harness.setup
    setup.points = [point for point in setup.points if point.variant.name == "off"]
    assert harness.goes(2, starts=2) == "off 1 1 on needles off 2 2"


def test_engines_are_probed_after_the_last_of_their_own_trials(folder: RunFolder) -> None:
    """No claim compares `off`, so it has fewer repeats, and no start for its probe alone."""
    (claim,) = folder.run().lab["claims"]
    claims = [{**claim, "baseline": {"variant": "off", "workload": "of another lab"}}]
    set_lab(folder, claims=claims, repeats=3, curve_repeats=1, probes=["needles"])
    assert Noted(folder).goes(3, starts=2) == "off 1 1 needles on 1 1 2 2 on 3 3 needles"


def test_a_probe_that_fails_costs_itself_alone(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gives_nothing(_: object) -> dict[str, Any]:
        raise KeyError("choices")

    probes = {"faulty": Probe(gives_nothing), "sound": Probe(lambda _: {"answers": 1})}
    monkeypatch.setattr("labs.harness.runner.harness.probes_of", lambda lab: probes)
    set_lab(folder, probes=["faulty", "sound"], probed=["on"])
    harness = Noted(folder)
    setup: Any = harness.setup
    setup.places, setup.writer = {}, None
    setup.clock = Clock()
    progress: Any = harness.progress
    progress.waiting = lambda text: None
    progress.part_done = lambda text, remaining_s: harness.steps.append(f"{text}, {remaining_s}")
    engine: Any = SimpleNamespace(reset_prefix_cache=lambda: None)
    monkeypatch.setattr(harness.engines, "alive", lambda variant: engine)
    on = setup.lab.variants[1]
    Harness._probe(harness, on)
    assert all(word in harness.steps[0] for word in ("faulty", "KeyError", "choices"))
    still_due_s = setup.clock.longest_probe_s  # of the one that failed
    assert harness.steps[1].endswith(f", {harness.trials.remaining_s}")
    assert (harness.trials.probes_to_come, still_due_s) == (1, setup.clock.probe_s)
    assert [folder.probe_file(name, "on").exists() for name in probes] == [False, True]
    assert harness._probes_due(on) == ["faulty"]
    assert setup.clock.played


def test_where_no_engine_starts_the_run_ends_with_the_reason(folder: RunFolder) -> None:
    harness = Noted(folder)
    harness.dead.update(("on", "off"))
    with pytest.raises(EngineError, match="no kernel"):
        harness.goes(2)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The repeats whose requests were written; no prompt is."""
    repeats: list[list[int]] = []
    monkeypatch.setattr(
        "labs.harness.runner.harness.write_requests", lambda *given: repeats.append(given[-1])
    )
    return repeats


@pytest.fixture
def undecided(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The judgements that the lab finds: one pair is inconclusive, of at most four repeats."""
    set_lab(folder, most_repeats=4)
    pair = SimpleNamespace(
        claim="faster",
        outcome="inconclusive",
        effect=True,
        treatment="on/short/concurrent-1",
        baseline="off/short/concurrent-1",
    )
    not_decided_by = SimpleNamespace(**{**vars(pair), "claim": "other"})  # no claim of the lab
    not_decided_by.treatment, not_decided_by.baseline = (
        f"{name}/short/concurrent-2" for name in ("on", "off")
    )
    judged = [pair, not_decided_by]
    found = SimpleNamespace(judgements=judged, measurements={})
    monkeypatch.setattr("labs.harness.runner.harness.summarise", lambda _: found)
    return judged


@pytest.mark.usefixtures("undecided")
def test_undecided_points_are_repeated_in_turn_too(
    folder: RunFolder, written: list[list[int]]
) -> None:
    harness = Noted(folder)
    assert harness.goes(2) == "off 1 1 2 2 on 1 1 2 2"
    harness.noted.clear()
    engines: Any = harness.engines
    engines.start_s = 100.0 * engines.started
    harness.repeat_undecided(until=time.monotonic() + 2 * (1 + 4 + PER_TRIAL_S) + 1)
    assert not harness.noted  # it is enough for two trials, but not for engine starts as well
    assert "most_s=420" in harness.steps[-1]
    harness.repeat_undecided(until=time.monotonic() + 1000)
    assert " ".join(harness.noted) == "off 3 on 3 on 4 off 4"
    assert written == [[3], [4]]
    assert sampling_of(folder, harness.setup.points, harness.setup.lab).looks == 2


@pytest.mark.usefixtures("written")
def test_where_no_time_is_left_for_any_repeat_the_lab_looks_once_whatever_it_would_see(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Intervals are then as wide as one look demands, so that there must never be another."""
    set_lab(folder, most_repeats=4)
    harness = Noted(folder)
    harness.goes(2)
    harness.noted.clear()

    def look(_: RunFolder) -> None:
        raise AssertionError("the figures were looked at")

    monkeypatch.setattr("labs.harness.runner.harness.summarise", look)
    lab, points = harness.setup.lab, harness.setup.points
    assert sampling_of(folder, points, lab).looks == 2
    harness.repeat_undecided(until=time.monotonic() + 1)
    assert "most_s=420" in harness.steps[-1]
    assert sampling_of(folder, points, lab).looks == 1
    harness.repeat_undecided(until=time.monotonic() + 1000)  # when the run is resumed
    assert not harness.noted


@pytest.mark.parametrize(("once", "looks"), [(False, 2), (True, 1)])
def test_claims_are_judged_for_as_many_looks_as_were_taken(
    tmp_path: Path, once: bool, looks: int
) -> None:
    folder = write_run(tmp_path, most_repeats=4)
    write_json(folder.path / "undecided.json", Undecided(points=(), once=once))
    assert {j.effect.looks for j in summarise(folder).judgements if j.effect} == {looks}


@pytest.mark.usefixtures("written", "undecided")
def test_a_call_whose_time_ends_leaves_undecided_points_to_the_next_call(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lab's stated time is not used up by that, so the run is not complete."""
    harness = Noted(folder)
    harness.goes(2)
    setup: Any = harness.setup
    setup.clock = Clock(ends=time.monotonic() + 5, played=True)
    monkeypatch.setattr(
        "labs.harness.runner.run.open_harness", lambda *_: contextlib.nullcontext(harness)
    )
    harness.noted.clear()
    with pytest.raises(TimeUsedUp, match="starting off"):
        running._measure(setup, folder, folder.path, harness.progress, time.monotonic())
    assert not harness.noted
    assert not any("stated time" in said for said in harness.steps)


def test_an_interrupted_run_goes_on_with_all_the_points_it_had_chosen(
    folder: RunFolder, written: list[list[int]], undecided: list[Any]
) -> None:
    harness = Noted(folder)
    harness.goes(2)
    harness.noted.clear()
    engines: Any = harness.engines
    engines.interrupted_at = "on"
    with pytest.raises(KeyboardInterrupt):
        harness.repeat_undecided(until=time.monotonic() + 1000)
    assert " ".join(harness.noted) == "off 3 on"
    undecided.clear()  # by what has been played since
    again = Noted(folder)
    again.repeat_undecided(until=time.monotonic() + 1000)
    assert " ".join(again.noted) == "on 3 on 4 off 4"
    assert written == [[3], [3], [4]]


@pytest.mark.usefixtures("written")
def test_a_resumed_run_goes_on_with_the_points_it_had_gone_on_with(folder: RunFolder) -> None:
    """A third look at the claims would take yet another correction."""
    set_lab(folder, most_repeats=4)
    harness = Noted(folder)
    harness.goes(2)
    point = harness.setup.points[0]
    harness.play_trials([point.variant], [(point, 3)], probe=True)
    harness.noted.clear()
    harness.repeat_undecided(until=time.monotonic())
    assert not harness.noted
    assert sampling_of(folder, harness.setup.points, harness.setup.lab).looks == 2
    harness.repeat_undecided(until=time.monotonic() + 1000)
    assert " ".join(harness.noted) == "off 4"


def test_engines_started_once_each_are_a_caveat(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    for resident, back, caveat in (
        (True, False, False),
        (False, False, True),
        (False, True, False),
    ):
        write_session(folder, resident, back)
        found = {c.name for c in summarise(folder).caveats}
        assert ("engines took turns" in found) is caveat


def test_once_every_point_was_played_the_rest_is_estimated_from_what_it_took(
    tmp_path: Path,
) -> None:
    harness = Noted(write_run(tmp_path))
    trials, points = harness.trials, harness.setup.points
    trials.expect(3)
    lab = harness.setup.lab
    assert trials.remaining_s == pytest.approx(3 * (lab.warmup_s + lab.window_s + PER_TRIAL_S))
    forecasts = PointForecasts(points={}, trial_s={points[0].key: 60.0, points[1].key: 0.1})
    told = harness.folder.predictions().model_copy(update={"in_virtual_time": forecasts})
    write_json(harness.folder.path / "predictions.json", told)
    trials = Noted(harness.folder).trials  # one point's window is held open, as was forecast
    trials.expect(3)
    others_s = (len(points) - 1) * (lab.warmup_s + lab.window_s)
    assert trials.remaining_s == pytest.approx(3 * ((60.0 + others_s) / len(points) + PER_TRIAL_S))
    trials._played, trials._took_s = len(points), 7.0 * len(points)
    assert trials.remaining_s == pytest.approx(3 * 7.0)
