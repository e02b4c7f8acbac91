"""Answers without a run: their figures by hand, their commands, and that no question has none."""

from __future__ import annotations

import re

import pytest

from labs import LABS
from labs.harness.derived.lab_modules import parts_of
from labs.harness.forecast.capacity_plan import model_named, plan
from labs.harness.plan.resolve import machine_of
from labs.harness.reports.computed import CARD, answer_with_command, computed, kind_of
from labs.harness.reports.dials import shipped_shape
from labs.harness.reports.document import plain_text
from labs.harness.reports.planner import kv_room_tokens
from labs.harness.site import answers, leaderboards
from labs.harness.spec.questions import QUESTIONS
from serving.hardware.gpus import DATASHEETS
from serving.simulator.datasheet import EXPECTED, step_times
from tests.cases import each
from tests.makefile import SETTINGS
from tests.unit.test_capacity_plan import SilentProgress, question

COMPUTED = [id for id in QUESTIONS if computed(id)]


def text(id: str) -> str:
    answer = computed(id)
    assert answer
    return plain_text((answer_with_command(answer), "\n", answer.answer.depth))


def test_figures_by_hand() -> None:
    figures = {
        "SD-5": "141 GB in 16 bits.*70.6 billion.*328 kB .2 x 80 layers x 8 KV heads x 128 x 2",
        # 1,000 x 0.10 + 200 x 0.30 USD a million: 0.00016 USD a request, of 60 USD a day
        "SD-6": "breaks even at 4.34 requests .1,000 . 200 tokens.*375,000 requests .450 million",
        # 131,072 bytes a token: 2 x 32 layers x 8 KV heads x 128 x 2 bytes
        # 2.15 GB at 64 GB/s, and in 447 ms
        # 2 x 6.98e9 x 16,384 + 2 x 32 x 4096 x 16,384^2 FLOP: 299e12, at 68% of 989 TFLOP/s
        "KV-8": "2.15 GB.* 8 bits .*1.07 GB.*4,096 tokens.*0.537 GB; .* two layers 1.07 GB"
        ".* 64 GB/s .*33.6 ms.* 447 .* ms.* 4.81 GB/s",
        # 2 x 7e9 FLOP a token and attention, at 69% of 989 TFLOP/s
        # a piece of 512 tokens is 7.2e12 FLOP, at about 0.6 of 989 TFLOP/s; a step reads 15 GB
        "SD-4": r"87.1 \(78.4 to 92.3\) ms for such a prompt.*512 tokens makes a step 13.1 .* 6.6",
    }
    for id, pattern in figures.items():
        assert re.search(pattern, text(id), re.DOTALL), id


def test_the_room_is_the_one_that_a_plan_finds() -> None:
    machine, _ = machine_of("h100")
    asked = question("llama-8b", model=model_named(machine, "llama-70b"))
    found = {fit.precision: fit.kv_tokens for fit in plan(asked, SilentProgress()).fits}
    for bits, precision in ((8, "fp8"), (4, "w4a16-gptq")):
        room = rf"{bits} bits \([^)]*\)[^.]* for {found[precision]:,.0f} tokens"
        assert re.search(room, text("SD-5"))
    shape = shipped_shape("llama-70b")
    assert kv_room_tokens(shape, DATASHEETS[CARD].memory_bytes, 2) == found["bf16"] == 0


def test_a_request_among_many_lasts_as_long_as_its_steps_and_everybodys_prompt() -> None:
    times = step_times(shipped_shape("llama-8b"), DATASHEETS[CARD], EXPECTED)
    alone, two = (times.request_s(batch, 1000, 100) for batch in (1, 2))
    # 15 GB at 85% of 3.35 TB/s and 1.2 ms: 6.5 ms a step; 15e12 FLOP at 504 TFLOP/s: 31 ms
    assert alone == pytest.approx(100 * 6.5e-3 + 31e-3, rel=0.03)
    # the other's prompt, and 100 times its 1,050 cached tokens: 4.8 ms
    assert two - alone == pytest.approx(31e-3 + 4.8e-3, rel=0.1)
    assert times.request_s(2, 1000, 100, cached_tokens=900) < two - 2 * 20e-3


def test_a_replica_serves_what_a_batch_does_and_not_one_prompt_at_a_time() -> None:
    """16 requests last 16 prefills of 86.6 or 8.7 ms, and 100 steps.

    A step reads 15 GB of weights and 16 x 4,050 tokens of 131 kB, 8.5 GB, at about 85% of 3.35
    TB/s, and takes 1 ms beside that: 9 to 10 ms.
    """
    per_s = [float(x) for x in re.findall(r"([\d.]+) \([^)]*\) req/s", text("SD-4"))]
    for found, prefill_s in zip(per_s, (0.0866, 0.0087), strict=True):
        assert 16 / (16 * prefill_s + 100 * 10.8e-3) < found < 16 / (16 * prefill_s + 100 * 9e-3)


def test_renting_pays_from_the_load_at_which_the_card_serves_what_breaks_even() -> None:
    """One request of 200 tokens at about 6.5 ms each and 20 ms of prefill: 0.75 a second.

    Eight last 8 prefills of 22 ms and 200 steps of 7 ms: 1.6 s, which is 5 a second; four are too
    few with 2.7. The API would charge 4.34.
    """
    found = re.search(r"about (\d+) .*?always in flight \(([\d.]+)", text("SD-6"))
    assert found
    assert int(found[1]) == 8
    assert float(found[2]) == pytest.approx(5.05, abs=0.3)


@each("id", COMPUTED)
def test_a_command_has_settings_that_exist(id: str) -> None:
    answer = computed(id)
    assert answer
    assert answer.command.startswith("make plan MACHINE=")
    assert set(re.findall(r"([A-Z_]+)=", answer.command)) <= set(SETTINGS)


def test_every_question_says_how_it_is_answered_or_what_would_answer_it() -> None:
    assert {"SD-4", "SD-5", "SD-6"} <= set(COMPUTED)
    page = leaderboards.collection([], answers.asked([]))
    rows = [line for line in page.splitlines() if re.match(r"\| [A-Z]{2}-\d", line)]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(QUESTIONS)
    for id, row in zip(QUESTIONS, rows, strict=True):
        *_, kind, answer = row.strip("| ").split(" | ")
        assert kind == kind_of(id, labs=())
        assert ("make " in answer) or "no lab asks it yet" in answer, row
    assert kind_of("SO-1", ["continuous-batching"]) == "measured"
    pruning = parts_of("weight-pruning").kinds
    assert kind_of("CO-8", ["weight-pruning"]) == "measured" != pruning["CO-4"]
    assert kind_of("CO-4", ["weight-pruning", "mixture-of-experts"]) == pruning["CO-4"]
    assert (
        kind_of("KV-8", ["context-retrieval", "kv-quantization"])
        == "measured; arithmetic and forecast"
    )


@each("lab", LABS)
def test_only_what_a_lab_answers_has_a_kind(lab: str) -> None:
    assert parts_of(lab).kinds.keys() <= set(LABS[lab].answers)
