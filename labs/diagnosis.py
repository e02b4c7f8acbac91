"""Diagnosis: latency became worse, so what in the metrics tells why?

A first token takes as long as the queue and the prefill of its prompt: TTFT = a + b N + c N^2 for N
prompt tokens. `a` is the launch of a step, b the matrix products of one more token, c its attention
to all before it. Each later token takes a step, which reads all weights and the keys and values of
the context: ITL = a' + b' C, a straight line in the context C.

So one symptom has many causes. A burst waits in the *queue*; so does everybody beside a neighbour's
long prompt. A cold cache makes the same prompts longer to *prefill*. A small KV cache *preempts*: a
request loses its blocks and is computed again. Slower tokens come of a longer context, of guesses
that are verified in vain, of a token budget that lets a whole prompt into one step (the gaps are
longer, the first tokens sooner), or of a step that is itself slower.

Here each is brought about alone, on engines that are otherwise the same, and told apart from the
engine's `/metrics` alone, by a rule that was written before (`labs/judging/diagnosis.py`). Each
trial is diagnosed blind, beside the healthy ones of the workload `reference`, which is the same as
`usual` but for its words. `make diagnose ENDPOINT=..` applies the same rule to a running server.

What makes the step itself slower is `enforce-eager` on a GPU. On a CPU every engine here is eager
already, so there weights of twice the size (`dtype: float32`) are what is changed.

Turn: the memory (`variants.small-kv.flags.num-gpu-blocks-override`), the long prompt
(`workloads.neighbour.intruder.prompt_tokens`), the burst (`workloads.burst.loads`).
"""

from __future__ import annotations

from typing import Literal

from labs import theory
from labs.lab import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from labs.paged_kv import KWON, held_tokens
from labs.single_stream import launched_eagerly
from labs.speculative_decoding import tpot_ratio
from loadtests.arrivals import Concurrent, Contended, Waves
from loadtests.workload import Exponential, Fixed, Intruder, Lengths, Prefix, Workload
from serving import metrics

SARATHI = "Agrawal et al., Sarathi-Serve, OSDI 2024"
ROOFLINE = "Williams et al., Roofline, 2009"

INJECTED: dict[tuple[str, str], str] = {
    ("healthy", "usual"): "healthy",
    ("healthy", "burst"): "burst",
    ("healthy", "cold"): "cold cache",
    ("healthy", "neighbour"): "long neighbour",
    ("healthy", "context"): "long context",
    ("small-kv", "usual"): "preemption",
    ("large-budget", "usual"): "large budget",
    ("guessing", "usual"): "speculation",
    ("slow-step", "usual"): "slow step",
}
"""What is wrong at a point, by its variant and its workload."""
REFERENCE = ("healthy", "reference")
ALONE = ("large-budget", "alone")

Figure = Literal[
    "TTFT", "Queue", "Prefill", "TPOT", "Long gaps", "Hit rate", "Preemptions", "Longest prompt"
]
Direction = Literal["rises", "falls", "stays"]
SIGNATURES: dict[str, dict[Figure, Direction]] = {
    "healthy": {
        "TTFT": "stays", "Queue": "stays", "Prefill": "stays", "TPOT": "stays",
        "Long gaps": "stays", "Hit rate": "stays", "Preemptions": "stays",
        "Longest prompt": "stays",
    },
    "burst": {
        "TTFT": "rises", "Queue": "rises", "Hit rate": "stays", "Preemptions": "stays",
        "Longest prompt": "stays",
    },
    "cold cache": {
        "TTFT": "rises", "Prefill": "rises", "Hit rate": "falls", "Preemptions": "stays",
        "Longest prompt": "stays",
    },
    "long neighbour": {
        "TTFT": "rises", "Preemptions": "stays", "Longest prompt": "rises",
    },
    "long context": {
        "Prefill": "rises", "TPOT": "rises", "Preemptions": "stays", "Longest prompt": "rises",
    },
    "preemption": {"TTFT": "rises", "Preemptions": "rises", "Longest prompt": "stays"},
    "large budget": {
        "Prefill": "falls", "Long gaps": "rises", "Hit rate": "stays", "Preemptions": "stays",
        "Longest prompt": "stays",
    },
    "speculation": {
        "TPOT": "rises", "Hit rate": "stays", "Preemptions": "stays", "Longest prompt": "stays",
    },
    "slow step": {
        "Prefill": "rises", "TPOT": "rises", "Hit rate": "stays", "Preemptions": "stays",
        "Longest prompt": "stays",
    },
}  # fmt: skip
"""Which of the engine's figures moves in which direction, predicted beforehand; others may move."""

