"""What makes a trial fail although the load was played to its end, or be measured again."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import requests

from labs.harness.derived.design import played_s, transports_s
from labs.harness.derived.summarize import summarise
from labs.harness.forecast.request_counts import Counts
from labs.harness.plan.resolve import keeps_disturbed
from labs.harness.plan.time_budget import PER_TRIAL_S, Clock
from labs.harness.runner.trials import (
    REST_S,
    Played,
    Trials,
    _costing_its_own,
    fell_silent,
    nothing_measured,
    played_together,
    recorded,
)
from labs.harness.spec.lab import LabError, Point, Variant
from labs.harness.storage.recorded import Discarded, TrialResult, snapshot_json
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from loadtests import records
from loadtests.arrivals import Concurrent
from loadtests.generator import GeneratorError
from loadtests.plan import TrialPlan, TrialSummary
from loadtests.records import RequestRecord
from loadtests.structures import Structure
from serving.engines.base import EngineError
from serving.hardware.reference_step import ReferenceStep
from serving.plugins import guard
from tests.unit.builders import make_engine, make_record, make_summary, write_run

ANSWERED = make_record([(11.0, 1), (12.0, 3)])
WARM_UP = make_record([(1.0, 1)], sent_s=0.5, in_window=False)
REFUSED = make_record([], error="HTTP 500: out of memory")


@pytest.mark.parametrize(
    ("found", "exhausted", "words"),
    [
        ([WARM_UP, REFUSED, REFUSED], False, ("of 2", "HTTP 500: out of memory")),
        ([WARM_UP], False, ("`window_s`",)),
        ([], False, ("`window_s`",)),
        ([WARM_UP], True, ("`requests`",)),
        ([WARM_UP, REFUSED, ANSWERED], False, ()),
    ],
)
def test_a_trial_is_measured_where_one_counted_request_succeeds(
    found: list[RequestRecord], exhausted: bool, words: tuple[str, ...]
) -> None:
    said = nothing_measured(found, exhausted)
    assert bool(said) == bool(words)
    assert all(word in said for word in words)


# ---------------------------------------------------------------------- disturbed, measured again


class Script(Trials):
    """Trials whose attempts are given beforehand: the largest lag of the event loop in each."""

    def __init__(self, folder: RunFolder, lags_s: Sequence[float], keep: bool = False) -> None:
        lab, points = folder.run().rebuilt_lab(), folder.run().points()
        setup: Any = SimpleNamespace(
            lab=lab, points=points, keep_disturbed=keep, blind=False, clock=Clock()
        )
        self.said, self.lags_s, nothing = list[str](), [*lags_s], cast(Any, None)
        self.remaining, self.skipped, self.gap_s = list[float](), list[int](), 0.1
        self.steps = list[ReferenceStep]()  # before and after each attempt; none: not timed
        progress: Any = SimpleNamespace(
            message=self.said.append, part_done=lambda text, left: self.remaining.append(left)
        )
        counts = Counts(folder.path.name, exporter_port=1)
        self.awake = list[list[str]]()  # of each attempt, the engines that it does not suspend
        engines = cast(Any, SimpleNamespace(others_suspended=self._suspend_others))
        super().__init__(setup, folder, folder.path, engines, nothing, nothing, counts, progress)

    @contextlib.contextmanager
    def _suspend_others(self, variants: Iterable[Variant]) -> Iterator[None]:
        self.awake.append([variant.name for variant in variants])
        yield

    def end_call(self) -> None:
        """Leave no time for anything but what a call begins with."""
        self._setup.clock.ends = time.monotonic()

    def _time_reference(self) -> ReferenceStep | None:
        return self.steps.pop(0) if self.steps else None

    def _play(self, points: Sequence[Point], repeat: int, name: str, began: float) -> list[Played]:
        played = [self._alone(point, repeat) for point in points]
        keys = [p.point.key for p in played if not p.result.failed]
        return [
            p if p.result.failed else replace(
                p, result=p.result.model_copy(
                    update={"beside": tuple(key for key in keys if key != p.point.key)}
                )
            )
            for p in played
        ]  # fmt: skip

    def _alone(self, point: Point, repeat: int) -> Played:
        if (lag_s := self.lags_s.pop(0)) == DIES:
            return Played.failed(point, repeat, EngineError("it died"))
        self.skipped.append(self._requests_to_skip(point))
        found = [
            make_record([(11.0, 1), (11.0 + self.gap_s, 1)], index=i, prompt_tokens=6)
            for i in range(5)
        ]
        records.write(self._folder.trial_folder(point, repeat) / "requests.jsonl.gz", found)
        engine = make_engine(found, point.variant.name == "on", hits=8.0)
        result = TrialResult(
            point=point.key,
            repeat=repeat,
            summary=make_summary(loop_lag_max_s=lag_s, sent=len(found)),
            engine=snapshot_json(engine),
        )
        return Played(point, result, "10 tok/s", found, engine)


DIES = -1.0


def attempts(
    tmp_path: Path, *lags_s: float, keep: bool = False
) -> tuple[Script, TrialResult, RunFolder]:
    folder = write_run(tmp_path)
    point = folder.run().points()[-1]
    trials = Script(folder, lags_s, keep)
    trials.play(point, 1)
    result = folder.trial_result(point, 1)
    assert result
    return trials, result, folder


def test_a_trial_that_nothing_disturbed_is_played_once(tmp_path: Path) -> None:
    trials, result, folder = attempts(tmp_path, 0.01)
    assert (trials.said, result.discarded) == ([], ())
    assert not summarise(folder).measured_again


def test_a_disturbed_trial_is_measured_again_and_told(tmp_path: Path) -> None:
    trials, result, folder = attempts(tmp_path, 2.5, 0.01)
    assert result.summary
    assert result.summary.loop_lag_max_s == 0.01  # the last attempt counts
    (discarded,) = result.discarded
    assert list(discarded.reasons) == ["generator's loop lagged"]
    assert discarded.loop_lag_max_s == 2.5
    (said,) = trials.said
    assert all(part in said for part in ("1 of 2", "generator's loop lagged"))
    summary = summarise(folder)
    key = f"{result.point}/1"
    assert summary.measured_again == {key: ["generator's loop lagged"]}
    assert "generator's loop lagged" not in {c.name for c in summary.caveats}


def test_it_is_measured_again_at_most_twice_and_then_keeps_its_caveat(tmp_path: Path) -> None:
    trials, result, folder = attempts(tmp_path, 2.5, 2.6, 2.7, 0.01)
    assert trials.lags_s == [0.01]
    assert [d.loop_lag_max_s for d in result.discarded] == [2.5, 2.6]
    (caveat,) = (c for c in summarise(folder).caveats if c.name == "generator's loop lagged")
    assert caveat.blocks
    (again,) = summarise(folder).measured_again.values()
    assert again == ["generator's loop lagged"] * 2


def steps(*factors: float) -> list[ReferenceStep]:
    return [ReferenceStep(reading_s=0.01, computing_s=0.005 * factor) for factor in factors]


def jumping(tmp_path: Path, *factors: float) -> tuple[Script, TrialResult, RunFolder]:
    """Attempts before and after each of which a step took so many times as long."""
    folder = write_run(tmp_path)
    point = folder.run().points()[-1]
    trials = Script(folder, [0.01] * (len(factors) // 2))
    trials.steps = steps(*factors)
    trials.play(point, 1)
    result = folder.trial_result(point, 1)
    assert result
    return trials, result, folder


@pytest.mark.parametrize(("after", "again"), [(1.45, 0), (1.55, 1), (1 / 1.45, 0), (1 / 1.55, 1)])
def test_a_trial_along_which_the_machines_speed_jumps_is_measured_again(
    after: float, again: int, tmp_path: Path
) -> None:
    trials, result, _ = jumping(tmp_path, 1.0, after, after, after)
    assert len(result.discarded) == again
    assert len(trials.lags_s) == 1 - again
    for discarded in result.discarded:
        assert list(discarded.reasons) == ["the machine's speed jumped"]
        assert "computing took" in discarded.reasons["the machine's speed jumped"]


def test_a_machine_that_jumps_each_time_leaves_the_caveat_that_it_is(tmp_path: Path) -> None:
    """After two more attempts; what was measured last has its verdict."""
    trials, result, folder = jumping(tmp_path, 1.0, 1.6, 1.0, 1.6, 1.0, 1.6, 1.0, 1.0)
    assert (len(result.discarded), len(trials.lags_s)) == (2, 1)
    jumps = [c for c in summarise(folder).caveats if c.name == "the machine's speed jumped"]
    assert [c.blocks for c in jumps] == [False]


def test_what_transport_takes_is_known_from_the_variants_undisturbed_trials_at_one_stream(
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path)
    one, two = (p for p in folder.run().points() if p.variant.name == "on")
    shutil.rmtree(folder.path / "trials")
    trials = Script(folder, [2.5, 0.01, 0.01, 2.5, 2.5, 2.5])
    for point in (one, two):
        trials.play(point, 1)
    assert trials._transports_s["on"] == pytest.approx({(one.key, 1): 0.001}, abs=5e-5)
    trials.play(one, 2)  # it stays disturbed
    assert [*trials._transports_s["on"]] == [(one.key, 1)]


def test_a_run_that_goes_on_knows_what_transport_takes_as_its_report_does(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    run = folder.run()
    points, lab = run.points(), run.rebuilt_lab()
    on_file = transports_s(folder, points, lab, run.expected(folder.predictions()))
    assert {variant: len(of) for variant, of in on_file.items()} == {"off": 2, "on": 2}
    assert Script(folder, [])._transports_s == on_file


def together(tmp_path: Path, *lags_s: float) -> tuple[Script, list[TrialResult]]:
    """Two variants whose requests take turns; their lags come in turn, too."""
    folder = write_run(tmp_path)
    points = [p for p in folder.run().points() if p.load == Concurrent(users=1)]
    trials = Script(folder, lags_s)
    trials.expect(4)
    trials.play(points[0], 1, points[1:])
    results = [folder.trial_result(point, 1) for point in points]
    assert all(results)
    return trials, [result for result in results if result]


def test_trials_that_are_played_together_are_recorded_apart(tmp_path: Path) -> None:
    trials, results = together(tmp_path, 0.01, 0.02)
    one, other = results
    assert (one.beside, other.beside) == ((other.point,), (one.point,))
    assert [r.summary and r.summary.loop_lag_max_s for r in results] == [0.01, 0.02]
    assert trials.said == []
    assert trials.remaining == [2 * (1 + 4 + PER_TRIAL_S)]  # of four, two are over


def silent(*_: object) -> None:
    pass


def engine_with(**own: Any) -> Any:
    """An engine that does whatever it is asked, and says nothing."""
    calls = dict.fromkeys(("reset_prefix_cache", "snapshot", "died", "stop"), silent)
    facts: dict[str, Any] = {
        "url": "",
        "name": "",
        "pid": None,
        "request_fields": {},
        "model_names": {},
    }
    rest = {"served": dict, "api_servers": list, "computing": list, "closes_connections": False}
    return SimpleNamespace(**{**calls, **facts, **rest, **own})


def play_with(
    trials: Trials,
    engine_of: Callable[[Variant], Any],
    play: Callable[..., Any],
) -> None:
    """Give the trials these engines, and a load generator that plays so."""
    vars(trials).update(
        _engines=SimpleNamespace(serving=engine_of, started=2, share_cpu=False),
        _load=SimpleNamespace(play=play),
        _telemetry=SimpleNamespace(begin=silent, write=silent, foreign_processes=silent),
        _progress=SimpleNamespace(waiting=silent),
    )


@pytest.mark.parametrize(
    ("together", "suspends", "pids", "rest_s"),
    [(2, True, (7, 8), REST_S), (1, True, (), 0.0), (2, False, (), 0.0)],
)
def test_between_turns_the_load_generator_suspends_what_computes(
    together: int, suspends: bool, pids: tuple[int, ...], rest_s: float, tmp_path: Path
) -> None:
    folder = write_run(tmp_path)
    trials = Script(folder, [])
    engine = engine_with(computing=lambda: [7, 8])
    vars(trials)["_engines"] = SimpleNamespace(share_cpu=suspends)
    planned = trials._trial_plan(folder.run().points()[-1], 1, engine, together)
    assert (planned.pids, planned.rest_s) == (pids, rest_s)


def test_where_one_is_disturbed_those_beside_it_are_measured_again_too(tmp_path: Path) -> None:
    trials, results = together(tmp_path, 0.01, 2.5, 0.03, 0.04)
    assert [r.summary and r.summary.loop_lag_max_s for r in results] == [0.03, 0.04]
    assert trials.awake == [["off", "on"], ["off", "on"]]  # in both attempts
    of_other, own = (r.discarded[0].reasons["generator's loop lagged"] for r in results)
    assert "2500 ms" in own
    assert of_other.endswith(own)
    assert of_other != own
    (said,) = trials.said
    assert said.startswith("off | on, 1 user, repeat 1 of 2")


def test_an_engine_that_dies_costs_its_own_trial_alone(tmp_path: Path) -> None:
    """It is not played again, and the one beside it was alone."""
    _, (one, other) = together(tmp_path, DIES, 2.5, 0.03)
    assert (one.failed, one.discarded) == ("it died", ())
    assert (other.failed, other.beside, len(other.discarded)) == (None, (), 1)


def test_one_users_trials_on_engines_that_stay_loaded_are_played_together(tmp_path: Path) -> None:
    run = write_run(tmp_path).run()
    lab, points = run.rebuilt_lab(), run.points()
    trials = [(p, r) for r in (1, 2) for p in points]
    one, two = ([(p, 1) for p in points if p.load == Concurrent(users=users)] for users in (1, 2))

    def parts(kind: str = "cpu", engines: int = 2) -> list[list[tuple[Point, int]]]:
        setup: Any = SimpleNamespace(lab=lab, machine=SimpleNamespace(kind=kind), blind=False)
        return played_together(setup, lab.variants[:engines], trials)

    found = parts()
    assert one in found
    assert [two[:1], two[1:]] == [part for part in found if part[0] in two]
    assert sorted(len(part) for part in found) == [1, 1, 1, 1, 2, 2]
    assert next(p.key for part in found for p, r in part) == points[0].key
    for alone in (parts(kind="gpu"), parts(engines=1)):
        assert alone == [[trial] for trial in trials]


def test_records_that_cannot_be_read_back_fail_the_trial(tmp_path: Path) -> None:
    """They ended the run in a traceback."""
    folder = write_run(tmp_path)
    point = folder.run().points()[-1]
    trials = Script(folder, [])
    path = folder.trial_folder(point, 1) / "requests.jsonl.gz"

    def play(*_: object) -> list[TrialSummary]:
        path.write_bytes(gzip.compress(b"no record"))
        return [make_summary()]

    play_with(trials, lambda _: engine_with(), play)
    with pytest.raises(GeneratorError, match="line 1"):
        Trials._play(trials, [point], 1, "a trial", time.monotonic())


@pytest.mark.parametrize(
    ("last", "silent"),
    [
        (make_record([], sent_s=12.0, error="TimeoutError: nothing came for 60 s"), True),
        (make_record([], sent_s=12.0, error="HTTP 500: no", first_byte_s=12.1), False),
        (make_record([], sent_s=12.0, error="not sent: the queue is full"), False),
        (make_record([], sent_s=9.0, error="TimeoutError: nothing came for 60 s"), False),
    ],
)
def test_an_engine_is_silent_where_nothing_came_for_the_last_request(
    last: RequestRecord, silent: bool
) -> None:
    answered = make_record([(11.0, 1)], first_byte_s=10.5)
    assert fell_silent([last, answered]) is silent
    assert not fell_silent([])


def test_a_full_disk_is_no_failure_of_an_engine(tmp_path: Path) -> None:
    point, *_ = write_run(tmp_path).run().points()
    played = list[Played]()
    with pytest.raises(OSError, match="full"), _costing_its_own(point, 1, played):
        raise OSError(errno.ENOSPC, "full")
    assert played == []


@pytest.mark.parametrize("call", ["reset_prefix_cache", "snapshot", "died", "served"])
def test_a_call_of_one_engine_that_fails_costs_its_own_trial_alone(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path)
    points = folder.run().points()
    refused, whole = points[0], points[-1]
    trials = Script(folder, [])
    found = [make_record([(11.0, 1), (11.1, 1)], index=i) for i in range(5)]

    def fail() -> None:
        raise requests.ConnectionError("refused")

    def play(asked: TrialPlan, waiting: object) -> list[TrialSummary]:
        for each in asked.all_plans:
            records.write(each.records, found)
        return [make_summary() for _ in asked.all_plans]

    ended = list[str]()  # its engine core may hang: the next trial gets another engine
    engines = {
        refused.variant.name: engine_with(stop=lambda: ended.append("off"), **{call: fail}),
        whole.variant.name: engine_with(),
    }
    counted = SimpleNamespace(info={}, values={}, histograms={})
    play_with(trials, lambda variant: engines[variant.name], play)
    monkeypatch.setattr("labs.harness.runner.trials.counted_since", lambda *_: counted)
    monkeypatch.setattr("labs.harness.runner.trials.snapshot_json", lambda _: {})
    played = Trials._play(trials, [refused, whole], 1, "a trial", time.monotonic())
    failed = {p.point.key: bool(p.result.failed) for p in played}
    assert failed == {refused.key: True, whole.key: False}
    assert ended == ["off"] * (call == "reset_prefix_cache")


@pytest.mark.parametrize(("began_s", "share"), [(1000.0, 0.97), (1000.0, None), (None, 0.97)])
def test_a_trial_records_how_busy_the_api_server_was_in_its_window(
    began_s: float | None, share: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is not known it has no such field, as older trials have none."""
    folder = write_run(tmp_path)
    point = folder.run().points()[-1]
    trials, asked = Script(folder, []), list[object]()

    def busiest(start_s: float, end_s: float) -> float | None:
        assert (start_s, end_s) == (1010.0, 1020.0)
        return share

    def play(*_: object) -> list[TrialSummary]:
        found = [make_record([(11.0, 1), (11.1, 1)], index=i) for i in range(5)]
        records.write(folder.trial_folder(point, 1) / "requests.jsonl.gz", found)
        return [make_summary(started_monotonic_s=began_s)]

    def servers(pids: Sequence[int]) -> Any:
        asked.extend(pids)
        return SimpleNamespace(read=silent, busiest=busiest)

    play_with(trials, lambda _: engine_with(api_servers=lambda: [7, 8]), play)
    monkeypatch.setattr("labs.harness.runner.trials.ServerLoad", servers)
    monkeypatch.setattr("labs.harness.runner.trials.counted_since", silent)
    (played,) = Trials._play(trials, [point], 1, "a trial", time.monotonic())
    assert asked == [7, 8]
    kept = json.loads(played.result.model_dump_json())
    assert kept.get("server_core_share") == (share if began_s else None)
    assert ("server_core_share" in kept) == (began_s is not None and share is not None)


