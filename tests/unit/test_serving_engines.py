"""What the lab of engines tells, on a run made by hand: curves, the same words, what is lacking."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from labs import LABS
from labs.harness.derived.run_view import Context
from labs.harness.reports.drawing import plt
from labs.harness.spec import theory
from labs.harness.spec.lab import Lab, Variant
from labs.serving_engines.facts import facts, leading_share
from labs.serving_engines.lab import (
    EAGER,
    LLAMA,
    LLAMA_Q4,
    VLLM,
    at_once,
    step_by_bytes,
    throughput_by_bytes,
    turn_taking,
)
from labs.serving_engines.plots import PLOTS
from loadtests.records import RequestRecord
from serving.engines.flags import FlagValue
from tests.unit.builders import make_lab, make_point, make_record, make_workload
from tests.unit.judged import context, judged_run, played, with_facts, withheld

OTHER = Variant(name="turns", engine="transformers")


def lab() -> Lab:
    return make_lab(
        variants=(Variant(name="vllm", flags={"max-num-seqs": 4}), OTHER),
        workloads=(make_workload("concurrent:1", "concurrent:8", keep_text=True),),
        claims=(), evidence=(), findings=("curves", "same-words", "cannot"),
    )  # fmt: skip


def run(home: Path) -> Context:
    """vLLM gains from eight users, the other one does not."""
    figures = {
        "vllm/short/concurrent-1": (20, 0.05, 0.1, 0.5),
        "vllm/short/concurrent-8": (80, 0.1, 0.4, 0.25),
        "turns/short/concurrent-1": (10, 0.1, 0.2, 0.2),
        "turns/short/concurrent-8": (10, 0.1, 4.0, 0.2),
    }
    values = {
        point: {"output_tokens_per_s": rate, "tpot_mean_s": tpot_s, "ttft_mean_s": ttft_s,
                "mbu": mbu, "batch": 1}
        for point, (rate, tpot_s, ttft_s, mbu) in figures.items()
    }  # fmt: skip
    return context(home, lab(), values)


def answers(*texts: str) -> list[RequestRecord]:
    return [make_record([(11.0, 1)], index=i, text=t) for i, t in enumerate(texts)]


def test_the_curve_of_each_engine_is_told_from_few_users_to_many(tmp_path: Path) -> None:
    found = with_facts(judged_run(run(tmp_path)), "serving-engines")
    rows = [
        (
            at.variant,
            at.users,
            at.tokens_per_s.value,
            at.tpot_s.value,
            at.ttft_s.value,
            at.mbu.value,
        )
        for at in facts(found).curves
    ]
    assert rows == [
        ("vllm", 1, 20, 0.05, 0.1, 0.5), ("vllm", 8, 80, 0.1, 0.4, 0.25),
        ("turns", 1, 10, 0.1, 0.2, 0.2), ("turns", 8, 10, 0.1, 4.0, 0.2),
    ]  # fmt: skip
    assert PLOTS["curves"](found, facts(found))
    plt.close("all")


def test_answers_are_compared_with_vllms_to_the_same_prompts(tmp_path: Path) -> None:
    found = run(tmp_path)
    played(found, "vllm/short/concurrent-1", answers("the sea is blue", "one", "so"))
    played(found, "turns/short/concurrent-1", answers("the sea was blue", "one"))
    long = make_record([(11.0, 2)], index=0, text="the sea", asked_tokens=1)
    played(found, "turns/short/concurrent-8", [long])
    told = facts(judged_run(found))
    vllm, turns = told.same_words or ()
    # two repeats each; with eight users the text is not compared, and the length is
    assert (vllm.answers, str(vllm.length_share), vllm.compared) == (6, "100%", 0)
    assert not vllm.same_share.known
    assert (turns.answers, str(turns.length_share), turns.compared) == (6, "66.7%", 4)
    assert (turns.same, str(turns.leading)) == (2, "75%")
    assert told.compared == [turns]


def test_every_engine_is_ranked_as_its_makers_start_it(tmp_path: Path) -> None:
    full = LABS["serving-engines"].at("cpu", quick=False)
    eager = {
        v.name: v.flags.get("enforce-eager", full.flags.get("enforce-eager")) for v in full.variants
    }
    assert (eager[VLLM.name], eager[EAGER.name]) == (False, True)
    variants = (VLLM, EAGER, OTHER)
    two = lab().model_copy(update={"variants": variants})
    values = {
        f"{v.name}/short/concurrent-{users}": {"output_tokens_per_s": 10, "tpot_mean_s": 0.1}
        for v in variants
        for users in (1, 8)
    }
    told = facts(judged_run(context(tmp_path, two, values)))
    assert told.ranked
    assert {at.variant for at in told.ranked.loaded} == {VLLM.name, OTHER.name}
    assert not told.is_vllm_eager
    before = two.model_copy(update={"flags": {"enforce-eager": True}})
    assert facts(judged_run(context(tmp_path, before, values))).is_vllm_eager


def test_engines_are_ranked_by_their_valid_figures(tmp_path: Path) -> None:
    def names(of: Context) -> list[list[str]]:
        ranked = facts(judged_run(of)).ranked
        assert ranked
        assert (ranked.few, ranked.many) == (1, 8)
        return [[at.variant for at in row] for row in (ranked.alone, ranked.loaded)]

    found = run(tmp_path)
    assert names(found) == [["vllm", "turns"], ["vllm", "turns"]]
    found = withheld(found, "vllm/short/concurrent-1", ("tpot_mean_s",))
    assert names(found) == [["turns", "vllm"], ["vllm", "turns"]]


def test_four_bits_in_a_file_stand_beside_sixteen_and_are_no_engine(tmp_path: Path) -> None:
    variants = (Variant(name="vllm"), LLAMA, LLAMA_Q4)
    two = lab().model_copy(update={"variants": variants})
    rates = {"vllm": 20, LLAMA.name: 10, LLAMA_Q4.name: 30}
    values = {
        f"{name}/short/concurrent-{users}": {"output_tokens_per_s": rate, "tpot_mean_s": 1 / rate}
        for name, rate in rates.items()
        for users in (1, 8)
    }
    scored = {"passages_tokens": [10, 20], "loss_nats": {"bf16": [30, 60], "q4": [33, 66]}}
    found = context(tmp_path, two, values, halved=[LLAMA_Q4.name], about={"gguf-q4": scored})
    told = facts(judged_run(found))
    assert told.ranked
    assert [at.variant for at in told.ranked.alone] == ["vllm", LLAMA.name]
    assert told.gguf
    assert (told.gguf.four.size.value, told.gguf.sixteen.size.value) == (0.001, 0.002)
    assert (told.gguf.four.alone.users, told.gguf.four.loaded.users) == (1, 8)
    assert told.gguf.four.alone.tokens_per_s.value == 30
    assert told.gguf.perplexity.value == pytest.approx(math.exp(9 / 30))
    assert facts(judged_run(context(tmp_path, two, values))).gguf is None  # not scored
    alone = two.model_copy(update={"variants": (variants[0], LLAMA_Q4)})
    found = context(tmp_path, alone, {}, about={"gguf-q4": scored})
    assert facts(judged_run(found)).gguf is None


def test_four_bits_are_as_much_faster_as_a_step_reads_fewer_bytes() -> None:
    sixteen = make_point()
    four = replace(sixteen, shape=replace(sixteen.shape, weight_bytes=400))
    kv = theory.decode_bytes(sixteen.shape, 1, sixteen.context_tokens) - 2000
    assert step_by_bytes(four, sixteen).value == pytest.approx((400 + kv) / (2000 + kv))
    assert throughput_by_bytes(four, sixteen).value > 1


@pytest.mark.parametrize(
    ("text", "other", "share"),
    [("a b c", "a b d", 2 / 3), ("a b", "a b", 1), ("a b", "a b c d", 1 / 2), ("x", "a", 0),
     ("", "", 0)],
)  # fmt: skip
def test_words_agree_up_to_the_first_that_differs(text: str, other: str, share: float) -> None:
    assert leading_share(text, other) == leading_share(other, text) == pytest.approx(share)


def test_how_many_an_engine_has_at_once_follows_from_its_flags() -> None:
    def batch(engine: str, **flags: int | bool) -> int:
        point = make_point(load="concurrent:8")
        given: dict[str, FlagValue] = {n.replace("_", "-"): v for n, v in flags.items()}
        varied = Variant(name="x", engine=engine, flags=given)
        return at_once(point.__class__(**{**vars(point), "variant": varied}))

    assert batch("vllm") == 8
    assert batch("vllm", max_num_seqs=4) == 4
    assert batch("transformers") == 1
    assert batch("transformers", continuous_batching=True) == 8
    assert batch("llama-cpp", parallel=2) == 2


def test_the_wait_for_those_in_front_grows_with_the_users() -> None:
    """Abacus reads 2,000 bytes of weights, and keys and values, at 1 MB/s."""
    alone, many = (turn_taking(make_point(load=f"concurrent:{n}")).value for n in (1, 3))
    each_s = (many - alone) / 2
    assert each_s > 3 * 2000 / 1e6  # three steps after the first token
    assert alone < each_s