# ------------------------------------------------------------------------------ the closed forms


def shared_tokens(point: Point) -> int:
    """Return the tokens of a prompt that are found in the prefix cache, in whole blocks."""
    prefix, block = point.workload.prefix, point.flags.block_size
    return prefix.tokens // block * block if prefix and point.workload.primed else 0


def new_tokens(point: Point) -> int:
    """Return the tokens of a stream's prompt that are computed."""
    return int(point.lengths[0][0]) - shared_tokens(point)


def context_tokens(point: Point) -> float:
    """Return the mean context of the streams."""
    (prompt, output), *_ = point.lengths
    return prompt + output / 2


def batch(point: Point) -> int:
    """Return how many requests run at once where the KV cache holds them all."""
    return min(point.load.users, point.flags.max_num_seqs)


def chunk_tokens(point: Point) -> int:
    """Return the tokens that a step has left for prompts, after one for each request in decode."""
    return max(1, point.flags.max_num_batched_tokens - batch(point) + 1)


def prefill_s(point: Point, tokens: int) -> float:
    """Return the time to prefill so many tokens in pieces, each in a step with the others."""
    return theory.chunked_prefill_s(
        point.shape, point.ceilings, batch(point) - 1, context_tokens(point), tokens,
        chunk_tokens(point),
    )  # fmt: skip


def step_s(point: Point) -> float:
    return theory.decode_step_s(point.shape, point.ceilings, batch(point), context_tokens(point))


def round_s(point: Point) -> float:
    """Return how long a full batch takes: all its prefills in turn, and the steps of an answer."""
    _, output = point.lengths[0]
    return batch(point) * prefill_s(point, new_tokens(point)) + output * step_s(point)


def waited(burst: Point, usual: Point) -> Prediction:
    """Predict TTFT in waves of W against a loop: W / S rounds of a batch S, one after another."""
    rounds = burst.load.users / burst.flags.max_num_seqs
    wait_s = max(0.0, rounds - 1) / 2 * round_s(burst)
    first_s = prefill_s(usual, new_tokens(usual))
    ahead_s = (batch(burst) - 1) / 2 * first_s  # of one's own round, which all begin together
    return Prediction(
        value=(first_s + ahead_s + wait_s) / first_s,
        formula="(t_prefill (S + 1) / 2 + (W / S - 1) / 2 rounds) / t_prefill",
        assumptions=("a round is all prefills of a batch, then all of its steps",),
        source=SARATHI,
    )


def recomputed(cold: Point, usual: Point) -> Prediction:
    return Prediction(
        value=prefill_s(cold, new_tokens(cold)) / prefill_s(usual, new_tokens(usual)),
        formula="t_prefill of the whole prompt / of what the cache does not hold, in pieces",
        assumptions=("no prompt waits for another's prefill",),
        source=SARATHI,
    )


def beside_the_long(contended: Point, usual: Point) -> Prediction:
    """Predict the streams' TTFT beside a long prompt that takes every step's budget for T of P."""
    assert contended.workload.intruder
    assert contended.load.kind == "contended"
    long_s = prefill_s(
        contended, contended.workload.intruder.prompt_tokens - shared_tokens(contended)
    )
    own_s = prefill_s(usual, new_tokens(usual))
    share = min(1.0, long_s / contended.load.every_s)
    return Prediction(
        value=(own_s + share * long_s / 2) / own_s,
        formula="(t_prefill + T / P T / 2) / t_prefill, T the long prompt's prefill every P",
        assumptions=("a stream's prompt comes at any time with the same chance",
                     "it waits until the long one's last piece is computed"),
        source=SARATHI,
    )  # fmt: skip


