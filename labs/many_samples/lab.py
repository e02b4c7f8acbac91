"""Many samples: what do n answers to one prompt cost, and what do voting and trying again buy?

A model that answers right now and then can be asked n times. Where something can check an answer (a
compiler, a test), one right answer of n is enough: *pass@n* is the chance of at least one. Where
nothing can, the answer given most often is taken: *majority voting*, or self-consistency. Both
spend compute at test time instead of on a larger model.

The engine makes n samples cheap twice over. They share their prompt, so with a *prefix cache* the
first sample prefills it and every other finds all its whole blocks but for the last token: n
samples find (n - 1) floor((P - 1) / b) b tokens of P-token prompts in blocks of b. And they decode
*side by side*: a step reads the weights once for all of them. Asking with `n=8` in one request is
another way to say the same. vLLM makes eight requests of it that share nothing but what the cache
holds; what is saved is one HTTP request and one tokenizing for eight.

Timed answers have one length each and are sampled at a temperature. Whole answers to small tasks
with exact solutions are asked for by a probe, one task at a time, so that the engine's seconds are
those of that task's samples alone.

Turn: the samples (`workloads.apart.samples.count` with `workloads.apart.loads`), the prompt
(`workloads.apart.prompt_tokens.tokens`), the block (`flags.block-size`).
"""

from __future__ import annotations

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Forecast, Lab, Point, Prediction, Variant
from loadtests.arrivals import Waves
from loadtests.workload import Fixed, Samples, Workload
from serving import metrics

BLOCKS_SOURCE = "Kwon et al., PagedAttention, SOSP 2023"


def cached_tokens(point: Point) -> int:
    """Return the tokens of a prompt that every sample but the first finds in the cache."""
    if not point.flags.enable_prefix_caching:
        return 0
    block = point.flags.block_size
    return (int(point.prompt_tokens) - 1) // block * block


def prefill_s(point: Point) -> float:
    """Return the seconds in which the prompts of all samples of a wave are prefilled."""
    shape, ceilings, prompt = point.shape, point.ceilings, point.prompt_tokens
    flop = theory.prefill_flops(shape, prompt)
    flop += (point.sequences - 1) * theory.prefill_flops(shape, prompt, cached_tokens(point))
    weights_s = shape.step_bytes(prompt) / ceilings.memory_bandwidth_bytes_per_s
    return max(flop / ceilings.flops_per_s, weights_s)


def tokens_per_s(point: Point) -> float:
    """Return the output tokens/s of waves of samples that start and end together."""
    step_s = theory.decode_step_s(
        point.shape, point.ceilings, point.sequences, point.context_tokens
    )
    wave_s = prefill_s(point) + (point.output_tokens - 1) * step_s
    return point.sequences * point.output_tokens / wave_s


def throughput_ratio(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=tokens_per_s(treatment) / tokens_per_s(baseline),
        formula="n L / (t_prefill(P) + (n - 1) t_prefill(P - found) + (L - 1) t(n)), and its ratio",
        assumptions=(
            "all samples of a prompt start and end together",
            "prefill runs at the measured rate, decode on the roofline",
            "sampling, tokenizing, scheduling and HTTP take no time",
        ),
        source=f"{BLOCKS_SOURCE}; Williams et al., Roofline, 2009",
    )


def first_token_ratio(treatment: Point, baseline: Point) -> Prediction:
    return Prediction(
        value=prefill_s(treatment) / prefill_s(baseline),
        formula="(FLOP(P) + (n - 1) FLOP(P - found)) / (n FLOP(P))",
        assumptions=(
            "all samples have their first token when all prompts are prefilled",
            "tokenizing, scheduling and HTTP take no time",
        ),
        source=BLOCKS_SOURCE,
    )


def hit_rate(point: Point) -> Prediction:
    n = point.sequences
    return Prediction(
        value=(n - 1) * cached_tokens(point) / (n * point.prompt_tokens),
        formula="(n - 1) floor((P - 1) / b) b / (n P)",
        assumptions=(
            "no prompt finds more than its own samples computed: the chat template that all prompts"
            " share is shorter than a block",
        ),
        source=BLOCKS_SOURCE,
    )


OFF = Variant(name="off", flags={"enable-prefix-caching": False})
ON = OFF.but("on", {"enable-prefix-caching": True})
FEW, MANY = 8, 32
SAMPLED = {"one": 1, "apart": FEW, "together": FEW, "many": MANY, "many-together": MANY}


def workload(name: str, together: bool = False, only: tuple[str, ...] = ()) -> Workload:
    """Ask for the samples of one prompt after another: apart, or all in one request."""
    count = SAMPLED[name]
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=320),
        output_tokens=Fixed(tokens=24),
        samples=Samples(count=count, together=together),
        only=only,
        loads=(Waves(size=1 if together else count),),
    )


SHARING = tuple(name for name, count in SAMPLED.items() if count > 1)  # find their prompt cached
# a load that one side names is the same on no other: each number of samples has its own
EIGHT = Arm(variant="on", workload="apart", load=f"waves:{FEW}")
THIRTY_TWO = Arm(variant="on", workload="many", load=f"waves:{MANY}")
ANOTHER_WAVE = "the same samples take a wave of one request, or of as many requests"
ANOTHER_NUMBER = "a wave holds all samples of one prompt, so it grows with their number"

