"""Many samples: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness.spec import theory
from labs.harness.spec.declare import (
    counter,
    echoes,
    falls,
    forecast,
    predicts,
    rises,
    sends,
    unchanged,
    variants,
)
from labs.harness.spec.lab import SLO, Lab, Point
from labs.harness.spec.theory import KWON, ROOFLINE
from loadtests.arrivals import Waves
from loadtests.workload import Samples, Workload
from serving import metrics


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


@predicts(
    "n L / (t_prefill(P) + (n - 1) t_prefill(P - found) + (L - 1) t(n)), and its ratio",
    "all samples of a prompt start and end together",
    "prefill runs at the measured rate, decode on the roofline",
    "sampling, tokenizing, scheduling and HTTP take no time",
    source=f"{KWON}; {ROOFLINE}",
)
def throughput_ratio(treatment: Point, baseline: Point) -> float:
    return tokens_per_s(treatment) / tokens_per_s(baseline)


@predicts(
    "(FLOP(P) + (n - 1) FLOP(P - found)) / (n FLOP(P))",
    "all samples have their first token when all prompts are prefilled",
    "tokenizing, scheduling and HTTP take no time",
    source=KWON,
)
def first_token_ratio(treatment: Point, baseline: Point) -> float:
    return prefill_s(treatment) / prefill_s(baseline)


@predicts(
    "(n - 1) floor((P - 1) / b) b / (n P)",
    "no prompt finds more than its own samples computed: the chat template that all prompts share"
    " is shorter than a block",
    source=KWON,
)
def hit_rate(point: Point) -> float:
    n = point.sequences
    return (n - 1) * cached_tokens(point) / (n * point.prompt_tokens)


FEW, MANY = 8, 32
SAMPLED = {"one": 1, "apart": FEW, "together": FEW, "many": MANY, "many-together": MANY}
SHARING = tuple(name for name, count in SAMPLED.items() if count > 1)  # find their prompt cached


def samples(name: str, *only: str, together: bool = False) -> Workload:
    """Ask for the samples of one prompt after another: apart, or all in one request."""
    count = SAMPLED[name]
    asked = Samples(count=count, together=together)
    return sends(name, 320, 24, Waves(size=1 if together else count), samples=asked, only=only)


# a claim's second load is the baseline's alone: each number of samples has a load of its own
OF_ONE, OF_EIGHT, OF_32 = (f" / waves:{n}" for n in (1, FEW, MANY))
ANOTHER_WAVE = "the same samples take a wave of one request, or of as many requests"
ANOTHER_NUMBER = "a wave holds all samples of one prompt, so it grows with their number"
RATE = "output_tokens_per_s"

LAB = Lab(
    name="many-samples",
    answers=("TT-1", "TT-2", "TT-3", "TT-4"),
    variants=variants("enable-prefix-caching", off=False, on=True),
    flags={
        "max-model-len": 1024,
        "enforce-eager": True,
        "block-size": 32,
        "kv-cache-memory-bytes": 512 * 2**20,
    },
    workloads=(
        samples("one", "on"),
        samples("apart"),
        samples("together", together=True),
        samples("many", "on"),
        samples("many-together", "on", together=True),
    ),
    claims=(
        rises("shared", RATE, "on / off", "apart", by=throughput_ratio),
        falls("first-token", "ttft_mean_s", "on / off", "apart", by=first_token_ratio),
        unchanged(
            "together",
            RATE,
            "on",
            "together / apart",
            OF_EIGHT,
            by=throughput_ratio,
            coupled=ANOTHER_WAVE,
        ),
        unchanged(
            "many-together",
            RATE,
            "on",
            "many-together / many",
            OF_32,
            by=throughput_ratio,
            coupled=ANOTHER_WAVE,
        ),
        rises("together-shared", RATE, "on / off", "together", by=throughput_ratio),
        rises(
            "batch",
            RATE,
            "on",
            "apart / one",
            OF_ONE,
            by=throughput_ratio,
            coupled=ANOTHER_NUMBER,
        ),
        rises(
            "many",
            RATE,
            "on",
            "many / apart",
            OF_EIGHT,
            by=throughput_ratio,
            coupled=ANOTHER_NUMBER,
        ),
    ),
    forecasts=tuple(
        forecast(f"hit-rate-{name}", "prefix_hit_rate", hit_rate, "on", name) for name in SHARING
    ),
    evidence=(
        *echoes(metrics.CACHE_CONFIG, "enable_prefix_caching", {"off": "False", "on": "True"}),
        counter(metrics.PREFIX_HITS, "stays", "off"),
        *(counter(metrics.PREFIX_HITS, "rises", "on", name) for name in SHARING),
        counter(metrics.PREEMPTIONS, "stays"),
    ),
    probes=("votes", "steps"),
    probed=("on",),
    findings=(
        "sampling-cost",
        "voting",
        "task-kinds",
        "larger-model",
        "search",
        "step-check",
        "verifier",
    ),
    plots=("sampling",),
    needs_text=(
        *("votes", "votes-quick", "steps", "steps-quick"),
        *("voting", "task-kinds", "larger-model", "search", "step-check", "verifier"),
    ),
    slo=SLO(ttft_s=2, tpot_s=0.15),
    requests=128,
    warmup_s=0.5,
    window_s=3,  # of whole waves
    repeats=3,
)
