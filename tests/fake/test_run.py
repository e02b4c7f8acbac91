"""Every lab from its question to its report on the fake engine, whose record is the truth.

Counts are exact. Times belong to test_fidelity, bad days to test_faults.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest

from labs import LABS
from labs.harness.analysis.computed import Predictions, Summary
from labs.harness.derived.lab_modules import kept
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.reports import plots
from labs.harness.reports.html import as_address
from labs.harness.reports.rendering import NOTHING, told_by
from labs.harness.spec.lab import Point
from labs.harness.storage.results import RunFolder
from labs.multi_lora.facts import Marks
from labs.speculative_decoding.facts import speculations, tokens_a_step
from loadtests.records import RequestRecord
from serving.models import catalog, dummy
from serving.models.catalog import ROOT
from serving.packaging.install import find_prometheus
from tests.fake import made
from tests.fake.conftest import (
    LABS_WITHOUT_PROMETHEUS,
    TOKEN,
    TOO_LARGE,
    Command,
    Finish,
    Finished,
    Reader,
    fake_engine,
    needs_prometheus,
    reading,
    router,
    the_program,
)
from tests.fake.test_reproduce import assert_nothing_is_worse, held_against
from tests.real import RUNS, all_count
from tests.sizes import BRIEF, sizes_of

every_lab = pytest.mark.parametrize("lab", LABS)
BATCHING = "continuous-batching"
TOO_BUSY = {  # what keeps a lab from concluding anything on a machine that does other work too
    "generator lagged", "generator's loop lagged", "fell behind the schedule", "TTFT differs",
    "trend in the window",
}  # fmt: skip
PROMETHEUS = find_prometheus(ROOT) is not None


def _trials(finished: Finished) -> list[tuple[Point, int, list[RequestRecord]]]:
    """(point, repeat, records) of every trial, in the order in which they were played."""
    folder = finished.folder
    points, lab = folder.run().points(), folder.run().rebuilt_lab()
    found = [trial for _, _, trial in folder.trials(points, lab)]
    assert all(trial is not None for trial in found)
    trials = sorted((t for t in found if t), key=lambda t: t.summary.started_unix_s)
    return [(t.point, t.repeat, t.records) for t in trials]


BY_TIMES = "timing-leak"


@every_lab
def test_it_ends_well_and_completely(lab: str, finish: Finish) -> None:
    finished = finish(lab)
    assert finished.command.process.returncode == 0, finished.command.said
    assert "Measuring memory bandwidth" not in finished.command.said  # takes 5 s and more
    folder = finished.folder
    summary, resolved = folder.summary(), folder.run().rebuilt_lab()
    assert folder.complete
    assert not summary.failed
    trials = {(point.key, repeat) for point, repeat, records in _trials(finished) if records}
    points = folder.run().points()
    assert trials == {(p.key, r) for p in points for r in range(1, resolved.repeats_of(p) + 1)}
    assert set(summary.measurements) == {p.key for p in points}


@every_lab
def test_predictions_come_before_any_engine_and_complete_comes_last(
    lab: str, finish: Finish
) -> None:
    finished = finish(lab)
    folder = finished.folder
    predicted = finished.reader.predicted()
    assert len(predicted) == len(finished.reader.engine_starts()) > 0
    for text in predicted:
        assert Predictions.model_validate_json(text) == folder.predictions()
    written = [file for file in folder.path.rglob("*") if file.is_file()]
    packed_later = {file for file in written if file.suffix == ".xz"}
    last = max(file.stat().st_mtime for file in set(written) - packed_later)
    assert (folder.path / "COMPLETE").stat().st_mtime == last


@every_lab
def test_the_engines_got_the_command_lines_that_are_on_file(lab: str, finish: Finish) -> None:
    """With the folders of derived models in the places of their names."""
    finished = finish(lab)
    started = [text.split() for _, text in finished.reader.engine_starts()]
    run, results = finished.folder.run(), finished.reader.results
    model = (
        dummy.resolve(run.machine, run.model.removesuffix(dummy.SUFFIX))
        if run.dummy
        else catalog.resolve(run.machine)
    )
    assert len(started) == len(run.argv)
    for served, *flags in run.argv.values():
        words = " ".join([served, *flags])
        words = words.replace("<model>", str(model.path))
        words = re.sub("<([a-z0-9-]+)>", lambda m: str(made.folder_of(m[1], results)), words)
        folder, *own = words.split()
        places = {folder, f"{folder}/model.gguf"}  # llama.cpp is given the file in it
        assert any(places & {*a} and a[len(a) - len(own) :] == own for a in started), words


def test_a_token_in_the_engines_command_is_in_no_file_of_the_run(finish: Finish) -> None:
    folder = finish(BATCHING).folder
    command = folder.run().engine_command
    assert command
    assert ": ***; cat" in " ".join(command)
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


@every_lab
def test_counts_are_exact(lab: str, finish: Finish) -> None:
    """Each request, each chunk and each token: in the records, the engines and Prometheus."""
    finished = finish(lab)
    # what a limit turned away was not served, and is in no log
    records = [r for _, _, trial in _trials(finished) for r in trial if not r.turned_away]
    # a load streams its answers, probes do not
    log = [line for line in finished.reader.engine_log() if line["stream"]]
    assert all(r.ok and r.output_tokens == r.asked_tokens for r in records)

    def seen(tokens: int | None, chunks: Sequence[Sequence[float]]) -> tuple[object, ...]:
        return tokens, tuple(int(k) for _, k in chunks)

    assert Counter(seen(r.prompt_tokens, r.chunks) for r in records) == Counter(
        seen(line["n_in"], line["chunks"]) for line in log
    )
    session = finished.folder.session()
    assert session
    assert (session.prometheus is None) == PROMETHEUS
    truth = {"requests": len(log), "output tokens": sum(line["n_out"] for line in log)}
    for agreement in session.agreement:
        number = truth.pop(agreement.what)
        counted = all_count(LABS[lab], agreement.what)
        assert (agreement.records, agreement.engine) == (number, number if counted else None)
        assert agreement.prometheus == (number if PROMETHEUS else None)
    assert not truth


@every_lab
def test_each_trial_has_a_reference_step_on_both_sides(lab: str, finish: Finish) -> None:
    finished = finish(lab)
    run = finished.folder.run()
    kept = [result for _, result, _ in finished.folder.trials(run.points(), run.rebuilt_lab())]
    assert kept
    assert all(result.reference_before and result.reference_after for result in kept)
    speed = finished.folder.summary().machine_speed
    assert speed
    assert speed.steps == 2 * len(kept)


@every_lab
def test_engines_that_stay_loaded_are_suspended_while_idle(lab: str, finish: Finish) -> None:
    folder = finish(lab).folder
    session = folder.session()
    assert session
    several = len(folder.run().lab["variants"]) > 1
    assert session.idle_suspended == (session.resident and several)
    assert session.client_first


@every_lab
def test_each_load_of_a_repeat_gets_the_same_requests(lab: str, finish: Finish) -> None:
    """They are drawn by the number of the repeat alone."""
    asked: dict[tuple[str, int], dict[int, tuple[int | None, int]]] = {}
    prepared = finish(lab).folder.run().rebuilt_lab().requests
    for point, repeat, records in _trials(finish(lab)):
        for visiting in (False, True):  # an intruder's requests go out by a clock of their own
            kind = [i for i in range(prepared) if point.workload.is_intruder(i) == visiting]
            # several answers to one request have its index
            sent = sorted({r.index for r in records if r.index in set(kind)})
            began, first = ([i for i in of if i % point.turns == 0] for of in (sent, kind))
            assert began == first[: len(began)]
            assert all(i in began or i - 1 in sent for i in sent)  # the turn after the one before
        mine = asked.setdefault((point.workload.name, repeat), {})
        for record in (r for r in records if not r.turned_away):
            request = (record.prompt_tokens, record.asked_tokens)
            assert mine.setdefault(record.index, request) == request


@every_lab
def test_the_report_answers_every_claim(lab: str, finish: Finish) -> None:
    folder = finish(lab).folder
    report, resolved = (folder.path / "report.md").read_text(), folder.run().rebuilt_lab()
    summary = folder.summary()
    assert resolved.question in report
    # beside other tests a claim may be not valid, and then a question may lack its figures
    answers = told_by(folder).answers
    assert answers.keys() <= set(resolved.answers)
    outcomes = [judgement.outcome for judgement in summary.judgements]
    if outcomes and "not valid" not in outcomes:
        assert answers.keys() == set(resolved.answers), finish(lab).command.said
    for claim in resolved.claims:
        assert claim.title in report
    assert "Claim by claim" in finish(lab).command.said
    without = set() if outcomes else {"effects"}
    pictures = {f"{name}.svg" for name in {*plots._drawn(resolved)} - without}
    assert {path.name for path in folder.path.glob("*.svg")} == pictures
    assert set(re.findall(r"\]\((\S+\.svg)\)", report)) == pictures
    assert "QUICK run" in report
    assert "Ad hoc run" in report
    page = (folder.path / "report.html").read_text()
    drawn = [as_address(path.read_text()) for path in folder.path.glob("*.svg")]
    assert all(picture in page for picture in drawn)


@every_lab
def test_every_treatment_shows_in_the_engine(lab: str, finish: Finish) -> None:
    """But for the pieces of a prompt, which a busy machine may smear: see test_engine."""
    caveats = finish(lab).folder.summary().caveats
    missing = [c.text for c in caveats if c.name == "treatment not applied"]
    assert not [text for text in missing if "pieces" not in text]


@every_lab
def test_every_finding_has_its_figures_and_every_probe_was_asked(lab: str, finish: Finish) -> None:
    finished = finish(lab)
    resolved, findings = finished.folder.run().rebuilt_lab(), told_by(finished.folder).findings
    assert len(findings) == len(resolved.findings)
    report = (finished.folder.path / "report.md").read_text()
    for finding in findings:
        assert finding.title in report
        assert finding.text != NOTHING, finding.title
        # how long single requests take decides that one, on a machine that is busy here
        assert finding.passed is not False or finding.name == BY_TIMES
    for probe in resolved.probes:
        asked = {v.name for v in resolved.variants if finished.folder.probe_result(probe, v.name)}
        assert asked == set(resolved.probed or [v.name for v in resolved.variants])


@pytest.fixture(scope="module")
def collector(finish: Finish, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """Someone who has the runs of all labs in one folder of results."""
    with reading(tmp_path_factory.mktemp("collector") / "reader") as someone:
        for lab in LABS:
            shutil.copytree(finish(lab).reader.results, someone.results, dirs_exist_ok=True)
        yield someone


def _runs(reader: Reader) -> list[Path]:
    return [path.parent for path in reader.results.glob(RUNS)]


def test_rebuilt_reports_are_the_same_to_the_byte(collector: Reader) -> None:
    def kept() -> dict[Path, bytes]:
        files = (path for run in _runs(collector) for path in run.rglob("*"))
        return {path: path.read_bytes() for path in files if path.is_file()}

    before = kept()
    again = collector.types("report")
    assert again.wait() == 0, again.said
    now = kept()
    assert now.keys() == before.keys()
    assert not [path for path, content in now.items() if content != before[path]]


def test_check_finds_nothing_wrong(collector: Reader) -> None:
    check = collector.types("check")
    assert check.wait() == 0, check.said
    assert len(_runs(collector)) == len(LABS)
    assert f"Well-formed runs: {len(LABS)}." in check.said


def test_one_trace_is_scored_under_every_definition(finish: Finish) -> None:
    finished = finish(BATCHING)
    command = finished.reader.types("score", str(finished.folder.path))
    assert command.wait() == 0, command.said
    points = len(finished.folder.run().points())
    for tool in ("this lab", "vllm bench serve", "GuideLLM", "AIPerf", "inference-perf"):
        assert len(re.findall(rf" {tool}  ", command.said)) == points
    assert "late generator" in command.said  # there is an open loop among them


def _unless_too_busy(summary: Summary) -> None:
    """A busy machine makes a lab refuse its verdicts, and rightly."""
    judged = [(j.metric, j.treatment, j.baseline) for j in summary.judgements]
    blocking = [c for c in summary.caveats if c.blocks and any(c.hits(*of) for of in judged)]
    late = {c.name for c in blocking} & TOO_BUSY
    if late:
        assert "not valid" in {j.outcome for j in summary.judgements}
        pytest.skip(f"this machine is too busy to conclude anything: {', '.join(late)}")


def test_static_batches_lose_on_an_engine_whose_step_knows_no_batch(finish: Finish) -> None:
    """The theory's own assumption, so its prediction must not be refuted."""
    summary = finish(BATCHING).folder.summary()
    _unless_too_busy(summary)
    assert not [c for c in summary.caveats if c.blocks and c.name not in TOO_BUSY]
    judged = {j.claim: j for j in summary.judgements}
    assert judged["static"].outcome == "helps"
    assert judged["static"].expected is True
    assert judged["static"].prediction_outcome in ("held", "open")
    assert judged["throughput"].outcome == "helps"


