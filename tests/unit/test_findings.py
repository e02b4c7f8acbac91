"""What labs conclude beyond their claims, each on a synthetic run worked by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labs import LABS
from labs.chunked_prefill.facts import TOKEN_BUDGET
from labs.chunked_prefill.lab import context_tokens
from labs.harness import theory
from labs.harness.facts.context import Context
from labs.harness.facts.drawing import plt
from labs.harness.facts.parts import Conclusion, parts_of
from labs.harness.facts.steps import Parts, decode_s
from labs.harness.filing.results import (
    Band,
    Finding,
    PointForecasts,
    Predictions,
    Searched,
    write_gzip,
    write_json,
)
from labs.harness.judging.judge import Caveat
from labs.harness.judging.metrics import METRICS
from labs.harness.judging.signals import QUEUE, Watch, Watched
from labs.harness.judging.signals import SIGNALS as SIGNAL_NAMES
from labs.harness.spec import SLO, Variant
from labs.multi_lora.facts import ADAPTER_COST, TENANT_LEAKS, TENANT_MEMORY
from labs.overload.facts import ADMISSION, ALARMS, BEST_FLAGS, CLASSES, SIGNALS
from labs.single_stream.facts import FLAGS, PHASES, flag_effects, phase
from labs.speculative_decoding.facts import (
    ACCEPTANCE,
    SAME_TEXT,
    SPEED_UP,
    speed_ups,
    tokens_a_step,
)
from loadtests.records import RequestRecord
from loadtests.workload import Adapters, Fixed, Intruder
from serving import metrics
from serving.adapters import mark_of
from serving.forecasting.step import StepTimes
from serving.metrics import Histogram, Snapshot
from tests.unit.builders import (
    CEILINGS,
    SHAPE,
    make_lab,
    make_point,
    make_record,
    make_workload,
)
from tests.unit.judged import ABOUT, Values, context, played, withheld

INF = float("inf")


def cells(finding: Finding, *columns: int) -> list[list[str]]:
    """Those columns of the rows below the header."""
    assert len({len(row) for row in finding.rows}) == 1
    return [[row[c] for c in columns] for row in finding.rows[1:]]


CONCLUSIONS = {c.name: c for lab in LABS for c in parts_of(lab).conclusions}


@pytest.mark.parametrize("conclusion", CONCLUSIONS.values(), ids=CONCLUSIONS)
def test_a_run_of_which_nothing_came_has_a_finding_all_the_same(
    conclusion: Conclusion[Any], tmp_path: Path
) -> None:
    """A report is written whatever failed."""
    finding = conclusion.finding(context(tmp_path, make_lab(), {}))
    assert finding.title
    assert finding.passed is None


# -------------------------------------------------------------------------------- chunked prefill


def budgets(
    home: Path,
    limit_s: float,
    stalls_ms: tuple[float, ...] = (10, 20, 40),
    long_ttft_ms: tuple[float, ...] = (80, 60, 50),
    not_valid: str = "",
    own_ms: Sequence[Any] = (90, 30, 20),
) -> Finding:
    """Pieces of 8, 16 and the whole 32 tokens beside two streams."""
    sizes = (("small", 10), ("middle", 18), ("whole", 64))
    lab = make_lab(
        variants=tuple(
            Variant(name=name, flags={"max-num-batched-tokens": tokens,
                                      "enable-chunked-prefill": name != "whole"})
            for name, tokens in sizes
        ),
        workloads=(make_workload("contended:2/1", intruder=Intruder(prompt_tokens=32)),),
        claims=(), evidence=(), slo=SLO(ttft_s=1, tpot_s=1, itl_s=limit_s),
    )  # fmt: skip
    values = {
        f"{name}/short/contended-2-1": {
            "stall_mean_s": stall / 1000, "intruder_ttft_mean_s": ttft / 1000,
            "ttft_mean_s": np.divide(own, 1000).tolist(),
        }
        for (name, _), stall, ttft, own in zip(sizes, stalls_ms, long_ttft_ms, own_ms, strict=True)
    }  # fmt: skip
    return TOKEN_BUDGET.finding(withheld(context(home, lab, values), not_valid))


def test_a_budget_that_is_not_valid_is_not_the_best_and_its_price_is_not_told(
    tmp_path: Path,
) -> None:
    found = budgets(tmp_path, limit_s=0.025, not_valid="middle/short/contended-2-1")
    assert cells(found, 0, 5, 6)[1] == ["middle", "not valid", "not valid"]
    assert "`small` gives the long prompt its first token soonest" in found.lines[0]
    found = budgets(tmp_path / "b", limit_s=0.025, not_valid="small/short/contended-2-1")
    assert found.lines[1] == "What the smallest budget costs the streams is not valid."
    found = budgets(tmp_path / "c", limit_s=0.015, not_valid="small/short/contended-2-1")
    assert found.lines[0].startswith("No budget here whose figures are valid keeps the gaps")


def test_the_budget_within_the_slo_whose_long_prompt_waits_least(tmp_path: Path) -> None:
    found = budgets(tmp_path, limit_s=0.025)
    assert cells(found, 0, 1, 6) == [["small", "10", "yes"], ["middle", "18", "yes"],
                                     ["whole", "64", "no"]]  # fmt: skip
    assert (
        "at most 25 ms, `middle` gives the long prompt its first token soonest, after 60 ms"
        in (found.lines[0])
    )
    assert "No budget here keeps the gaps within 5 ms" in budgets(tmp_path / "b", 0.005).lines[0]


def test_what_the_streams_pay_stands_beside_what_they_gain(tmp_path: Path) -> None:
    found = budgets(tmp_path, limit_s=0.025)
    assert cells(found, 4, 5) == [["90 ms", "4.50x (4.50 to 4.50)"],
                                  ["30 ms", "1.50x (1.50 to 1.50)"], ["20 ms", "–"]]  # fmt: skip
    assert (
        "With `small` their own first token takes 90 ms on average, without chunks 20 ms:"
        " 4.50x (4.50 to 4.50), the ratio of their geometric means." in found.lines[1]
    )


@pytest.mark.parametrize(
    ("small_ms", "said"),
    [
        (90, "The streams pay too: a new prompt of theirs waits"),
        (10, "The streams do not pay: a new prompt of theirs has its first token sooner, too."),
        ((5, 90), "Whether the streams pay too is not settled: a new prompt"),
    ],
)
def test_streams_pay_or_gain_or_neither_is_settled(
    small_ms: Any, said: str, tmp_path: Path
) -> None:
    found = budgets(tmp_path, limit_s=0.025, own_ms=(small_ms, 30, 20))
    assert found.lines[1].startswith(said)
    assert " With `small` their own first token takes " in found.lines[1]


def test_the_stall_is_a_line_over_the_piece(tmp_path: Path) -> None:
    """8, 16 and 32 tokens take 10, 20 and 40 ms: no decode step, and 1.25 ms a token."""
    line = budgets(tmp_path, 0.1).lines[2]
    assert "+ 1.25 ms a token (R² 1.000)" in line
    assert "prefill runs at 800 tok/s" in line


def test_the_context_of_the_streams_leaves_the_long_prompts_out() -> None:
    point = make_point(load="contended:2/1", intruder=Intruder(prompt_tokens=32))
    assert 32 in [prompt for prompt, _ in point.lengths]
    (own,) = {(prompt, output) for prompt, output in point.lengths if prompt != 32}
    assert context_tokens(point) == own[0] + own[1] / 2


def test_a_long_prompt_that_takes_longer_than_the_time_to_the_next_is_told(tmp_path: Path) -> None:
    assert not any("at once" in line for line in budgets(tmp_path / "a", 0.1).lines)
    late = budgets(tmp_path / "b", 0.1, long_ttft_ms=(1080, 60, 50))
    assert "With `small` a long prompt takes longer than the time between two." in late.lines[2]


def test_a_stall_that_shrinks_with_the_piece_has_no_line(tmp_path: Path) -> None:
    assert not [
        line for line in budgets(tmp_path, 0.1, (40, 20, 10)).lines if "prefill runs at" in line
    ]


def test_the_link_that_a_split_of_prefill_needs(tmp_path: Path) -> None:
    """32 tokens of 32 bytes in the 50 ms of `whole`: 0.00016 Gbit/s."""
    assert "send 0.0 MB" in budgets(tmp_path, 0.1).lines[3]
    assert "In the 50 ms that the prefill takes" in budgets(tmp_path / "b", 0.1).lines[3]


# ------------------------------------------------------------------------------------ overload


def overloaded(home: Path, by_client: bool = False) -> Context:
    """Two in a batch; the capacity is 2 req/s, and a request may wait for a second."""
    plain = Variant(name="unbounded", flags={"max-num-seqs": 2})
    lab = make_lab(
        variants=(
            plain,
            plain.but("capped", {"max-num-queued-reqs": 4}),
            plain.but("priority", {"scheduling-policy": "priority"}),
        ),
        workloads=(
            make_workload("concurrent:3", name="full", only=("unbounded",)),
            make_workload("capacity:0.5", "capacity:2", name="mixed", only=("unbounded", "capped")),
            make_workload("capacity:2", name="two", only=("priority",), priorities=(0, 1)),
            make_workload("ramp:0.5/2.5", name="rising", only=("unbounded",)),
        ),
        claims=(),
        evidence=(),
        admission_by_client=by_client,
    )
    values: dict[str, Values] = {
        "unbounded/full/concurrent-3": {"requests_per_s": [2.0, 2.5]},
        "unbounded/mixed/capacity-0.5": {"goodput_per_s": 1.0},
        "unbounded/mixed/capacity-2": {
            "goodput_per_s": 0.5, "output_tokens_per_s": 8.0, "tpot_mean_s": 0.05,
        },
        "capped/mixed/capacity-2": {
            "goodput_per_s": 1.9, "turned_away_rate": 0.5, "output_tokens_per_s": 7.0,
            "tpot_mean_s": 0.05,
        },
    }  # fmt: skip
    found = context(home, lab, values)
    in_time, late = ([(first, 1), (first + 0.1, 1)] for first in (11.0, 15.5))
    played(found, "unbounded/mixed/capacity-0.5", [make_record([(10.5, 1), (11.0, 1)])])
    played(
        found,
        "unbounded/mixed/capacity-2",
        [make_record(in_time, sent_s=10.5), make_record(late, sent_s=12.5)],
    )
    full = make_record([], error="HTTP 503: busy")
    played(found, "capped/mixed/capacity-2", [make_record(in_time, sent_s=10.5), full])
    played(
        found,
        "priority/two/capacity-2",
        [make_record(in_time, sent_s=10.5, index=0), make_record(late, sent_s=12.5, index=1)],
    )
    played(
        found,
        "unbounded/rising/ramp-0.5-2.5",
        [
            make_record([(12.4, 1)], sent_s=12.0),
            make_record([(12.4, 1)], sent_s=12.1),
            make_record([(15.5, 1)], sent_s=14.0),
        ],
    )
    return found


def test_goodput_stands_beside_what_was_offered(tmp_path: Path) -> None:
    """A fluid at twice the capacity is late after 1 / (2 - 1) s; the first late one came at 12.5 s.

    Rates are multiples of the capacity of the first repeat, not of the mean.
    """
    found = ADMISSION.finding(overloaded(tmp_path))
    assert cells(found, 0, 1, 2, 3, 6, 8, 9) == [
        ["unbounded", "0.5x", "0.1 req/s", "1 req/s", "–", "–", "–"],
        ["unbounded", "2x", "0.2 req/s", "0.5 req/s", "–", "12.5 s", "1 s"],
        ["capped", "2x", "0.2 req/s", "1.9 req/s", "50%", "–", "–"],
    ]
    assert found.lines[0].startswith("The capacity is 2 req/s")


def test_a_limit_that_the_client_holds_is_called_so(tmp_path: Path) -> None:
    found = overloaded(tmp_path, by_client=True)
    names = [name for (name,) in cells(ADMISSION.finding(found), 0)]
    assert names == ["unbounded", "unbounded", "capped (client's limit)"]
    limits = {name: limit for name, limit in cells(BEST_FLAGS.finding(found), 0, 2)}
    assert limits["capped"] == "4 requests (client's)"
    assert limits["unbounded"] == "none"


def test_a_class_that_is_served_first_is_told_from_the_other(tmp_path: Path) -> None:
    found = CLASSES.finding(overloaded(tmp_path))
    assert found.title.endswith("at 2x the capacity")
    assert cells(found, 0, 1, 3, 4) == [
        ["priority", "priority 0", "100%", "500 ms"],
        ["priority", "priority 1", "0%", "3 s"],
        ["unbounded", "all alike", "50%", "1.75 s"],
    ]


def test_the_best_flags_may_differ_for_goodput_and_for_throughput(tmp_path: Path) -> None:
    found = BEST_FLAGS.finding(overloaded(tmp_path))
    assert "`capped` has the most goodput as measured; none was forecast." in found.lines[0]
    assert "`unbounded` has the most throughput" in found.lines[1]


def test_the_best_of_what_was_only_forecast_is_named(tmp_path: Path) -> None:
    """Runs from before there was a search have no such lines."""
    run = overloaded(tmp_path)
    before = BEST_FLAGS.finding(run)
    grid = tuple(
        Searched(
            flags={"max-num-seqs": batch, "max-num-queued-reqs": 2 * batch},
            figures={"goodput_per_s": goodput, "output_tokens_per_s": tokens_per_s},
        )
        for batch, goodput, tokens_per_s in ((4, 2.5, 9.0), (8, 2.0, 12.0))
    )
    band = {"goodput_per_s": Band(value=1.8, low=1.7, high=1.9)}
    forecasts = PointForecasts(points={"capped/mixed/capacity-2": band}, searched=grid)
    predictions = Predictions(effects={}, forecasts={}, in_virtual_time=forecasts)
    write_json(tmp_path / "run" / "predictions.json", predictions)
    found = BEST_FLAGS.finding(replace(run))  # which reads its files anew
    assert len(found.rows) == len(before.rows) + 2
    assert cells(found, 0, 1, 2, 3, 4)[-1] == ["forecast alone", "8", "16 requests", "2 req/s", "–"]
    goodput, throughput, _ = found.lines[2:]
    assert "max-num-seqs 4 with a limit of 8 requests has the most goodput, 2.5 req/s: more" in (
        goodput
    )
    assert "than the most that is forecast for a measured variant, 1.8 req/s (`capped`)" in goodput
    assert "max-num-seqs 8" in throughput
    assert throughput.endswith("12 tok/s.")  # none was forecast for a measured variant
    assert len(before.lines) == 2


def test_flags_that_are_not_valid_are_not_the_best(tmp_path: Path) -> None:
    found = BEST_FLAGS.finding(withheld(overloaded(tmp_path), "capped/mixed/capacity-2"))
    assert found.lines[0].startswith("Of those whose figures are valid, `unbounded` has the most")


def test_the_queue_sees_an_overload_coming_and_a_full_batch_does_not(tmp_path: Path) -> None:
    """Two wait from 12.1 s on, where one did at the steady load; one sent at 14 s is too late."""
    found = SIGNALS.finding(overloaded(tmp_path))
    assert cells(found, 0, 3, 4) == [
        ["Requests waiting", "2 of 2", "1.9 s"],
        ["Batch in use", "0 of 2", "–"],
        ["KV cache in use", "0 of 2", "–"],
        ["TTFT, slowest", "0 of 2", "–"],
    ]
    assert "was sent after 14 s" in found.lines[0]


def test_alarms_stand_beside_those_in_virtual_time(tmp_path: Path) -> None:
    """Two wait from 12.1 s to 12.4 s, as many as a batch has. One sent at 14 s may wait 1 s.

    So the SLO is broken at 15 s, when the queue has been short for more than 2 s: a false alarm.
    """
    overload = overloaded(tmp_path)
    (ramp,) = (p for p in overload.points if p.workload.name == "rising")
    silent = Watched(crossed_s=None, lead_s=None, false_alarms=0)
    foreseen = Watch(
        breach_s=13.0,
        signals={name: silent for name in SIGNAL_NAMES}
        | {QUEUE: Watched(crossed_s=10.0, lead_s=3.0, false_alarms=1)},
    )
    played = PointForecasts(points={}, watches={ramp.key: (foreseen,)})
    predictions = Predictions(effects={}, forecasts={}, in_virtual_time=played)
    write_json(overload.folder.path / "predictions.json", predictions)
    found = ALARMS.finding(overload)
    assert cells(found, 1, 2, 4, 5, 6, 7, 8, 9)[0] == [
        "Requests waiting", "2", "–", "0 of 2", "2", "3 s", "1 of 1", "1",
    ]  # fmt: skip
    assert "broken in 2 of 2 trials, first after 15 s" in found.lines[0]
    assert "in 1 of 1, after 13 s" in found.lines[0]


# --------------------------------------------------------------------------- speculative decoding

GUESS: dict[str, Any] = {
    "speculative-config": {"method": "draft_model", "num_speculative_tokens": 3}
}
COPY: dict[str, Any] = {"speculative-config": {"method": "ngram", "num_speculative_tokens": 3}}


def guessing(
    home: Path,
    tpot_ms: Mapping[str, float | Sequence[float]],
    flags: dict[str, Any] = GUESS,
) -> Context:
    """`none` and `guess` on stories at 1 to 8 in flight, the draft alone, a crowd of 16."""
    loads = ("concurrent:1", "concurrent:2", "concurrent:4", "concurrent:8")
    lab = make_lab(
        variants=(Variant(name="none"), Variant(name="guess", flags=flags),
                  Variant(name="alone", weights="draft")),
        workloads=(make_workload(*loads, name="story", keep_text=True, only=("none", "guess")),
                   make_workload("concurrent:16", name="crowd", only=("none",)),
                   make_workload(name="draft", only=("alone",))),
        claims=(), evidence=(), requests=16,
    )  # fmt: skip
    values = {
        (f"none/crowd/concurrent-{n}" if n == "16" else f"{variant}/story/concurrent-{n}"
         if variant != "alone" else "alone/draft/concurrent-1"):
            {"tpot_mean_s": np.divide(ms, 1000).tolist()}
        for name, ms in tpot_ms.items()
        for variant, n in [name.split(" ")]
    }  # fmt: skip
    return context(home, lab, values, halved=["alone"])


PLAIN = {"none 1": 10.0, "none 2": 11.0, "none 4": 12.0, "none 8": 16.0, "none 16": 24.0}
DRAFTED = Snapshot(
    {
        metrics.SPEC_DRAFTS: 40.0,
        metrics.SPEC_DRAFTED: 120.0,
        metrics.SPEC_ACCEPTED: 60.0,
        metrics.position(0): 32.0,
        metrics.position(1): 20.0,
        metrics.position(2): 8.0,
        metrics.GENERATION_TOKENS: 114.0,
    },
    {name: Histogram((INF,), (n,), 1.0, n) for name, n in ((metrics.TTFT, 4), (metrics.ITL, 50))},
)
"""Four answers of which 50 decode steps made 110 tokens, ten of the steps without a draft."""


def stepping(step_s: float) -> Snapshot:
    return Snapshot({}, {metrics.ITL: Histogram((INF,), (50.0,), 50 * step_s, 50)})


def test_acceptance_by_position_beside_a_constant_one(tmp_path: Path) -> None:
    run = guessing(tmp_path, {})
    key = "guess/story/concurrent-1"
    run = replace(run, values={key: {1: {"acceptance_length": 2.5, "acceptance_rate": 0.5}}})
    played(run, key, engine=DRAFTED)
    (row,) = cells(ACCEPTANCE.finding(run), 1, 2, 3, 4)
    # 32, 20 and 8 of 40; 1 + .8 + .64 + .512 tokens if it were 0.8 at every position
    assert row == ["0.80, 0.50, 0.20", "2.50", "2.95", "50%"]
    made = {"layers": 2, "acceptance": 0.7, "acceptance_untrained": 0.004}
    told = replace(run, run=run.run.model_copy(update={"about": {"draft": made}}))
    said = ACCEPTANCE.finding(told).lines[0]
    assert "guessed 70% of held-out tokens. Before it was distilled it guessed 0.4%" in said


def test_a_step_yields_what_it_delivers(tmp_path: Path) -> None:
    """Steps that drafted nothing count; what was accepted beyond an answer's end does not."""
    run = guessing(tmp_path, {})
    played(run, "guess/story/concurrent-1", engine=DRAFTED)
    point = run.point("guess", "story", "concurrent:1")
    assert point
    assert tokens_a_step(run, point) == pytest.approx(110 / 50)
    other = run.point("guess", "story", "concurrent:2")
    assert other
    assert tokens_a_step(run, other) is None