def longer_read(far: Point, near: Point) -> Prediction:
    return Prediction(
        value=step_s(far) / step_s(near),
        formula="(weight bytes + B C KV bytes) of the long context / of the usual",
        assumptions=("reading is all that a step does",),
        source=ROOFLINE,
    )


def fewer_at_once(small: Point, usual: Point) -> Prediction:
    """Predict the time of a whole answer where only some requests fit: B / those that run."""
    block, shared = small.flags.block_size, shared_tokens(small)
    room = (small.flags.num_gpu_blocks_override - 1) * block - shared
    running = min(batch(usual), room / (held_tokens(small, block) - shared))
    return Prediction(
        value=batch(usual) / running,
        formula="B / min(B, (C - shared) / (mean tokens held - shared))",
        assumptions=("a step takes as long for fewer", "what is computed twice is not counted"),
        source=KWON,
    )


def longest_step_s(point: Point) -> float:
    return theory.chunk_step_s(
        point.shape, point.ceilings, batch(point) - 1, context_tokens(point), new_tokens(point),
        chunk_tokens(point),
    )  # fmt: skip


def longest_step(large: Point, small: Point) -> Prediction:
    return Prediction(
        value=longest_step_s(large) / longest_step_s(small),
        formula="the step with min(budget, prompt) tokens of a prompt, large budget / small",
        assumptions=("more than one gap in a hundred is beside a prompt",),
        source=SARATHI,
    )


def fewer_steps(large: Point, small: Point) -> Prediction:
    return Prediction(
        value=prefill_s(large, new_tokens(large)) / prefill_s(small, new_tokens(small)),
        formula="t_prefill in few large pieces / in many small ones, each with a decode step",
        assumptions=("no prompt waits for another's prefill",),
        source=SARATHI,
    )


ACCEPTED = 0.1
"""The chance that a guess is right which follows one equal word, assumed: little is repeated."""


def accepted(point: Point) -> float:
    return ACCEPTED


def slower_step(slow: Point, usual: Point) -> Prediction:
    """Predict an eager step, or one that reads weights of four bytes for two."""
    if slow.flags.get("dtype") != "float32":
        return launched_eagerly(slow, usual)
    kv_bytes = batch(usual) * context_tokens(usual) * usual.shape.kv_bytes_per_token()
    read = usual.shape.weight_bytes + kv_bytes
    return Prediction(
        value=2 * read / read,
        formula="4 bytes a number / 2",
        assumptions=("reading weights, keys and values is all that a step does",),
        source=ROOFLINE,
    )


def as_before(usual: Point, reference: Point) -> Prediction:
    return Prediction(
        value=1.0,
        formula="1: the same requests in other words",
        source="A/A tests: Kohavi et al., Data Mining and Knowledge Discovery, 2009",
    )


# ---------------------------------------------------------------------------------------- the lab

HEALTHY = Variant(name="healthy")
SIX = Concurrent(users=6)
BURST = Waves(size=16)
BESIDE = Contended(users=5, every_s=2)
EVERYWHERE = ("healthy", "small-kv", "large-budget", "guessing", "slow-step")


def workload(
    name: str,
    *only: str,
    prompt_tokens: int = 384,
    prefix: Prefix | None = None,
    load: Concurrent | Contended | Waves = SIX,
    intruder: Intruder | None = None,
    primed: bool = True,
) -> Workload:
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=prompt_tokens),
        output_tokens=Fixed(tokens=16),
        prefix=prefix or Prefix(tokens=128),
        primed=primed,
        intruder=intruder,
        only=only or ("healthy",),
        loads=(load,),
    )


def claim(
    name: str, title: str, metric: str, treatment: tuple[str, str], expect: str, predict: object,
    load: Contended | Waves | None = None, coupled: str = "",
) -> Claim:  # fmt: skip
    """State what a disturbance does to a figure, against the usual load of a healthy engine.

    `load` is the disturbance's own, where it has one.
    """
    variant, sent = treatment
    loads = ({"load": str(load)}, {"load": str(SIX)}) if load else ({}, {})
    return Claim.model_validate(
        {
            "name": name,
            "title": title,
            "metric": metric,
            "treatment": {"variant": variant, "workload": sent, **loads[0]},
            "baseline": {"variant": "healthy", "workload": "usual", **loads[1]},
            "expect": expect,
            "predict": predict,
            "coupled": coupled,
        }
    )