# ------------------------------------------------------------------- what the engine's record says


def test_acceptance_is_the_chance_the_engine_was_given(finish: Finish) -> None:
    """A draft of five is accepted at 0.6, 0.6^2, ...; a hundred drafts and more tell that well."""
    found = kept("speculative-decoding", finish("speculative-decoding").folder.summary().facts)
    of_five = (at for at in found.acceptance.points if at.point.startswith("draft-5/story"))
    most = max(of_five, key=lambda at: int(at.point.rpartition("-")[2]))
    positions = [share.value for share in most.shares]
    assert positions == pytest.approx([0.6**n for n in range(1, 6)], abs=0.15)
    # each is accepted only with those before it, so the shares add up to what a draft yields
    assert most.tokens_per_draft.value == pytest.approx(1 + sum(positions), abs=0.03)


def test_a_step_yields_the_tokens_that_the_engine_sent_in_it(finish: Finish) -> None:
    folder = finish("speculative-decoding").folder
    run, lab = folder.run(), folder.run().rebuilt_lab()
    summary = folder.summary()
    context = Context(folder, run, lab, run.points(), summary.measurements)
    judged = JudgedRun.of(context, summary)
    points = [point for point, _ in speculations(judged)]
    assert points
    for point in points:
        chunks = [
            tokens
            for _, _, trial in folder.trials([point], lab)
            for record in (trial.records if trial else ())
            for _, tokens in record.chunks[1:]
        ]
        assert tokens_a_step(judged, point).value == pytest.approx(fmean(chunks))


