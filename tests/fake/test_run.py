"""Every lab from its question to its report on the fake engine, whose record is the truth.

Counts are exact. Times belong to test_fidelity, bad days to test_faults.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from labs import LABS
from labs.lab import Point
from labs.results import RunFolder, Summary
from loadtests.records import RequestRecord
from serving.install import find_prometheus
from serving.models import ROOT
from tests.fake.conftest import Finish, Finished, Reader, fake_engine

every_lab = pytest.mark.parametrize("lab", LABS)
BATCHING = "continuous-batching"


def _trials(finished: Finished) -> list[tuple[Point, int, list[RequestRecord]]]:
    """(point, repeat, records) of every trial, in the order in which they were played."""
    folder = finished.folder
    points, lab = folder.run().points(), folder.run().rebuilt_lab()
    found = [trial for _, _, trial in folder.trials(points, lab)]
    assert all(trial is not None for trial in found)
    trials = sorted((t for t in found if t), key=lambda t: t.summary.started_unix_s)
    return [(t.point, t.repeat, t.records) for t in trials]


@every_lab
def test_it_ends_well_and_completely(lab: str, finish: Finish) -> None:
    finished = finish(lab)
    assert finished.command.process.returncode == 0, finished.command.said
    folder = finished.folder
    summary, resolved = folder.summary(), folder.run().rebuilt_lab()
    assert folder.complete
    assert not summary.failed
    trials = {(point.key, repeat) for point, repeat, records in _trials(finished) if records}
    points = folder.run().points()
    assert trials == {(p.key, r) for p in points for r in range(1, resolved.repeats + 1)}
    assert set(summary.measurements) == {p.key for p in points}


@every_lab
def test_predictions_come_before_any_engine_and_complete_comes_last(
    lab: str, finish: Finish
) -> None:
    finished = finish(lab)
    path = finished.folder.path
    first_start, _ = finished.reader.engine_starts()[0]
    assert (path / "predictions.json").stat().st_mtime <= first_start
    last = max(file.stat().st_mtime for file in path.rglob("*") if file.is_file())
    assert (path / "COMPLETE").stat().st_mtime == last


@every_lab
def test_the_engines_got_the_command_lines_that_are_on_file(lab: str, finish: Finish) -> None:
    finished = finish(lab)
    started = [text.split() for _, text in finished.reader.engine_starts()]
    run = finished.folder.run()
    assert len(started) == len(run.argv)
    for _, *flags in run.argv.values():
        assert any(argv[-len(flags) :] == " ".join(flags).split() for argv in started)


@every_lab
def test_counts_are_exact(lab: str, finish: Finish) -> None:
    """Each request, each chunk and each token: in the records, the engines and Prometheus."""
    finished = finish(lab)
    records = [r for _, _, trial in _trials(finished) for r in trial]
    log = finished.reader.engine_log()
    assert all(r.ok and r.output_tokens == r.asked_tokens for r in records)

    def seen(tokens: int | None, chunks: Sequence[Sequence[float]]) -> tuple[object, ...]:
        return tokens, tuple(int(k) for _, k in chunks)

    assert Counter(seen(r.prompt_tokens, r.chunks) for r in records) == Counter(
        seen(line["n_in"], line["chunks"]) for line in log
    )
    session = finished.folder.session()
    assert session
    prometheus = find_prometheus(ROOT) is not None
    assert (session.prometheus is None) == prometheus
    truth = {"requests": len(log), "output tokens": sum(line["n_out"] for line in log)}
    for agreement in session.agreement:
        number = truth.pop(agreement.what)
        assert (agreement.records, agreement.engine) == (number, number)
        assert agreement.prometheus == (number if prometheus else None)
    assert not truth


@every_lab
def test_each_load_of_a_repeat_gets_the_same_requests(lab: str, finish: Finish) -> None:
    """And the next repeat gets others. The fake counts words, so that prompts differ in tokens."""
    asked: dict[tuple[str, int], dict[int, tuple[int | None, int]]] = {}
    for point, repeat, records in _trials(finish(lab)):
        assert sorted(r.index for r in records) == list(range(len(records)))
        mine = asked.setdefault((point.workload.name, repeat), {})
        for record in records:
            request = (record.prompt_tokens, record.asked_tokens)
            assert mine.setdefault(record.index, request) == request
    for (name, repeat), requests in asked.items():
        if repeat > 1:
            first = asked[name, 1]
            assert any(first[i] != requests[i] for i in first.keys() & requests.keys())


@every_lab
def test_the_report_answers_every_claim(lab: str, finish: Finish) -> None:
    folder = finish(lab).folder
    report, resolved = (folder.path / "report.md").read_text(), folder.run().rebuilt_lab()
    assert resolved.question in report
    for claim in resolved.claims:
        assert claim.title in report
        assert claim.title in finish(lab).command.said
    pictures = {f"{name}.svg" for name in ("effects", *resolved.plots)}
    assert {path.name for path in folder.path.glob("*.svg")} == pictures
    assert set(re.findall(r"\]\((\S+\.svg)\)", report)) == pictures
    assert "QUICK run" in report
    assert "Ad hoc run" in report


@every_lab
def test_a_rebuilt_report_is_the_same_to_the_byte(lab: str, finish: Finish) -> None:
    finished = finish(lab)
    path = finished.folder.path
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    again = finished.reader.types("report", str(path))
    assert again.wait() == 0, again.said
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


@every_lab
def test_check_finds_nothing_wrong(lab: str, finish: Finish) -> None:
    finished = finish(lab)
    check = finished.reader.types("check", str(finished.folder.path))
    assert check.wait() == 0, check.said
    assert "well formed" in check.said


def test_check_misses_a_trial(finish: Finish, reader: Reader, tmp_path: Path) -> None:
    """A complete run with a hole in it is not well formed."""
    source = finish(BATCHING).folder.path
    copy = tmp_path.joinpath(*source.parts[-3:])
    for file in source.rglob("*"):
        if file.is_file() and "/2/" not in str(file.relative_to(source)):
            target = copy / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    check = reader.types("check", str(copy))
    assert check.wait() == 1
    assert "is missing" in check.said
    assert "error:" in check.said


def _unless_too_busy(summary: Summary) -> None:
    """A busy machine makes a lab refuse its verdicts, and rightly."""
    late = {c.name for c in summary.caveats if c.blocks and "lagged" in c.name}
    if late:
        assert "not valid" in {j.outcome for j in summary.judgements}
        pytest.skip(f"this machine is too busy to conclude anything: {', '.join(late)}")


def test_static_batches_lose_on_an_engine_whose_step_knows_no_batch(finish: Finish) -> None:
    """The theory's own assumption, so its prediction must hold."""
    summary = finish(BATCHING).folder.summary()
    _unless_too_busy(summary)
    assert not [c for c in summary.caveats if c.blocks]
    judged = {j.claim: j for j in summary.judgements}
    assert judged["static"].outcome == "helps"
    assert judged["static"].expected is True
    assert judged["static"].prediction_held is True
    assert judged["throughput"].outcome == "helps"