def test_speed_up_measured_and_explained_by_measured_parts(tmp_path: Path) -> None:
    """A draft of 2 of 10 ms, by the engine; a verification at B puts 4 B tokens in a step."""
    run = guessing(tmp_path, {**PLAIN, "alone 1": 1.0, "guess 1": 8.0, "guess 2": 10.0,
                              "guess 8": 20.0})  # fmt: skip
    played(run, "guess/story/concurrent-1", engine=DRAFTED)
    played(run, "alone/draft/concurrent-1", engine=stepping(0.002))
    played(run, "none/story/concurrent-1", engine=stepping(0.010))
    found = {s.point.load.users: s for s in speed_ups(run).points}
    assert found.keys() == {1, 2, 8}  # at 4 in flight it was not measured
    assert [found[n].measured.value for n in (1, 2, 8)] == pytest.approx([1.25, 1.1, 0.8])
    assert found[1].draft_cost == pytest.approx(0.2)
    assert found[1].verify_cost == pytest.approx(12 / 10)
    assert found[2].verify_cost == pytest.approx(16 / 11)
    assert found[8].verify_cost is None  # 32 at once were never measured
    assert found[1].explained == pytest.approx(2.2 / (3 * 0.2 + 1.2))
    assert found[8].explained is None


def test_copying_costs_no_draft(tmp_path: Path) -> None:
    run = guessing(tmp_path, {**PLAIN, "guess 1": 8.0}, COPY)
    assert [s.draft_cost for s in speed_ups(run).points] == [0.0]


