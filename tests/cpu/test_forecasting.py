"""vLLM's own scheduler in virtual time: what it does is known exactly where a step takes a second.

With another vLLM these tests say whether its engine core can still be driven so.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from labs.harness.forecast import capacity_plan
from labs.harness.forecast.capacity_figures import CapacityPlan, Demand
from labs.harness.forecast.capacity_plan import Question, model_named
from labs.harness.plan.resolve import machine_of
from labs.harness.spec.lab import SLO
from labs.harness.spec.theory import experts_needed
from loadtests.prompts import tokenizer
from serving.hardware import machine
from serving.models import catalog, dummy
from serving.simulator.fleet import ROUTERS, Handover, Routing
from serving.simulator.ngram_acceptance import Copied
from serving.simulator.profiled_step import TimingPlan
from serving.simulator.protocol import (
    ForecastPlan,
    ForecastPlay,
    PlannedEngine,
    PlannedTrial,
    SyntheticRequest,
    TimingPlans,
)
from serving.simulator.step import Masking, StepTimes
from serving.simulator.traffic import Delays, Prompt, Traffic
from tests import with_vllm
from tests.unit.test_capacity_plan import SilentProgress

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        machine.detect().kind != "cpu", reason="this machine has a GPU: blocks have another size"
    ),
]

SECOND = StepTimes(
    tokens=(1,), linear_s=(1.0,), rows=(1,), head_s=(0.0,), attention_pair_s=0, attention_read_s=0
)
A_SECOND_A_ROW = SECOND.model_copy(update={"rows": (1, 2), "head_s": (0.0, 1.0)})  # after the first
A_SECOND_A_PIECE = SECOND.model_copy(update={"attention_pair_s": 1e-3})
HANDOVER = Handover(bytes_per_token=10, link_bytes_per_s=1000, asked_s=0.25)
ONCE = Traffic(kind="waves", users=2, warmup_s=0, window_s=1)
EVERY_FIVE = Traffic(kind="open", schedule_s=(0, 5, 10, 15, 20, 25), warmup_s=0, window_s=26)
CLOSE = Traffic(kind="open", schedule_s=(0.0, 0.1, 0.2), warmup_s=0, window_s=1)
IN_TURN = Traffic(kind="closed", users=1, warmup_s=0, window_s=20)
BLOCK = 128
MASKS = Masking(compile_s=0, mask_s=0.75, processors=2)
COPIED: tuple[Copied, ...] = (
    ((0, 0),) * 5,  # nothing is ever found
    ((3, 2), (1, 1), (0, 0), (3, 1), (3, 3), (2, 0), (1, 0), (0, 0), (0, 0)),  # 1 + 3 + 2 + 1 + ..
)
WORDS = " ".join(["street"] * 300)
CACHING, UNCACHED = "--enable-prefix-caching", "--no-enable-prefix-caching"
URGENT_FIRST = "--max-num-seqs 1 --scheduling-policy priority"
SLIDING = """--hf-overrides '{"sliding_window": 64, "layer_types": []}'"""
NGRAM = (
    "--speculative-config"
    """ '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}'"""
)


WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FOUR_BITS = {**WEIGHTS, "num_bits": 4, "strategy": "group", "group_size": 64}
QUANTIZED = {
    "bf16": None,
    "w8a8": ("int-quantized", {"weights": WEIGHTS, "input_activations": TOKENS}),
    "w4a16": ("pack-quantized", {"weights": FOUR_BITS}),
}
OLD = machine.cpu().lacks_avx512  # so that some kernels are missing
KINDS = {name: kind for name, kind in QUANTIZED.items() if not (OLD and name == "w4a16")}
TYPES = [  # of what is not quantized, and of the cache
    ("auto", "auto"),
    *([("float32", "auto")] if machine.cpu().lacks_bf16 else []),  # where labs serve in it
    *(() if OLD else (("auto", "fp8_e4m3"), ("auto", "fp8_e5m2"))),
]
MIXTURE = "mixture"
STEPS_TIMED = len(KINDS) - 1 + len(TYPES) + 1
TELLING_EXPERTS = """
import runpy
import sys