def test_a_quantized_cache_holds_more_tokens_by_its_bytes(finish: Finish) -> None:
    """Twice as many as one in BF16, four times as many as one in float32."""
    folder = finish("kv-quantization").folder
    summary, value_bytes = folder.summary(), folder.run().rebuilt_lab().value_bytes
    forecasts = {f.point.split("/")[0]: f for f in summary.forecasts}
    held = {name: f.measured.value for name, f in forecasts.items() if f.measured}
    for name in ("bf16", "fp8"):
        assert held[name] == forecasts[name].prediction.value
    assert held["fp8"] == pytest.approx(value_bytes * held["bf16"], rel=0.01)


def test_a_primed_trial_finds_all_that_is_shared(finish: Finish) -> None:
    """Its first requests too: every one finds the same."""
    folder = finish("kv-quantization").folder
    rows = folder.summary().measurements["bf16/far/concurrent-4"].values()
    found = [rate for row in rows if (rate := row["prefix_hit_rate"]) is not None]
    assert found
    assert found == pytest.approx([448 / 512] * len(found), abs=0.06)  # in whole blocks


def test_a_tight_cache_preempts_and_eight_bits_do_later(finish: Finish) -> None:
    summary = finish("kv-quantization").folder.summary()
    thrown = {
        key: sum(row["preemptions"] or 0 for row in rows.values())
        for key, rows in summary.measurements.items()
    }
    tight, quantized = (
        [thrown[f"{v}-tight/growing/concurrent-{n}"] for n in (4, 16)] for v in ("bf16", "fp8")
    )
    assert tight[0] == quantized[0] == 0
    assert tight[1] > quantized[1]


