"""The rule that names a cause from an engine's metrics, its lab, and `make diagnose`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from typer.testing import CliRunner

from labs import LABS
from labs.diagnosis.facts import (
    Coefficients,
    Level,
    Moved,
    blind,
    coefficients,
    facts,
    point_of,
    seen_by_clients,
    signatures,
    told_apart,
)
from labs.diagnosis.lab import INJECTED, SIGNATURES, running
from labs.diagnosis.plots import draw_coefficients, draw_signatures
from labs.harness.analysis.diagnosis import Cause, Reading, TooLittle, diagnose
from labs.harness.analysis.quantity import Quantity
from labs.harness.cli.cli import app
from labs.harness.reports import diagnoses, markdown
from labs.harness.reports.document import plain_text
from labs.harness.reports.templates import MISSING, filled
from labs.harness.runner.diagnosing import ReadingFile, between
from labs.harness.spec.lab import LabError, Point
from labs.harness.storage.recorded import snapshot_json
from serving import metrics
from serving.metrics import Histogram, Snapshot, together
from tests.unit import hostile
from tests.unit.answering import Answering, answered_by
from tests.unit.builders import CEILINGS, SHAPE, make_record
from tests.unit.hostile import says, whole
from tests.unit.judged import context, judged_run, played, told_of, withheld

INF = float("inf")
GAPS_S = (0.025, 0.05, 0.1, 0.2, 0.5, INF)
PROMPTS = (200.0, 500.0, 1000.0, 2000.0, INF)
LAB = LABS["diagnosis"].at("cpu", quick=False)


def spread(bounds: tuple[float, ...], values: Mapping[float, int]) -> Histogram:
    """A histogram of so many observations of each value."""
    counts = tuple(float(sum(n for v, n in values.items() if v <= le)) for le in bounds)
    return Histogram(bounds, counts, sum(v * n for v, n in values.items()), sum(values.values()))


def counted(
    *,
    queue_s: float = 0.01,
    prefill_s: float = 0.19,
    gaps_s: Mapping[float, int] | None = None,
    prompts: Mapping[float, int] | None = None,
    hits: float = 0.3,
    preemptions: int = 0,
    drafted: tuple[int, int] | None = None,
    tokens_a_gap: float = 1.0,
) -> Snapshot:
    """What ten requests count, which share a third of their prompts and take 40 ms a token."""
    gaps, sent = gaps_s or {0.04: 200}, prompts or {384.0: 10}
    requests = sum(sent.values())

    def alike(seconds: float) -> Histogram:
        return spread((0.3, 1.0, INF), {seconds: requests})

    values = {
        metrics.REQUESTS: float(requests),
        metrics.GENERATION_TOKENS: requests + tokens_a_gap * sum(gaps.values()),
        metrics.PREEMPTIONS: float(preemptions),
        metrics.PREFIX_QUERIES: 1000.0,
        metrics.PREFIX_HITS: 1000.0 * hits,
    }
    if drafted:
        values |= {
            metrics.SPEC_DRAFTED: float(drafted[0]),
            metrics.SPEC_ACCEPTED: float(drafted[1]),
        }
    return Snapshot(
        values,
        {
            metrics.TTFT: alike(queue_s + prefill_s),
            metrics.QUEUE_TIME: alike(queue_s),
            metrics.PREFILL_TIME: alike(prefill_s),
            metrics.ITL: spread(GAPS_S, gaps),
            metrics.REQUEST_PROMPT_TOKENS: spread(PROMPTS, sent),
        },
    )


HEALTHY = counted()
DISTURBED: dict[Cause, Snapshot] = {
    "healthy": counted(prefill_s=0.2, gaps_s={0.043: 200}),
    "burst": counted(queue_s=0.5),
    "cold cache": counted(prefill_s=0.3, hits=0.0),
    "long neighbour": counted(queue_s=0.2, prefill_s=0.3, prompts={384.0: 9, 1280.0: 1}),
    "long context": counted(gaps_s={0.06: 200}, prompts={1280.0: 10}, hits=0.8),
    "preemption": counted(queue_s=0.3, gaps_s={0.06: 200}, preemptions=3),
    "large budget": counted(prefill_s=0.1, gaps_s={0.025: 180, 0.15: 20}),
    "speculation": counted(gaps_s={0.09: 200}, drafted=(1000, 100), tokens_a_gap=1.5),
    "slow step": counted(prefill_s=0.24, gaps_s={0.05: 200}),
}
"""What each disturbance leaves in the metrics, by the reasons that the lab gives."""


def named(now: Snapshot, healthy: Snapshot | None = HEALTHY) -> Cause:
    return diagnose(Reading(now), Reading(healthy) if healthy else None).cause


@pytest.mark.parametrize("cause", DISTURBED)
def test_every_cause_is_named_by_its_own_mark(cause: Cause) -> None:
    assert named(DISTURBED[cause]) == cause


def test_every_cause_of_the_lab_is_one_of_the_rule_and_has_a_signature() -> None:
    assert set(INJECTED.values()) == DISTURBED.keys() == SIGNATURES.keys()
    of_traffic = {"more requests at once"}  # a closed loop of equally many users has no more
    no_cause = {"unknown", "cannot be told"}
    assert set(INJECTED.values()) | of_traffic | no_cause == set(get_args(Cause))
    assert set(diagnoses.MEANINGS) == (set(INJECTED.values()) | of_traffic) - {"healthy"}
    on_gpu = LABS["diagnosis"].at("gpu", quick=False).points(SHAPE, CEILINGS)
    assert INJECTED.keys() <= {(p.variant.name, p.workload.name) for p in on_gpu}
    here = {(p.variant.name, p.workload.name) for p in points()}
    assert INJECTED.keys() - here == {("slow-step", "usual")}


def test_a_mark_without_a_symptom_is_no_cause() -> None:
    """Fewer hits cost nothing here, and guesses pay: nothing is worse."""
    assert named(counted(hits=0.0)) == "healthy"
    assert named(counted(gaps_s={0.05: 200}, drafted=(1000, 500), tokens_a_gap=2)) == "healthy"
    assert named(counted(prompts={384.0: 9, 1280.0: 1})) == "healthy"


@pytest.mark.parametrize(
    ("gaps_s", "cause"),
    [
        ({0.04: 100, 0.08: 20, 0.3: 40}, "large budget"),  # fewer around the mean, more are long
        ({0.04: 100, 0.08: 100, 0.3: 40}, "slow step"),  # as many around it, more are long
        ({0.04: 100, 0.08: 20, 0.15: 40}, "healthy"),  # none is longer than before
    ],
)
def test_a_large_budget_makes_a_few_gaps_long_and_the_others_short(
    gaps_s: dict[float, int], cause: Cause
) -> None:
    """However long a token takes on average, which depends on the machine as well."""
    healthy = counted(gaps_s={0.04: 100, 0.08: 60, 0.15: 40})
    assert named(counted(gaps_s=gaps_s), healthy) == cause


@pytest.mark.parametrize(("metric", "later"), [("ttft_mean_s", False), ("tpot_mean_s", True)])
def test_a_report_says_where_a_mark_was_changed_after_its_run(
    metric: str, later: bool, tmp_path: Path
) -> None:
    """The metric of the recorded claim tells, as both were changed together."""
    (budget,) = (c for c in LAB.claims if c.name == "budget")
    claim = budget.model_copy(update={"metric": metric})
    found = context(tmp_path, LAB.model_copy(update={"claims": (claim,)}), {})
    for point in found.points:
        played(found, point.key, engine=HEALTHY)
    assert told_apart(found).mark_changed_later is later


def test_every_mark_is_told_with_its_figures() -> None:
    """Beside a healthy reading, and by thresholds alone."""
    stalls = counted(prompts={384.0: 19, 2500.0: 1}, gaps_s={0.04: 180, 0.3: 20})
    more = Reading(counted(gaps_s={0.052: 1600}, prompts={384.0: 80}), 5.2)
    found = [
        *(diagnose(Reading(now), Reading(HEALTHY)) for now in DISTURBED.values()),
        diagnose(more, Reading(HEALTHY, 4.0)),
        *(diagnose(Reading(now)) for now in (*DISTURBED.values(), stalls)),
    ]
    marks = [mark for diagnosis in found for mark in diagnosis.marks]
    assert {mark.cause for mark in marks} == set(diagnoses.MEANINGS)
    for mark in marks:
        told = plain_text(filled("mark.md", mark=mark))
        assert told.endswith("."), mark
        assert MISSING not in told, mark
        assert all(str(of) in told for of in mark.figures.values() if of.known), mark


def test_a_symptom_without_a_mark_is_not_named() -> None:
    """First tokens come later, but neither from the queue nor from anything that was sent."""
    assert named(counted(prefill_s=0.4)) == "unknown"


def test_what_was_sent_comes_before_what_it_brings_about() -> None:
    """A neighbour's prompt fills the queue, too: the queue is listed second."""
    found = diagnose(Reading(counted(queue_s=0.4, prompts={384.0: 9, 1280.0: 1})), Reading(HEALTHY))
    assert [mark.cause for mark in found.marks] == ["long neighbour", "burst"]
    assert found.symptoms == ("first tokens come later",)