from serving.plugins.random_weights import EvenRouting

route = EvenRouting.route_tokens


def telling(self, **routed):
    weights, ids = route(self, **routed)
    tokens, experts = routed["router_logits"].shape
    print(f"experts: {tokens} {experts} {len(ids.unique())}", file=sys.stderr)
    return weights, ids


EvenRouting.route_tokens = telling
runpy.run_module("serving.simulator", run_name="__main__")
"""


def step_of(model: Path, dtype: str = "auto", cache: str = "auto") -> TimingPlan:
    argv = (
        "--model", str(model), "--block-size", "32", "--dtype", dtype, "--kv-cache-dtype", cache,
    )  # fmt: skip
    return TimingPlan(
        config=model / "config.json", device="cpu", cores=(0,), tokens=(1, 4), rows=(1,),
        engine_argv=argv, passes=6,
    )  # fmt: skip


def steps_to_time(folder: Path) -> TimingPlans:
    """Plan to time two layers of the bundled shape, in every type of weights and cache.

    The last has the shape of a mixture of experts.
    """
    plans = []
    for name, quantized in KINDS.items():
        model = folder / name
        shutil.copytree(
            catalog.bundled(), model, ignore=shutil.ignore_patterns("*.safetensors", "*.gguf")
        )
        config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 2}
        if quantized:
            layout, group = quantized
            config["quantization_config"] = {
                "quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
                "config_groups": {"group_0": {"targets": ["Linear"], **group}},
            }  # fmt: skip
        (model / "config.json").write_text(json.dumps(config))
        for dtype, cache in TYPES if name == "bf16" else TYPES[:1]:
            plans.append(step_of(model, dtype, cache))
    shape = json.loads(
        (dummy.resolve(machine.detect(), "moe-tiny").path / "config.json").read_text()
    )
    mixture = folder / MIXTURE
    shutil.copytree(folder / "bf16", mixture)
    (mixture / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 2}))
    plans.append(step_of(mixture, "float32" if machine.cpu().lacks_bf16 else "auto"))
    return TimingPlans(timing=tuple(plans))


@pytest.fixture(scope="module")
def forecaster(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One process for all, first timing and then playing."""
    plans = steps_to_time(tmp_path_factory.mktemp("models")), loads(tmp_path_factory)
    done = subprocess.run(
        with_vllm.python("-c", TELLING_EXPERTS),
        input="".join(f"{plan.model_dump_json()}\n" for plan in plans),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def answers(forecaster: subprocess.CompletedProcess[str]) -> list[str]:
    ready, *lines = forecaster.stdout.splitlines()
    assert ready == "ready"
    return lines


@pytest.fixture(scope="module")
def step_times(answers: list[str]) -> list[StepTimes]:
    return [StepTimes.model_validate_json(line) for line in answers[:STEPS_TIMED]]


@pytest.fixture(scope="module")
def plays(answers: list[str]) -> dict[str, ForecastPlay]:
    lines = answers[STEPS_TIMED:]
    return {play.key: play for play in map(ForecastPlay.model_validate_json, lines)}


def test_quantized_weights_and_caches_are_timed_by_the_engine_s_own_operators(
    step_times: list[StepTimes],
) -> None:
    """No engine has run, and no weights exist."""
    assert all(t.linear_s[0] > 0 and t.tokens == (1, 4) for t in step_times)
    assert all(t.attention_read_s > 0 for t in step_times)


def test_the_tokens_of_a_mixture_go_to_experts_drawn_evenly(
    forecaster: subprocess.CompletedProcess[str],
) -> None:
    """As in an engine with random weights, and for any other, whose router is not there yet."""
    told = [
        [int(number) for number in line.split()[1:]]
        for line in forecaster.stderr.splitlines()
        if line.startswith("experts: ")
    ]
    needed: dict[int, list[int]] = defaultdict(list)
    for tokens, experts, seen in told:
        assert experts == 32
        needed[tokens].append(seen)
    assert set(needed[1]) == {4}  # each step anew, in both layers
    assert fmean(needed[4]) == pytest.approx(experts_needed(32, 4, 4), rel=0.15)
    assert len(needed[4]) >= 2 * 6


def loads(tmp_path_factory: pytest.TempPathFactory) -> ForecastPlan:
    """Plan to play a trial of each kind, where most steps take a second."""
    folder = tmp_path_factory.mktemp("requests")
    model = catalog.bundled()
    sent = {
        "short": [("hello", 5), ("hello", 9)],
        "same": [(WORDS, 2)] * 4,
        "salted": [(WORDS, 2)] * 4,
        "tenants": [("hello", 3), ("hello", 3)],
        "long": [(WORDS, 2), ("hello", 20)],
        "many": [(WORDS, 140), ("other " + WORDS, 140)],
        "three": [("hello", 4)] * 3,
    }
    classes = {"three": (0, 1, 0)}
    tokens_of = tokenizer(str(model))
    for name, requests in sent.items():
        (folder / name).write_text("".join(
            Prompt(
                index=index,
                token_ids=tuple(map(int, tokens_of([{"role": "user", "content": text}]))),
                output_tokens=output_tokens,
                adapter=f"tenant-{index}" if name == "tenants" else None,
                salt=f"for {index // 2}" if name == "salted" else None,
                priority=classes.get(name, (0,) * len(requests))[index],
            ).model_dump_json() + "\n"
            for index, (text, output_tokens) in enumerate(requests)
        ))  # fmt: skip

    (folder / "documents").write_text("".join(
        SyntheticRequest(
            index=index, prompt_tokens=300, output_tokens=3, document=index // 2,
            document_tokens=2 * BLOCK,
        ).model_dump_json() + "\n"
        for index in range(6)
    ))  # fmt: skip

    def engine(
        key: str,
        requests: str,
        flags: str = "",
        traffic: Traffic = ONCE,
        step_times: StepTimes = SECOND,
        kv_bytes: int = 2**28,
        handover: Handover | None = None,
        replicas: int = 1,
        **options: Any,
    ) -> PlannedEngine:
        trial = PlannedTrial(
            key=key, repeat=1, requests=folder / requests, traffic=traffic, **options
        )
        return PlannedEngine(
            argv=(
                "--model", str(model), "--enforce-eager", "--max-model-len", "1024",
                "--kv-cache-memory-bytes", str(kv_bytes), *shlex.split(flags),
            ),
            step_times=step_times,
            trials=(trial,),
            handover=handover,
            replicas=replicas,
        )  # fmt: skip

    def tight(key: str, flags: str = "") -> PlannedEngine:
        """Two requests do not fit."""
        small = 8 * BLOCK * 23_040
        return engine(key, "many", f"--max-model-len 512 {flags}", kv_bytes=small)

    def guessing(key: str, acceptance: float, **options: Any) -> PlannedEngine:
        return engine(key, "short", NGRAM, acceptance=acceptance, **options)

    def fleet(router: str) -> PlannedEngine:
        return engine(
            router,
            "documents",
            CACHING,
            EVERY_FIVE,
            routing=Routing(rule=router),
            ends_only=True,
            replicas=2,
        )

    in_pieces = "--max-num-batched-tokens 128"
    whole = "--no-enable-chunked-prefill --max-num-batched-tokens 1024"
    # a server's own option, which an engine core does not know, is passed over
    slot = "--enable-lora --max-loras 1 --lora-modules tenant-0=a tenant-1=b"
    return ForecastPlan(
        delays=Delays(request_s=0, serial_s=0, response_s=0, client_s=0),
        engines=(
            engine("one slot", "tenants", slot),
            engine("plain", "short", UNCACHED),
            engine("masked", "short", masking=MASKS),
            engine("cached", "same", CACHING, IN_TURN),
            engine("salted", "salted", CACHING, IN_TURN),
            engine("pieces", "long", in_pieces),
            tight("tight"),
            tight("tight, in pieces", f"{UNCACHED} {in_pieces}"),
            tight("kept free", "--watermark 0.25"),
            tight("windowed", f"{SLIDING} {in_pieces}"),
            engine("limited", "three", "--max-num-queued-reqs 2", CLOSE),
            engine("limited in tokens", "three", "--max-num-queued-tokens 1", CLOSE),
            engine("urgent first", "three", URGENT_FIRST, CLOSE),
            guessing("guessed", 1),
            guessing("rows", 1, step_times=A_SECOND_A_ROW),
            guessing("nothing to guess", 1, guessed=0),
            guessing("copied", 1, copied=COPIED),
            engine("slower", "short", UNCACHED, pace=1.5),
            guessing("by chance", 0.5, guessed=0.5),
            guessing("by chance again", 0.5, guessed=0.5),
            engine("cached again", "same", CACHING, IN_TURN),
            fleet("round-robin"),
            fleet("prefix-aware"),
            engine(
                "split", "long", f"{UNCACHED} {whole}", step_times=A_SECOND_A_PIECE,
                handover=HANDOVER,
            ),
        ),
    )  # fmt: skip


def tokens_at(play: ForecastPlay, index: int) -> list[tuple[float, int]]:
    return next(a.chunks for a in play.play.answers if a.index == index)


def test_a_batch_decodes_a_token_a_step(plays: dict[str, ForecastPlay]) -> None:
    assert tokens_at(plays["plain"], 0) == [(float(i), 1) for i in range(1, 6)]
    assert tokens_at(plays["plain"], 1) == [(float(i), 1) for i in range(1, 10)]
    assert plays["plain"].counters["preemptions"] == 0


def test_the_cache_in_use_is_what_each_step_leaves(plays: dict[str, ForecastPlay]) -> None:
    """A block for each: both from the first step to the fifth, then one until the ninth."""
    play = plays["plain"]
    blocks = play.kv_capacity_tokens / BLOCK - 1  # vLLM keeps one for itself
    assert play.kv_use
    assert play.kv_use.peak == pytest.approx(2 / blocks)
    assert play.kv_use.mean == pytest.approx(1.5 / blocks)
    assert plays["round-robin"].kv_use is None  # of two engines


def test_masks_that_take_longer_than_the_step_set_the_pace(plays: dict[str, ForecastPlay]) -> None:
    assert tokens_at(plays["masked"], 0) == [(1.5 * i, 1) for i in range(1, 6)]  # of two answers
    assert [at for at, _ in tokens_at(plays["masked"], 1)][5:] == [8.5, 9.5, 10.5, 11.5]  # of one


def test_a_prompt_that_came_before_is_read_from_the_cache(plays: dict[str, ForecastPlay]) -> None:
    play = plays["cached"]
    prompt = play.play.answers[0].prompt_tokens
    hit = (prompt - 1) // BLOCK * BLOCK  # the last token is always computed
    again = len(play.play.answers) - 1
    assert again > 0
    assert play.counters["prefix_hits"] == again * hit > 0
    assert play.found_tokens == [n * hit for n in range(again + 1)]  # the first finds nothing
    assert play.counters["prefix_queries"] == (again + 1) * prompt


def test_a_prompt_is_found_under_its_own_salt_only(plays: dict[str, ForecastPlay]) -> None:
    hit = plays["cached"].found_tokens[1]
    assert plays["salted"].found_tokens == [0, hit, hit, 2 * hit]  # summed up, request by request


def test_a_budget_cuts_a_long_prompt_into_pieces(plays: dict[str, ForecastPlay]) -> None:
    play = plays["pieces"]
    long = play.play.answers[0]
    assert long.prompt_tokens > 2 * BLOCK
    assert long.chunks[0][0] == -(-long.prompt_tokens // BLOCK)  # alone in its first steps


def test_where_memory_is_short_requests_are_preempted(plays: dict[str, ForecastPlay]) -> None:
    assert plays["tight"].kv_capacity_tokens == 8 * BLOCK
    assert plays["tight"].counters["preemptions"] > 0
    answers = plays["tight"].play.answers
    assert all(sum(n for _, n in a.chunks) == 140 for a in answers)
    # what is looked up again after a preemption is not in vLLM's own metrics
    assert plays["tight"].counters["prefix_queries"] == sum(a.prompt_tokens for a in answers)


def test_a_preempted_answer_goes_on_when_all_of_it_is_computed_again(
    plays: dict[str, ForecastPlay],
) -> None:
    """Its own tokens too, and no token is sampled before."""
    play = plays["tight, in pieces"]
    assert play.counters["preemptions"] == 1
    first, preempted = sorted(play.play.answers, key=lambda a: a.chunks[-1][0])
    times = [at for at, _ in preempted.chunks]
    _, after = max(pairwise(times), key=lambda gap: gap[1] - gap[0])
    known = preempted.prompt_tokens + times.index(after)
    assert after - first.chunks[-1][0] == -(-known // BLOCK) > -(-preempted.prompt_tokens // BLOCK)
    assert len(times) == 140


def test_a_watermark_lets_the_second_wait_instead(plays: dict[str, ForecastPlay]) -> None:
    """Two of eight blocks stay free, and it needs three of the four that the first leaves."""
    play = plays["kept free"]
    assert play.counters["preemptions"] == 0
    first, second = sorted(tokens_at(play, index) for index in (0, 1))
    assert second[0][0] > first[-1][0]
    assert len(first) == len(second) == 140


def test_a_window_holds_less_of_each_request(plays: dict[str, ForecastPlay]) -> None:
    """What lies behind it is given back, so that the two do fit."""
    play = plays["windowed"]
    assert play.kv_capacity_tokens == plays["tight"].kv_capacity_tokens
    assert play.counters["preemptions"] == 0
    assert all(sum(n for _, n in a.chunks) == 140 for a in play.play.answers)


def test_drafts_that_are_all_accepted_come_together(plays: dict[str, ForecastPlay]) -> None:
    play = plays["guessed"]
    assert [n for _, n in tokens_at(play, 1)] == [1, 4, 4]
    assert play.counters["accepted_tokens"] == play.counters["draft_tokens"] > 0
    # 2 rows for the prompts, then 4 for each answer: what was sampled last and three guesses
    assert [at for at, _ in tokens_at(plays["rows"], 1)] == [2.0, 2.0 + 8.0, 10.0 + 4.0]
    nothing = plays["nothing to guess"]
    assert tokens_at(nothing, 1) == tokens_at(plays["plain"], 1)
    assert not nothing.counters.get("drafts")


def test_answers_that_were_read_say_what_is_guessed_and_accepted(
    plays: dict[str, ForecastPlay],
) -> None:
    play = plays["copied"]
    assert [n for _, n in tokens_at(play, 0)] == [1] * 5
    assert [n for _, n in tokens_at(play, 1)] == [1, 3, 2, 1, 1, 1]
    counted = [play.counters[n] for n in ("drafts", "draft_tokens", "accepted_tokens")]
    assert counted == [4, 3 + 3 + 2 + 1, 2 + 1]


def test_a_trial_of_another_pace_takes_as_much_longer(plays: dict[str, ForecastPlay]) -> None:
    assert tokens_at(plays["slower"], 0) == [(1.5 * i, 1) for i in range(1, 6)]


@pytest.mark.parametrize("key", ["cached", "by chance"])
def test_an_engine_that_begins_anew_plays_to_the_byte_as_a_new_one(
    key: str, plays: dict[str, ForecastPlay]
) -> None:
    again = plays[f"{key} again"].model_copy(update={"key": key})
    assert again.model_dump_json() == plays[key].model_dump_json()


def test_with_one_slot_adapters_take_turns(plays: dict[str, ForecastPlay]) -> None:
    assert tokens_at(plays["one slot"], 0) == [(float(i), 1) for i in (1, 2, 3)]
    assert tokens_at(plays["one slot"], 1) == [(float(i), 1) for i in (4, 5, 6)]


def test_replicas_share_the_requests_and_each_has_a_cache_of_its_own(
    plays: dict[str, ForecastPlay],
) -> None:
    """Three documents are asked about twice each, in a row: in turn, no replica sees one again."""
    in_turn, by_prefix = plays["round-robin"], plays["prefix-aware"]
    assert in_turn.counters["prefix_hits"] == 0
    assert by_prefix.counters["prefix_hits"] == 3 * 2 * BLOCK
    for play in (in_turn, by_prefix):
        assert play.counters["prefix_queries"] == 6 * 300
        assert [a.chunks for a in play.play.answers] == [
            [(a.sent_s + 1, 1), (a.sent_s + 3, 2)] for a in play.play.answers
        ]


def test_the_engine_that_decodes_computes_one_token_of_a_prompt_that_was_handed_over(
    plays: dict[str, ForecastPlay],
) -> None:
    """Both prompts are prefilled in one step; they come over one after the other."""
    play = plays["split"]
    long, short = sorted(play.play.answers, key=lambda a: -a.prompt_tokens)
    pairs = sum(a.prompt_tokens * (a.prompt_tokens + 1) / 2 for a in (long, short))
    over_s = 1 + 1e-3 * pairs + 0.25 + long.prompt_tokens / 100
    assert [at for at, _ in long.chunks] == pytest.approx([over_s + 1, over_s + 2])
    steps = [at for at, _ in short.chunks]
    assert len(steps) == 20
    assert steps[0] > over_s + short.prompt_tokens / 100
    assert [b - a for a, b in pairwise(steps)] == pytest.approx([1.0] * 19)
    assert play.counters["preemptions"] == 0


def test_a_plan_is_the_same_by_one_process_and_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte of every figure, whichever process plays a load, and after which others."""
    card, _ = machine_of("h100")
    demand = Demand(200, 10, rate_per_s=300, documents=5, document_tokens=128)
    question = Question(
        model_named(card, "llama-1b"), "bf16", "h100", demand, SLO(ttft_s=0.5, tpot_s=0.01),
        replicas=3, routers=tuple(ROUTERS),
    )  # fmt: skip
    forked = with_vllm.python("serving.simulator")
    monkeypatch.setattr("labs.harness.forecast.forecaster.FORECASTER_ARGV", forked)
    monkeypatch.setattr(capacity_plan, "FEWEST", 20)
    monkeypatch.setattr(capacity_plan, "GRIDS", ((0.6, 0.9, 1.25),))
    one, two = (plan_on(question, processes, monkeypatch) for processes in (1, 2))
    assert len(one.rates) == len(capacity_plan.GRIDS[0])
    assert len({fleet.expected for fleet in one.fleets.values()}) == len(ROUTERS)
    assert one == two


def plan_on(question: Question, processes: int, monkeypatch: pytest.MonkeyPatch) -> CapacityPlan:
    monkeypatch.setattr(capacity_plan, "processes", lambda _: processes)
    return capacity_plan.plan(question, SilentProgress())


def test_limits_on_the_queue_turn_away_what_vllms_server_would(
    plays: dict[str, ForecastPlay],
) -> None:
    """Two may be there; or one prompt before its first token, so that the others come in vain."""
    refused = {
        key: [a.index for a in plays[key].play.answers if a.turned_away_s is not None]
        for key in ("limited", "limited in tokens", "urgent first")
    }
    assert refused == {"limited": [2], "limited in tokens": [2], "urgent first": []}
    assert plays["limited"].counters["turned_away"] == 1


def test_the_lowest_priority_number_is_served_first(plays: dict[str, ForecastPlay]) -> None:
    answers = plays["urgent first"].play.answers
    assert sorted((a.chunks[0][0], a.index) for a in answers) == [(1, 0), (5, 2), (9, 1)]