def test_two_engines_that_answer_alike_differ_in_nothing(finish: Finish) -> None:
    facts = kept("weight-quantization", finish("weight-quantization").folder.summary().facts)
    assert facts.quality.treatments
    for of in facts.quality.compared.values():
        assert of.levels.perplexity.value == pytest.approx(2, rel=1e-3)
        assert (of.perplexity_ratio.value, of.kl_divergence.value) == (1, 0)


def test_every_tenant_hears_its_own_adapter(finish: Finish) -> None:
    finished = finish("multi-lora")
    found = kept("multi-lora", finished.folder.summary().facts).tenant_leaks
    asked = sum(len(records) for point, _, records in _trials(finished) if point.workload.adapters)
    assert found.in_trials == Marks(asked, 0, 0)
    assert (found.probe.shared, found.probe.loaded) == (Marks(120, 0, 0), Marks(32, 0, 0))
    names = Counter(line["model"] for line in finished.reader.engine_log() if line["stream"])
    assert {f"tenant-{i}" for i in range(8)} | {f"tenant-{i}-rank-64" for i in range(2)} < {*names}


# ------------------------------------------------------------------------- an engine and its twin


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Continuous batching against itself, on engines whose steps vary; four repeats at most."""
    settings = (
        "warmup_s=0.1 window_s=0.7 repeats=2 most_repeats=4 requests=128"
        " workloads.exponential.output_tokens.mean_tokens=8"
        " workloads.exponential.output_tokens.max_tokens=16"
    )
    with reading(tmp_path_factory.mktemp("twins") / "reader") as reader:
        command = reader.types(
            "run", BATCHING, AA="1", QUICK="1", SET=settings, engine=("--jitter", "0.3"),
            program=LABS_WITHOUT_PROMETHEUS,
        )  # fmt: skip
        command.wait()
        yield Finished(reader, command)


def test_a_lab_against_itself_is_one_engine_twice_and_counts_its_false_alarms(
    twins: Finished,
) -> None:
    assert twins.command.process.returncode == 0, twins.command.said
    run, summary = twins.folder.run(), twins.folder.summary()
    assert run.argv["base"] == run.argv["base-again"]
    assert {j.metric for j in summary.judgements} == {"output_tokens_per_s", "tpot_mean_s"}
    alarms = sum(j.outcome in ("helps", "hurts") for j in summary.judgements)
    assert (
        f"False alarms: {alarms} of {len(summary.judgements)}"
        in (twins.folder.path / "report.md").read_text()
    )
    assert run.ad_hoc
    assert {c.name for c in summary.caveats if c.blocks} <= TOO_BUSY, summary.caveats


def test_engines_that_do_not_fit_together_are_visited_there_and_back(reader: Reader) -> None:
    """Each asks for more than half of this machine's memory."""
    settings = f"{BRIEF} {sizes_of('chunked-prefill').fake} repeats=3 starts=2 {TOO_LARGE}"
    command = reader.types(
        "run", "chunked-prefill", AA="1", QUICK="1", SET=settings, program=LABS_WITHOUT_PROMETHEUS
    )
    assert command.wait(400) == 0, command.said
    folder = command.folder
    played = [(p.variant.name, r) for p, r, _ in _trials(Finished(reader, command))]
    names = [name for name, r in played if r == 1]  # in the order that was drawn
    assert set(names) == {v.name for v in folder.run().rebuilt_lab().variants}
    assert played == [
        *((name, r) for name in names for r in (1, 2)),
        *((name, 3) for name in names[::-1]),
    ]
    assert len(reader.engine_starts()) == 2 * len(names)
    session = folder.session()
    assert session
    assert session.there_and_back
    assert all(a.engine == a.records > 0 for a in session.agreement)
    assert not reader.processes()


