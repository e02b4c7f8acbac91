"""Worksheets ask for what the labs' own functions predict, and every question has a key."""

from __future__ import annotations

import json

import pytest

from labs import LABS
from labs.harness.reports import teaching, worksheets
from labs.harness.reports.dials import cards, cards_of, pair_of, predicted
from labs.harness.spec.page import WORKSHEET, Page, PageError, Section, page_of

(CARD,) = (card for card in cards() if card.card == "h100")
LAB = LABS["prefix-caching"]
CLAIM = "ttft-share-90"


def ask(monkeypatch: pytest.MonkeyPatch, question: str) -> list[worksheets.Task]:
    page = Page(LAB.title, LAB.question, {WORKSHEET: Section(f"- {question}")})
    monkeypatch.setattr(worksheets, "page_of", lambda _: page)
    return [task for sheet in worksheets.worksheets(LAB, [CARD]) for task in sheet.tasks]


def test_the_key_is_what_the_claim_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = ask(monkeypatch, f"`{CLAIM}`: What is left? Because.")
    claim = next(c for c in LAB.claims if c.name == CLAIM)
    assert task.key == claim.predict(*pair_of(LAB, claim, CARD)).value
    assert task.unit == "x"
    assert len(task.points) == 2


def test_a_time_is_asked_in_a_unit_and_its_parts_are_in_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (task,) = ask(monkeypatch, f"`weights_read_s({CLAIM}.baseline)`: How long?")
    seconds = CARD.shape.weight_bytes / CARD.ceilings.memory_bandwidth_bytes_per_s
    assert task.key == pytest.approx(1000 * seconds)
    assert task.unit == "ms"
    marking = json.loads(task.marking)
    assert marking["parts"]["reading the weights once"] == pytest.approx(marking["key"])


@pytest.mark.parametrize(
    "asked", ["nothing", f"nothing({CLAIM}.baseline)", "step_s(none.baseline)"]
)
def test_a_question_that_nothing_answers_is_refused(
    monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    with pytest.raises(PageError):
        ask(monkeypatch, f"`{asked}`: How long?")


@pytest.mark.parametrize("name", LABS)
def test_every_lesson_has_a_worksheet_without_a_run(name: str) -> None:
    """Of three questions or more, each with one question mark that parts it from its reason."""
    page = page_of(name)
    assert page
    items = page[WORKSHEET].items
    assert len(page[WORKSHEET].named) == len(items) >= 3
    assert all(item.count("?") == 1 for item in items)
    worksheets.worksheets(LABS[name], cards_of(LABS[name]))  # raises where a question has no key


def test_a_teacher_has_the_key_and_no_minutes_that_no_run_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (task,) = ask(monkeypatch, f"`{CLAIM}`: What is left?")
    sheets = worksheets.worksheets(LAB, [CARD])
    taught = teaching.Taught.of(LAB.name, sheets, None, None)
    assert [[*answers] for _, answers in taught.key] == [[task.answer]]
    assert (taught.run_min, taught.engines) == (None, None)


def test_a_prediction_on_a_card_is_of_the_points_that_the_claim_has_there() -> None:
    """On a CPU this claim compares 16 requests in flight with one, on a card of 80 GB 256."""
    lab = LABS["continuous-batching"]
    claim = next(c for c in lab.at(CARD.scale, quick=False).claims if c.name == "throughput")
    pair = pair_of(lab, claim, CARD)
    assert pair[0].load.users == 256
    assert dict(predicted(lab, "throughput"))[CARD.name] == claim.predict(*pair).value
