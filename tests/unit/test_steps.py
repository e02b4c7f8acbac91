"""Sums step by step: what is asked, how it is checked, what a check is worth, and what is told."""

from __future__ import annotations

import itertools
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import pytest

from labs import LABS
from labs.harness.analysis.probes import ProbedEngine
from labs.harness.spec.lab import Variant
from labs.harness.storage.writing import write_gzip
from labs.many_samples import probes
from labs.many_samples.facts import Stepwise, end_of_search, facts
from labs.many_samples.reasoning_steps import (
    adding,
    chains,
    chosen,
    end_of,
    found_at_end,
    found_by_steps,
    is_step,
    steps_right,
)
from labs.many_samples.sampled_tasks import pass_at
from loadtests.prompts import Writer
from tests.cases import each
from tests.unit.answering import Answering, answered_by
from tests.unit.builders import make_lab, words
from tests.unit.judged import context, judged_run
from tests.unit.test_probes import Running

STEPS = ("8 + 5 = 13", "13 + 5 = 18")


def test_a_chain_is_solved_in_steps_and_no_example_gives_it_away() -> None:
    assert adding(8, 5, 2).steps == STEPS
    drawn = chains(5, (2, 4), seed=0)
    assert drawn == chains(5, (2, 4), seed=0) != chains(5, (2, 4), seed=1)
    assert [len(chain.steps) for chain in drawn] == [2] * 5 + [4] * 5
    assert len({chain.question for chain in drawn}) == 10
    assert not any(c.question in [of.question for of in c.shots] for c in drawn)
    *shots, question = drawn[0].prompt.split("\n")
    assert (len(shots), question) == (3, drawn[0].question)


def test_a_solution_is_shown_again_after_wrong_and_right_ones() -> None:
    """Each example has two solutions: the second is right, and so is every other first one."""
    chain = chains(1, (2,), seed=0)[0]
    *shown, question, asked = chain.revising(" 1 + 1 = 3; 3 + 3 = 6; 6\n").split("\n")
    assert question == f"{chain.question} 1 + 1 = 3; 3 + 3 = 6"
    assert asked == "Checked:"
    ends = [end_of(line, 2) for line in shown]
    right = [of.steps[-1].split()[-1] for of in chain.shots]
    assert ends[1::2] == right
    assert [a == b for a, b in zip(ends[::2], right, strict=True)] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 8 + 5 = 13; 13 + 5 = 18", 2), ("8+5=13;13+5=18.\n1", 2), (" 8 + 5 = 13", 1),
        (" 8 + 5 = 13; 13 + 5 = 19", 1), (" 8 + 5 = 14; 13 + 5 = 18", 0), ("", 0), (" 18", 0),
        (" 9 + 4 = 13; 13 + 5 = 18", 0), (" 8 + 5 = 13; 13 + 5 = 18; 18 + 5 = 23", 2),
    ],
)  # fmt: skip
def test_steps_are_right_up_to_the_first_that_is_not(text: str, right: int) -> None:
    assert steps_right(text, STEPS) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 8 + 5 = 13", True), ("8+5=13.", True), (" 8 + 5 = 130", False), ("13", False), ("", False)],
)
def test_a_step_has_one_form_whatever_its_spaces(text: str, right: bool) -> None:
    assert is_step(text, STEPS[0]) == right


def test_a_solution_ends_with_the_number_of_its_last_step() -> None:
    assert end_of(" 8 + 5 = 13; 13 + 5 = 18; 33\n34", 2) == "18"
    assert end_of(" 8 + 5 = 13", 2) is None
    assert end_of(" none", 1) is None


@each("n", range(1, 6))
def test_a_check_that_does_not_err_finds_what_pass_at_n_says(n: int) -> None:
    answers = ["right"] * 2 + ["wrong"] * 3
    assert chosen(2, 5, n) == pytest.approx(pass_at(n, answers, "right"))


@each("n", range(1, 5))
def test_a_check_that_errs_keeps_what_it_calls_right(n: int) -> None:
    """Over all sets of n of 2 right and 2 wrong ones, and all that may be called right."""

    def kept(drawn: tuple[bool, ...]) -> float:
        chance = 0.0
        for errs in itertools.product((False, True), repeat=n):
            called = [d for d, e in zip(drawn, errs, strict=True) if d != e] or drawn
            of_errs = 0.1 ** sum(errs) * 0.9 ** (n - sum(errs))
            chance += of_errs * fmean(called)
        return chance

    sets = [*itertools.combinations((True, True, False, False), n)]
    assert chosen(2, 4, n, 0.1) == pytest.approx(fmean(map(kept, sets)))
    assert chosen(2, 4, n, 0.5) == pytest.approx(0.5)  # it knows nothing


def test_forecasts_part_where_steps_are_many() -> None:
    """Half of the steps right, four steps, four tries: 1 - (15/16)^4 and (15/16)^4."""
    assert found_at_end(0.5, 4, 4) == pytest.approx(1 - (15 / 16) ** 4)
    assert found_by_steps(0.5, 4, 4) == pytest.approx((15 / 16) ** 4)
    assert found_at_end(0.5, 1, 4) == found_by_steps(0.5, 1, 4) == 15 / 16
    assert found_at_end(0, 4, 4) == found_by_steps(0, 4, 4) == 0


