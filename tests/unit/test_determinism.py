"""Greedy answers beside each other: where they part, and the forecast of how many do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from labs import LABS
from labs.determinism import probes
from labs.determinism.facts import (
    Beside,
    Position,
    SameText,
    chance_to_part,
    chances_still_equal,
    facts,
    forecast,
    same_text,
)
from labs.harness.analysis.probes import ProbedEngine
from labs.harness.storage.writing import write_gzip
from loadtests.prompts import Writer
from tests.unit.answering import Answering, answered_by
from tests.unit.builders import make_lab, words
from tests.unit.judged import context, judged_run
from tests.unit.test_probes import Running

LAB = LABS["determinism"].at("cpu", quick=False)


def answer(*positions: tuple[int, float, int, float]) -> list[Position]:
    return [Position(*p) for p in positions]


ALONE = answer((1, -0.1, 9, -2.1), (2, -0.5, 8, -0.75), (3, -0.2, 7, -1.2))
PARTED = answer((1, -0.25, 9, -2.0), (8, -0.5, 2, -0.625), (4, -0.1, 5, -3.0))
MOVED = answer((1, -0.1, 9, -2.1), (2, -0.5, 8, -0.75), (3, -0.2, 6, -1.2))


def test_answers_are_compared_up_to_the_first_token_that_differs() -> None:
    """There the gap went from 0.25 to -0.125; a position with another second-best has no shift."""
    parted = Beside(ALONE, PARTED)
    assert parted.same_tokens == 1
    assert parted.roundings == pytest.approx([0.15])
    assert parted.shifts == pytest.approx([0.25, 0.375])
    moved = Beside(ALONE, MOVED)
    assert (moved.same_tokens, moved.roundings, moved.shifts) == (3, [0, 0, 0], [0, 0])


SHIFTS = [0.0, 0.125, 0.125, 0.5]


def test_half_of_the_shifts_beyond_a_gap_part_answers_and_half_as_many_of_those_that_tie() -> None:
    gaps = {0.0: 3 / 8, 0.1: 3 / 8, 0.125: 2 / 8, 0.2: 1 / 8, 0.5: 0.5 / 8, 1.0: 0}
    assert {gap: chance_to_part(gap, SHIFTS) for gap in gaps} == gaps
    assert chances_still_equal(ALONE, SHIFTS) == pytest.approx([1, 7 / 8, 7 / 8])
    assert chances_still_equal([ALONE[1]] * 2, SHIFTS) == pytest.approx([7 / 8, 49 / 64])


def test_a_forecast_knows_of_what_it_is_about_only_the_gaps_alone() -> None:
    """Shifts of 0.25 and 0.375: of a gap of 0.25 a tie and a larger one, (1 + 1/2) / 2 / 2."""
    known = [Beside(ALONE, PARTED)]
    judged = [Beside(ALONE, PARTED)] + 3 * [Beside(ALONE, MOVED)]
    found = forecast(known, judged)
    assert found
    assert found.share.value == pytest.approx(3 / 8)
    assert found.measured.value == 1 / 4
    assert list(found.still_equal) == [1, 0.625, 0.625]
    assert found.held  # the interval of 1 of 4 is from 5% to 70%
    never = forecast([Beside(ALONE, ALONE)], 4 * [Beside(ALONE, PARTED)])
    assert never
    assert (never.share.value, never.held) == (0, False)
    assert forecast([], known) is None
    assert forecast(known, []) is None


def told(**ways: Sequence[Sequence[Position]]) -> SameText:
    return same_text(4 * [ALONE], {("plain", asked): of for asked, of in ways.items()}, "plain")


def test_what_a_way_to_serve_changes() -> None:
    moved = answer((1, -0.3, 9, -2.1), *ALONE[1:])
    ways = {"again": 4 * [ALONE], "4": 4 * [moved], "16": [PARTED, ALONE, PARTED, ALONE]}
    found = told(**ways)
    assert [w.changes for w in found.ways] == ["nothing", "bits", "texts"]
    most = found.of("16")
    assert most
    assert [most.differ.value, most.first.value, *most.parted_gaps] == [1 / 2, 2, 0.25, 0.25]
    assert most.moved.value == pytest.approx(2 / 8)  # 3 + 3 + 1 + 1 tokens before any parts
    assert most.same_gap.value == pytest.approx(1.5)  # of 1 and 2
    assert list(most.still_equal) == [1, 1 / 2, 1 / 2]
    again = found.of("again")
    assert again
    assert not again.first.known
    assert found.ties.value == 0
    assert found.batch_matters
    assert not told(**{"4": [PARTED], "16": [PARTED]}).batch_matters
    from_the_start = told(other=4 * [answer((4, -0.1, 5, -2.1), *ALONE[1:])]).ways[0]
    assert (from_the_start.first.value, from_the_start.moved.known) == (1, False)


class Greedy(Answering):
    """Answers with a token for each that is asked, and the best other."""

    bodies: ClassVar[list[dict[str, Any]]]

    def do_POST(self) -> None:
        asked = self.asked()
        self.bodies.append(asked)
        top = [{f"token_id:{i}": -0.5, "token_id:99": -1.25} for i in range(asked["max_tokens"])]
        tokens = [next(iter(of)) for of in top]
        known = {"tokens": tokens, "token_logprobs": [-0.5] * len(top), "top_logprobs": top}
        self.reply({"choices": [{"logprobs": known}]})


def asked_of(place: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    Greedy.bodies = []
    with answered_by(Greedy) as url:
        engine = ProbedEngine(LAB.variants[place], LAB, Running(url), {}, Writer(words))
        return probes.greedy(engine, texts=3), Greedy.bodies


def test_the_probe_asks_the_same_prompts_in_every_way() -> None:
    found, bodies = asked_of(0)
    assert list(found["answers"]) == ["alone", "again", "4", "16"]
    assert {len(of) for of in found["answers"].values()} == {3}
    assert found["answers"]["16"][2][:2] == [(0, -0.5, 99, -1.25), (1, -0.5, 99, -1.25)]
    assert [b["max_tokens"] for b in bodies] == 3 * [1] + 4 * 3 * [64]
    assert len({b["prompt"] for b in bodies}) == 3
    assert {b["temperature"] for b in bodies} == {0}
    other, _ = asked_of(1)
    assert list(other["answers"]) == ["alone"]


def test_a_run_is_compared_with_its_first_variant_or_not_at_all(tmp_path: Path) -> None:
    lab = make_lab(variants=LAB.variants[:2], claims=(), evidence=(), findings=LAB.findings)
    found = context(tmp_path, lab, {})

    def asked(variant: str, given: Sequence[Position]) -> None:
        on_file = {"answers": {"alone": [[tuple(p) for p in given]]}}
        write_gzip(found.folder.probe_file("greedy", variant), on_file)

    asked("cached", PARTED)
    assert facts(judged_run(found)).same_text is None
    asked("plain", ALONE)
    compared = facts(judged_run(found)).same_text
    assert compared
    assert [(w.variant, w.asked, w.differ.value) for w in compared.ways] == [("cached", "alone", 1)]