def test_a_queue_that_is_only_slower_is_no_burst() -> None:
    """Everything takes 1.5 times as long, the wait for a place too."""
    busy = counted(queue_s=0.15, prefill_s=0.05)
    slower = counted(queue_s=0.225, prefill_s=0.075, gaps_s={0.06: 200})
    assert named(slower, busy) == "slow step"
    assert named(counted(queue_s=0.4, prefill_s=0.075, gaps_s={0.06: 200}), busy) == "burst"


def test_guesses_that_were_there_before_are_blamed_once_fewer_are_accepted() -> None:
    before = counted(gaps_s={0.06: 200}, drafted=(1000, 700), tokens_a_gap=2)
    assert named(counted(gaps_s={0.06: 200}, drafted=(1000, 300), tokens_a_gap=1.3), before) == (
        "speculation"
    )
    slower = counted(gaps_s={0.09: 200}, drafted=(1000, 700), tokens_a_gap=2)
    assert named(slower, before) == "slow step"


@pytest.mark.parametrize(
    ("requests", "gap_s", "seconds", "cause"),
    [
        (80, 0.052, 5.2, "more requests at once"),  # 16 in decode, 1.3 times as slow
        (10, 0.052, 4.0, "slow step"),  # as many come: slower tokens alone make 2.6 of 2
        (10, 0.12, 4.0, "slow step"),  # 6 of 2, at a third of the speed
        (80, 0.041, 4.1, "healthy"),  # 16, but no token is slower
        (80, 0.052, None, "slow step"),  # over an interval that is not known
    ],
)
def test_more_traffic_is_no_broken_engine(
    requests: int, gap_s: float, seconds: float | None, cause: Cause
) -> None:
    """Beside a healthy engine that has 2 requests in decode on average."""
    healthy = Reading(HEALTHY, seconds=4.0)
    assert healthy.decoding == pytest.approx(2)
    more = counted(gaps_s={gap_s: 20 * requests}, prompts={384.0: requests})
    found = diagnose(Reading(more, seconds), healthy)
    assert found.cause == cause
    if cause == "more requests at once":
        figures = found.marks[0].figures
        assert [figures[name].value for name in ("decoding", "healthy")] == pytest.approx([16, 2])
        text = markdown.document(diagnoses.page("m", 4, Reading(more, seconds), healthy, found))
        assert "More traffic comes than before" in text
        assert "machine" not in text


