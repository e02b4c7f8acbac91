"""Paged KV: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from labs.harness.spec import theory
from labs.harness.spec.declare import (
    ANY,
    counter,
    echoes,
    falls,
    forecast,
    predicts,
    rises,
    sends,
    users,
)
from labs.harness.spec.lab import SLO, Evidence, Lab, Point, Variant
from labs.harness.spec.theory import KWON, ROOFLINE
from loadtests.workload import Exponential, Prefix
from serving import metrics

AINSLIE = "Ainslie et al., GQA, EMNLP 2023"
MOST_REPLAYED = 1024  # requests
Lengths = Sequence[tuple[int, int]]  # (prompt, output) tokens of each request


def held_tokens(point: Point, block: int) -> float:
    """Return the tokens' room that a request holds in blocks of this size, at a step's mean.

    A request that has yielded w tokens holds its prompt and those w, in whole blocks. Long requests
    take more steps, and count for as many.
    """
    steps = sum(output for _, output in point.lengths)
    held = sum(
        _blocks_up_to(prompt + output - 1, block) - _blocks_up_to(prompt - 1, block)
        for prompt, output in point.lengths
    )
    return block * held / steps


def _blocks_up_to(tokens: int, block: int) -> int:
    """Return the sum of the blocks that 1, 2, ... and `tokens` tokens take."""
    full, rest = divmod(tokens, block)
    return block * full * (full + 1) // 2 + rest * (full + 1)


def admitted(point: Point) -> float:
    """Return how many requests run at once: all in flight, the limit, or what the blocks hold.

    The engine keeps one block for itself.
    """
    block = point.flags.block_size
    held = (point.kv_room_tokens - block) / held_tokens(point, block)
    return min(point.flags.at_once(point.load.users), held)


@predicts(
    "min(B, max-num-seqs, (C - b) / mean tokens held), treatment / baseline",
    "what the running requests hold together stays near its mean",
    "a request that waits or is preempted is not in decode",
    source=KWON,
)
def admitted_ratio(treatment: Point, baseline: Point) -> float:
    return admitted(treatment) / admitted(baseline)


@predicts(
    "roofline throughput of the requests that run at once, treatment / baseline",
    "the costs that the roofline leaves out do not grow with the batch",
    source=KWON,
)
def throughput_ratio(treatment: Point, baseline: Point) -> float:
    treated, untreated = (theory.throughput_of(p, admitted(p)) for p in (treatment, baseline))
    return treated / untreated


def kept_free_blocks(watermark: float, blocks: float) -> int:
    """Return the blocks that stay free where a request is admitted beside others, as in vLLM."""
    return int(watermark * blocks)


@dataclass(frozen=True)
class Replayed:
    """The means of a replay over its steps."""

    running: float  # requests at once
    written_tokens: float
    held_tokens: float
    preempted: int
    tokens: int  # that were written in all steps together

    @property
    def useful(self) -> float:
        """The share of the memory held that something was written to."""
        return self.written_tokens / self.held_tokens

    @property
    def wasted_tokens(self) -> float:
        """Tokens' room that each running request holds and has not written."""
        return (self.held_tokens - self.written_tokens) / self.running