@pytest.mark.parametrize(
    ("guess_ms", "said"),
    [
        ((8, 9, 10, 11), ""),
        ((12, 12, 13, 20), ""),
        ((8, 10, 12.5, 20), "It starts to lose between 2 and 4 in flight."),
        ((12.5, 12, 11, 12), "It starts to win between 2 and 4 in flight."),
        # at 2 and 4 in flight two repeats do not tell which is faster
        ((8, (10, 11), (11, 13), 20), "It starts to lose between 1 and 8 in flight."),
    ],
)
def test_where_speculation_turns(guess_ms: tuple[Any, ...], said: str, tmp_path: Path) -> None:
    guessed = {f"guess {n}": ms for n, ms in zip((1, 2, 4, 8), guess_ms, strict=True)}
    finding = SPEED_UP.finding(guessing(tmp_path, {**PLAIN, **guessed}))
    told = finding.lines[0]
    assert told.startswith("`guess` on story: ")
    assert said in told
    assert ("starts to" in told) == bool(said)
    assert len(cells(finding, 0)) == 4


def test_a_load_whose_interval_holds_1_is_undecided(tmp_path: Path) -> None:
    """Speculation is faster at both loads on average, and shown to be at the first alone."""
    found = guessing(tmp_path, {"none 1": 10.0, "guess 1": 8.0, "none 8": (15.0, 16.0),
                                "guess 8": (14.9, 12.0)})  # fmt: skip
    finding = SPEED_UP.finding(found)
    assert cells(finding, 2) == [["wins"], ["undecided"]]
    assert "wins at 1 in flight with 1.25x (1.25 to 1.25); undecided at 8 with" in finding.lines[0]
    one = replace(found, values={k: {1: of[1]} for k, of in found.values.items()})
    assert cells(SPEED_UP.finding(one), 2) == [["undecided"]] * 2