def test_without_a_healthy_reading_only_some_causes_can_be_told() -> None:
    told = {cause for cause, now in DISTURBED.items() if named(now, None) == cause != "healthy"}
    assert told == {"burst", "preemption", "speculation"}
    stalls = counted(prompts={384.0: 19, 2500.0: 1}, gaps_s={0.04: 180, 0.3: 20})
    assert named(stalls, None) == "long neighbour"
    assert named(HEALTHY, None) == "healthy"


def test_too_few_requests_say_nothing() -> None:
    few = counted(prompts={384.0: 4})
    with pytest.raises(TooLittle, match="4 requests were finished in the reading, and 5"):
        named(few)
    with pytest.raises(TooLittle, match="in the healthy reading"):
        named(HEALTHY, few)


def test_an_engine_that_shows_less_is_diagnosed_by_what_it_shows() -> None:
    plain = Snapshot({metrics.REQUESTS: 9.0})
    assert named(plain, plain) == "cannot be told"
    assert named(plain, None) == "cannot be told"
    assert Reading(plain).tpot_s is None


def without(snapshot: Snapshot, *names: str) -> Snapshot:
    """What a Prometheus recorded that does not keep these metrics."""
    return Snapshot(
        {name: v for name, v in snapshot.values.items() if name not in names},
        {name: h for name, h in snapshot.histograms.items() if name not in names},
    )