def test_only_points_of_undecided_claims_are_repeated_and_no_more_than_asked(
    twins: Finished,
) -> None:
    summary = twins.folder.summary()
    repeats = {key: len(rows) for key, rows in summary.measurements.items()}
    assert set(repeats.values()) <= {2, 4}
    if max(repeats.values()) == 2:  # what is not valid gets no more of them
        _unless_too_busy(summary)
    assert max(repeats.values()) == 4  # two repeats decide next to nothing
    for j in summary.judgements:
        assert j.effect
        assert j.effect.looks == 2
        assert j.effect.ratio.n == min(repeats[j.treatment], repeats[j.baseline])
        if j.outcome == "inconclusive":
            assert j.effect.ratio.n == 4
    assert "after 2 repeats" in twins.command.said


def test_the_baseline_is_not_worse_than_itself(twins: Finished, tmp_path: Path) -> None:
    run = twins.folder.path
    assert_nothing_is_worse(
        held_against(twins.reader, f"{run}:base", f"{run}:base-again", tmp_path)
    )


# ------------------------------------------------------------------- a server that is already there


@dataclass(frozen=True)
class Driven:
    """A run against two servers that are already there, behind a router that shows no metrics.

    Prometheus is killed in the middle of it.
    """

    reader: Reader
    command: Command
    url: str
    replicas: list[str]
    requests: list[int]  # that each server has answered


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    settings = (
        "warmup_s=0.1 window_s=0.5 repeats=1 most_repeats=0"
        ' workloads.exponential.loads=["concurrent:4","waves:4"]'
        ' workloads.fixed.loads=["concurrent:4"] requests=64'
        " claims.static.treatment.load=concurrent:4 claims.static.baseline.load=waves:4"
    )
    home = tmp_path_factory.mktemp("driven")
    law = ("--step-s", ".01", "--no-enable-prefix-caching", "--served-model-name", "theirs")
    with reading(home / "reader") as reader:
        logs = [home / "a.jsonl", home / "b.jsonl"]
        with ExitStack() as servers:
            replicas = [servers.enter_context(fake_engine(log, *law)) for log in logs]
            url = servers.enter_context(router(replicas))
            command = reader.types(
                "run", BATCHING, ENDPOINT=f"{url}/v1", ENDPOINT_METRICS=",".join(replicas),
                QUICK="1", SET=settings,
            )  # fmt: skip
            command.until(r"repeat 1 of .* tok/s \(")
            if PROMETHEUS:
                the_program("prometheus", command.family()).kill()
            command.wait()
        answered = [len(log.read_text().splitlines()) for log in logs]
        yield Driven(reader, command, url, replicas, answered)