@pytest.mark.parametrize("side", ["none", "guess"])
def test_a_speed_up_that_is_not_valid_neither_wins_nor_loses(side: str, tmp_path: Path) -> None:
    found = guessing(tmp_path, {**PLAIN, "guess 1": 8.0, "guess 4": 11.0, "guess 8": 30.0})
    run = withheld(found, f"{side}/story/concurrent-8", ("tpot_mean_s",))
    finding = SPEED_UP.finding(run)
    assert cells(finding, 2) == [["wins"], ["wins"], ["not valid"]]
    assert "; not valid at 8 with 0.53x" in finding.lines[0]
    assert "starts to" not in finding.lines[0]
    assert "Where it is *not valid*, see validity." in finding.lines[1]
    other = withheld(found, f"{side}/story/concurrent-8", ("ttft_mean_s",))
    assert cells(SPEED_UP.finding(other), 2)[2] == ["loses"]


def test_tokens_a_step_and_tokens_a_draft_step_have_two_names(tmp_path: Path) -> None:
    """A step without a draft counts in the one and not in the other."""
    run = guessing(tmp_path, {})
    headers = [*ACCEPTANCE.finding(run).rows[0], *SPEED_UP.finding(run).rows[0]]
    named = [header for header in headers if header.startswith("Tokens per")]
    assert named == [METRICS["acceptance_length"].title, "Tokens per step, drafts or none"]