@pytest.mark.parametrize("side", ["now", "healthy"])
def test_what_was_not_compared_is_not_said_to_be_well(side: str) -> None:
    """Tokens take twice as long, and either reading lacks the gaps between them."""
    both = {"now": counted(gaps_s={0.08: 200}), "healthy": HEALTHY}
    assert named(both["now"], both["healthy"]) == "slow step"
    both[side] = without(both[side], metrics.ITL)
    now, healthy = Reading(both["now"], 10), Reading(both["healthy"], 10)
    found = diagnose(now, healthy)
    assert found.cause == "cannot be told"
    text = markdown.document(diagnoses.page("m", 10, now, healthy, found))
    assert "Nothing is wrong" not in text
    assert "Whether something is wrong cannot be told" in text
    missing = "TPOT, the gaps between tokens, the number of requests at once"
    assert f"because one of the readings lacks them: {missing}." in text


def test_what_a_reading_lacks_is_no_mark_and_is_named_beside_the_cause() -> None:
    slower = counted(gaps_s={0.08: 200})
    no_prompts = without(slower, metrics.REQUEST_PROMPT_TOKENS, metrics.PREFIX_QUERIES)
    found = diagnose(Reading(no_prompts, 10), Reading(HEALTHY, 10))
    assert [mark.cause for mark in found.marks] == ["slow step"]  # no cold cache
    assert found.lacking == ("the lengths of prompts", "hits in the prefix cache")
    off = replace(slower, values={**slower.values, metrics.PREFIX_QUERIES: 0.0})
    assert named(off) == "cold cache"  # it is shown, and nothing is looked up any more
    late = counted(gaps_s={0.08: 200}, preemptions=3)
    assert named(late, without(HEALTHY, metrics.PREEMPTIONS)) == "slow step"
    alone = diagnose(Reading(without(HEALTHY, metrics.QUEUE_TIME)))
    assert (alone.cause, alone.lacking) == ("cannot be told", ("the time in the queue",))


def test_a_token_takes_the_time_of_all_gaps_over_the_tokens_after_the_first() -> None:
    """Two tokens a gap of 60 ms: 30 ms a token."""
    reading = Reading(counted(gaps_s={0.06: 200}, tokens_a_gap=2))
    assert reading.tpot_s == pytest.approx(0.03)
    assert reading.gap_s == pytest.approx(0.06)
    assert Reading(DISTURBED["large budget"]).gaps_above(0.1) == pytest.approx(0.1)


