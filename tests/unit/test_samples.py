"""Several answers to one prompt: what is sent, read, forecast, proved, and concluded."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from labs import LABS
from labs.harness.analysis.checks.expected import Expected
from labs.harness.analysis.measure import output_tokens_per_s, requests_per_s
from labs.harness.analysis.probes import ProbedEngine
from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.validity import caveats_of
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec.lab import Point, Variant
from labs.harness.storage.writing import write_gzip
from labs.many_samples import probes
from labs.many_samples.facts import Facts, facts, probed, solved, weighed
from labs.many_samples.lab import SAMPLED, hit_rate
from labs.many_samples.sampled_tasks import (
    canonical,
    gain_over_tasks,
    over_tasks,
    pass_at,
    tasks,
    vote_at,
)
from loadtests.plan import body, read_requests, write_requests
from loadtests.prompts import Writer
from loadtests.workload import Chat, Fixed, Samples
from serving import metrics
from serving.models.catalog import ROOT
from serving.simulator.traffic import Prompt, Traffic, play
from tests.cases import each
from tests.unit.answering import Answering, answered_by
from tests.unit.builders import (
    CEILINGS,
    SHAPE,
    make_engine,
    make_lab,
    make_point,
    make_record,
    make_trial,
    make_workload,
    words,
)
from tests.unit.judged import context, judged_run
from tests.unit.test_forecasting import NONE, Server
from tests.unit.test_probes import Running

APART, TOGETHER = Samples(count=4), Samples(count=4, together=True)


# ------------------------------------------------------------------------------ what is sent


def sent(samples: Samples, n: int = 8) -> list[dict[str, Any]]:
    workload = make_workload(samples=samples, prompt_tokens=Fixed(tokens=20))
    return [body(request, "m") for request in workload.requests(n, 0, Writer(words))]


def test_apart_prompts_are_repeated_and_together_each_is_asked_for_all_answers(
    tmp_path: Path,
) -> None:
    apart, together = sent(APART), sent(TOGETHER)
    prompts = [json.dumps(b["messages"]) for b in apart]
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4
    assert prompts[0] != prompts[4]
    assert all(b["temperature"] == 1 and "n" not in b for b in apart)
    assert len({json.dumps(b["messages"]) for b in together}) == 8
    assert {b["n"] for b in together} == {4}
    workload = make_workload(samples=TOGETHER, prompt_tokens=Fixed(tokens=20))
    write_requests(tmp_path / "r.jsonl", workload.requests(2, 0, Writer(words)), "m")
    assert [r.choices for r in read_requests(tmp_path / "r.jsonl")] == [4, 4]


def test_samples_go_with_nothing_else_that_says_how_prompts_are_alike() -> None:
    with pytest.raises(ValidationError, match="no prefix, chat"):
        make_workload(samples=APART, chat=Chat(turns=2, grows_tokens=4))


# ------------------------------------------------------------------- from the stream's lines

_PART = """
import json, sys
from loadtests.streaming import by_choice, tokens_of
for text in json.load(sys.stdin):
    lines = [(float(at), line.encode()) for at, line in text]
    parts, complaint = by_choice(lines, 2)
    print(json.dumps([[tokens_of(part, 0.0, 5) for part in parts], complaint]))