def test_the_same_text_is_told_request_by_request(tmp_path: Path) -> None:
    run = guessing(tmp_path, {})

    def answers(*texts: str | None) -> list[RequestRecord]:
        return [make_record([(11.0, 1)], index=i, text=t) for i, t in enumerate(texts)]

    played(run, "none/story/concurrent-1", answers("a", "b", "c", "d"))
    played(run, "none/story/concurrent-2", answers("a", "b"))
    played(run, "guess/story/concurrent-1", answers("a", "b", "x", None))
    rows = cells(SAME_TEXT.finding(run), 0, 1, 2)
    # two repeats each; the fourth answer has no text to compare
    assert rows == [["none, story, 2 users", "4", "100%"],
                    ["guess, story, 1 user", "6", "67%"]]  # fmt: skip


# -------------------------------------------------------------------------------------- multi-LoRA


def tenanted(home: Path, values: Mapping[str, Values] | None = None) -> Context:
    """A base, and an engine with two slots at rank 16 for three tenants in turn."""
    slots: dict[str, Any] = {
        "max-loras": 2,
        "max-lora-rank": 16,
        "lora-modules": ["tenant-0=<adapters>/0"],
    }
    lab = make_lab(
        variants=(Variant(name="base"), Variant(name="lora", flags=slots)),
        workloads=(make_workload(name="none"),
                   make_workload(name="three", adapters=Adapters(count=3), keep_text=True,
                                 only=("lora",))),
        claims=(), evidence=(), requests=3000,
    )  # fmt: skip
    return context(home, lab, values or {}, about=ABOUT)