def stays(arm: Arm, metric: str) -> Evidence:
    return Evidence(arm=arm, kind="stays", metric=metric)


EVIDENCE = (
    Evidence(arm=Arm(variant="small-kv"), kind="rises", metric=metrics.PREEMPTIONS),
    *(
        stays(Arm(variant=name), metrics.PREEMPTIONS)
        for name in EVERYWHERE
        if name != "small-kv"
    ),
    Evidence(arm=Arm(workload="usual"), kind="rises", metric=metrics.PREFIX_HITS),
    stays(Arm(workload="cold"), metrics.PREFIX_HITS),
    Evidence(arm=Arm(variant="guessing"), kind="rises", metric=metrics.SPEC_DRAFTED),
    Evidence(arm=Arm(variant="healthy"), kind="absent", metric=metrics.SPEC_DRAFTS),
)  # fmt: skip
IN_FLOAT32 = Evidence(
    arm=Arm(variant="slow-step"),
    kind="echoes",
    metric=metrics.ENGINE_CONFIG,
    label="dtype",
    value="float32",
)


def varied(mean_tokens: int, max_tokens: int) -> Lengths:
    return Exponential(mean_tokens=mean_tokens, max_tokens=max_tokens)


LAB = Lab(
    name="diagnosis",
    title="Diagnosis",
    question="Latency became worse or unsteady: do the metrics tell why?",
    answers=("ME-4", "IP-4", "IP-5", "IP-6"),
    acceptance=accepted,
    variants=(
        HEALTHY,
        HEALTHY.but("small-kv", {"num-gpu-blocks-override": 48}),
        HEALTHY.but("large-budget", {"max-num-batched-tokens": 1408}),
        HEALTHY.but(
            "guessing",
            {
                "speculative-config": {
                    "method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 1,
                    "prompt_lookup_min": 1,
                }
            },
        ),
        HEALTHY.but("slow-step", {"dtype": "float32"}),
    ),
    flags={
        "max-model-len": 1408,
        "max-num-seqs": 8,
        "max-num-batched-tokens": 64,
        "enable-prefix-caching": True,
        "block-size": 32,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        workload("reference"),
        workload("usual", *EVERYWHERE),
        workload("burst", load=BURST),
        workload("cold", prefix=Prefix(tokens=128, groups=192), primed=False),
        workload(
            "neighbour",
            load=BESIDE,
            intruder=Intruder(prompt_tokens=1280),
        ),
        workload("context", prompt_tokens=1280, prefix=Prefix(tokens=1024)),
        Workload(
            name="alone",
            prompt_tokens=varied(512, 1280),
            output_tokens=Fixed(tokens=8),
            only=("large-budget",),
            loads=(Concurrent(users=1),),
        ),
    ),
    claims=(
        Claim(
            name="steady",
            title="Nothing tells the usual load from its reference",
            metric="tpot_mean_s",
            treatment=Arm(variant="healthy", workload="usual"),
            baseline=Arm(variant="healthy", workload="reference"),
            expect="unchanged",
            predict=as_before,
        ),
        claim("burst", "In a burst first tokens wait for a place in the batch", "ttft_mean_s",
              ("healthy", "burst"), "rises", waited, BURST,
              "waves are another load, and the workload carries it"),
        claim("cold", "A cold cache prefills again what was shared", "ttft_mean_s",
              ("healthy", "cold"), "rises", recomputed),
        claim("neighbour", "Beside a neighbour's long prompt others' first tokens come later",
              "ttft_mean_s", ("healthy", "neighbour"), "rises", beside_the_long,
              BESIDE, "the long prompts come at times of their own, and the workload carries them"),
        claim("preemption", "A KV cache that preempts makes answers take longer", "e2e_p50_s",
              ("small-kv", "usual"), "rises", fewer_at_once),
        claim("context", "A longer context makes each token slower", "tpot_mean_s",
              ("healthy", "context"), "rises", longer_read),
        claim("budget", "A larger token budget makes the longest gaps longer", "itl_p99_s",
              ("large-budget", "usual"), "rises", longest_step),
        claim("budget-ttft", "And first tokens come sooner", "ttft_mean_s",
              ("large-budget", "usual"), "falls", fewer_steps),
        claim("guessing", "Guesses that are seldom right make each token slower under load",
              "tpot_mean_s", ("guessing", "usual"), "rises", tpot_ratio(accepted)),
        claim("slow-step", "A slower step makes each token slower", "tpot_mean_s",
              ("slow-step", "usual"), "rises", slower_step),
    ),
    evidence=(*EVIDENCE, IN_FLOAT32),
    findings=("told-apart", "signatures", "coefficients"),
    plots=("signatures",),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=192,
    warmup_s=1,
    window_s=4,
    repeats=4,
    scales={
        "gpu": {
            "flags": {
                "max-model-len": 8192,
                "max-num-seqs": 32,
                "max-num-batched-tokens": 512,
                "enable-prefix-caching": True,
                "block-size": 16,
                "kv-cache-memory-bytes": 6 * 2**30,
                # left to itself, vLLM has it on in the engines that guess nothing
                "async-scheduling": False,
            },
            "variants.small-kv.flags": {"num-gpu-blocks-override": 1400},
            "variants.large-budget.flags": {"max-num-batched-tokens": 8192},
            "variants.slow-step.flags": {"enforce-eager": True},
            **{
                f"workloads.{name}.{field}": value
                for name, prompt, prefix in (("reference", 2048, 1024), ("usual", 2048, 1024),
                                             ("burst", 2048, 1024), ("cold", 2048, 1024),
                                             ("neighbour", 2048, 1024), ("context", 7168, 6144))
                for field, value in (
                    ("prompt_tokens.tokens", prompt),
                    ("output_tokens.tokens", 64),
                    ("prefix.tokens", prefix),
                    ("loads", (Concurrent(users=24),)),
                )
            },
            "workloads.cold.prefix.groups": 256,
            "workloads.burst.loads": (Waves(size=64),),
            "workloads.neighbour.loads": (Contended(users=23, every_s=2),),
            "workloads.neighbour.intruder.prompt_tokens": 7680,
            "workloads.alone.prompt_tokens": {
                "kind": "exponential", "mean_tokens": 3072, "max_tokens": 8000,
            },
            "workloads.alone.output_tokens.tokens": 64,
            **{
                f"claims.{name}.{arm}.load": load
                for name, own in (("burst", "waves:64"), ("neighbour", "contended:23/2"))
                for arm, load in (("treatment", own), ("baseline", "concurrent:24"))
            },
            "evidence": EVIDENCE,
            "requests": 512,
            "warmup_s": 2,
            "window_s": 6,
            "next_knobs": (
                'SET="variants.small-kv.flags.num-gpu-blocks-override=2000" has more memory: from'
                " which size on does nothing preempt?",
                'SET="workloads.neighbour.intruder.prompt_tokens=4096" is a shorter neighbour',
                'SET="variants.large-budget.flags.max-num-batched-tokens=2048" is a budget between'
                " the two",
            ),
        }
    },
    quick={"window_s": 2.5, "repeats": 1},
    limits={
        "cpu": "Queue, cache, preemptions and the pieces of prompts are vLLM's own, so their marks"
        " carry over. How much each disturbance costs does not: a step here is mostly the cost of"
        " launching small operations. Every engine is eager, so a slower step is one with weights"
        " of twice the size; compiled against eager is measured in `single-stream`.",
        "gpu": "One disturbance at a time, each large enough to be felt. Where two come together"
        " the rule names the first in its order, and lists the other.",
    },
    next_knobs=(
        'SET="variants.small-kv.flags.num-gpu-blocks-override=56" has more memory: from which size'
        " on does nothing preempt?",
        'SET="workloads.neighbour.intruder.prompt_tokens=768" is a shorter neighbour: is it still'
        " told?",
        'SET="variants.large-budget.flags.max-num-batched-tokens=160" is a budget between the two',
        'SET=\'workloads.burst.loads=["waves:12"]\' is a smaller burst',
    ),
)  # fmt: skip
