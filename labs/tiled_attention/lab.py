"""Tiled attention: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Forecast, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Fixed, Prefix, Workload
from serving import metrics

DAO = "Dao et al., FlashAttention, 2022"
FLASH_DECODING = "Dao et al., Flash-Decoding, 2023"
ROOFLINE = "Williams et al., Roofline, 2009"
POWERS = {
    ("memory", "untiled"): 2,
    ("memory", "tiled"): 1,
    ("time", "untiled"): 2,
    ("time", "tiled"): 2,
}
"""(figure, kernel) -> the power of N with which it grows."""

# ------------------------------------------------------------------- attention by itself


def arithmetic(lab: Lab, point: Point) -> dict[str, Prediction]:
    """Write down beforehand what the lab's findings are held against."""
    shape, ceilings = point.shape, point.ceilings
    predictions = {
        f"growth of {figure}, {kernel}": Prediction(
            value=power,
            formula="N" if power == 1 else f"N^{power:g}",
            assumptions=("no part that does not grow is counted",),
            source=DAO,
        )
        for (figure, kernel), power in POWERS.items()
    }
    for tokens in lab.attention_tokens:
        predictions[f"memory, untiled at {tokens}"] = Prediction(
            value=2 * theory.scores_bytes(shape, tokens),
            formula="2 heads N^2 4 bytes: the scores and their softmax, in float32",
            source=DAO,
        )
        predictions[f"time, tiled / untiled at {tokens}"] = Prediction(
            value=1.0,
            kind="ceiling",
            formula="1: the same arithmetic, and less traffic",
            source=DAO,
        )
    prompts = {
        w.prompt_tokens.tokens
        for w in lab.workloads
        if isinstance(w.prompt_tokens, Fixed) and not w.prefix
    }
    for tokens in sorted(prompts):
        predictions[f"share of TTFT that grows as N^2 at {tokens}"] = Prediction(
            value=theory.quadratic_share(shape, tokens),
            formula="2 L d heads N^2 / (2 P N + 2 L d heads N^2)",
            assumptions=("every operation runs at the same rate",),
            source="Kaplan et al. 2020, table 1",
        )
    predictions["TPOT for each token of context"] = Prediction(
        value=shape.kv_bytes_per_token() / ceilings.memory_bandwidth_bytes_per_s,
        kind="floor",
        formula="KV bytes a token / bandwidth",
        assumptions=("no key or value of an earlier step is left in a cache",),
        source=ROOFLINE,
    )
    return predictions


# ------------------------------------------------------------------------- on the engine


def ttft_ratio(longer: Point, shorter: Point) -> Prediction:
    def prefill_s(point: Point) -> float:
        return theory.prefill_left_s(point.shape, point.ceilings, point.prompt_tokens, 0)

    return Prediction(
        value=prefill_s(longer) / prefill_s(shorter),
        formula="max(FLOP / rate, bytes / bandwidth), FLOP = 2 P N + 2 L d heads N^2",
        assumptions=("attention runs at the same rate as all other arithmetic",),
        source="Kaplan et al. 2020, table 1",
    )


def step_ratio(far: Point, near: Point) -> Prediction:
    def step_s(point: Point) -> float:
        return theory.decode_step_s(
            point.shape, point.ceilings, point.load.users, point.context_tokens
        )

    return Prediction(
        value=step_s(far) / step_s(near),
        formula="(weight bytes + context x KV bytes a token), far / near",
        assumptions=("reading is all that a step does",),
        source=ROOFLINE,
    )


def same_step(split: Point, unsplit: Point) -> Prediction:
    return Prediction(
        value=1.0,
        formula="1: one piece holds all of a short context",
        assumptions=("choosing the number of splits takes no time",),
        source=FLASH_DECODING,
    )


def split_ratio(split: Point, unsplit: Point) -> Prediction:
    """Predict how long a step is where only KV heads' own processors read, beside all of them.

    A processor is taken to read an equal share of the bandwidth, and a card to have 132 of them.
    """

    def step_s(point: Point, share: float) -> float:
        bandwidth = point.ceilings.memory_bandwidth_bytes_per_s
        return (point.shape.weight_bytes + point.kv_bytes() / share) / bandwidth

    share = min(1.0, unsplit.shape.kv_heads / PROCESSORS)
    return Prediction(
        value=step_s(split, 1.0) / step_s(unsplit, share),
        kind="floor",
        formula="(weights + KV) / (weights + KV x processors / KV heads)",
        assumptions=(
            f"the GPU has {PROCESSORS} processors, and each reads an equal share of the bandwidth",
        ),
        source=FLASH_DECODING,
    )


