"""Agent sessions: what is asked of them. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from statistics import fmean
from typing import Any

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
)
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from labs.harness.spec.theory import KWON
from loadtests.arrivals import LogNormal, OfSessions, Sessions
from loadtests.workload import Chat, Exponential, Salted, Workload
from serving import metrics

MATTSON = "Mattson et al., Evaluation techniques for storage hierarchies, IBM Systems J., 1970"


def turn_blocks(point: Point, nth: slice = slice(None)) -> float:
    """Return the blocks that the nth of all turns fill on average, prompts and answers."""
    block = point.flags.block_size
    return fmean(-(-(prompt + output) // block) for prompt, output in point.lengths[nth])


def others_blocks(point: Point) -> list[float]:
    """Return the blocks that the other sessions use in each gap of one.

    One that is at any moment of its own gap has g / E[gap] turns in a gap of length g, and one at
    least with the probability E[min(gap, g)] / E[gap] (a renewal process): with certainty where all
    gaps are equal. The first uses a turn's blocks, each further one those that a turn adds.
    """
    load, turns = point.load, point.turns
    gaps_s = load.gaps_s if isinstance(load, OfSessions) and load.gap_s else (1.0,)
    all_s, added = fmean(gaps_s), turn_blocks(point, slice(turns - 1, None, turns)) / turns
    blocks = []
    for own_s in gaps_s:
        first = fmean(min(gap_s, own_s) for gap_s in gaps_s) / all_s
        used = first * turn_blocks(point) + (own_s / all_s - first) * added
        blocks.append((load.users - 1) * used)
    return blocks


def room_blocks(point: Point) -> float:
    """Return the blocks of the cache, without the one that vLLM keeps to itself."""
    return point.kv_room_tokens // point.flags.block_size - 1


def sessions_held(point: Point) -> float:
    """Return the sessions whose last turn the cache holds, at their mean length."""
    return room_blocks(point) / turn_blocks(point)


def found_tokens(point: Point) -> float:
    """Return the mean tokens of a turn's prompt that are found in the cache.

    A turn finds the whole blocks of the prompt before it, the first ones last to be forgotten, as
    far as they fit the cache beside what the other sessions used meanwhile; none under a salt of
    its own.
    """
    if point.workload.chat and point.workload.chat.salted == "request":
        return 0.0
    block, last = point.flags.block_size, point.turns - 1
    earlier = [p // block for i, (p, _) in enumerate(point.lengths) if i % point.turns < last]
    left = [max(0.0, room_blocks(point) - others) for others in others_blocks(point)]
    found_blocks = sum(fmean(min(room, blocks) for room in left) for blocks in earlier)
    return found_blocks * block / len(point.lengths)


@predicts(
    "t_prefill(tokens left) of the one / of the other",
    "between two turns of a session each other one has those of a renewal process",
    "prefill runs at one rate, and no request waits for another",
    source=f"LRU: {MATTSON}; blocks: {KWON}",
)
def ttft_ratio(one: Point, other: Point) -> float:
    def first_s(point: Point) -> float:
        return theory.first_token_of(point, found_tokens(point))

    return first_s(one) / first_s(other)


@predicts(
    "min(blocks before, memory - blocks of the others' turns), of the one / of the other",
    "the least recently used block is forgotten first, whenever that was",
    "a session's turns are sent equally often",
    source=f"LRU: {MATTSON}; blocks: {KWON}",
)
def hits_ratio(one: Point, other: Point) -> float:
    return found_tokens(one) / found_tokens(other)


@predicts("1", "a priority decides who waits, and gives away no other block")
def unmoved(_one: Point, _other: Point) -> float:
    return 1.0


@predicts(
    "sum over turns of min(blocks before, memory - blocks of the others' turns) b / prompts",
    "what the memory holds is counted in blocks, without the one that vLLM keeps to itself",
    source=f"LRU: {MATTSON}; blocks: {KWON}",
)
def hit_rate(point: Point) -> float:
    return found_tokens(point) / point.prompt_tokens


FEW, MANY = Sessions(users=2, gap_s=2), Sessions(users=5, gap_s=2)
SLOW, UNEVEN = Sessions(users=5, gap_s=4), LogNormal(users=5, gap_s=2, sigma=1)
HITS, TTFT = "prefix_hit_rate", "ttft_mean_s"
LENGTHS = Exponential(min_tokens=48, mean_tokens=135, max_tokens=300)  # 128 after the cuts
PLAIN = "agents"  # the workload with neither salts nor priorities
SMALL = Variant(name="small", flags={"num-gpu-blocks-override": 24})
LARGE = SMALL.but("large", {"num-gpu-blocks-override": 128})
COARSE = LARGE.but("coarse", {"block-size": 256, "num-gpu-blocks-override": 16})
RANKED = SMALL.but("ranked", {"scheduling-policy": "priority"})
VARIANTS = SMALL, LARGE, COARSE, RANKED


def agents(
    name: str,
    *loads: Sessions | LogNormal,
    prompts: int | Exponential = 128,
    salted: Salted | None = None,
    **more: Any,
) -> Workload:
    """Make sessions of four turns: a prompt is what an agent has read so far, an answer a call."""
    chat = Chat(turns=4, grows_tokens=64, salted=salted)
    return sends(name, prompts, 4, *loads, chat=chat, **more)


LAB = Lab(
    name="agent-sessions",
    answers=("SA-7",),
    variants=VARIANTS,
    flags={
        "max-model-len": 512,
        "max-num-seqs": 2,  # as many of the longest as the small cache holds for certain
        "enforce-eager": True,
        "block-size": 32,
        "enable-prefix-caching": True,
        "kv-cache-memory-bytes": 96 * 2**20,
    },
    workloads=(
        agents(PLAIN, FEW, MANY, SLOW, only=("small", "large")),
        agents("tenants", MANY, salted="conversation", only=("large", "coarse")),
        agents("strangers", MANY, salted="request", only=("large",)),
        agents("uneven", UNEVEN, prompts=LENGTHS, only=("small", "large")),
        agents("ranked", MANY, priorities=(1, 0, 0, 0), only=("ranked",)),  # later turns first
    ),
    claims=(
        falls("room", TTFT, "large / small", load=MANY, by=ttft_ratio),
        rises("sessions", TTFT, "small", load=f"{MANY} / {FEW}", by=ttft_ratio),
        unchanged("fit", HITS, "large", load=f"{MANY} / {FEW}", by=hits_ratio, margin=0.1),
        unchanged("gap", HITS, "large", load=f"{SLOW} / {MANY}", by=hits_ratio, margin=0.1),
        falls(
            "uneven", TTFT, "small", "uneven / agents", f"{UNEVEN} / {MANY}", by=ttft_ratio,
            coupled="lengths and gaps are drawn together, as they come",
        ),
        falls("drawn", TTFT, "large / small", "uneven", by=ttft_ratio),
        unchanged("salt", HITS, "large", "tenants / agents", MANY, by=hits_ratio, margin=0.1),
        falls(
            "blocks", HITS, "coarse / large", "tenants", MANY, by=hits_ratio,
            coupled="fewer blocks, so that the cache has room for as many tokens",
        ),
        unchanged(
            "rank", HITS, "ranked / small", "ranked / agents", MANY, by=unmoved, margin=0.25,
            coupled="an engine without this policy refuses a request that names a priority",
        ),
    ),
    forecasts=(forecast("hit-rate", HITS, hit_rate),),
    evidence=(
        *echoes(
            metrics.CACHE_CONFIG, "num_gpu_blocks",
            {v.name: "--num-gpu-blocks-override" for v in VARIANTS},
        ),
        *echoes(metrics.CACHE_CONFIG, "block_size", {"coarse": "--block-size"}),
        *(counter(metrics.PREFIX_HITS, "rises", "large", of) for of in ("agents", "tenants")),
        counter(metrics.PREFIX_HITS, "stays", workload="strangers"),
        counter(metrics.PREFIX_HITS, "rises", "small", load=FEW),
        counter(metrics.PREEMPTIONS, "stays"),
    ),
    findings=("turns",),
    slo=SLO(ttft_s=0.5, tpot_s=0.2),
    requests=240,
    warmup_s=0,  # the cache is counted from the first request on
    window_s=16,  # a conversation with the longer gap, two with the shorter
    repeats=3,
)  # fmt: skip