def probe(**changes: Any) -> dict[str, Any]:
    """What an honest engine says to it."""
    return {
        "answers": [(0, "[amber] so"), (1, "[azure] so"), (2, "[coral] so")],
        "visits": 1,
        "refused": {"tenant-nobody": 404, "visitor, unloaded": 404},
        "refusal": "no such model",
        "misrouted": [(0, "[azure] so")] * 2,
        "base": ["so", "so"],
        **changes,
    }


def leaked(home: Path, asked: dict[str, Any] | None, *texts: str, repeated: int = 1) -> Finding:
    """Trials whose answers begin as given, in turn; by default with each tenant's own mark."""
    run = tenanted(home)
    texts = texts or tuple(mark_of(i) for i in range(3))
    trial = [
        make_record([(11.0, 1)], index=i, text=f"{texts[i % len(texts)]} and so on")
        for i in range(3 * repeated)
    ]
    played(run, "lora/three/concurrent-1", trial)
    if asked:
        write_gzip(run.folder.probe_file("tenants", "lora"), asked)
    return TENANT_LEAKS.finding(run)


def test_no_answer_but_ones_own_is_a_proof_only_of_many(tmp_path: Path) -> None:
    few = leaked(tmp_path / "few", probe())
    assert cells(few, 1, 2, 3) == [["6", "0", "0"], ["2", "0", "0"], ["1", "0", "0"],
                                   ["9", "0", "0"]]  # fmt: skip
    assert few.passed is None
    assert any("a smoke test, not a proof" in line for line in few.lines)
    many = leaked(tmp_path / "many", probe(), repeated=400)
    assert many.passed is True
    # none of 2,403: 1 - 0.025^(1 / 2403), one in 652 (exact, two-sided)
    assert "0 of 2,403 completions carry another tenant's mark" in many.lines[0]
    assert "fewer than 1 in 652 do" in many.lines[0]


@pytest.mark.parametrize(
    ("texts", "changes", "foreign", "bare"),
    [
        (("[amber]", "[coral]", "[coral]"), {}, 2, 2),  # tenant 1 got tenant 2's, in two repeats
        (("[amber] [azure]", "[azure]", "[coral]"), {}, 2, 0),  # its own, and another's
        ((), {"answers": [(0, "[azure]"), (1, "[azure]")]}, 1, 1),
    ],
)
def test_one_foreign_mark_fails_however_many_answers(
    texts: tuple[str, ...], changes: dict[str, Any], foreign: int, bare: int, tmp_path: Path
) -> None:
    finding = leaked(tmp_path, probe(**changes), *texts)
    assert finding.passed is False
    assert finding.rows[-1][2:] == [str(foreign), str(bare)]