def test_readings_of_one_engine_are_added() -> None:
    both = Reading(together([HEALTHY, counted(queue_s=0.03)]))
    assert both.requests == 20
    assert both.hit_rate == pytest.approx(0.3)
    assert both.queue_s == pytest.approx(0.02)
    with pytest.raises(ValueError, match="other buckets"):
        spread(GAPS_S, {0.04: 1}).plus(spread(PROMPTS, {384: 1}))


# ----------------------------------------------------------------------------- the predictions


def points() -> list[Point]:
    return LAB.points(SHAPE, CEILINGS)


@pytest.mark.parametrize("scale", ["cpu", "gpu", "gpu-80"])
def test_nothing_is_guessed_from_what_random_weights_write(scale: str) -> None:
    lab = LABS["diagnosis"].at(scale, quick=False, dummy=True)
    real = LABS["diagnosis"].at(scale, quick=False)
    assert {v.name for v in real.variants} - {v.name for v in lab.variants} == {"guessing"}
    assert {c.name for c in real.claims} - {c.name for c in lab.claims} == {"guessing"}
    assert not [e for e in lab.evidence if e.metric == metrics.SPEC_DRAFTED]
    assert lab.left_out


def test_memory_holds_some_of_four_requests() -> None:
    """26 blocks of 32: 6 are shared, each of 4 holds 6 more, a 7th with its first token, an 8th
    with the 33rd, which one answer in eight reaches."""
    (small,) = (p for p in points() if p.variant.name == "small-kv")
    assert 20 / 7.1 < running(small) < 20 / 6.9


# --------------------------------------------------------------------------------- its findings


def test_trials_are_named_blind_and_counted(tmp_path: Path) -> None:
    """Every cause but one is named; the trials of `cold` had a warm cache, so nothing was wrong."""
    found = context(tmp_path, LAB, {})
    as_it_was: dict[str, Snapshot] = {str(cause): now for cause, now in DISTURBED.items()}
    as_it_was["cold cache"] = HEALTHY
    played(found, "healthy/reference/concurrent-4", engine=HEALTHY)
    for point in found.points:
        injected = INJECTED.get((point.variant.name, point.workload.name))
        if injected:
            played(found, point.key, engine=as_it_was[injected])
    run = judged_run(found)
    told = told_apart(run)
    assert (told.right, told.trials) == (7 * LAB.repeats, 8 * LAB.repeats)
    assert told.matrix["healthy"] == told.matrix["cold cache"]
    (wrong,) = told.wrong
    assert (wrong.injected, wrong.named, wrong.repeats) == ("cold cache", "healthy", (1, 2, 3, 4))
    cases = [diagnoses.Case.of(trial, "a machine") for trial in blind(run)]
    wrongly = [case for case in cases if case.named != case.cause]
    assert (len(cases), len(wrongly)) == (7 + LAB.repeats, LAB.repeats)
    assert not any(case.mark for case in wrongly)
    assert all(case.mark for case in cases if case.cause not in ("healthy", "cold cache"))
    moved = signatures(run)
    assert [row.injected for row in moved.late] == ["burst", "long neighbour", "cold cache"]
    assert (moved.predicted, moved.seen) == (36, 31)
    burst, neighbour, cold = (row.figures for row in moved.late)
    known = [m for m in (burst["TTFT"], burst["Queue"]) if m]
    assert [m.level.value.value for m in known] == pytest.approx([3.45, 0.5])
    assert [m.moved for m in known] == ["rises", "rises"]
    assert cold["Hit rate"] == Moved(moved.healthy["Hit rate"], "stays", "falls")
    bucket = Level(Quantity(1000), Quantity(2000))
    assert neighbour["Longest prompt"] == Moved(bucket, "rises", "rises")
    assert coefficients(run) == Coefficients(None, None)  # nobody was alone
    assert draw_signatures(run, facts(run))


