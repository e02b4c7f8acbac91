"""Many samples: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

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
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="apart"),
            baseline=Arm(variant="off", workload="apart"),
            expect="rises",
            predict=throughput_ratio,
        ),
        Claim(
            name="first-token",
            metric="ttft_mean_s",
            treatment=Arm(variant="on", workload="apart"),
            baseline=Arm(variant="off", workload="apart"),
            expect="falls",
            predict=first_token_ratio,
        ),
        Claim(
            name="together",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="together"),
            baseline=EIGHT,
            expect="unchanged",
            predict=throughput_ratio,
            coupled=ANOTHER_WAVE,
        ),
        Claim(
            name="many-together",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="many-together"),
            baseline=THIRTY_TWO,
            expect="unchanged",
            predict=throughput_ratio,
            coupled=ANOTHER_WAVE,
        ),
        Claim(
            name="together-shared",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="together"),
            baseline=Arm(variant="off", workload="together"),
            expect="rises",
            predict=throughput_ratio,
        ),
        Claim(
            name="batch",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="apart"),
            baseline=Arm(variant="on", workload="one", load="waves:1"),
            expect="rises",
            predict=throughput_ratio,
            coupled=ANOTHER_NUMBER,
        ),
        Claim(
            name="many",
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
            Evidence(arm=Arm(variant="on", workload=name), kind="rises", metric=metrics.PREFIX_HITS)
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
)
