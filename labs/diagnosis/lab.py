"""Diagnosis: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from statistics import mean
from typing import Literal

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent, Contended, Waves
from loadtests.workload import Exponential, Fixed, Intruder, Prefix, Workload
from serving import metrics

KWON = "Kwon et al., PagedAttention, SOSP 2023"
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
        "Long gaps": "rises", "Hit rate": "stays", "Preemptions": "stays",
        "Longest prompt": "stays",
    },
    "speculation": {
        "TTFT": "rises", "Hit rate": "stays", "Preemptions": "stays", "Longest prompt": "stays",
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


def answer_tokens(point: Point) -> float:
    """Return the mean length of the streams' answers."""
    return mean(o for i, (_, o) in enumerate(point.lengths) if not point.workload.is_intruder(i))


def context_tokens(point: Point) -> float:
    """Return the mean context of the streams."""
    return point.lengths[0][0] + answer_tokens(point) / 2


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
    return batch(point) * prefill_s(point, new_tokens(point)) + answer_tokens(point) * step_s(point)


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


def running(small: Point) -> float:
    """Return how many requests the KV cache holds at once.

    The engine keeps a block for itself; a request holds what it has written, in whole blocks.
    """
    block, shared = small.flags.block_size, shared_tokens(small)
    room = (small.flags.num_gpu_blocks_override - 1) * block - shared
    held = mean(
        block * -(-(prompt + written) // block)
        for prompt, output in small.lengths
        for written in range(output)
    )
    return min(batch(small), room / (held - shared))


def fewer_at_once(small: Point, usual: Point) -> Prediction:
    """Predict TTFT where only some requests fit at once: the others wait for their answers."""
    first_s = prefill_s(usual, new_tokens(usual))
    answer_s = first_s + answer_tokens(usual) * step_s(usual)
    waiting = batch(usual) / running(small) - 1  # for each that runs
    return Prediction(
        value=(first_s + waiting * answer_s) / first_s,
        formula="(t_prefill + (B / r - 1) (t_prefill + L t)) / t_prefill,"
        " r = (C - shared) / (mean tokens held - shared)",
        assumptions=("a step takes as long for fewer", "what is computed twice is not counted"),
        source=KWON,
    )


def fewer_pieces(large: Point, small: Point) -> Prediction:
    first_s, cut_s = (prefill_s(point, new_tokens(point)) for point in (large, small))
    return Prediction(
        value=first_s / cut_s,
        formula="t_prefill in pieces of the large budget / in pieces of the small one",
        assumptions=("no prompt waits for another's",),
        source=SARATHI,
    )


ACCEPTED = 0.1
"""The chance that a guess is right which follows one equal word, assumed: little is repeated."""


def accepted(point: Point) -> float:
    return ACCEPTED


def budget_taken(guessing: Point, usual: Point) -> Prediction:
    """Predict TTFT where guesses take their part of each step's token budget first."""
    guesses = guessing.flags.speculative_config["num_speculative_tokens"]
    left = max(1, chunk_tokens(guessing) - (batch(guessing) - 1) * guesses)
    first_s = theory.chunked_prefill_s(
        guessing.shape, guessing.ceilings, (batch(guessing) - 1) * (1 + guesses),
        # the tokens of a request that are verified together read its context once
        context_tokens(guessing) / (1 + guesses), new_tokens(guessing), left,
    )  # fmt: skip
    return Prediction(
        value=first_s / prefill_s(usual, new_tokens(usual)),
        formula="t_prefill in pieces of budget - (B - 1) (g + 1) tokens / of budget - (B - 1)",
        assumptions=("every request has g guesses in every step", "no prompt waits for another's"),
        source=SARATHI,
    )


OPERATIONS, LAUNCH_S = 10, 10e-6  # of a layer, and to launch one from Python


def launched_eagerly(slow: Point, usual: Point) -> Prediction:
    launching_s = usual.shape.layers * OPERATIONS * LAUNCH_S
    return Prediction(
        value=1 + launching_s / step_s(usual),
        formula=f"(t + {OPERATIONS} operations a layer of {1e6 * LAUNCH_S:g} us) / t",
        assumptions=("no launch hides behind an operation", "nothing is added to t by default"),
        source="Ansel et al., PyTorch 2, ASPLOS 2024",
    )


def as_before(usual: Point, reference: Point) -> Prediction:
    return Prediction(
        value=1.0,
        formula="1: the same requests in other words",
        source="A/A tests: Kohavi et al., Data Mining and Knowledge Discovery, 2009",
    )


# ---------------------------------------------------------------------------------------- the lab

HEALTHY = Variant(name="healthy")
FOUR = Concurrent(users=4)
BURST = Waves(size=12)
BESIDE = Contended(users=3, every_s=2)
VARIANTS = (
    HEALTHY,
    HEALTHY.but("small-kv", {"num-gpu-blocks-override": 27, "max-model-len": 640}),
    HEALTHY.but("large-budget", {"max-num-batched-tokens": 1664}),
    HEALTHY.but(
        "guessing",
        {
            "speculative-config": {
                "method": "ngram", "num_speculative_tokens": 16, "prompt_lookup_max": 1,
                "prompt_lookup_min": 1,
            }
        },
    ),
)  # fmt: skip
ON_A_GPU = (*VARIANTS, HEALTHY.but("slow-step", {"enforce-eager": True}))


def workload(
    name: str,
    *only: str,
    prompt_tokens: int = 384,
    prefix: Prefix | None = None,
    load: Concurrent | Contended | Waves = FOUR,
    intruder: Intruder | None = None,
    primed: bool = True,
) -> Workload:
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=prompt_tokens),
        # equal ones would end together, and one large step would hold all of the next prompts
        output_tokens=Exponential(mean_tokens=16, max_tokens=48),
        prefix=prefix or Prefix(tokens=192),
        primed=primed,
        intruder=intruder,
        only=only or ("healthy",),
        loads=(load,),
    )