def test_slower_tokens_are_those_that_clients_saw_as_the_claims_compare_them(
    tmp_path: Path,
) -> None:
    """The engine's gaps over whole trials say 1.5 times for a long context; the windows say 2."""
    figures = {
        "healthy/usual/concurrent-4": (0.04, 0.2),
        "healthy/context/concurrent-4": (0.08, 0.3),
        "large-budget/usual/concurrent-4": (0.042, 0.1),
    }
    found = context(tmp_path, LAB, {
        key: {"tpot_mean_s": [tpot_s * f for f in (0.9, 1, 1, 1.1)], "ttft_mean_s": ttft_s}
        for key, (tpot_s, ttft_s) in figures.items()
    })  # fmt: skip
    engine = {"healthy/reference": HEALTHY, "healthy/context": DISTURBED["long context"]}
    for name, snapshot in engine.items():
        played(found, f"{name}/concurrent-4", engine=snapshot)
    run = judged_run(found)
    told = facts(run)
    (slower,), (not_slower,) = told.slower, told.not_slower
    assert (slower.name, not_slower.name) == ("long context", "large budget")
    assert slower["tpot"].value == pytest.approx(2)
    assert str(slower["tpot"]) in told_of(run).answers["IP-6"].brief
    treatment, baseline = (point_of(run, "healthy", name) for name in ("context", "usual"))
    assert slower["tpot"] == run.ratio_of(treatment, baseline, "tpot_mean_s")
    assert not_slower["ttft"].value == pytest.approx(0.5)
    withheld_there = withheld(found, "healthy/context/concurrent-4")
    assert [of.name for of in seen_by_clients(withheld_there)] == ["large budget"]


def test_coefficients_are_found_again(tmp_path: Path) -> None:
    """TTFT = 0.1 + 0.001 N + 1e-6 N^2, ITL = 0.05 + 1e-5 C, to the digit."""
    found = context(tmp_path, LAB, {})
    alone = []
    for i, n in enumerate((100, 300, 500, 800, 1200)):
        first = 10 + 0.1 + 0.001 * n + 1e-6 * n**2
        step = 0.05 + 1e-5 * (n + 4)
        chunks = [(first + k * step, 1) for k in range(8)]
        alone.append(make_record(chunks, index=i, prompt_tokens=n, sent_s=10.0))
    played(found, "large-budget/alone/concurrent-1", alone, HEALTHY)
    run = judged_run(found)
    fits = coefficients(run)
    assert fits.ttft
    assert fits.itl
    terms = [c.measured for fit in (fits.ttft, fits.itl) for c in fit.coefficients]
    assert [term.value for term in terms] == pytest.approx([0.1, 1000, 1000, 0.05, 10])
    assert [term.unit for term in terms] == ["s", "µs", "ns", "s", "µs"]
    assert [part.value for part in fits.ttft.parts] == pytest.approx([0.1, 1.2, 1.44])
    assert fits.ttft.takes.value == pytest.approx(fits.ttft.at(1200)) == pytest.approx(2.74)
    assert all(c.is_known and not c.forecast.known for c in fits.ttft.coefficients)
    assert draw_coefficients(run, facts(run))


# --------------------------------------------------------------------------- `make diagnose`

MODELS = says(whole('{"data": [{"id": "abacus-1"}]}'))


def exposed(snapshot: Snapshot) -> str:
    """A snapshot as `/metrics` shows it."""
    lines = []
    for name, value in snapshot.values.items():
        lines += [f"# TYPE {name.removesuffix('_total')} counter", f"{name} {value}"]
    for name, histogram in snapshot.histograms.items():
        lines.append(f"# TYPE {name} histogram")
        for le, count in zip(histogram.le, histogram.counts, strict=True):
            lines.append(f'{name}_bucket{{le="{"+Inf" if le == INF else le}"}} {count}')
        lines += [f"{name}_sum {histogram.sum}", f"{name}_count {histogram.count}"]
    return "\n".join(lines) + "\n"