def test_what_was_discarded_counts_as_time_of_the_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    lab, points = folder.run().rebuilt_lab(), folder.run().points()
    before_s = played_s(folder, points, lab)
    result = folder.trial_result(points[0], 1)
    assert result
    lost = Discarded(
        reasons={}, loop_lag_max_s=None, cpu_steal=None, cpu_others=None, cpu_engine=None, took_s=8
    )
    longer = result.model_copy(update={"discarded": (lost,), "took_s": result.took_s + 1})
    write_json(folder.trial_folder(points[0], 1) / "trial.json", longer)
    assert played_s(folder, points, lab) == before_s + 9


def test_a_disturbed_first_trial_of_a_call_is_measured_again_only_where_it_fits(
    tmp_path: Path,
) -> None:
    """Else a machine that is always disturbed would never get a trial on file."""
    folder = write_run(tmp_path)
    point = folder.run().points()[-1]
    trials = Script(folder, [2.5, 0.01])
    trials.end_call()
    trials.play(point, 1)
    result = folder.trial_result(point, 1)
    assert result
    assert result.summary
    assert result.summary.loop_lag_max_s == 2.5
    (said,) = trials.said
    assert "no time is left" in said


def test_an_interrupted_second_attempt_leaves_the_trial_to_be_played(tmp_path: Path) -> None:
    """The first one was disturbed, and the second one's records may lie there already."""
    folder = write_run(tmp_path)
    point = folder.run().points()[-1]
    (folder.trial_folder(point, 1) / "trial.json").unlink()
    with pytest.raises(IndexError):  # as Ctrl-C would
        Script(folder, [2.5]).play(point, 1)
    assert not recorded(folder, point, 1)


