"""What a person reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from labs import LABS
from labs.harness.analysis.computed import Summary
from labs.harness.analysis.text import (
    between,
    claim_outcome,
    decided_text,
    interval,
    number,
    one_load,
    outcome_text,
    point_label,
    prediction_text,
    predictions_text,
    ratio_ends,
    ratio_interval,
    ratio_text,
    verdict_text,
    with_ends,
)
from labs.harness.analysis.validity import SERVER_BUSY
from labs.harness.analysis.verdicts import Caveat, Effect, Interval, Judgement, PredictionOutcome
from labs.harness.derived.lab_modules import Headline
from labs.harness.derived.run_view import JudgedRun
from labs.harness.derived.summarize import summarise
from labs.harness.reports import headlines, method, plots, report, tables
from labs.harness.reports.document import parts
from labs.harness.reports.rendering import told_by
from labs.harness.site import leaderboards
from labs.harness.spec.lab import Prediction, Variant
from labs.harness.storage import results
from labs.harness.storage.bounded import read_json
from labs.harness.storage.newest import newest_runs
from labs.harness.storage.recorded import MachineFile, Session, TrialResult
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from loadtests.arrivals import Waves
from tests.unit.builders import PREDICTION, make_lab, make_point, write_run
from tests.unit.judged import page_says


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "1", "–"),
        (None, "s", "–"),
        (0.0, "1", "0"),
        (0.0, "s", "0 ms"),
        (0.01234, "s", "12.3 ms"),
        (0.999, "s", "999 ms"),
        (1.0, "s", "1 s"),
        (12.345, "s", "12.3 s"),
        (-0.0025, "s", "-2.5 ms"),
        (0.12345, "1", "0.123"),
        (999.4, "tok/s", "999 tok/s"),
        (1000.0, "tok/s", "1,000 tok/s"),
        (1234567.0, "FLOP/s", "1,234,567 FLOP/s"),
        (0.5, "USD", "0.5"),
        (0.9996, "s", "1 s"),
        (999.7, "tok/s", "1,000 tok/s"),
        (-5.0, "s", "-5 s"),
    ],
)
def test_number(value: float | None, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_interval_has_both_bounds_or_is_a_dash() -> None:
    found = Interval(value=0.5, low=0.4, high=0.6, n=3)
    assert interval(found, "s") == "400 to 600 ms"
    assert interval(None) == interval(Interval(value=1, low=None, high=None, n=1)) == "–"
    assert between(0.9, 1.2, "s") == "900 ms to 1.2 s"
    assert between(0.1, 0.2, "share") == "10% to 20%"
    assert between(1, 2000) == "1 to 2,000"


@pytest.mark.parametrize(
    ("ends", "unit", "text"),
    [
        ((50.0, 43.3, 55.0), "tok/s", "50 (43.3 to 55) tok/s"),
        ((0.151, 0.117, 0.207), "s", "151 (117 to 207) ms"),
        ((0.898, 0.696, 1.23), "s", "898 ms (696 ms to 1.23 s)"),
        ((0.5, 0.4, 0.6), "share", "50% (40% to 60%)"),
        ((0.0912, 0.09119, 0.09121), "share", "9.12%"),
    ],
)
def test_a_figure_and_its_ends_name_the_unit_once(
    ends: tuple[float, float, float], unit: str, text: str
) -> None:
    assert with_ends(*ends, unit) == text


@pytest.mark.parametrize(
    ("kind", "text"), [("point", "2"), ("ceiling", "at most 2"), ("floor", "at least 2")]
)
def test_prediction_says_what_kind_it_is(kind: Any, text: str) -> None:
    assert prediction_text(Prediction(value=2, kind=kind, formula="")) == text


def test_point_is_named_by_what_varies() -> None:
    lab = make_lab()
    assert point_label("on/short/concurrent-2", lab) == "on, 2 users"
    alone = make_lab(variants=lab.variants[:1], claims=(), evidence=())
    assert point_label("off/short/concurrent-2", alone) == "2 users"
    again = lab.workloads[0].model_copy(update={"name": "long"})
    two = make_lab(workloads=(*lab.workloads, again))
    assert point_label("on/long/concurrent-1", two) == "on, long, 1 user"
    assert point_label("on/long/waves-8", two) == "on, long, waves-8"  # which the lab has not
    short = lab.workloads[0].model_copy(update={"loads": (Waves(size=8),)})
    one = make_lab(workloads=(short,), claims=(), evidence=())
    assert point_label("on/short/waves-8", one) == "on"
    assert one_load(one) == "waves of 8"
    assert one_load(lab) is None


def judgement(outcome: Any, expected: bool | None, effect: Effect | None = None) -> Judgement:
    return Judgement(
        claim="faster", title="On is faster", metric="output_tokens_per_s", treatment="on",
        baseline="off", outcome=outcome, expected=expected, effect=effect, prediction=PREDICTION,
        prediction_outcome="open", margin=0.05, why="errors",
    )  # fmt: skip


def test_ratio_without_effect_or_interval_is_a_dash() -> None:
    none = judgement("inconclusive", None)
    assert (ratio_text(none), ratio_interval(none)) == ("–", "–")
    ratio = Interval(value=1.5, low=None, high=None, n=1)
    single = judgement("inconclusive", None, Effect(ratio=ratio, spread=None))
    assert (ratio_text(single), ratio_interval(single)) == ("1.50x", "–")


def test_verdict_in_words() -> None:
    assert verdict_text(judgement("helps", True)) == "helps (as claimed)"
    none = judgement("no effect", False).model_copy(update={"why": "within 5%"})
    assert verdict_text(none) == "no effect: within 5% (against the claim)"
    assert verdict_text(judgement("not valid", None)) == "not valid: errors"
    assert verdict_text(judgement("inconclusive", None)) == "inconclusive: errors"


def test_a_ratio_of_arithmetic_means_is_said_to_be_one() -> None:
    def where(of_means: bool) -> str:
        ratio = Interval(value=1.5, low=1.2, high=1.9, n=3)
        effect = Effect(ratio=ratio, spread=0.1, of_means=of_means)
        points = {side: f"{side}/short/concurrent-1" for side in ("treatment", "baseline")}
        judged = judgement("helps", True, effect).model_copy(update=points)
        summary = Summary.model_construct(judgements=[judged])
        return str(tables.compared(make_lab(), summary))

    assert "; of the arithmetic means, as a repeat had 0 |" in where(of_means=True)
    assert "arithmetic" not in where(of_means=False)


SEVEN = [f"v{n}/w/l" for n in range(7)]


@pytest.mark.parametrize(
    ("points", "caveat", "told"),
    [
        (("on/short/concurrent-1", "on/short/concurrent-2"), {"blocks": True},
         "- **errors** (no verdict there; on, 1 user; on, 2 users): 3 of 9"),
        ((None,), {"blocks": True, "metrics": ("tpot_mean_s",)},
         "- **errors** (no verdict on times between tokens there; the run): 3 of 9"),
        (SEVEN, {}, "- **errors** (caveat; 7 points): 3 of 9"),
        (SEVEN, {"blocks": True},
         f"- **errors** (no verdict there; {'; '.join(f'v{n}, l' for n in range(7))}): 3 of 9"),
    ],
)  # fmt: skip
def test_caveats_are_told_once_each_with_where_and_whether_they_block(
    points: Sequence[str | None], caveat: dict[str, Any], told: str
) -> None:
    found = [Caveat(name="errors", text="3 of 9", point=p, **caveat) for p in points]
    assert report.validity(found, make_lab()) == told


def test_report_is_the_same_bytes_from_the_same_files(folder: RunFolder) -> None:
    def files() -> dict[str, bytes]:
        report.write(folder)
        found = [p for p in folder.path.iterdir() if p.suffix in (".md", ".svg")]
        return {p.name: p.read_bytes() for p in found}

    first = files()
    assert set(first) == {"report.md", "effects.svg"}
    assert files() == first


def test_report_shows_the_verdict_beside_the_prediction(folder: RunFolder) -> None:
    text = report.write(folder).read_text()
    row = next(
        line for line in text.splitlines() if line.startswith("| On is faster (on, 2 users)")
    )
    assert [cell.strip() for cell in row.split("|")][2:-1] == [
        "2.97x", "2.84 to 3.10", "2.00x", "refuted (157% of the effect)", "helps",
    ]  # fmt: skip
    assert "Claims decided: 2 of 2. Predictions: 2 refuted." in text
    assert "treatment / baseline: `by hand`" in text


def test_a_figure_that_is_not_valid_is_shown_and_marked(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_says(monkeypatch, '## Answers\n\n### SO-4\n\nIt is {{ claim("faster") }}.\n')
    assert told_by(folder).answers["SO-4"].brief.startswith("It is 2.9")
    summary = folder.summary()
    spoilt = [
        j.model_copy(update={"outcome": "not valid", "why": "errors"}) for j in summary.judgements
    ]
    write_json(folder.path / "summary.json", summary.model_copy(update={"judgements": spoilt}))
    assert not told_by(folder).answers  # the results pages count it as unanswered
    facts = report.Facts.of(folder)
    for told in (report.document(facts, ()), report.digest(facts)):
        assert "*Not valid here, and shown all the same:* It is 2.9" in told
        assert re.search(r"\| 2\.97x, not valid \|.* not valid \|", told)


@pytest.mark.parametrize(
    ("kind", "outcome", "said"),
    [
        ("point", "held", "held"),
        ("point", "open", "open"),
        ("ceiling", "not broken", "not broken (35% of it)"),
        ("floor", "broken", "broken (35% of it)"),
    ],
)
def test_of_a_bound_the_distance_is_told(kind: Any, outcome: PredictionOutcome, said: str) -> None:
    prediction = Prediction(value=2, kind=kind, formula="")
    measured = Interval(value=0.7, low=0.6, high=0.8, n=3)
    assert outcome_text(outcome, prediction, measured) == said
    assert outcome_text("open", prediction, None) == "open"


def test_what_is_trivial_is_told_and_counted_apart() -> None:
    about_1 = PREDICTION.model_copy(update={"value": 1.03})
    open_, trivial = judgement("helps", True), judgement("no effect", True)
    held = open_.model_copy(update={"prediction_outcome": "held"})
    trivial = trivial.model_copy(update={"prediction": about_1, "prediction_outcome": "held"})
    undecided = trivial.model_copy(update={"expected": None, "prediction_outcome": "open"})
    assert claim_outcome(trivial) == "held, trivial"
    found = [held, open_, open_, trivial, undecided]
    assert (decided_text(found), decided_text([])) == ("4 of 5", "–")
    assert predictions_text(found) == "1 held, 2 open; trivial: 1 held, 1 open"
    assert (predictions_text([trivial]), predictions_text([])) == ("trivial: 1 held", "–")


def test_plots_know_what_is_not_valid(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    caveat = Caveat(name="errors", text="", blocks=True, point="off/short/concurrent-1")
    summary = folder.summary().model_copy(update={"caveats": [caveat]})
    known = []

    def draw(run: JudgedRun) -> None:
        known.append([p.key for p in run.points if run.withholds("tpot_mean_s", p)])

    monkeypatch.setattr(plots, "_drawn", lambda _: {"one": draw})
    facts = report.Facts.of(folder)
    plots.draw(folder, facts.lab, facts.points, summary, save=False)
    assert known == [["off/short/concurrent-1"]]


NOTED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"judgements": []}, "Claims for which this run has no points: faster."),
    ({"lab": {"admission_by_client": True}}, {}, "The limits are the client's: this vLLM has no"),
    ({"lab": {"load_processes": 4}}, {}, "Load processes on this machine: 4."),
    ({"endpoint": "http://there"}, {}, "Measured on the endpoint http://there, which this lab"),
    ({"changes": {"a": "*1*"}}, {}, r"Ad hoc run (a=\*1\*): it stays out of summary tables."),
    ({"quick": True}, {"missing": 2}, "Trials not played: 2. This run is not complete."),
]


@pytest.mark.parametrize(("of_run", "of_summary", "said"), NOTED)
def test_what_sets_a_run_apart_stands_before_its_first_figure(
    folder: RunFolder, of_run: dict[str, Any], of_summary: dict[str, Any], said: str
) -> None:
    run, summary = folder.run(), folder.summary()
    assert report.notes(run, summary) == ""
    of_run = of_run | ({"lab": run.lab | of_run["lab"]} if "lab" in of_run else {})
    changed = run.model_copy(update=of_run), summary.model_copy(update=of_summary)
    assert f"> **{said}" in report.notes(*changed)


def test_a_run_held_against_the_ceilings_of_another_machine_says_so(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    run, summary = folder.run(), folder.summary()
    own = MachineFile(machine=run.machine, ceilings=run.ceilings)
    write_json(tmp_path / run.machine.slug / "machine.json", own)
    other = run.machine.model_copy(update={"caches_bytes": {"L1": 48 * 2**10, "L1i": 2**16}})
    older = run.model_copy(update={"machine": other})
    assert f"another CPU of the same name: {run.machine.describe()}.**" in report.notes(
        older, summary
    )


def test_a_run_with_random_weights_says_so_first(folder: RunFolder) -> None:
    lab = {**folder.run().lab, "left_out": ("quality: there is no text",)}
    changed = {"dummy": True, "model": "llama-8b-dummy", "lab": lab}
    write_json(folder.path / "run.json", folder.run().model_copy(update=changed))
    lines = [line for line in report.write(folder).read_text().splitlines() if line]
    assert lines[0].startswith("# ")
    assert lines[0].endswith(", with random weights")
    assert lines[2].startswith("> **Random weights in the architecture of llama-8b-dummy: speed")
    assert lines[3] == "> **Left out: quality: there is no text.**"
    assert any("WEIGHTS=dummy MODEL=llama-8b`" in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "flag", "name", "says"),
    [
        ("gpu", "tensor-parallel-size", "several GPUs", "no communication between GPUs"),
        ("cpu", "data-parallel-size", "several copies", "those of one copy of the model"),
    ],
)
def test_several_gpus_or_copies_are_a_caveat_of_the_predictions(
    kind: str, flag: str, name: str, says: str, folder: RunFolder
) -> None:
    assert not {"several GPUs", "several copies"} & {c.name for c in folder.summary().caveats}
    run = folder.run()
    machine, lab = run.machine.model_copy(update={"kind": kind}), run.lab
    lab["flags"][flag] = 2
    write_json(folder.path / "run.json", run.model_copy(update={"lab": lab, "machine": machine}))
    caveats = {c.name: c for c in summarise(folder).caveats}
    assert not caveats[name].blocks
    assert says in caveats[name].text


def test_report_of_a_failed_trial_has_a_dash_not_a_zero(folder: RunFolder) -> None:
    for repeat in (1, 2):
        path = folder.path / f"trials/on/short/concurrent-2/{repeat}/trial.json"
        failed = TrialResult(point="on/short/concurrent-2", repeat=repeat, failed="engine died")
        write_json(path, failed)
    summarise(folder)
    text = report.write(folder).read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| on, 2 users |"))
    assert set(row.removeprefix("| on, 2 users |").split()) == {"–", "|"}
    assert "`on/short/concurrent-2/1`: engine died" in text


def test_a_report_shows_how_busy_the_api_server_was_where_that_was_recorded(
    folder: RunFolder,
) -> None:
    """Runs from before it was recorded are told as they were."""
    assert "API server's share of a core" not in report.write(folder).read_text()
    points = folder.run().points()
    for n, point in enumerate(points):
        result = folder.trial_result(point, 1)
        assert result
        busy = result.model_copy(update={"server_core_share": 0.25 + 0.125 * n})
        write_json(folder.trial_folder(point, 1) / "trial.json", busy)
    summary = summarise(folder)
    assert summary.value(points[1].key, "server_core_share") == 0.375
    told = report.write(folder).read_text()
    assert "| API server's share of a core |" in told
    assert "can use hardly more than one core" in told


@pytest.mark.parametrize(("kind", "told"), [("gpu", True), ("cpu", False)])
def test_every_answer_from_a_gpu_says_where_the_api_server_was_at_its_limit(
    folder: RunFolder, kind: Any, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_says(monkeypatch, "## Answers\n\n### SO-4\n\nOften.\n")
    run = folder.run()
    machine = run.machine.model_copy(update={"kind": kind})
    asked = run.environment.model_copy(update={"compute_mode": None})  # which says that it was
    ours = run.model_copy(update={"machine": machine, "environment": asked})
    write_json(folder.path / "run.json", ours)
    summarise(folder)
    assert told_by(folder).answers["SO-4"].whole == "Often."
    for point in run.points()[1:]:
        result = folder.trial_result(point, 1)
        assert result
        busy = result.model_copy(update={"server_core_share": 0.97})
        write_json(folder.trial_folder(point, 1) / "trial.json", busy)
    summary = summarise(folder)
    limited = "But at 3 of 4 points vLLM's API server was at its limit: "
    assert (limited in told_by(folder).answers["SO-4"].depth) is told
    assert [c.blocks for c in summary.caveats if c.name == SERVER_BUSY] == [False] * 3
    assert [j.outcome for j in summary.judgements] == ["helps"] * 2  # it withholds no verdict


def test_only_complete_ordinary_runs_are_published(folder: RunFolder) -> None:
    assert [f.path for f in newest_runs()] == [folder.path]
    run = folder.run()
    for change in ({"quick": True}, {"changes": {"seed": 1}}, {"endpoint": "http://there"}):
        write_json(folder.path / "run.json", run.model_copy(update=change))
        assert newest_runs() == [], change
    write_json(folder.path / "run.json", run)
    (folder.path / "COMPLETE").unlink()
    assert newest_runs() == []


@pytest.mark.parametrize("resident", [True, False])
def test_engines_that_took_turns_are_a_caveat(resident: bool, folder: RunFolder) -> None:
    sitting = Session(
        engine_start_s=1, load_s=1, wall_s=3, resident=resident, agreement=[], prometheus=None
    )
    write_json(folder.path / "session.json", sitting)
    found = [c for c in summarise(folder).caveats if c.name == "engines took turns"]
    assert [c.blocks for c in found] == ([] if resident else [False])


@pytest.mark.parametrize(
    ("starts", "resident", "most_repeats", "said"),
    [
        (None, True, 0, "Each engine was started once: differences between starts are not"),
        (2, False, 0, "one was started only 2 times. Fewer than 4 starts"),
        (4, False, 0, "each was started at least 4 times. Between engines the mean of a start"),
        (None, True, 8, "an interval of 95% is taken at 97.5%, and one of 90% at 95%"),
    ],
)
def test_a_report_says_what_its_intervals_cover(
    tmp_path: Path, starts: int | None, resident: bool, most_repeats: int, said: str
) -> None:
    folder = write_run(tmp_path, repeats=4, most_repeats=most_repeats)
    sitting = Session(
        engine_start_s=1, load_s=1, wall_s=3, resident=resident, there_and_back=True, agreement=[],
        prometheus=None,
    )  # fmt: skip
    write_json(folder.path / "session.json", sitting)
    for path in folder.path.rglob("trial.json"):
        trial = read_json(path, TrialResult)
        start = starts and min(trial.repeat, starts)
        write_json(path, trial.model_copy(update={"start": start}))
    summarise(folder)
    text = report.write(folder).read_text()
    assert said in text
    assert "An interval covers one sitting" in text


@pytest.mark.parametrize(
    ("ended_at", "resumed"),
    [
        ("2026-01-01T00:01:40+00:00", False),
        ("2026-01-01T00:01:42+00:00", False),  # whole seconds
        ("2026-01-01T08:00:00+00:00", True),
        (None, False),  # of an older run
    ],
)
def test_the_times_of_a_resumed_run_are_said_to_be_the_last_sessions(
    folder: RunFolder, ended_at: str | None, resumed: bool
) -> None:
    """It was started at midnight, and its last session took 100 s."""
    session = Session(
        engine_start_s=10, load_s=60, wall_s=100, resident=True, agreement=[], prometheus=None,
        ended_at=ended_at,
    )  # fmt: skip
    write_json(folder.path / "session.json", session)
    text = report.write(folder).read_text()
    assert ("Time of the last session: 100 s in all" in text) == resumed
    assert ("an earlier one, whose times are not on file." in text) == resumed
    assert ("Time: 100 s in all" in text) != resumed
    page = leaderboards.write_machine(folder.path.parents[1], [folder]).read_text()
    assert ("| 1.0 min (last session) |" if resumed else "| 1.0 min |") in page


@pytest.mark.parametrize(
    ("played", "most_repeats", "said"),
    [
        ((2, 2), 0, ("2 repeats", 0)),
        ((2, 2), 8, ("2 repeats", 8)),
        ((2, 7), 8, ("2 to 7 repeats", 8)),
    ],
)
def test_it_is_said_how_often_points_were_measured(
    folder: RunFolder, played: tuple[int, int], most_repeats: int, said: tuple[str, int]
) -> None:
    measured: dict[str, Any] = {
        f"point {n}": {r: {} for r in range(times)} for n, times in enumerate(played)
    }
    summary = folder.summary().model_copy(update={"measurements": measured})
    known = method.repeats(make_lab(most_repeats=most_repeats), summary)
    assert (known["text"], known["most"]) == said


@pytest.mark.parametrize(
    ("engine", "flags", "endpoint", "is_eager"),
    [("vllm", {"enforce-eager": True}, "", True), ("vllm", {}, "", False),
     ("llama-cpp", {}, "", False), ("vllm", {"enforce-eager": True}, "http://127.0.0.1:1", False)],
)  # fmt: skip
def test_a_report_says_that_every_engine_went_without_compilation(
    engine: str, flags: dict[str, Any], endpoint: str, is_eager: bool, folder: RunFolder
) -> None:
    run = folder.run().model_copy(update={"endpoint": endpoint})
    point = make_point()
    started = replace(point, variant=Variant(name="a", engine=engine, flags=flags))
    assert report.runs_eager(run, [started]) == is_eager


def test_a_terminal_ends_with_the_answer_its_doubt_and_what_to_try_next(folder: RunFolder) -> None:
    run = folder.run().model_copy(update={"quick": True})
    facts = replace(report.Facts.of(folder), run=run)
    knobs = ('SET="a=1" tells more', 'SET="b=1" tells less')
    names = [*LABS]
    lab = facts.lab.model_copy(update={"name": names[0], "next_knobs": knobs})
    digest = report.digest(replace(facts, lab=lab))
    _, notes, sections = parts(digest)
    assert notes.startswith("> **QUICK run")
    titles = [parts(section)[0] for section in sections]
    assert titles == ["Every point", "Claim by claim", "Validity", "The answer"]
    last = sections[-1].splitlines()
    assert [re.split(":?[*]{2}", line)[1] for line in last[-4:]] == [
        "Doubt", "The whole run", "Try next", "Next lab"
    ]  # fmt: skip
    assert f'`make lab-{names[0]} SET="a=1"` tells more' in last[-2]
    assert f"`make lab-{names[1]}`" in last[-1]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.98, 1.11, "0.98 to 1.11"),
        (0.0, 0.088, "0.00 to 0.088"),
        (1.3, 29.83, "1.30 to 29.8"),
        (9.996, 215.21, "10 to 215"),
        (5.7e-7, 6.2e7, "under 0.001 to over 1,000"),
        (None, None, "–"),
    ],
)
def test_the_ends_of_an_interval_are_no_further_than_a_thousandfold(
    low: float | None, high: float | None, words: str
) -> None:
    assert ratio_ends(Interval(value=1.0, low=low, high=high, n=3)) == words


@pytest.mark.parametrize(
    ("value", "low", "high", "words"),
    [
        (81_562, 42_968, 154_820, "42,968 to 154,820"),
        (1200, 800, 1800, "800 to 1,800"),
        (2e-4, 1e-4, 4e-4, "0.0001 to 0.0004"),
    ],
)
def test_no_end_is_cut_short_of_the_ratio_itself(
    value: float, low: float, high: float, words: str
) -> None:
    assert ratio_ends(Interval(value=value, low=low, high=high, n=3)) == words


def test_a_ratio_below_one_is_told_as_how_many_times_less(folder: RunFolder) -> None:
    judged = next(j for j in folder.summary().judgements if j.effect)
    assert judged.effect
    ratio = Interval(value=0.1, low=0.08, high=0.125, n=5)
    prediction = judged.prediction.model_copy(update={"value": 0.5})
    update = {"effect": judged.effect.model_copy(update={"ratio": ratio}), "prediction": prediction}
    headline = Headline("faster", "Doing it", "the figure")
    for metric, less in (("tpot_mean_s", "shorter"), ("output_tokens_per_s", "lower")):
        told = headlines.told(judged.model_copy(update={**update, "metric": metric}), headline)
        said = f"Doing it: the figure is 10 times {less} (8.00 to 12.5; predicted 2.00: "
        assert told.startswith(said)
