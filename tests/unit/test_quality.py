"""Every quality figure against numbers worked by hand, and what an engine's answers become."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import requests

from labs.harness.analysis import evaluation, quality
from labs.harness.analysis.evaluation import Evaluation, Passage, ScoredCompletion, evaluate
from labs.harness.analysis.quality import (
    Margin,
    QualityFigure,
    compare,
    gate,
    kl_divergence,
    paired_difference,
    per_token,
)
from tests.unit.answering import Answering, answered_by

HALF, QUARTER = math.log(0.5), math.log(0.25)


def passage(*actual: float) -> Passage:
    """Token 1 follows at every position, with these probabilities; token 2 gets the rest."""
    return Passage(
        token_ids=(1,) * len(actual),
        known=tuple({1: math.log(p), 2: math.log(1 - p)} for p in actual),
    )


def replies(*correct: bool, needles: bool = False) -> tuple[ScoredCompletion, ...]:
    return tuple(
        ScoredCompletion(
            question=f"question {i}",
            expected="7",
            answer="7" if right else "8",
            correct=right,
            length_tokens=256 * (1 + i % 2) if needles else None,
            depth=0.5 if needles else None,
        )
        for i, right in enumerate(correct)
    )


def of(passages: list[Passage], correct: tuple[bool, ...] = (True,) * 4) -> Evaluation:
    return Evaluation(
        model="m",
        passages=tuple(passages),
        needles=replies(*correct, needles=True),
        tasks=replies(*correct),
        took_s=1.0,
    )


def by_name(figures: list[QualityFigure]) -> dict[str, QualityFigure]:
    return {" ".join(filter(None, (f.name, f.where))): f for f in figures}


# ------------------------------------------------------------------------------------ statistics


def test_perplexity_and_its_ratio() -> None:
    before = of([passage(0.5, 0.5), passage(0.5, 0.5)])
    after = of([passage(0.25, 0.25), passage(0.5, 0.25)])
    figures = by_name(compare(before, after))
    assert figures["perplexity baseline"].value == pytest.approx(2)
    # -mean log p = (3 log 4 + log 2) / 4 = 7/4 log 2; a ratio of 2^(3/4)
    assert figures["perplexity treatment"].value == pytest.approx(2**1.75)
    ratio = figures["perplexity_ratio"]
    assert ratio.value == pytest.approx(2**0.75)
    # passage means 1 and 1/2 (log 2): standard error 1/4 log 2, t(1 degree) = 12.706
    assert ratio.high == pytest.approx(2 ** (0.75 + 12.7062 * 0.25), rel=1e-4)
    assert ratio.low == pytest.approx(2 ** (0.75 - 12.7062 * 0.25), rel=1e-4)
    assert ratio.n == 4


def test_top1_agreement() -> None:
    before, after = of([passage(0.6, 0.6), passage(0.6)]), of([passage(0.7, 0.3), passage(0.9)])
    agreement = by_name(compare(before, after))["top1_agreement"]
    assert agreement.value == pytest.approx(2 / 3)
    assert agreement.high == 1.0  # a share's interval ends at one


def test_a_tie_goes_to_the_lowest_id_on_both_sides() -> None:
    tie = Passage(token_ids=(5,), known=({5: HALF, 3: HALF},))
    turned = Passage(token_ids=(5,), known=({3: HALF, 5: HALF},))
    assert by_name(compare(of([tie]), of([turned])))["top1_agreement"].value == 1


def test_longer_passages_weigh_more() -> None:
    mean = per_token([[1.0, 1.0, 1.0], [0.0]])
    assert mean.value == 0.75
    # residuals 3 - 9/4 and 0 - 3/4: sqrt(2 * (9/16 + 9/16)) / 4 = 3/8
    assert mean.high == pytest.approx(0.75 + 12.7062 * 0.375, rel=1e-4)
    assert per_token([[1.0, 2.0]]).low is None  # one passage gives no interval


def test_kl_of_a_known_pair() -> None:
    p, q = {1: HALF, 2: QUARTER}, {1: QUARTER, 2: QUARTER}
    # 1/2 log 2 + 0 + 1/4 log(1/4 / 1/2)
    assert kl_divergence(p, q) == pytest.approx(0.25 * math.log(2))
    # an id only one side knows goes to the rest: 1/2 log 2 + 1/2 log(1/2 / 3/4)
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence({1: HALF, 2: QUARTER}, {1: QUARTER, 9: QUARTER}) == pytest.approx(expected)


def test_kl_of_one_with_itself_is_zero_whatever_is_left_over() -> None:
    whole = {1: HALF, 2: HALF + 1e-5}  # rounding may sum to more than one
    assert kl_divergence(whole, whole) == 0
    assert kl_divergence({1: 0.0}, {2: 0.0}) == 0  # nothing in common shows nothing


@pytest.mark.parametrize("seed", range(5))
def test_coarsened_kl_never_exceeds_the_exact_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, 500)
    log_p, log_q = (
        x - math.log(np.exp(x).sum()) for x in (logits, logits + rng.normal(0, 0.5, 500))
    )
    exact = float((np.exp(log_p) * (log_p - log_q)).sum())
    divergences = []
    for k in (5, 20, 500):
        p, q = ({int(i): float(x[i]) for i in np.argsort(-x)[:k]} for x in (log_p, log_q))
        divergences.append(kl_divergence(p, q))
    assert 0 < divergences[0] <= exact
    assert 0 < divergences[1] <= exact
    assert divergences[2] == pytest.approx(exact, abs=1e-5)  # all known: nothing is lost


def test_paired_difference_and_mcnemar() -> None:
    before = [True] * 6 + [False] * 2 + [True] * 2
    after = [False] * 6 + [False] * 2 + [True] * 2
    difference, p_value = paired_difference(before, after)
    assert difference.value == -0.6
    assert p_value == pytest.approx(2 * 0.5**6)  # six changed, all one way
    # (0 + 1) / 12 - (6 + 1) / 12 = -1/2; variance (8/12 - 1/4) / 12
    half = 1.959964 * math.sqrt((8 / 12 - 0.25) / 12)
    assert difference.low == pytest.approx(-0.5 - half)
    assert difference.high == pytest.approx(-0.5 + half)


def test_no_answer_changed_still_leaves_doubt() -> None:
    difference, p_value = paired_difference([True] * 45, [True] * 45)
    assert (difference.value, p_value) == (0, 1)
    assert difference.high == pytest.approx(1.959964 * math.sqrt(2) / 47)


def test_shares_by_length_and_depth() -> None:
    figures = by_name(compare(of([passage(0.5)]), of([passage(0.5)], (True, False, True, False))))
    assert figures["needle_retrieval baseline"].value == 1
    assert figures["needle_retrieval treatment"].value == 0.5
    assert figures["needle_retrieval_difference"].value == -0.5
    assert figures["needle_retrieval_difference 256 tokens"].value == 0
    assert figures["needle_retrieval_difference 512 tokens"].value == -1
    assert figures["needle_retrieval_difference depth 0.5"].n == 4
    assert figures["task_accuracy_difference"].p_value == 0.5


def test_only_the_same_questions_compare() -> None:
    one, other = of([passage(0.5)]), of([passage(0.5, 0.5)])
    with pytest.raises(ValueError, match="passages differ"):
        compare(one, other)
    renamed = tuple(r.model_copy(update={"question": "another"}) for r in one.tasks)
    with pytest.raises(ValueError, match="task_accuracy"):
        compare(one, one.model_copy(update={"tasks": renamed}))


# -------------------------------------------------------------------------------- gate and table


def figure(low: float | None, high: float | None, name: str = "perplexity_ratio") -> QualityFigure:
    return QualityFigure(name=name, value=1.0, low=low, high=high, n=9, source="by hand")


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.99, 1.01, "pass"),
        (0.99, 1.02, "pass"),
        (1.0, 1.03, "undecided"),
        (1.03, 1.05, "fail"),
        (None, None, "undecided"),
    ],
)
def test_the_whole_interval_must_keep_the_margin(
    low: float | None, high: float | None, outcome: str
) -> None:
    margin = Margin(figure="perplexity_ratio", at_most=1.02)
    assert gate([figure(low, high)], [margin])[0] == outcome


def test_one_failure_decides_and_doubt_is_no_pass() -> None:
    margins = [Margin(figure="a", at_least=-0.05), Margin(figure="b", at_least=-0.05)]
    good, bad, vague = (-0.01, 0.01), (-0.3, -0.1), (-0.1, 0.1)
    for first, second, outcome in (
        (good, good, "pass"),
        (good, vague, "undecided"),
        (vague, bad, "fail"),
    ):
        result, verdicts = gate([figure(*first, name="a"), figure(*second, name="b")], margins)
        assert result == outcome
        assert [v.margin.figure for v in verdicts] == ["a", "b"]


def test_a_worse_engine_fails_the_gate_and_the_same_one_passes() -> None:
    base = of([passage(0.5, 0.6)] * 4, (True,) * 60)
    worse = of([passage(0.25, 0.3)] * 4, (True, False) * 30)
    assert gate(compare(base, base))[0] == "pass"
    outcome, verdicts = gate(compare(base, worse))
    assert outcome == "fail"
    assert [v.result for v in verdicts] == ["fail"] * 3


# ---------------------------------------------------------------------------------------- asking


class Engine(Answering):
    """Knows every token's probability to be 1/2, the numbers in every text, and no task."""

    bodies: list[dict[str, object]]

    def do_POST(self) -> None:
        body = self.asked()
        self.bodies.append(body)
        if body["model"] != "m":
            self.send_error(404)
            return
        choice: dict[str, object] = {"text": " no idea"}
        if "messages" in body:
            question, start = (m["content"] for m in body["messages"])
            number = question.partition(start)[2].split(".")[0]
            choice = {"message": {"content": f"{number}."}}
        elif "prompt_logprobs" in body:
            ids = list(range(len(body["prompt"].split())))
            known = {"logprob": HALF, "rank": 1, "decoded_token": "x"}
            choice = {
                "prompt_token_ids": ids,
                "prompt_logprobs": [None, *({str(i): known, "99999": known} for i in ids[1:])],
            }
        self.reply({"choices": [choice]})