def test_a_failure_is_recorded_and_shown_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint may send the key back, and an engine's last log lines may hold a token."""
    monkeypatch.setenv(guard.KEY, "my-key")
    said = "HTTP 401: Incorrect API key provided: my-key\nHF_TOKEN=abc"
    folder = write_run(tmp_path)
    point = folder.run().points()[-1]

    def fail(*_: object) -> list[Played]:
        raise EngineError(said)

    trials = Script(folder, [])
    monkeypatch.setattr(trials, "_play", fail)
    shown: list[str] = []
    monkeypatch.setattr(trials._progress, "part_done", lambda text, _: shown.append(text))
    trials.play(point, 1)
    trials.fail([(point, 2)], said)
    results = [folder.trial_result(point, repeat) for repeat in (1, 2)]
    masked = "HTTP 401: Incorrect API key provided: ***\nHF_TOKEN=***"
    assert [result and result.failed for result in results] == [masked, None]
    assert "provided: ***" in shown[0]


@pytest.mark.parametrize(
    ("structure", "skipped"),
    [
        (None, [0, 0, 0]),
        (Structure(form="record"), [0, 0, 0]),
        (Structure(form="record", unseen=True), [0, 5, 10]),
    ],
)
def test_structures_that_an_attempt_has_shown_the_engine_are_not_sent_again(
    tmp_path: Path, structure: Structure | None, skipped: list[int]
) -> None:
    folder = write_run(tmp_path)
    point = folder.run().points()[0]
    workload = point.workload.model_copy(update={"structure": structure})
    trials = Script(folder, (2.5, 2.6, 0.01))
    trials.play(replace(point, workload=workload), 1)
    assert trials.skipped == skipped


def test_where_disturbed_trials_are_kept_none_is_measured_again(tmp_path: Path) -> None:
    trials, result, folder = attempts(tmp_path, 2.5, 0.01, keep=True)
    assert (trials.said, trials.lags_s, result.discarded) == ([], [0.01], ())
    assert "generator's loop lagged" in {c.name for c in summarise(folder).caveats}


def test_the_figures_of_a_trial_do_not_decide_whether_it_is_measured_again(tmp_path: Path) -> None:
    """Undisturbed, whether it is fast or slow beside the trials on file."""
    folder = write_run(tmp_path)
    for gap_s in (0.001, 8.0):
        trials = Script(folder, [0.01])
        trials.gap_s = gap_s
        trials.play(folder.run().points()[-1], 1)
        assert trials.said == []


def test_a_misspelled_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABS_DISTURBED", "Keep")
    with pytest.raises(LabError, match="DISTURBED=Keep"):
        keeps_disturbed()
    for text, keeps in (("", False), ("keep", True)):
        monkeypatch.setenv("LABS_DISTURBED", text)
        assert keeps_disturbed() is keeps