def replay(
    lengths: Lengths,
    users: int,
    room_tokens: float,
    block: int,
    stretch_tokens: int = 0,
    kept_free_tokens: float = 0,
) -> Replayed | None:
    """Replay the allocation of requests that queue for `room_tokens`, a token each in every step.

    A request holds its tokens in whole blocks, or `stretch_tokens` from its first step to its last
    where that is given (contiguous allocation). At most `users` run at once. As in vLLM, a request
    is admitted once its prompt fits, and beside others only if `kept_free_tokens` stay free; where
    one that runs finds no block, the newest gives its own back, goes to the front of the queue, and
    later computes again what it had. The end, where the queue is empty, is left out. None where
    some request alone does not fit, or none ever waits.
    """

    def held(prompt: int, written: int) -> int:
        return stretch_tokens or block * -(-(prompt + written) // block)

    if max(held(prompt, output - 1) for prompt, output in lengths) > room_tokens:
        return None
    queue = deque((prompt, output, 0) for prompt, output in lengths)
    running: list[tuple[int, int, int]] = []  # (prompt, output, written so far), the newest last
    steps = requests = written = taken_in_all = preempted = 0
    while True:
        taken = sum(held(p, w) for p, _, w in running)
        lacking = taken > room_tokens
        while taken > room_tokens:
            prompt, _, done = newest = running.pop()
            queue.appendleft(newest)
            taken -= held(prompt, done)
            preempted += 1
        while queue and not lacking and len(running) < users:
            prompt, _, done = queue[0]
            kept = kept_free_tokens if running else 0
            if taken + held(prompt, done) + kept > room_tokens:
                break
            running.append(queue.popleft())
            taken += held(prompt, done)
        if not queue:
            break
        steps, requests = steps + 1, requests + len(running)
        taken_in_all += taken
        written += sum(p + w for p, _, w in running)
        running = [(p, o, w + 1) for p, o, w in running if w + 1 < o]
    if not steps:
        return None
    return Replayed(requests / steps, written / steps, taken_in_all / steps, preempted, requests)


replay_once = lru_cache(maxsize=256)(replay)  # whatever the ceilings: claims and cards share it


def replayed(point: Point, watermark: float | None = None) -> Replayed | None:
    """Replay what a point is sent in the blocks that it has, by its own watermark or another.

    The engine keeps one block for itself.
    """
    block, room = point.flags.block_size, point.kv_room_tokens
    share = point.flags.watermark if watermark is None else watermark
    return replay_once(
        point.lengths[:MOST_REPLAYED],
        point.load.users,
        room - block,
        block,
        kept_free_tokens=block * kept_free_blocks(share, room / block),
    )


@predicts(
    "preemptions in a replay of the blocks, treatment / baseline, and 1/2 on both sides"
    " so that a ratio exists",
    "a step is a token of each running request",
    "prefill takes no time",
    source=KWON,
)
def preempted_ratio(treatment: Point, baseline: Point) -> float:
    def preempted(point: Point) -> float:
        return (done.preempted if (done := replayed(point)) else 0) + 0.5

    return preempted(treatment) / preempted(baseline)


@predicts(
    "blocks x block size, or floor(memory / (b x 2 layers KV-heads head-dim bytes)) b", source=KWON
)
def capacity(point: Point) -> float:
    return point.kv_room_tokens


@predicts("KV heads, baseline / treatment, in whole blocks", source=AINSLIE)
def capacity_ratio(fewer: Point, more: Point) -> float:
    return fewer.kv_room_tokens / more.kv_room_tokens


@predicts(
    "(weight bytes + context x KV bytes a token) grouped / one KV head a query head",
    "reading is all that a step does",
    source=ROOFLINE,
)
def step_ratio(grouped: Point, every: Point) -> float:
    return theory.step_of(grouped) / theory.step_of(every)


PAGED = Variant(name="paged", flags={"block-size": 32, "num-gpu-blocks-override": 48})
GQA = Variant(
    name="gqa",
    flags={"block-size": 32, "max-model-len": 2176, "enable-prefix-caching": True},
)
VARIANTS = (
    PAGED,
    PAGED.but("large-blocks", {"block-size": 128, "num-gpu-blocks-override": 12}),
    PAGED.but("contiguous", {"max-num-seqs": 6}),
    PAGED.but("watermark", {"watermark": 0.05}),
    GQA,
    GQA.but("mha", weights="mha"),
)


def own_value(label: str, flag: str, variants: Sequence[Variant]) -> tuple[Evidence, ...]:
    """Ask for each variant's own value of a flag under a label of the cache's configuration."""
    return echoes(metrics.CACHE_CONFIG, label, {v.name: f"--{flag}" for v in variants})


CLAIMS = (
    rises("admitted", "batch", "paged / contiguous", "mixed", by=admitted_ratio),
    rises("throughput", "output_tokens_per_s", "paged / contiguous", "mixed", by=throughput_ratio),
    rises(
        "blocks",
        "batch",
        "paged / large-blocks",
        "mixed",
        by=admitted_ratio,
        coupled="the same memory has fewer blocks where they are larger",
    ),
    falls("watermark", "preemptions", "watermark / paged", "growing", by=preempted_ratio),
    rises("heads", "kv_capacity_tokens", "gqa / mha", "near", by=capacity_ratio),
    falls("context", "tpot_mean_s", "gqa / mha", "far", by=step_ratio),
)
EVIDENCE = (
    *own_value("block_size", "block-size", VARIANTS),
    *own_value("num_gpu_blocks", "num-gpu-blocks-override", VARIANTS[:4]),
    *echoes(metrics.ENGINE_CONFIG, "watermark", {"watermark": "--watermark"}),
    counter(metrics.PREEMPTIONS, "rises", "paged", "growing"),
    counter(metrics.PREEMPTIONS, "stays", "contiguous"),
    counter(metrics.PREEMPTIONS, "stays", ANY, "near"),
    counter(metrics.PREEMPTIONS, "stays", ANY, "far"),
)
# A GPU's: on a CPU a seventh engine does not fit beside six in 24 GiB
MQA = GQA.but("mqa", weights="mqa")
WITH_ONE_HEAD: dict[str, Any] = {
    "variants": [v.model_dump() for v in (*VARIANTS, MQA)],
    "evidence": (*EVIDENCE, *own_value("block_size", "block-size", [MQA])),
    "claims": (
        *CLAIMS,
        rises("one-head", "kv_capacity_tokens", "mqa / gqa", "near", by=capacity_ratio),
    ),
}

LAB = Lab(
    name="paged-kv",
    answers=("KV-3", "KV-4", "KV-5", "KO-3"),
    variants=VARIANTS,
    flags={
        "max-model-len": 256,
        "enable-prefix-caching": False,
        "enforce-eager": True,
        "kv-cache-memory-bytes": 160 * 2**20,
    },
    workloads=(
        sends(
            "mixed",
            40,
            Exponential(mean_tokens=16, max_tokens=64),
            *users(16),
            only=("paged", "large-blocks", "contiguous"),
        ),
        sends(
            "growing",  # more than fit once they have grown
            30,
            Exponential(mean_tokens=20, max_tokens=48),
            *users(28),
            only=("paged", "watermark"),
        ),
        sends("near", 128, 16, *users(1), only=("gqa", "mha")),
        sends(
            "far",
            2048,
            16,
            *users(1),
            prefix=Prefix(tokens=1984),
            primed=True,  # so that a trial is decode, and hardly any prefill
            only=("gqa", "mha"),
        ),
    ),
    claims=CLAIMS,
    forecasts=(forecast("capacity", "kv_capacity_tokens", capacity, workload="near"),),
    evidence=EVIDENCE,
    findings=("allocator", "watermark", "heads", "tiles-and-pages"),
    plots=("allocator",),
    slo=SLO(ttft_s=2, tpot_s=0.15),
    requests=256,
    warmup_s=0.6,
    window_s=3,
    scales={"gpu": WITH_ONE_HEAD},
)