"""


def event(index: object = None, usage: object = None) -> str:
    choices = [] if index is None else [{"index": index, "delta": {"content": "and"}}]
    counted = {} if usage is None else {"usage": {"prompt_tokens": 9, "completion_tokens": usage}}
    return f"data: {json.dumps({'choices': choices, **counted})}\n"


def parted(*streams: Sequence[str]) -> list[Any]:
    """What becomes of streams of two answers; a line comes each second. Locust needs a process."""
    numbered = [[*enumerate(stream, start=1)] for stream in streams]
    done = subprocess.run(
        [sys.executable, "-c", _PART], cwd=ROOT, input=json.dumps(numbered), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_stream_of_several_answers_is_read_answer_by_answer() -> None:
    whole = [event(0, 1), event(1, 1), event(1, 3), event(0, 2), event(None, 5), "data: [DONE]\n"]
    short = [*whole[:4], event(None, 6)]
    uncounted = [event(0), event(1), event(None, 2)]
    foreign, below, odd = ([event(0, 1), event(i, 1)] for i in (2, -1, "x"))
    garbage = [event(0, 1), event(1, [2]), event(None, 3)]
    broken = [event(0, 1), 'data: {"error": {"code": 500}}\n']
    found = parted(whole, short, uncounted, foreign, below, odd, garbage, broken)
    assert found[0] == [[[[[1, 1], [4, 1]], 9, 2, None], [[[2, 1], [3, 2]], 9, 3, None]], None]
    assert re.findall(r"\d+", found[1][1]) == ["6", "5"]
    assert re.findall(r"\d+", found[2][1]) == ["2", "0"]
    assert all("of 2 answers" in row[1] for row in found[3:6])
    assert found[6][0][1][3].startswith("not a")
    assert [answer[3] for answer in found[7][0]] == ["{'code': 500}"] * 2


# --------------------------------------------------------------------- forecast and measured


def answered(choices: int, users: int = 1) -> Any:
    asked = [Prompt(index=i, token_ids=(1, 2), output_tokens=4, choices=choices) for i in range(40)]
    traffic = Traffic(kind="closed", users=users, warmup_s=0, window_s=10, least_counted=2)
    return play(Server(), traffic, asked, (), NONE)


def test_a_user_sends_again_when_all_answers_are_complete() -> None:
    one, three = answered(1), answered(3)
    assert sorted({a.sent_s for a in three.answers}) == [a.sent_s for a in one.answers]
    assert [a.choice for a in three.answers[:4]] == [0, 1, 2, 0]
    assert {a.choice for a in one.answers} == {None}
    assert three.window_s == one.window_s


def test_a_request_for_several_answers_is_several_requests_at_once() -> None:
    """Four answers of two tokens in every two seconds: 4 tokens/s, and 2 requests/s."""
    found = [
        make_record([(t + 1, 1), (t + 2, 1)], sent_s=t, index=i, choice=choice)
        for i, t in enumerate(range(10, 20, 2))
        for choice in range(4)
    ]
    for load in ("concurrent:1", "waves:1"):
        together = make_point(load=load, samples=TOGETHER)
        trial = make_trial(found, point=together, sent=5, answered_under_load=True)
        assert output_tokens_per_s(trial) == pytest.approx(4)
        assert requests_per_s(trial) == pytest.approx(2)
        assert together.sequences == 4


@pytest.mark.parametrize("samples", [APART, TOGETHER], ids=["apart", "together"])
@pytest.mark.parametrize(
    ("off", "names"),
    [(0, []), (-16, ["treatment not applied"]), (16, ["warm prefix cache"])],
)
def test_all_samples_but_the_first_find_their_prompt_to_the_token(
    samples: Samples, off: int, names: list[str]
) -> None:
    """Five prompts of 64 tokens, four answers each: 63 tokens hold three blocks of 16."""
    load = "waves:1" if samples.together else "waves:4"
    point_on = make_point(
        "on", load, flags={"enable-prefix-caching": True}, samples=samples,
        prompt_tokens=Fixed(tokens=64),
    )  # fmt: skip
    found = [
        make_record(
            [(t + 0.1 * k, 1) for k in range(1, 5)], sent_s=t, prompt_tokens=64,
            index=i if samples.together else 4 * i + k, choice=k if samples.together else None,
        )
        for i, t in enumerate(range(10, 20, 2))
        for k in range(4)
    ]  # fmt: skip
    config = {"block_size": "16", "num_gpu_blocks": "1000", "enable_prefix_caching": "True"}
    engine = make_engine(found, True, 5 * 3 * 48 + off)
    engine = replace(engine, info={metrics.CACHE_CONFIG: config})
    trial = make_trial(found, engine=engine, point=point_on)
    caveats = caveats_of(trial, Expected(template_tokens=10))
    assert [c.name for c in caveats if c.blocks] == names


LAB = LABS["many-samples"].at("cpu", quick=False)
POINTS = LAB.points(SHAPE, CEILINGS)


def point(variant: str, workload: str) -> Point:
    return next(p for p in POINTS if (p.variant.name, p.workload.name) == (variant, workload))


def test_hits_are_the_whole_blocks_of_all_but_the_first_sample() -> None:
    """Of 319 tokens nine blocks of 32 are whole."""
    assert hit_rate(point("on", "apart")).value == pytest.approx(7 * 288 / (8 * 320))
    assert hit_rate(point("on", "together")).value == hit_rate(point("on", "apart")).value
    for name in ("many", "many-together"):
        assert hit_rate(point("on", name)).value == pytest.approx(31 * 288 / (32 * 320))
    assert hit_rate(point("off", "apart")).value == 0


def test_samples_are_as_many_however_they_are_asked_for() -> None:
    assert {name: point("on", name).sequences for name in SAMPLED} == {
        "one": 1, "apart": 8, "together": 8, "many": 32, "many-together": 32
    }  # fmt: skip
    for name, apart in (("together", "apart"), ("many-together", "many")):
        (claim,) = (c for c in LAB.claims if c.name == name)
        ((one_request, requests),) = LAB.pairs(claim, list(POINTS))
        assert (one_request, requests) == (point("on", name), point("on", apart))
        assert (one_request.load.users, requests.load.users) == (1, requests.sequences)
        assert claim.predict(one_request, requests).value == 1
    shared = next(c for c in LAB.claims if c.name == "shared")
    assert 1 < shared.predict(point("on", "apart"), point("off", "apart")).value < 8


# ------------------------------------------------------------------------- tasks and estimators


def test_tasks_have_one_right_answer_and_come_after_solved_ones() -> None:
    drawn = tasks(3, seed=0)
    assert len(drawn) == 21
    assert drawn == tasks(3, seed=0) != tasks(3, seed=1)
    for task in drawn:
        *shots, question = task.prompt.split("\n")
        assert len(shots) == 3
        numbers = canonical(question.partition(" in ")[0])
        assert numbers
        asked = [int(n) for n in numbers.split()]
        product = 1
        for n in asked:
            product *= n
        right = {"add": [sum(asked)], "multiply": [product], "sort": sorted(asked),
                 "largest": [max(asked)]}  # fmt: skip
        assert task.expected == " ".join(map(str, right[task.kind.split()[0]]))


@each("seed", range(40))
def test_no_task_is_asked_twice_or_solved_in_its_examples(seed: int) -> None:
    shots, asked = set[tuple[str, str]](), list[tuple[str, str]]()
    for task in tasks(5, seed):
        *lines, question = task.prompt.split("\n")
        for line, into in [*((line, shots.add) for line in lines), (question, asked.append)]:
            numbers = re.findall(r"\d+", re.split("=|:| in ", line)[0])
            into((task.kind, " ".join(sorted(numbers))))
    assert len(shots) == 3 * 7
    assert len({*shots, *asked}) == (3 + 5) * 7


def test_more_tasks_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="hardly 23 "):
        tasks(20, seed=0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 82\n47", "82"), ("82.", "82"), ("4,318", "4318"), (" 17, 33, 52", "17 33 52"),
        ("= 007", "7"), ("none", None), ("", None), ("\n82", "82"),
    ],
)  # fmt: skip
def test_an_answer_is_the_numbers_of_its_first_line(text: str, answer: str | None) -> None:
    assert canonical(text) == answer


ANSWERS = ("7", "7", "8", "8", "8", None)


@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_all_sets_with_a_right_answer(k: int) -> None:
    sets = [*itertools.combinations(ANSWERS, k)]
    assert pass_at(k, ANSWERS, "7") == pytest.approx(fmean("7" in s for s in sets))
    assert pass_at(k, ANSWERS, "9") == 0


@pytest.mark.parametrize("k", range(1, 7))
def test_a_vote_is_the_mean_over_sets_and_ties_count_in_part(k: int) -> None:
    def credit(votes: Sequence[str | None]) -> float:
        sevens, eights = votes.count("7"), votes.count("8")
        return float(sevens > eights) + (sevens == eights > 0) / 2

    exact = fmean(credit(votes) for votes in itertools.combinations(ANSWERS, k))
    assert vote_at(k, ANSWERS, "7") == pytest.approx(exact, abs=0.08)  # 400 drawn sets
    assert vote_at(k, (None,) * 6, "7") == 0
    assert vote_at(6, ANSWERS, "7") == 0
    assert vote_at(6, ANSWERS, "8") == 1


def test_intervals_are_over_tasks_and_never_without_a_width_that_is_known() -> None:
    some = over_tasks([0.0, 1.0, 0.5, 1.0] * 5)
    assert some.value == pytest.approx(0.625)
    assert some.low is not None
    assert some.high is not None
    assert 0.4 < some.low < 0.625 < some.high < 0.85
    none = over_tasks([0.0] * 20)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(0.161, abs=0.001)  # Wilson, 0 of 20
    assert gain_over_tasks([0.5] * 4, [0.5] * 4).low is None
    gain = gain_over_tasks([0.0, 0.5] * 10, [0.5, 0.5] * 10)
    assert gain.low is not None
    assert 0 < gain.low < gain.value == 0.25


# ---------------------------------------------------------------------------- the probe, the facts


class Solver(Answering):
    """Completes every prompt with the same numbers, as often as it is asked to."""

    bodies: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        asked = self.asked()
        self.bodies.append(asked)
        choices = [{"index": i, "text": f" {i}"} for i in range(asked["n"])]
        usage = {"completion_tokens": 2 * asked["n"]}
        self.reply({"choices": choices, "usage": usage})


def test_the_probe_asks_each_task_once_greedily_and_in_rounds_of_samples() -> None:
    variant = Variant(name="on")
    lab = make_lab(variants=(variant,), claims=(), evidence=())
    with answered_by(Solver) as url:
        found = probes.votes(ProbedEngine(variant, lab, Running(url), {}, Writer(words)), each=1)
    _, *bodies = Solver.bodies  # the first warms the engine up
    assert [(b["n"], b["temperature"]) for b in bodies] == 7 * [
        (1, 0), (1, 0.7), (4, 0.7), (16, 0.7)
    ]  # fmt: skip
    assert len({b["prompt"] for b in bodies}) == len(found["tasks"]) == 7
    first = found["tasks"][0]
    assert [r["texts"] for r in first["rounds"]][1] == [" 0", " 1", " 2", " 3"]
    assert [r["tokens"] for r in first["rounds"]] == [2, 8, 32]
    assert all(r["took_s"] > 0 for r in first["rounds"])


def of_tasks(home: Path, *right: int) -> JudgedRun:
    """A task for each number: so many of its 21 samples are right, and all others say 0."""
    found = context(home, make_lab(findings=LAB.findings), {})

    def asked(texts: Sequence[str], took_s: float) -> dict[str, Any]:
        return {"n": len(texts), "took_s": took_s, "tokens": 3 * len(texts), "texts": texts}

    def task(count: int) -> dict[str, Any]:
        texts = ["7\n"] * count + ["0"] * (21 - count)
        return {
            "kind": "add two", "prompt": "3 + 4 =", "expected": "7", "greedy": asked(["0"], 0.2),
            "rounds": [asked(texts[20:], 0.2), asked(texts[16:20], 0.3), asked(texts[:16], 0.65)],
        }  # fmt: skip

    answers = {"temperature": 0.7, "tasks": [task(count) for count in right]}
    write_gzip(found.folder.probe_file("votes", "on"), answers)
    return judged_run(found)


def bought(home: Path, *right: int) -> Facts:
    return facts(of_tasks(home, *right))


def test_what_a_vote_buys_and_what_a_point_of_it_costs(tmp_path: Path) -> None:
    """Two thirds right win every large vote: 14 of 21 alone, and nearly all of 16."""
    told = bought(tmp_path, *[14] * 6, *[0] * 4)
    found, (kind,) = told.voting, told.task_kinds
    assert (kind.name, kind["tasks"].value, kind["greedy"].value) == ("add two", 10, 0)
    assert told.now_and_then == ["add two"]
    assert found
    assert found.one["voted"].value == pytest.approx(0.6 * 14 / 21)
    assert found.most["voted"].value == pytest.approx(0.6, abs=0.01)
    assert found.most["passed"].value == pytest.approx(0.6)
    assert found.beats == "yes"
    points = found.most["gain"].value or 0
    assert points == pytest.approx(20, abs=1)
    assert found.most["point_s"].value == pytest.approx(0.45 / points)
    assert found.most["point_tokens"].value == pytest.approx(45 / points)
    assert [found["times_seconds"].value, found["times_tokens"].value] == pytest.approx([3.25, 16])
    assert [found[name].value for name in ("greedy", "tasks", "drawn")] == [0, 10, 21]


@pytest.mark.parametrize(("right", "beats"), [((3, 2, 3, 2, 1, 2), "worse"), ((0, 0, 0), "open")])
def test_a_vote_that_gains_nothing_has_no_price(
    right: tuple[int, ...], beats: str, tmp_path: Path
) -> None:
    found = bought(tmp_path, *right).voting
    assert found
    assert (found.beats, found.most["point_s"].known) == (beats, False)


def test_a_larger_model_is_weighed_by_the_seconds_of_samples(tmp_path: Path) -> None:
    """An answer here takes 0.2 s, and a sample more 30 ms."""
    run = of_tasks(tmp_path, 14, 0)
    found, probe, point = facts(run).larger_model, probed(run, "votes"), run.points[0]
    assert found
    assert probe
    tasks = solved(probe)
    assert found.one_s.value == 0.2
    assert found.sample_more_s.value == pytest.approx(0.03)
    one_s, more_s = Quantity(0.2, "s"), Quantity(0.03, "s")
    times = 1 + 5.5 * 0.03 / 0.2  # five samples more for the seconds of one answer
    larger = replace(SHAPE, params=3000, weight_bytes=round(times * (2000 + 64 * 32)) - 64 * 32)
    row = weighed("larger", larger, point, tasks, one_s, more_s)
    assert row.times.value == pytest.approx(times, rel=1e-3)
    assert (row.alone, row.alone_is_beyond, row.busy) == (6, False, 1)  # as many products
    assert [row.passed.value, row.voted.value] == pytest.approx([14 / 21 / 2] * 2)
    thrice = weighed("more", replace(larger, matmul_params=5000), point, tasks, one_s, more_s)
    assert thrice.busy == 2  # 10,000 + 4,096 FLOP of attention for 2,000 + 4,096
    assert thrice.passed.value == pytest.approx((1 - 7 * 6 / (21 * 20)) / 2)
    assert all(row.alone_is_beyond for row in found.rows)
    assert found.rows[-1].busy_is_beyond
    assert weighed("free", larger, point, tasks, one_s, 0 * more_s).alone_is_beyond


def test_a_perfect_check_bounds_what_a_reward_model_can_add(tmp_path: Path) -> None:
    """Of 3 right in 21 a vote of 16 takes none, and 16 of them miss all three now and then."""
    found = bought(tmp_path, 3, 3, 21, 0).verifier
    assert found
    missed = (5 * 4 * 3) / (21 * 20 * 19)
    assert found.gap.value == pytest.approx(100 * (2 * (1 - missed)) / 4, abs=0.1)
    once_s, by_step_s = found.at_the_end["seconds"].value, found.by_step["seconds"].value
    assert by_step_s
    assert once_s
    assert by_step_s >= once_s > 0


@pytest.mark.parametrize(
    ("hits", "exactly"), [(7 * 288 / (8 * 320), "exactly"), (0.7, "not exactly"), (None, "unknown")]
)
def test_costs_stand_beside_one_sample_and_hits_are_exact_or_not(
    hits: float | None, exactly: str, tmp_path: Path
) -> None:
    found = facts(judged_run(context(tmp_path, LAB, {
        "on/one/waves-1": {"output_tokens_per_s": 20.0},
        "on/apart/waves-8": {"output_tokens_per_s": 100.0, "prefix_hit_rate": hits},
        "off/apart/waves-8": {"output_tokens_per_s": 50.0},
    })))  # fmt: skip
    assert found.sampling_cost
    (eight,) = found.sampling_cost.several
    assert found.sampling_cost["one_s"].value == pytest.approx(24 / 20)
    assert (eight["samples"].value, eight["requests"].value) == (8, 8)
    assert eight["times"].value == pytest.approx(8 * 24 / 100 / (24 / 20))
    assert found.sampling_cost.found == exactly
    assert (found.voting, found.task_kinds, found.verifier) == (None, (), None)  # no task was asked