LAB = Lab(
    name="many-samples",
    title="Many samples",
    question="A model is right only now and then: what does it cost to ask it many times, and what"
    " does it buy?",
    answers=("TT-1", "TT-2", "TT-3", "TT-4"),
    variants=(OFF, ON),
    flags={
        "max-model-len": 1024,
        "enforce-eager": True,
        "block-size": 32,
        "kv-cache-memory-bytes": 512 * 2**20,
    },
    workloads=(
        workload("one", only=("on",)),
        workload("apart"),
        workload("together", together=True),
        workload("many", only=("on",)),
        workload("many-together", together=True, only=("on",)),
    ),
    claims=(
        Claim(
            name="shared",
            title="With a prefix cache the samples of a prompt prefill it once",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="apart"),
            baseline=Arm(variant="off", workload="apart"),
            expect="rises",
            predict=throughput_ratio,
        ),
        Claim(
            name="first-token",
            title="With a prefix cache all samples of a prompt have their first token sooner",
            metric="ttft_mean_s",
            treatment=Arm(variant="on", workload="apart"),
            baseline=Arm(variant="off", workload="apart"),
            expect="falls",
            predict=first_token_ratio,
        ),
        Claim(
            name="together",
            title="Eight samples by `n=8` in one request cost the engine what eight requests do",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="together"),
            baseline=EIGHT,
            expect="unchanged",
            predict=throughput_ratio,
            coupled=ANOTHER_WAVE,
        ),
        Claim(
            name="many-together",
            title="32 samples by `n=32` in one request cost the engine what 32 requests do",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="many-together"),
            baseline=THIRTY_TWO,
            expect="unchanged",
            predict=throughput_ratio,
            coupled=ANOTHER_WAVE,
        ),
        Claim(
            name="together-shared",
            title="Samples by `n=8` share their prompt by the cache alone: without it, each"
            " prefills the prompt",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="together"),
            baseline=Arm(variant="off", workload="together"),
            expect="rises",
            predict=throughput_ratio,
        ),
        Claim(
            name="batch",
            title="Eight samples share the decode steps of one",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="apart"),
            baseline=Arm(variant="on", workload="one", load="waves:1"),
            expect="rises",
            predict=throughput_ratio,
            coupled=ANOTHER_NUMBER,
        ),
        Claim(
            name="many",
            title="Four times as many samples cost less than four times as much",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="many"),
            baseline=EIGHT,
            expect="rises",
            predict=throughput_ratio,
            coupled=ANOTHER_NUMBER,
        ),
    ),
    forecasts=tuple(
        Forecast(
            name=f"hit-rate-{name}",
            metric="prefix_hit_rate",
            arm=Arm(variant="on", workload=name),
            predict=hit_rate,
        )
        for name in SHARING
    ),
    evidence=(
        *(
            Evidence.echo(name, metrics.CACHE_CONFIG, "enable_prefix_caching", str(name == "on"))
            for name in ("off", "on")
        ),
        Evidence(arm=Arm(variant="off"), kind="stays", metric=metrics.PREFIX_HITS),
        *(
            Evidence(
                arm=Arm(variant="on", workload=name), kind="rises", metric=metrics.PREFIX_HITS
            )
            for name in SHARING
        ),
        Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
    ),
    probes=("votes",),
    probed=("on",),
    findings=("sampling-cost", "voting", "task-kinds", "larger-model", "verifier"),
    plots=("sampling",),
    needs_text=("votes", "votes-quick", "voting", "task-kinds", "larger-model", "verifier"),
    slo=SLO(ttft_s=2, tpot_s=0.15),
    requests=128,
    warmup_s=0.5,
    window_s=3,  # of whole waves
    repeats=3,
    scales={
        "cpu": {"most_s": 300.0},  # the probe takes a minute
        "gpu": {
            "flags": {
                "block-size": 16,
                "max-num-seqs": 256,
            },
            **{
                f"workloads.{name}.{part}.tokens": tokens
                for name in SAMPLED
                for part, tokens in (("prompt_tokens", 4000), ("output_tokens", 128))
            },
            "requests": 192,  # of 4,000 tokens, which take long to write
            "warmup_s": 2,
            "window_s": 6,
            "next_knobs": (
                "SET='requests=768 workloads.many.samples.count=128"
                " workloads.many.loads=[\"waves:128\"]'"
                " asks for 128 samples: are the steps still shared as well?",
                'SET="workloads.apart.prompt_tokens.tokens=512" shortens the prompt: there is less'
                " to share",
                'SET="flags.block-size=64" coarsens what can be shared: hits are floored to whole'
                " blocks",
            ),
        },
    },
    quick={"repeats": 1, "window_s": 2.5, "probes": ("votes-quick",)},
    limits={
        "cpu": "Hits, and that `n` in one request is n requests to the engine, are vLLM's own and"
        " carry over. What n samples cost does not: a large part of a step here is the cost of"
        " launching small operations, so a larger batch looks cheaper than on a GPU. A model of 135"
        " M parameters solves few of the tasks; a larger one solves others, and gains elsewhere.",
        "gpu": "Small tasks with exact solutions: what voting buys on them says little of essays."
        " The model votes by itself; no reward model and no search was measured.",
    },
    next_knobs=(
        "SET='workloads.many.samples.count=64 workloads.many.loads=[\"waves:64\"]' asks for 64"
        " samples: are the steps still shared as well?",
        'SET="workloads.apart.prompt_tokens.tokens=64" shortens the prompt: there is less to share',
        'SET="flags.block-size=128" coarsens what can be shared: hits are floored to whole blocks',
    ),
)  # fmt: skip