# ------------------------------------------------------------------- a server that is already there


@pytest.fixture
def endpoint_log(tmp_path: Path) -> Path:
    return tmp_path / "endpoint.jsonl"


def test_an_endpoint_is_driven_and_not_taken_for_the_labs_own(
    reader: Reader, endpoint_log: Path
) -> None:
    settings = (
        'warmup_s=0.1 window_s=0.5 repeats=1 workloads.exponential.loads=["concurrent:4","waves:4"]'
        ' workloads.fixed.loads=["concurrent:4"] requests=64'
        " claims.static.treatment.load=concurrent:4 claims.static.baseline.load=waves:4"
    )
    law = ("--step-s", ".01", "--no-enable-prefix-caching", "--served-model-name", "theirs")
    with fake_engine(endpoint_log, *law) as url:
        command = reader.types("run", BATCHING, ENDPOINT=f"{url}/v1", QUICK="1", SET=settings)
        assert command.wait() == 0, command.said
    assert not reader.engine_starts()
    folder = command.folder
    report, note = (folder.path / "report.md").read_text(), "which this lab did not configure"
    assert note in report
    assert note in command.said
    assert url in report
    assert folder.complete
    summary = folder.summary()
    assert "endpoint's hardware unknown" in {c.name for c in summary.caveats}
    assert "treatment not applied" not in {c.name for c in summary.caveats}
    records = _records(folder)
    assert len(records) == len(endpoint_log.read_text().splitlines())
    session = folder.session()
    assert session
    assert all(a.engine == a.records for a in session.agreement)


def _records(folder: RunFolder) -> list[RequestRecord]:
    trials = folder.trials(folder.run().points(), folder.run().rebuilt_lab())
    return [record for _, _, trial in trials if trial for record in trial.records]