class Solver(Answering):
    """Answers with the sums of 1 and 2, 1 and 3, and so on, as many as it is asked for."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        asked = self.asked()
        self.bodies.append(asked)
        choices = [{"index": i, "text": f" 1 + {2 + i} = {3 + i}"} for i in range(asked["n"])]
        self.reply({"choices": choices, "usage": {"completion_tokens": 8 * asked["n"]}})


def test_a_search_goes_on_from_a_right_step_and_a_revision_from_the_last_answer() -> None:
    variant = Variant(name="on")
    lab = make_lab(variants=(variant,), claims=(), evidence=())
    with answered_by(Solver) as url:
        served = ProbedEngine(variant, lab, Running(url), {}, Writer(words))
        found = probes.steps(served, each=1, lengths=(2,))
    (task,) = found["tasks"]
    _, *bodies = Solver.bodies  # the first warms the engine up
    assert [b["n"] for b in bodies] == [1, 4, 16, 1, 1, 1, 4, 4, 16, 16]
    (chain,) = chains(1, (2,), lab.seed)
    assert bodies[0]["prompt"] == task["prompt"] == chain.prompt
    assert bodies[3]["prompt"] == chain.revising(" 1 + 2 = 3")
    assert bodies[7]["prompt"] == f"{chain.prompt} 1 + 2 = 3;"
    assert [b["stop"] for b in bodies[5:7]] == [["\n"], ["\n", ";"]]
    assert [r["tokens"] for r in task["rounds"]] == [8, 32, 128]
    assert len(task["revisions"]) == 4


def told(home: Path) -> Stepwise:
    """Two chains of two steps. Of 21 solutions of the first 7 are right; of the other none."""
    found = context(home, LABS["many-samples"].at("cpu", quick=False), {})

    def asked(*texts: str) -> dict[str, Any]:
        return {"n": len(texts), "took_s": 0.5, "tokens": 8 * len(texts), "texts": texts}

    def task(good: int, first: int, second: int) -> dict[str, Any]:
        right, wrong = "; ".join(STEPS), f"{STEPS[0]}; 13 + 5 = 19"
        whole = [right] * good + [wrong] * (21 - good)

        def step(n: int, i: int, count: int) -> dict[str, Any]:
            return asked(*[STEPS[i]] * count, *["0"] * (n - count))

        return {
            "prompt": "Add 5 to 8, 2 times:",
            "steps": STEPS,
            "rounds": [asked(*whole[20:]), asked(*whole[16:20]), asked(*whole[:16])],
            "searches": [
                {"n": n, "steps": [step(n, 0, first), step(n, 1, second)]} for n in (4, 16)
            ],
            "revisions": [asked(wrong), asked(wrong), asked(right), asked(right)],
        }

    answers = {"temperature": 0.7, "tasks": [task(7, 4, 2), task(0, 4, 0)]}
    write_gzip(found.folder.probe_file("steps", "on"), answers)
    stepwise = facts(judged_run(found)).stepwise
    assert stepwise
    return stepwise


def test_what_the_same_tokens_buy(tmp_path: Path) -> None:
    found = told(tmp_path)
    few = found.few
    missed = (14 * 13 * 12 * 11) / (21 * 20 * 19 * 18)
    assert few["end"]["solved"].value == pytest.approx((1 - missed) / 2)
    assert few["step"]["solved"].value == pytest.approx(1 / 2)
    assert few["revision"]["solved"].value == 1
    assert few["revisions' vote"]["solved"].value == pytest.approx(1 / 2)  # a tie of two and two
    assert 0 < (few["vote"]["solved"].value or 0) < (1 - missed) / 2
    assert [few[m]["tokens"].value for m in ("vote", "end", "step", "revision")] == [32, 32, 64, 32]
    assert [few[m]["seconds"].value for m in ("vote", "step", "revision")] == [0.5, 1, 2]
    assert (found.waits.value, found.revision_waits.value) == (2, 4)


def test_measured_stands_beside_a_forecast_from_the_accuracy_of_steps(tmp_path: Path) -> None:
    """All 42 first steps are right, and 7 of 42 second ones."""
    found = told(tmp_path)
    assert found.accuracy.value == pytest.approx(49 / 84)
    assert (found.right_ends, found.by_luck) == (7, 0)
    four, _ = found.lengths
    assert [four[name].value for name in ("steps", "tasks", "samples")] == [2, 2, 4]
    assert four["forecast_by_end"].value == pytest.approx(1 - (1 - (49 / 84) ** 2) ** 4)
    assert four["forecast_by_step"].value == pytest.approx((1 - (35 / 84) ** 4) ** 2)
    assert found.parted["gain"].value == max(of["gain"].value or 0 for of in found.foreseen) > 0


def test_a_search_is_judged_by_its_end_as_whole_solutions_are() -> None:
    """The first candidate goes on from where none is right, and may end right by luck."""
    step = STEPS[-1]
    last = [{"texts": texts} for texts in (["0"], ["99 + 5 = 18", "0"])]
    assert end_of_search({"steps": last}, STEPS) == step.split()[-1]
    last[-1] = {"texts": ["0", step]}
    assert end_of_search({"steps": last}, STEPS) == step.split()[-1]


def test_a_check_that_errs_is_worth_less(tmp_path: Path) -> None:
    found = [e for e in told(tmp_path).erring if e["samples"].value == 4]
    assert [e["error"].value for e in found] == [0, 0.05, 0.1, 0.2]
    for values in ([e[by].value for e in found] for by in ("by_end", "by_step")):
        assert values == sorted(values, key=lambda v: -(v or 0))
        assert len({*values}) == 4