@pytest.fixture
def engine() -> Iterator[str]:
    Engine.bodies = []
    with answered_by(Engine) as url:
        yield f"{url}/"


def test_what_an_engine_says_becomes_answers(engine: str) -> None:
    evaluation = evaluate(engine, "m")
    assert len(evaluation.passages) == 12
    assert all(p.logprobs == [round(HALF, 5)] * len(p.token_ids) for p in evaluation.passages)
    assert len(evaluation.needles) == 3 * 5 * 4
    assert all(r.correct for r in evaluation.needles)
    assert len(evaluation.tasks) == 112
    assert not any(r.correct for r in evaluation.tasks)
    assert {r.answer for r in evaluation.tasks} == {"no idea"}
    assert {(b["temperature"], b["seed"]) for b in Engine.bodies} == {(0, 0)}
    assert len({b["cache_salt"] for b in Engine.bodies}) == 1
    evaluate(engine, "m", quick=True)
    assert len({b["cache_salt"] for b in Engine.bodies}) == 2  # it found nothing of the first
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_quick_asks_less_of_the_same(engine: str) -> None:
    quick, whole = evaluate(engine, "m", quick=True), evaluate(engine, "m")
    assert (len(quick.passages), len(quick.needles), len(quick.tasks)) == (4, 10, 38)
    assert set(quick.needles) <= set(whole.needles)
    assert set(quick.tasks) <= set(whole.tasks)