def test_an_endpoint_is_driven_and_not_taken_for_the_labs_own(driven: Driven) -> None:
    assert driven.command.process.returncode == 0, driven.command.said
    assert not driven.reader.engine_starts()
    folder = driven.command.folder
    report, note = (folder.path / "report.md").read_text(), "did not configure"
    assert note in report
    assert note in driven.command.said
    assert driven.url in report
    assert folder.complete
    caveats = {c.name for c in folder.summary().caveats}
    assert "endpoint's hardware unknown" in caveats
    assert "treatment not applied" not in caveats  # it echoes the lab's own setting, by luck
    assert all(each in report for each in driven.replicas)
    assert min(driven.requests) > 1
    # the first one asked whether it streams
    assert 1 + len(_records(folder)) == sum(driven.requests)
    session = folder.session()
    assert session
    assert all(a.engine == a.records for a in session.agreement)


@needs_prometheus
def test_a_run_outlives_prometheus_and_says_so(driven: Driven) -> None:
    assert driven.command.process.returncode == 0, driven.command.said
    folder = driven.command.folder
    assert folder.complete
    assert "Prometheus ended" in (folder.path / "report.md").read_text()
    session = folder.session()
    assert session
    assert all(a.prometheus is None for a in session.agreement)
    assert not driven.reader.processes()


def _records(folder: RunFolder) -> list[RequestRecord]:
    trials = folder.trials(folder.run().points(), folder.run().rebuilt_lab())
    return [record for _, _, trial in trials if trial for record in trial.records]
