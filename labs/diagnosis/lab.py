"""Diagnosis: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Literal, get_args

from labs.harness.spec import theory
from labs.harness.spec.declare import ANY, counter, falls, predicts, rises, sends, unchanged, users
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from labs.harness.spec.theory import KWON, PYTORCH_2, ROOFLINE, SARATHI
from loadtests.arrivals import AnyArrival, Contended, Waves
from loadtests.workload import Exponential, Intruder, Prefix, Workload
from serving import metrics

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
STEADY: dict[Figure, Direction] = {
    "Hit rate": "stays",
    "Preemptions": "stays",
    "Longest prompt": "stays",
}
SIGNATURES: dict[str, dict[Figure, Direction]] = {
    "healthy": dict.fromkeys(get_args(Figure), "stays"),
    "burst": {"TTFT": "rises", "Queue": "rises", **STEADY},
    "cold cache": {"TTFT": "rises", "Prefill": "rises", **STEADY, "Hit rate": "falls"},
    "long neighbour": {"TTFT": "rises", "Preemptions": "stays", "Longest prompt": "rises"},
    "long context": {
        "Prefill": "rises",
        "TPOT": "rises",
        "Preemptions": "stays",
        "Longest prompt": "rises",
    },
    "preemption": {"TTFT": "rises", "Preemptions": "rises", "Longest prompt": "stays"},
    "large budget": {"Long gaps": "rises", **STEADY},
    "speculation": {"TTFT": "rises", **STEADY},
    "slow step": {"Prefill": "rises", "TPOT": "rises", **STEADY},
}
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
        point.shape,
        point.ceilings,
        batch(point) - 1,
        context_tokens(point),
        tokens,
        chunk_tokens(point),
    )


def prompt_s(point: Point) -> float:
    """Return the time to prefill what is not cached of a stream's prompt."""
    return prefill_s(point, new_tokens(point))


def step_s(point: Point) -> float:
    return theory.decode_step_s(point.shape, point.ceilings, batch(point), context_tokens(point))


def round_s(point: Point) -> float:
    """Return how long a full batch takes: all its prefills in turn, and the steps of an answer."""
    return batch(point) * prompt_s(point) + answer_tokens(point) * step_s(point)


@predicts(
    "(t_prefill (S + 1) / 2 + (W / S - 1) / 2 rounds) / t_prefill",
    "a round is all prefills of a batch, then all of its steps",
    source=SARATHI,
)
def waited(burst: Point, usual: Point) -> float:
    """Predict TTFT in waves of W against a loop: W / S rounds of a batch S, one after another."""
    rounds = burst.load.users / burst.flags.max_num_seqs
    wait_s = max(0.0, rounds - 1) / 2 * round_s(burst)
    first_s = prompt_s(usual)
    ahead_s = (batch(burst) - 1) / 2 * first_s  # of one's own round, which all begin together
    return (first_s + ahead_s + wait_s) / first_s


@predicts(
    "t_prefill of the whole prompt / of what the cache does not hold, in pieces",
    "no prompt waits for another's prefill",
    source=SARATHI,
)
def recomputed(cold: Point, usual: Point) -> float:
    return prompt_s(cold) / prompt_s(usual)


@predicts(
    "(t_prefill + T / P T / 2) / t_prefill, T the long prompt's prefill every P",
    "a stream's prompt comes at any time with the same chance",
    "it waits until the long one's last piece is computed",
    source=SARATHI,
)
def beside_the_long(contended: Point, usual: Point) -> float:
    """Predict the streams' TTFT beside a long prompt that takes every step's budget for T of P."""
    assert contended.workload.intruder
    assert contended.load.kind == "contended"
    long_s = prefill_s(
        contended, contended.workload.intruder.prompt_tokens - shared_tokens(contended)
    )
    share = min(1.0, long_s / contended.load.every_s)
    return (prompt_s(usual) + share * long_s / 2) / prompt_s(usual)


@predicts(
    "(weight bytes + B C KV bytes) of the long context / of the usual",
    "reading is all that a step does",
    source=ROOFLINE,
)
def longer_read(far: Point, near: Point) -> float:
    return step_s(far) / step_s(near)


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


@predicts(
    "(t_prefill + (B / r - 1) (t_prefill + L t)) / t_prefill,"
    " r = (C - shared) / (mean tokens held - shared)",
    "a step takes as long for fewer",
    "what is computed twice is not counted",
    source=KWON,
)
def fewer_at_once(small: Point, usual: Point) -> float:
    """Predict TTFT where only some requests fit at once: the others wait for their answers."""
    first_s = prompt_s(usual)
    answer_s = first_s + answer_tokens(usual) * step_s(usual)
    waiting = batch(usual) / running(small) - 1  # for each that runs
    return (first_s + waiting * answer_s) / first_s


@predicts(
    "t_prefill in pieces of the large budget / in pieces of the small one",
    "no prompt waits for another's",
    source=SARATHI,
)
def fewer_pieces(large: Point, small: Point) -> float:
    return prompt_s(large) / prompt_s(small)


ACCEPTED = 0.1
"""The chance that a guess is right which follows one equal word, assumed: little is repeated."""


def accepted(point: Point) -> float:
    return ACCEPTED


