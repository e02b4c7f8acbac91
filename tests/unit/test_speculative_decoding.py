"""What a run says of guessing ahead, beyond its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.run_view import Context
from labs.harness.spec.lab import Variant
from labs.speculative_decoding.facts import Draft, SpeedUps, Turn, facts, same_text, tokens_a_step
from loadtests.records import RequestRecord
from serving import metrics
from serving.metrics import Histogram, Snapshot
from tests.unit.builders import make_lab, make_record, make_workload
from tests.unit.judged import context, judged_run, played, withheld

INF = float("inf")
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


def speed_ups_of(found: Context) -> SpeedUps:
    return facts(judged_run(found)).speed_up


def test_acceptance_by_position_beside_a_constant_one(tmp_path: Path) -> None:
    run = guessing(tmp_path, {})
    key = "guess/story/concurrent-1"
    run = replace(run, values={key: {1: {"acceptance_length": 2.5, "acceptance_rate": 0.5}}})
    played(run, key, engine=DRAFTED)
    made = {"layers": 2, "acceptance": 0.7, "acceptance_untrained": 0.004, "seconds": 90.0}
    run = replace(run, run=run.run.model_copy(update={"about": {"draft": made}}))
    found = facts(judged_run(run)).acceptance
    (at,) = found.points
    assert [share.value for share in at.shares] == [0.8, 0.5, 0.2]  # 32, 20 and 8 of 40
    # 1 + .8 + .64 + .512 tokens if it were 0.8 at every position
    assert at.tokens_at_constant_share.value == pytest.approx(2.952)
    assert (at.tokens_per_draft.value, str(at.wasted_share)) == (2.5, "50%")
    shares = (Quantity(0.7, "share"), Quantity(0.004, "share"))
    assert found.drafts == (Draft("draft", 2, Quantity(90.0, "s"), *shares),)


def test_a_step_yields_what_it_delivers(tmp_path: Path) -> None:
    """Steps that drafted nothing count; what was accepted beyond an answer's end does not."""
    run = judged_run(guessing(tmp_path, {}))
    played(run, "guess/story/concurrent-1", engine=DRAFTED)
    first, second, *_ = (p for p in run.points if p.variant.name == "guess")
    assert tokens_a_step(run, first).value == pytest.approx(110 / 50)
    assert not tokens_a_step(run, second).known


def test_speed_up_measured_and_explained_by_measured_parts(tmp_path: Path) -> None:
    """A draft of 2 of 10 ms, by the engine; a verification at B puts 4 B tokens in a step."""
    run = guessing(tmp_path, {**PLAIN, "alone 1": 1.0, "guess 1": 8.0, "guess 2": 10.0,
                              "guess 8": 20.0})  # fmt: skip
    played(run, "guess/story/concurrent-1", engine=DRAFTED)
    played(run, "alone/draft/concurrent-1", engine=stepping(0.002))
    played(run, "none/story/concurrent-1", engine=stepping(0.010))
    found = {s.users: s for s in speed_ups_of(run).points}
    assert found.keys() == {1, 2, 8}  # at 4 in flight it was not measured
    assert [found[n].measured.value for n in (1, 2, 8)] == pytest.approx([1.25, 1.1, 0.8])
    assert found[1].draft_cost.value == pytest.approx(0.2)
    assert found[1].verify_cost.value == pytest.approx(12 / 10)
    assert found[2].verify_cost.value == pytest.approx(16 / 11)
    assert not found[8].verify_cost.known  # 32 at once were never measured
    assert found[1].explained.value == pytest.approx(2.2 / (3 * 0.2 + 1.2))
    assert found[1].pass_cost.value == pytest.approx((2.2 / 1.25 - 1.2) / 3)
    assert not found[8].explained.known


def test_copying_costs_no_draft(tmp_path: Path) -> None:
    run = guessing(tmp_path, {**PLAIN, "guess 1": 8.0}, COPY)
    assert [s.draft_cost.value for s in speed_ups_of(run).points] == [0.0]


@pytest.mark.parametrize(
    ("guess_ms", "turn"),
    [
        ((8, 9, 10, 11), None),
        ((12, 12, 13, 20), None),
        ((8, 10, 12.5, 20), Turn(2, 4, gains=False)),
        ((12.5, 12, 11, 12), Turn(2, 4, gains=True)),
        # at 2 and 4 in flight two repeats do not tell which is faster
        ((8, (10, 11), (11, 13), 20), Turn(1, 8, gains=False)),
    ],
)
def test_where_speculation_turns(
    guess_ms: tuple[Any, ...], turn: Turn | None, tmp_path: Path
) -> None:
    guessed = {f"guess {n}": ms for n, ms in zip((1, 2, 4, 8), guess_ms, strict=True)}
    (curve,) = speed_ups_of(guessing(tmp_path, {**PLAIN, **guessed})).curves
    assert (curve.workload, curve.turn, len(curve.speed_ups)) == ("story", turn, 4)


def test_a_load_whose_interval_holds_1_is_undecided(tmp_path: Path) -> None:
    """Speculation is faster at both loads on average, and shown to be at the first alone."""
    found = guessing(tmp_path, {"none 1": 10.0, "guess 1": 8.0, "none 8": (15.0, 16.0),
                                "guess 8": (14.9, 12.0)})  # fmt: skip
    assert [p.outcome for p in speed_ups_of(found).points] == ["wins", "undecided"]
    one = replace(found, values={k: {1: of[1]} for k, of in found.values.items()})
    assert [p.outcome for p in speed_ups_of(one).points] == ["undecided"] * 2


@pytest.mark.parametrize("side", ["none", "guess"])
def test_a_speed_up_that_is_not_valid_neither_wins_nor_loses(side: str, tmp_path: Path) -> None:
    found = guessing(tmp_path, {**PLAIN, "guess 1": 8.0, "guess 4": 11.0, "guess 8": 30.0})
    told = speed_ups_of(withheld(found, f"{side}/story/concurrent-8", ("tpot_mean_s",)))
    assert [p.outcome for p in told.points] == ["wins", "wins", "not valid"]
    assert [curve.turn for curve in told.curves] == [None]
    assert not told.all_valid
    assert (told.best and told.best.users, told.first_loss) == (1, None)
    other = speed_ups_of(withheld(found, f"{side}/story/concurrent-8", ("ttft_mean_s",)))
    assert other.points[2].outcome == "loses"
    assert other.first_loss == other.points[2]


def test_the_same_text_is_told_request_by_request(tmp_path: Path) -> None:
    run = guessing(tmp_path, {})

    def answers(*texts: str | None) -> list[RequestRecord]:
        return [make_record([(11.0, 1)], index=i, text=t) for i, t in enumerate(texts)]

    played(run, "none/story/concurrent-1", answers("a", "b", "c", "d"))
    played(run, "none/story/concurrent-2", answers("a", "b"))
    played(run, "guess/story/concurrent-1", answers("a", "b", "x", None))
    # two repeats each; the fourth answer has no text to compare
    assert [(of.point, of.compared, of.same_share.value) for of in same_text(judged_run(run))] == [
        ("none/story/concurrent-2", 4, 1.0), ("guess/story/concurrent-1", 6, 4 / 6),
    ]  # fmt: skip