def first_token(point: Point) -> Prediction:
    return Prediction(
        value=theory.prefill_left_s(point.shape, point.ceilings, point.prompt_tokens, 0),
        kind="floor",
        formula="max(FLOP / rate, bytes / bandwidth)",
        assumptions=("no launch, scheduling or sampling cost",),
        source=ROOFLINE,
    )


PROCESSORS = 132  # streaming multiprocessors of an H100 and an H200, SXM

DEFAULT = Variant(name="default")
UNSPLIT = DEFAULT.but(
    "unsplit", {"attention-config": {"flash_attn_max_num_splits_for_cuda_graph": 1}}
)
ONE = (Concurrent(users=1),)


def prompt(name: str, tokens: int, output_tokens: int = 1) -> Workload:
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=tokens),
        output_tokens=Fixed(tokens=output_tokens),
        only=("default",),
        loads=ONE,
    )


def context(name: str, tokens: int, output_tokens: int = 16) -> Workload:
    """Decode behind so many tokens; all but the last 64 are in the cache before a trial begins."""
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=tokens),
        output_tokens=Fixed(tokens=output_tokens),
        prefix=Prefix(tokens=tokens - 64),
        primed=True,
        loads=ONE,
    )


CLAIMS = (
    Claim(
        name="prompt",
        metric="ttft_mean_s",
        treatment=Arm(variant="default", workload="longest"),
        baseline=Arm(variant="default", workload="short"),
        expect="rises",
        predict=ttft_ratio,
    ),
    Claim(
        name="context",
        metric="tpot_mean_s",
        treatment=Arm(variant="default", workload="far"),
        baseline=Arm(variant="default", workload="near"),
        expect="rises",
        predict=step_ratio,
    ),
)
SPLIT_CLAIMS = (
    Claim(
        name="split",
        metric="tpot_mean_s",
        treatment=Arm(variant="default", workload="far"),
        baseline=Arm(variant="unsplit", workload="far"),
        expect="falls",
        predict=split_ratio,
    ),
    Claim(
        name="split-near",
        metric="tpot_mean_s",
        treatment=Arm(variant="default", workload="near"),
        baseline=Arm(variant="unsplit", workload="near"),
        expect="unchanged",
        predict=same_step,
    ),
)
EVIDENCE = (
    Evidence(arm=Arm(), kind="stays", metric=metrics.PREEMPTIONS),
    Evidence(arm=Arm(workload="far"), kind="rises", metric=metrics.PREFIX_HITS),
)
SPLITTING = {
    "variants": [DEFAULT.model_dump(), UNSPLIT.model_dump()],
    "claims": (*CLAIMS, *SPLIT_CLAIMS),
    "evidence": (
        *EVIDENCE,
        # splits are limited in CUDA graphs alone
        Evidence.echo("default", metrics.ENGINE_CONFIG, "enforce_eager", "False"),
        Evidence.echo("unsplit", metrics.ENGINE_CONFIG, "max_num_splits", "1"),
        # and passed to this version alone
        Evidence.echo("unsplit", metrics.ENGINE_CONFIG, "flash_attention", "3"),
    ),
}
"""On the classes of memory with GPUs whose kernels take the number of splits from vLLM.

Where one's do not, as an A100's, the evidence is missing, and the verdicts are withheld.
"""

LAB = Lab(
    name="tiled-attention",
    answers=("KO-1", "KO-4"),
    variants=(DEFAULT,),
    flags={
        "max-model-len": 2048,
        "max-num-batched-tokens": 2048,  # a prompt in one step
        "enable-prefix-caching": True,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 256 * 2**20,
    },
    workloads=(
        prompt("short", 128),
        prompt("long", 512),
        prompt("longest", 1536),
        context("near", 128),
        context("far", 1536),
    ),
    claims=CLAIMS,
    forecasts=(
        Forecast(name="ttft", metric="ttft_mean_s", arm=Arm(workload="longest"),
                 predict=first_token),
    ),
    evidence=EVIDENCE,
    attention_tokens=(1024, 2048, 4096, 8192, 16384),
    arithmetic=arithmetic,
    findings=("tiling", "long-prompts", "long-contexts"),
    plots=("growth", "lengths"),
    slo=SLO(ttft_s=10, tpot_s=0.2),
    requests=64,
    repeats=3,  # of long requests; claims that are undecided get more
    warmup_s=1,
    window_s=4,
    scales={"gpu-80": SPLITTING, "gpu-141": SPLITTING},
)  # fmt: skip