def test_an_engine_that_refuses_is_an_error(engine: str) -> None:
    with pytest.raises(requests.HTTPError):
        evaluate(engine, "another")


# ----------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("length_tokens", evaluation.LENGTHS_TOKENS)
def test_needles_lie_at_their_depths(length_tokens: int) -> None:
    text, numbers = evaluation.needles_text(length_tokens, 0)
    assert (text, numbers) == evaluation.needles_text(length_tokens, 0)
    assert text != evaluation.needles_text(length_tokens, 1)[0]
    places = [text.index(number) / len(text) for number in numbers.values()]
    assert places == pytest.approx(evaluation.DEPTHS, abs=0.16)
    assert all(text.count(number) == 1 for number in numbers.values())


def test_no_text_is_held_out_and_calibrated_on() -> None:
    held_out, calibration = (
        (evaluation.TEXTS / name).read_text().strip().split("\n\n")
        for name in ("held_out.txt", "calibration.txt")
    )
    assert len(held_out) == 12
    assert sum(len(p.split()) for p in calibration) > 4000
    assert not {s for p in held_out for s in p.split(". ")} & {
        s for p in calibration for s in p.split(". ")
    }


def test_every_margin_names_a_figure() -> None:
    same = of([passage(0.5)] * 2)
    assert {m.figure for m in quality.MARGINS} <= {f.name for f in compare(same, same)}