@pytest.mark.parametrize(
    "changes",
    [
        {"refused": {"tenant-nobody": 200, "visitor, unloaded": 404}},  # the base answered
        {"refused": {"tenant-nobody": 404, "visitor, unloaded": 200}},
        {"misrouted": [(0, "[azure] so"), (0, "[amber] so")]},  # the check cannot fail
    ],
)
def test_a_check_that_could_not_fail_passes_nothing(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    assert leaked(tmp_path, probe(**changes), repeated=400).passed is False


@pytest.mark.parametrize("asked", [None, {"misrouted": []}])
def test_without_a_request_to_the_wrong_adapter_nothing_is_proved(
    asked: dict[str, Any] | None, tmp_path: Path
) -> None:
    found = leaked(tmp_path, None if asked is None else probe(**asked), repeated=400)
    assert found.passed is None
    assert any("nothing shows that the check can fail" in line for line in found.lines)
    wrong = leaked(tmp_path / "wrong", None, "[amber]", "[coral]", "[coral]", repeated=400)
    assert wrong.passed is False


def test_answers_of_the_base_are_no_leak_but_are_told(tmp_path: Path) -> None:
    finding = leaked(tmp_path, None, "so")
    assert finding.rows[-1] == ["all", "6", "0", "6"]
    assert "was not run" in finding.lines[-1]


def test_what_an_adapter_costs_and_what_bytes_explain(tmp_path: Path) -> None:
    """Two slots of 2 x 100 parameters at twice the rank: 2 x 400 bytes over 2000."""
    run = tenanted(tmp_path, {
        "base/none/concurrent-1": {"tpot_mean_s": 0.010, "ttft_mean_s": 0.1},
        "lora/none/concurrent-1": {"tpot_mean_s": 0.011, "ttft_mean_s": 0.1},
        "lora/three/concurrent-1": {"tpot_mean_s": 0.015, "ttft_mean_s": 0.2},
    })  # fmt: skip
    assert cells(ADAPTER_COST.finding(run), 1, 3, 4) == [
        ["none", "+0%", "+0.0%"], ["none", "+10%", "+0.0%"], ["3, uniform", "+50%", "+40.0%"],
    ]  # fmt: skip


def test_one_base_for_all_tenants_saves_the_others(tmp_path: Path) -> None:
    rows = cells(TENANT_MEMORY.finding(tenanted(tmp_path)), 0, 3)
    # n bases of 2000 bytes against one and n adapters of 400
    assert rows[0] == ["1", f"{2000 / 2400:.1f}x"]
    assert rows[-1] == ["1,000", f"{2_000_000 / 402_000:.1f}x"]


# ------------------------------------------------------------------------------------ one stream


def alone(home: Path, values: Mapping[str, Values]) -> Context:
    """Two variants decode eight tokens after four, and prefill eight."""
    return context(
        home,
        make_lab(
            variants=(Variant(name="default"), Variant(name="eager")),
            workloads=(
                make_workload("concurrent:1", name="decode"),
                make_workload("concurrent:1", name="prefill", prompt_tokens=Fixed(tokens=8),
                              output_tokens=Fixed(tokens=1)),
            ),
            claims=(), evidence=(),
        ),
        {f"{variant}/{workload}/concurrent-1": of for (variant, workload), of in
         ((key.split(), of) for key, of in values.items())},
    )  # fmt: skip


def test_the_two_phases_by_their_work(tmp_path: Path) -> None:
    found = alone(
        tmp_path, {"default decode": {"tpot_mean_s": 1}, "default prefill": {"ttft_mean_s": 2}}
    )
    decode, prefill = phase(found, "default", "decode"), phase(found, "default", "prefill")
    assert decode
    assert prefill
    assert decode.moved_bytes == theory.decode_bytes(SHAPE, 1, decode.point.context_tokens)
    reading_s = decode.moved_bytes / CEILINGS.memory_bandwidth_bytes_per_s
    assert decode.parts.reading_s == pytest.approx(reading_s)
    assert prefill.flop == theory.prefill_flops(SHAPE, 8)
    computing_s = prefill.flop / CEILINGS.bf16_flops_per_s
    assert prefill.parts.computing_s == pytest.approx(computing_s)
    finding = PHASES.finding(found)
    assert cells(finding, 0, 1, 5) == [
        ["decode, 1 token", "1 s", "1"], ["prefill, 8 tokens", "2 s", "4"],
    ]  # fmt: skip
    ridge = CEILINGS.ridge_flops_per_byte
    for row, p in zip(finding.rows[1:], (decode, prefill), strict=True):
        above = p.flop / p.moved_bytes > ridge
        assert row[-1] == ("arithmetic" if above else "memory bandwidth")
    assert (
        "takes in 4 tokens/s where decode, with the same weights, puts out 1." in finding.lines[0]
    )


@pytest.mark.parametrize(
    ("measured_s", "limit"),
    [(0.0263, "neither ceiling limits"), (0.016, "memory bandwidth limits"),
     (0.0105, "memory bandwidth limits"), (0.0200, "no one part alone limits")],
)  # fmt: skip
def test_the_parts_of_a_step_add_up_as_they_are_printed(measured_s: float, limit: str) -> None:
    parts = Parts(measured_s=measured_s, reading_s=0.00939, computing_s=0.00132)
    numbers = [cell.removesuffix("%)").split(" ms (") for cell in parts.cells()]
    assert sum(float(ms) for ms, _ in numbers) == pytest.approx(1000 * measured_s, abs=0.005)
    assert sum(int(share) for _, share in numbers) == 100
    assert parts.limit == limit
    sentence = parts.sentence("A step")
    assert ("overlap" in sentence) == (measured_s < 0.00939 + 0.00132)


@pytest.mark.parametrize(
    ("stand_in_s", "parts_ms", "told"),
    [
        (0.020, [9.4, 1.3, 9.3, 6.3], "6.3 ms (24%) the engine's own."),
        (0.028, [9.4, 1.3, 17.3, -1.7], "less 1.7 ms (7%) by which the engine was faster."),
        (0.009, [9.4, 1.3, 0.0, 15.6], "0.0 ms (0%) overhead beyond both ceilings, 15.6 ms"),
    ],
)
def test_a_step_with_a_timed_stand_in_has_four_parts(
    stand_in_s: float, parts_ms: list[float], told: str
) -> None:
    """Also where the engine was faster than it, or where it reads and computes at once."""
    parts = Parts(0.0263, 0.00939, 0.00132, stand_in_s)
    numbers = [cell.removesuffix("%)").split(" ms (") for cell in parts.cells()]
    assert [float(ms) for ms, _ in numbers] == pytest.approx(parts_ms)
    assert sum(float(ms) for ms, _ in numbers) == pytest.approx(26.3)
    assert sum(int(share) for _, share in numbers) == 100
    assert parts.rest_s == pytest.approx(parts.overhead_s + parts.engine_s)
    assert told in parts.sentence("A step")


def with_stand_in(found: Context, *variants: str, steps: int = 1) -> Context:
    """The same run, forecast over steps of one second and one second more for each token."""
    keys = [p.key for p in found.points if p.variant.name in variants]
    band = {"tpot_mean_s": Band(value=1, low=1, high=1)}
    times = StepTimes(
        tokens=(0, 100), linear_s=(1, 101), rows=(1, 2), head_s=(0, 0), attention_pair_s=0,
        attention_read_s=0,
    )  # fmt: skip
    forecasts = PointForecasts(
        points=dict.fromkeys(keys, band), step_times=[times.model_dump()] * steps
    )
    before = Predictions(effects={}, forecasts={}, in_virtual_time=forecasts)
    write_json(found.folder.path / "predictions.json", before)
    return found


def test_a_pass_has_its_stand_in_where_one_was_timed(tmp_path: Path) -> None:
    values: dict[str, Values] = {
        "default decode": {"tpot_mean_s": 3}, "default prefill": {"ttft_mean_s": 20},
        "eager decode": {"tpot_mean_s": 3}, "eager prefill": {"ttft_mean_s": 20},
    }  # fmt: skip
    found = with_stand_in(alone(tmp_path, values), "default")
    decode, prefill = phase(found, "default", "decode"), phase(found, "default", "prefill")
    eager = phase(found, "eager", "decode")
    assert decode
    assert prefill
    assert eager
    assert (decode.stand_in_s, prefill.stand_in_s, eager.stand_in_s) == (2, 9, None)
    finding = PHASES.finding(found)
    assert finding.rows[0][2:6] == ["Reading", "Computing", "Overhead", "The engine's own"]
    assert "stand-in step, timed before the engine started" in " ".join(finding.lines)
    figure = FLAGS.draw
    assert figure
    assert "these two are told as one, the rest" in (figure(flag_effects(found)) or "")
    labels = {text.get_text() for text in plt.gcf().legends[0].get_texts()}
    assert {"overhead", "the engine's own", "the rest"} <= labels
    plt.close("all")


def test_a_step_that_brings_a_token_has_at_least_one_request() -> None:
    """Between whole numbers of requests its time is interpolated."""
    times = StepTimes(
        tokens=(1, 2), linear_s=(1, 3), rows=(1, 2), head_s=(0, 0), attention_pair_s=0,
        attention_read_s=0,
    )  # fmt: skip
    assert [decode_s(times, batch, 8) for batch in (0.9, 1, 1.25, 2)] == [1, 1, 1.5, 3]


def test_whose_step_was_timed_is_not_guessed(tmp_path: Path) -> None:
    """Of a lab with several models or kinds of kernels, several steps are on file."""
    found = with_stand_in(
        alone(tmp_path, {"default decode": {"tpot_mean_s": 3}}), "default", steps=2
    )
    decode = phase(found, "default", "decode")
    assert decode
    assert decode.stand_in_s is None
    assert PHASES.finding(found).rows[0][2:5] == ["Reading", "Computing", "The rest"]


def test_mbu_and_mfu_beside_the_flags_are_those_of_every_point(tmp_path: Path) -> None:
    found = alone(
        tmp_path,
        {"default decode": {"tpot_mean_s": 1, "mbu": 0.36},
         "default prefill": {"ttft_mean_s": 2, "mfu": 0.73}},
    )  # fmt: skip
    assert cells(FLAGS.finding(found), 2, 6) == [["36%", "73%"]]


def test_which_flag_matters_is_told_beside_the_noise(tmp_path: Path) -> None:
    found = alone(
        tmp_path,
        {
            "default decode": {"tpot_mean_s": [1.0, 1.01, 0.99]},
            "eager decode": {"tpot_mean_s": [1.5, 1.515, 1.485]},
            "default prefill": {"ttft_mean_s": [1.0, 1.01, 0.99]},
            "eager prefill": {"ttft_mean_s": [1.0, 1.01, 0.99]},
        },
    )
    finding = FLAGS.finding(found)
    assert cells(finding, 0, 3, 4, 7, 8) == [
        ["default", "–", "–", "–", "–"],
        ["eager", "1.50x (1.46 to 1.55)", "yes", "1.00x (0.97 to 1.03)", "no"],
    ]
    assert finding.lines[0].startswith("`default` decodes fastest")
    assert finding.lines[2:] == [
        "These flags matter to decode, by TPOT beside the defaults: `eager` 1.50x (1.46 to 1.55)."
    ]


def test_a_flag_without_its_evidence_matters_to_nothing(tmp_path: Path) -> None:
    found = alone(
        tmp_path,
        {"default decode": {"tpot_mean_s": [1.5, 1.51, 1.49]},
         "eager decode": {"tpot_mean_s": [1.0, 1.01, 0.99]},
         "eager prefill": {"ttft_mean_s": 1.0}},
    )  # fmt: skip
    caveat = Caveat(name="treatment not applied", text="", blocks=True,
                    point="eager/decode/concurrent-1")  # fmt: skip
    finding = FLAGS.finding(replace(found, caveats=[caveat]))
    assert cells(finding, 0, 4, 8) == [["default", "–", "–"], ["eager", "not valid", "–"]]
    assert not any("fastest" in line for line in finding.lines)  # one is left, beside no other
    assert finding.lines[1].startswith("Not valid, as *Validity* says: `eager` 0.67x")


def test_defaults_that_are_not_valid_are_not_the_fastest(tmp_path: Path) -> None:
    decode = {"default": [1.0, 1.01, 0.99], "eager": [1.5, 1.51, 1.49]}
    found = alone(tmp_path, {f"{n} decode": {"tpot_mean_s": v} for n, v in decode.items()})
    assert FLAGS.finding(found).lines[0].startswith("`default` decodes fastest")
    caveat = Caveat(name="load from others", text="", blocks=True,
                    point="default/decode/concurrent-1")  # fmt: skip
    told = FLAGS.finding(replace(found, caveats=[caveat]))
    assert not any("fastest" in line for line in told.lines)


def test_one_repeat_settles_no_flag(tmp_path: Path) -> None:
    found = alone(
        tmp_path, {"default decode": {"tpot_mean_s": 1.0}, "eager decode": {"tpot_mean_s": 1.5}}
    )
    found = replace(found, values={key: {1: of[1]} for key, of in found.values.items()})
    finding = FLAGS.finding(found)
    assert cells(finding, 3, 4, 8) == [
        ["–", "–", "–"], ["1.50x (of one repeat)", "not settled", "–"],
    ]  # fmt: skip
    assert finding.lines[-1] == "Not settled by these repeats: `eager` 1.50x (of one repeat)."