def run_command(
    monkeypatch: pytest.MonkeyPatch, readings: Sequence[Snapshot | None], *options: str
) -> tuple[int, str]:
    """The command beside a server that shows these one after another; None: no metrics."""
    left = list(readings)

    def show(send: hostile.Send) -> None:
        reading = left.pop(0)
        send(
            whole("no such path", "404 Not Found")
            if reading is None
            else whole(exposed(reading), kind="text/plain")
        )

    clock = SimpleNamespace(monotonic=itertools.count(step=0.5).__next__, sleep=lambda _: None)
    monkeypatch.setattr("labs.harness.runner.diagnosing.time", clock)
    with hostile.serving({"/v1/models": MODELS, "/metrics": show}) as url:
        done = CliRunner().invoke(
            app,
            ["diagnose", "--endpoint", url, "--seconds", "1", *options],
            env={"COLUMNS": "200"},
        )
    return done.exit_code, " ".join(f"{done.output} {done.stderr}".split())


def test_a_running_server_is_diagnosed_beside_a_healthy_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "healthy.json"
    later = [HEALTHY, together([HEALTHY, HEALTHY])]
    code, text = run_command(monkeypatch, [*later], "--out", str(file))
    assert code == 0, text
    assert "Nothing is wrong by the thresholds that need no comparison." in text
    assert "a cold cache, a longer context" in text
    assert ReadingFile.model_validate_json(file.read_text()).reading.requests == 10
    now = [HEALTHY, together([HEALTHY, DISTURBED["cold cache"]])]
    code, text = run_command(monkeypatch, now, "--baseline", str(file))
    assert code == 0, text
    assert "The metrics point to cold cache" in text
    assert "0% of the prompt tokens are found in the prefix cache, healthy 30%" in text
    code, text = run_command(monkeypatch, [*later], "--baseline", str(file))
    assert "Nothing is wrong: neither first tokens, tokens nor gaps are worse than healthy" in text


def test_a_server_that_cannot_be_read_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none, negative = (
        replace(HEALTHY, values={**HEALTHY.values, metrics.REQUESTS: number})
        for number in (math.nan, -1.0)
    )
    readings: list[tuple[list[Snapshot | None], str]] = [
        ([None], "/metrics does not show the metrics of an engine that the lab knows"),
        ([together([HEALTHY, HEALTHY]), HEALTHY], "not of the same engine, because its counters"),
        ([HEALTHY, HEALTHY], "0 requests were finished in the reading, and 5 are needed"),
        ([HEALTHY, none], "a number that is none"),
        ([HEALTHY, negative], "a number that is none"),
    ]
    for shown, sentence in readings:
        code, text = run_command(monkeypatch, shown)
        assert (code, sentence in text) == (1, True), text
    other = tmp_path / "other.json"
    strange = ReadingFile(model="beads-2", seconds=1, counted=snapshot_json(HEALTHY))
    written = strange.model_dump_json()
    unlike = json.dumps({"model": "abacus-1", "seconds": 1, "counted": {"values": 5}})
    baselines = {
        "is missing; while the server is well, `make diagnose ENDPOINT=.. OUT=": None,
        "BASELINE is a reading of beads-2, and this server serves abacus-1": written,
        "no reading of an engine's metrics": unlike,
        "no number": written.replace("1000.0", "NaN"),
    }
    for sentence, content in baselines.items():
        if content is not None:
            other.write_text(content)
        code, text = run_command(monkeypatch, [], "--baseline", str(other))
        assert (code, sentence in text) == (1, True), text


# --------------------------------------------- `make diagnose` of what a Prometheus recorded


def recorded(snapshot: Snapshot, engine: str = "one", model: str = "abacus-1") -> list[Any]:
    """An instant query's result, as Prometheus answers it."""
    here = {"instance": engine, "model_name": model}
    series: list[tuple[dict[str, str], float]] = [
        ({"__name__": name, **here}, value) for name, value in snapshot.values.items()
    ]
    for name, histogram in snapshot.histograms.items():
        for le, count in zip(histogram.le, histogram.counts, strict=True):
            bound = "+Inf" if le == INF else str(le)
            series.append(({"__name__": f"{name}_bucket", "le": bound, **here}, count))
        series.append(({"__name__": f"{name}_sum", **here}, histogram.sum))
        series.append(({"__name__": f"{name}_count", **here}, histogram.count))
    return [{"metric": labels, "value": [0, str(value)]} for labels, value in series]


