"""Tiled attention: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

import math

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
    users,
)
from labs.harness.spec.lab import SLO, Lab, Point, Prediction, Variant
from labs.harness.spec.theory import DAO, KAPLAN, ROOFLINE
from loadtests.workload import Fixed, Prefix, Workload
from serving import metrics

FLASH_DECODING = "Dao et al., Flash-Decoding, 2023"
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
            source=f"{KAPLAN}, table 1",
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


@predicts(
    "max(FLOP / rate, bytes / bandwidth), FLOP = 2 P N + 2 L d heads N^2",
    "attention runs at the same rate as all other arithmetic",
    source=f"{KAPLAN}, table 1",
)
def ttft_ratio(longer: Point, shorter: Point) -> float:
    return theory.first_token_of(longer) / theory.first_token_of(shorter)


@predicts(
    "(weight bytes + context x KV bytes a token), far / near",
    "reading is all that a step does",
    source=ROOFLINE,
)
def step_ratio(far: Point, near: Point) -> float:
    return theory.step_of(far) / theory.step_of(near)


@predicts(
    "1: one piece holds all of a short context",
    "choosing the number of splits takes no time",
    source=FLASH_DECODING,
)
def same_step(split: Point, unsplit: Point) -> float:
    return 1.0


PROCESSORS = 132  # streaming multiprocessors of an H100 and an H200, SXM


@predicts(
    "(weights + KV) / (weights + KV x processors / KV heads)",
    f"the GPU has {PROCESSORS} processors, and each reads an equal share of the bandwidth",
    source=FLASH_DECODING,
    kind="floor",
)
def split_ratio(split: Point, unsplit: Point) -> float:
    """Predict how long a step is where only KV heads' own processors read, beside all of them."""

    def step_s(point: Point, share: float) -> float:
        bandwidth = point.ceilings.memory_bandwidth_bytes_per_s
        return (point.shape.weight_bytes + point.kv_bytes() / share) / bandwidth

    share = min(1.0, unsplit.shape.kv_heads / PROCESSORS)
    return step_s(split, 1.0) / step_s(unsplit, share)


def splits_ratio(kv_heads: int, processors: int) -> float:
    """Predict attention's time with each KV head's keys split among all processors / whole.

    A piece is work for one processor: whole heads take turns where there are more than processors.
    """
    return kv_heads / processors / math.ceil(kv_heads / processors)


@predicts(
    "max(FLOP / rate, bytes / bandwidth)",
    "no launch, scheduling or sampling cost",
    source=ROOFLINE,
    kind="floor",
)
def first_token(point: Point) -> float:
    return theory.first_token_of(point)


DEFAULT = Variant(name="default")
UNSPLIT = DEFAULT.but(
    "unsplit", {"attention-config": {"flash_attn_max_num_splits_for_cuda_graph": 1}}
)


def prompt(name: str, tokens: int) -> Workload:
    return sends(name, tokens, 1, *users(1), only=("default",))


def context(name: str, tokens: int) -> Workload:
    """Decode behind so many tokens; all but the last 64 are in the cache before a trial begins."""
    return sends(name, tokens, 16, *users(1), prefix=Prefix(tokens=tokens - 64), primed=True)


CLAIMS = (
    rises("prompt", "ttft_mean_s", "default", "longest / short", by=ttft_ratio),
    rises("context", "tpot_mean_s", "default", "far / near", by=step_ratio),
)
EVIDENCE = (
    counter(metrics.PREEMPTIONS, "stays"),
    counter(metrics.PREFIX_HITS, "rises", workload="far"),
)
SPLITTING = {
    "variants": [DEFAULT.model_dump(), UNSPLIT.model_dump()],
    "claims": (
        *CLAIMS,
        falls("split", "tpot_mean_s", "default / unsplit", "far", by=split_ratio),
        unchanged("split-near", "tpot_mean_s", "default / unsplit", "near", by=same_step),
    ),
    "evidence": (
        *EVIDENCE,
        # splits are limited in CUDA graphs alone
        *echoes(metrics.ENGINE_CONFIG, "enforce_eager", {"default": "False"}),
        *echoes(metrics.ENGINE_CONFIG, "max_num_splits", {"unsplit": "1"}),
        # and passed to this version alone
        *echoes(metrics.ENGINE_CONFIG, "flash_attention", {"unsplit": "3"}),
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
    forecasts=(forecast("ttft", "ttft_mean_s", first_token, workload="longest"),),
    evidence=EVIDENCE,
    attention_tokens=(1024, 2048, 4096, 8192, 16384),
    arithmetic=arithmetic,
    findings=("tiling", "long-prompts", "long-contexts", "splits"),
    plots=("growth", "lengths"),
    slo=SLO(ttft_s=10, tpot_s=0.2),
    requests=64,
    repeats=3,  # of long requests; claims that are undecided get more
    warmup_s=1,
    window_s=4,
    scales={"gpu-80": SPLITTING, "gpu-141": SPLITTING},
)