@predicts(
    "t_prefill in pieces of budget - (B - 1) (g + 1) tokens / of budget - (B - 1)",
    "every request has g guesses in every step",
    "no prompt waits for another's",
    source=SARATHI,
)
def budget_taken(guessing: Point, usual: Point) -> float:
    """Predict TTFT where guesses take their part of each step's token budget first."""
    guesses = guessing.flags.speculative_config["num_speculative_tokens"]
    left = max(1, chunk_tokens(guessing) - (batch(guessing) - 1) * guesses)
    first_s = theory.chunked_prefill_s(
        guessing.shape,
        guessing.ceilings,
        (batch(guessing) - 1) * (1 + guesses),
        # the tokens of a request that are verified together read its context once
        context_tokens(guessing) / (1 + guesses),
        new_tokens(guessing),
        left,
    )
    return first_s / prompt_s(usual)


OPERATIONS, LAUNCH_S = 10, 10e-6  # of a layer, and to launch one from Python


@predicts(
    f"(t + {OPERATIONS} operations a layer of {1e6 * LAUNCH_S:g} us) / t",
    "no launch hides behind an operation",
    "nothing is added to t by default",
    source=PYTORCH_2,
)
def launched_eagerly(slow: Point, usual: Point) -> float:
    return 1 + usual.shape.layers * OPERATIONS * LAUNCH_S / step_s(usual)


@predicts(
    "1: the same requests in other words",
    source="A/A tests: Kohavi et al., Data Mining and Knowledge Discovery, 2009",
)
def as_before(usual: Point, reference: Point) -> float:
    return 1.0


# ---------------------------------------------------------------------------------------- the lab

HEALTHY = Variant(name="healthy")
VARIANTS = (
    HEALTHY,
    HEALTHY.but("small-kv", {"num-gpu-blocks-override": 27, "max-model-len": 640}),
    HEALTHY.but("large-budget", {"max-num-batched-tokens": 1664}),
    HEALTHY.but(
        "guessing",
        {
            "speculative-config": {
                "method": "ngram",
                "num_speculative_tokens": 16,
                "prompt_lookup_max": 1,
                "prompt_lookup_min": 1,
            }
        },
    ),
)
SLOW_STEP = HEALTHY.but("slow-step", {"enforce-eager": True})
FOUR = users(4)[0]
BURST = Waves(size=12)
BESIDE = Contended(users=3, every_s=2)


def disturbed(
    name: str,
    prompt_tokens: int = 384,
    shared_tokens: int = 192,
    load: AnyArrival = FOUR,
    groups: int = 1,
    primed: bool = True,
    intruder: Intruder | None = None,
    only: Sequence[str] = ("healthy",),
) -> Workload:
    return sends(
        name,
        prompt_tokens,
        # equal ones would end together, and one large step would hold all of the next prompts
        Exponential(mean_tokens=16, max_tokens=48),
        load,
        prefix=Prefix(tokens=shared_tokens, groups=groups),
        primed=primed,
        intruder=intruder,
        only=tuple(only),
    )


CLAIMS = (
    unchanged("steady", "tpot_mean_s", "healthy", "usual / reference", by=as_before),
    rises(
        "burst",
        "ttft_mean_s",
        "healthy",
        "burst / usual",
        f"{BURST} / {FOUR}",
        by=waited,
        coupled="waves are another load, and the workload carries it",
    ),
    rises("cold", "ttft_mean_s", "healthy", "cold / usual", by=recomputed),
    rises(
        "neighbour",
        "ttft_mean_s",
        "healthy",
        "neighbour / usual",
        f"{BESIDE} / {FOUR}",
        by=beside_the_long,
        coupled="the long prompts come at times of their own, and the workload carries them",
    ),
    rises(
        "preemption",
        "ttft_mean_s",
        "small-kv / healthy",
        "usual",
        by=fewer_at_once,
        coupled="the engine wants memory for one request of max-model-len",
    ),
    rises("context", "tpot_mean_s", "healthy", "context / usual", by=longer_read),
    falls("budget", "ttft_mean_s", "large-budget / healthy", "usual", by=fewer_pieces),
    rises("guessing", "ttft_mean_s", "guessing / healthy", "usual", by=budget_taken),
)
COLD = counter(metrics.PREFIX_HITS, "stays", ANY, "cold")
EVIDENCE = (
    counter(metrics.PREEMPTIONS, "rises", "small-kv"),
    counter(metrics.PREEMPTIONS, "stays", "healthy"),
    counter(metrics.PREEMPTIONS, "stays", "large-budget"),
    counter(metrics.PREEMPTIONS, "stays", "guessing"),
    counter(metrics.PREFIX_HITS, "rises", ANY, "usual"),
    COLD,
    counter(metrics.SPEC_DRAFTED, "rises", "guessing"),
    counter(metrics.SPEC_DRAFTS, "absent", "healthy"),
)
ON_A_GPU = {
    "variants": [v.model_dump() for v in (*VARIANTS, SLOW_STEP)],
    "claims": (
        *CLAIMS,
        rises("slow-step", "tpot_mean_s", "slow-step / healthy", "usual", by=launched_eagerly),
    ),
    "evidence": (
        # a chat template of more than a block is a prefix that all prompts share
        *(evidence for evidence in EVIDENCE if evidence != COLD),
        counter(metrics.PREEMPTIONS, "stays", "slow-step"),
    ),
}


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
        disturbed("reference"),
        disturbed("usual", only=[v.name for v in VARIANTS]),
        disturbed("burst", load=BURST),
        disturbed("cold", groups=192, primed=False),
        disturbed("neighbour", load=BESIDE, intruder=Intruder(prompt_tokens=1024)),
        disturbed("context", 1536, 1344),
        sends(
            "alone",
            1024,
            8,
            *users(1),
            trace=tuple((0.0, prompt, 8) for prompt in (320, 64, 1024, 160, 640)),  # in turn
            only=("large-budget",),
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
    scales={"gpu": ON_A_GPU},
    dummy=on_random_weights,
)