BEGAN, ENDED = "2026-11-28T10:00+00:00", "2026-11-28T10:10+00:00"


def diagnosed(before: list[Any], after: list[Any], *options: str, resets: float = 0) -> str:
    """The command beside a Prometheus that has these series at the two times."""
    times = {f"time={datetime.fromisoformat(at).timestamp():.3f}": at for at in (BEGAN, ENDED)}

    def says_query(text: str) -> list[Any]:
        at = next(at for form, at in times.items() if form in text)
        if "resets" in text:
            assert "requests_processing" not in text  # a gauge, which falls without a restart
            return [{"metric": {}, "value": [0, str(resets)]}]
        return before if at == BEGAN else after

    class Recorded(Answering):
        def do_POST(self) -> None:
            form = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.reply({"data": {"result": says_query(form)}})

    with answered_by(Recorded) as url:
        arguments = ["diagnose", "--prometheus-url", url, "--from", BEGAN, "--to", ENDED, *options]
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code in (0, 1), done.output
    return " ".join(f"{done.output} {done.stderr}".split())


def test_what_prometheus_recorded_is_diagnosed_like_a_running_server(tmp_path: Path) -> None:
    file, well = str(tmp_path / "healthy.json"), recorded(HEALTHY)
    text = diagnosed(well, recorded(together([HEALTHY, HEALTHY])), "--out", file)
    assert "Diagnosis of abacus-1, 10 requests in 600 s" in text
    cold = recorded(together([HEALTHY, DISTURBED["cold cache"]]))
    assert "The metrics point to cold cache" in diagnosed(well, cold, "--baseline", file)
    two = [*well, *recorded(HEALTHY, "two")]  # engines, whose counts are added
    later = [*cold, *recorded(together([HEALTHY, DISTURBED["cold cache"]]), "two")]
    assert "20 requests in 600 s" in diagnosed(two, later)


def test_what_prometheus_cannot_say_is_told_in_a_sentence() -> None:
    well, later = recorded(HEALTHY), recorded(together([HEALTHY, HEALTHY]))
    another = recorded(together([HEALTHY, HEALTHY]), "two")  # has counted more than `one` had
    others = [*later, *recorded(HEALTHY, "two", "beads-2")]
    nan = [{**each, "value": [0, "NaN"]} for each in later]
    for after, sentence in (
        (another, "an engine was stopped, or started again"),
        ([], "has no series of an engine that the lab knows at TO=2026-11-28T"),
        (others, "add MODEL=.., one of abacus-1, beads-2"),
        ([{"metric": {}, "value": 1}], "does not answer as Prometheus does"),
        (nan, "has series that are no engine's"),
    ):
        assert sentence in diagnosed(well, after)
    assert "started again, between FROM= and TO=" in diagnosed(well, later, resets=1)
    assert "FROM=soon is no time" in diagnosed(well, later, "--from", "soon")
    assert "TO= has to be later than FROM=" in diagnosed(well, later, "--from", ENDED)
    secret = diagnosed(well, later, "--prometheus-url", "http://me:sesame@127.0.0.1:1")
    assert "holds a user, a password or a key" in secret
    assert "sesame" not in secret


def test_a_reading_of_other_buckets_is_refused() -> None:
    """Another engine's, or another version's: its bounds cannot be compared one by one."""
    other = replace(HEALTHY, histograms={})
    assert between(other, HEALTHY).values[metrics.REQUESTS] == 0
    shifted = replace(HEALTHY, histograms={metrics.ITL: spread((0.1, INF), {0.04: 300})})
    with pytest.raises(LabError, match="started again"):
        between(HEALTHY, shifted)