def claim(
    name: str, metric: str, treatment: tuple[str, str], expect: str, predict: object,
    load: Contended | Waves | None = None, coupled: str = "",
) -> Claim:  # fmt: skip
    """State what a disturbance does to a figure, against the usual load of a healthy engine.

    `load` is the disturbance's own, where it has one.
    """
    variant, sent = treatment
    loads = ({"load": str(load)}, {"load": str(FOUR)}) if load else ({}, {})
    return Claim.model_validate(
        {
            "name": name,
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
        stays(Arm(variant=v.name), metrics.PREEMPTIONS)
        for v in VARIANTS
        if v.name != "small-kv"
    ),
    Evidence(arm=Arm(workload="usual"), kind="rises", metric=metrics.PREFIX_HITS),
    stays(Arm(workload="cold"), metrics.PREFIX_HITS),
    Evidence(arm=Arm(variant="guessing"), kind="rises", metric=metrics.SPEC_DRAFTED),
    Evidence(arm=Arm(variant="healthy"), kind="absent", metric=metrics.SPEC_DRAFTS),
)  # fmt: skip


def lengths(*prompts: int, output: int) -> tuple[tuple[float, int, int], ...]:
    """Write a trace of prompts of these lengths, which are sent in turn."""
    return tuple((0.0, prompt, output) for prompt in prompts)


CLAIMS = (
    Claim(
        name="steady",
        metric="tpot_mean_s",
        treatment=Arm(variant="healthy", workload="usual"),
        baseline=Arm(variant="healthy", workload="reference"),
        expect="unchanged",
        predict=as_before,
    ),
    claim("burst", "ttft_mean_s", ("healthy", "burst"), "rises", waited, BURST,
          "waves are another load, and the workload carries it"),
    claim("cold", "ttft_mean_s", ("healthy", "cold"), "rises", recomputed),
    claim("neighbour", "ttft_mean_s", ("healthy", "neighbour"), "rises", beside_the_long, BESIDE,
          "the long prompts come at times of their own, and the workload carries them"),
    claim("preemption", "ttft_mean_s", ("small-kv", "usual"), "rises", fewer_at_once,
          coupled="the engine wants memory for one request of max-model-len"),
    claim("context", "tpot_mean_s", ("healthy", "context"), "rises", longer_read),
    claim("budget", "ttft_mean_s", ("large-budget", "usual"), "falls", fewer_pieces),
    claim("guessing", "ttft_mean_s", ("guessing", "usual"), "rises", budget_taken),
)  # fmt: skip
SLOW_STEP = claim("slow-step", "tpot_mean_s", ("slow-step", "usual"), "rises", launched_eagerly)


def on_random_weights(lab: Lab) -> Lab:
    """Leave out the guesses: whether anything is repeated, and guessed, is chance there."""
    return lab.without({"guessing": "random weights write no text from which n-grams could guess"})


LAB = Lab(
    name="diagnosis",
    answers=("ME-4", "IP-4", "IP-5", "IP-6"),
    acceptance=accepted,
    variants=VARIANTS,
    flags={
        "max-model-len": 1664,
        "max-num-seqs": 4,
        "max-num-batched-tokens": 96,
        "enable-prefix-caching": True,
        "block-size": 32,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 192 * 2**20,
    },
    workloads=(
        workload("reference"),
        workload("usual", *(v.name for v in VARIANTS)),
        workload("burst", load=BURST),
        workload("cold", prefix=Prefix(tokens=192, groups=192), primed=False),
        workload(
            "neighbour",
            load=BESIDE,
            intruder=Intruder(prompt_tokens=1024),
        ),
        workload("context", prompt_tokens=1536, prefix=Prefix(tokens=1344)),
        Workload(
            name="alone",
            prompt_tokens=Fixed(tokens=1024),
            output_tokens=Fixed(tokens=8),
            trace=lengths(320, 64, 1024, 160, 640, output=8),
            only=("large-budget",),
            loads=(Concurrent(users=1),),
        ),
    ),
    claims=CLAIMS,
    evidence=EVIDENCE,
    findings=("told-apart", "signatures", "coefficients"),
    plots=("signatures",),
    slo=SLO(ttft_s=1, tpot_s=0.1),
    requests=192,
    warmup_s=1,
    window_s=4,
    repeats=4,
    scales={
        "gpu": {
            "variants": [v.model_dump() for v in ON_A_GPU],
            "claims": (*CLAIMS, SLOW_STEP),
            "evidence": (
                # a chat template of more than a block is a prefix that all prompts share
                *(e for e in EVIDENCE if e.arm.workload != "cold"),
                stays(Arm(variant="slow-step"), metrics.PREEMPTIONS),
            ),
        }
    },
    dummy=on_random_weights,
)  # fmt: skip
