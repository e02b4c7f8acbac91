"""Prefix routing: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

from itertools import accumulate

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
from labs.harness.spec.lab import SLO, Lab, Point, Variant
from labs.harness.spec.theory import KWON
from loadtests.workload import Prefix, Workload
from serving import metrics

AWARE = "cache_aware"
RESERVED_BLOCKS = 1  # that vLLM keeps for itself
CHE = "Fagin, Asymptotic miss ratios over independent references, J. Comput. Syst. Sci., 1977"


def keeps_together(point: Point) -> bool:
    """Whether requests that begin alike go to the same replica."""
    return point.flags.router.get("policy") == AWARE


def documents_seen(point: Point) -> float:
    """Return the documents that a replica is asked about: its share of them, or all."""
    prefix, replicas = point.workload.prefix, point.flags.replicas
    if not prefix:
        return 0
    return prefix.groups / replicas if keeps_together(point) else prefix.groups


def documents_held(point: Point) -> float:
    """Return the documents that a replica's cache holds under LRU, of those that it is asked about.

    The last C documents take C times a document's blocks, and the full blocks of the questions
    asked meanwhile: N (H(N) - H(N - C)) of them by the coupon collector, for N documents that are
    drawn evenly, H being the harmonic numbers. The answers that are being written hold blocks, too.
    """
    flags, prefix = point.flags, point.workload.prefix
    if not prefix:
        return 0
    block, seen = flags.block_size, round(documents_seen(point))
    of_document = prefix.tokens // block
    of_question = point.prompt_tokens // block - of_document
    of_answer = -(-(point.prompt_tokens + point.output_tokens) // block) - of_document
    running = point.load.users / flags.replicas
    room = point.kv_room_tokens // block - RESERVED_BLOCKS - running * of_answer
    more = [of_document + of_question * seen / (seen - held) for held in range(seen)]  # for another
    held = sum(needed <= room for needed in accumulate(more))
    return held if held == seen else held + max(0.0, room - sum(more[:held])) / more[held]


def found_share(point: Point) -> float:
    """Return the share of a prompt's tokens that are found again, once the cache is warm.

    Of documents that are drawn evenly, a cache that forgets the least recently used one finds any
    with the chance held / seen.
    """
    prefix, block = point.workload.prefix, point.flags.block_size
    if not prefix:
        return 0
    chance = documents_held(point) / documents_seen(point)
    return chance * (prefix.tokens // block * block) / point.prompt_tokens


@predicts(
    "documents held / asked about, of the one / of the other",
    "documents are drawn evenly, and the least recently used blocks are forgotten",
    "the first request of each document is one of many",
    source=f"LRU: {CHE}; blocks: {KWON}",
)
def hits_ratio(aware: Point, blind: Point) -> float:
    return found_share(aware) / found_share(blind)


@predicts(
    "t_prefill(tokens left) of the one / of the other",
    "prefill runs at one rate, and no request waits for another",
    source=KWON,
)
def ttft_ratio(one: Point, other: Point) -> float:
    def first_s(point: Point) -> float:
        return theory.first_token_of(point, found_share(point) * point.prompt_tokens)

    return first_s(one) / first_s(other)


def busiest(point: Point) -> float:
    """Return the share of the requests at the busiest replica."""
    prefix, even = point.workload.prefix, 1 / point.flags.replicas
    limited = "balance-abs-threshold" in point.flags.router
    if not keeps_together(point) or limited or not prefix or prefix.favourite is None:
        return even
    others = (prefix.groups - 1) // point.flags.replicas  # that share a replica with the favourite
    return prefix.favourite + others * (1 - prefix.favourite) / (prefix.groups - 1)


@predicts(
    "(favourite + its neighbours' share) / (1 / replicas)",
    "documents are shared out evenly among replicas",
    "under a limit on the imbalance, as without affinity, each replica gets as many",
)
def busiest_ratio(one: Point, other: Point) -> float:
    return busiest(one) / busiest(other)


@predicts("1", "a router reads the head and the text of a request, which takes no time")
def no_cost(through: Point, past: Point) -> float:
    return 1.0


@predicts("chance held / seen, as a share of a prompt's tokens", source=f"{CHE}; {KWON}")
def hit_rate(point: Point) -> float:
    return found_share(point)


def routed(name: str, policy: str, replicas: int = 2, **more: int | float) -> Variant:
    """Put so many replicas behind a router with this policy."""
    limits = {f"router-{flag.replace('_', '-')}": value for flag, value in more.items()}
    several = {"replicas": replicas} if replicas > 1 else {}
    return Variant(name=name, flags={**several, "router-policy": policy, **limits})


def asks(name: str, favourite: float, *only: str, documents: int = 8) -> Workload:
    """Ask about documents that are drawn: one is the favourite, the others are drawn evenly."""
    prefix = Prefix(tokens=224, groups=documents, favourite=favourite)
    return sends(name, 256, 1, FOUR, prefix=prefix, only=only)


(ONE, FOUR) = users(1, 4)
ROUTED = ("passed-on", "round-robin", "power-of-two", "cache-aware", "balanced")
TWO = ("round-robin", "power-of-two", "cache-aware")
HITS, BUSIEST, TTFT = "prefix_hit_rate", "busiest_share", "ttft_mean_s"

LAB = Lab(
    name="prefix-routing",
    answers=("SA-6",),
    variants=(
        Variant(name="direct"),
        routed("passed-on", AWARE, replicas=1),
        routed("round-robin", "round_robin"),
        routed("power-of-two", "power_of_two"),
        routed("cache-aware", AWARE),
        routed("balanced", AWARE, balance_abs_threshold=1),
    ),
    flags={
        "max-model-len": 512,
        "max-num-seqs": 8,
        "enforce-eager": True,
        "block-size": 32,
        "enable-prefix-caching": True,
        "kv-cache-memory-bytes": 36 * 2**20,
    },
    workloads=(
        asks("documents", 1 / 8, *TWO),
        asks("favourite", 0.7, "round-robin", "cache-aware", "balanced"),
        sends("unlike", 256, 1, FOUR, only=("power-of-two", "cache-aware")),
        sends("alone", 256, 1, ONE, only=("direct", "passed-on")),
    ),
    claims=(
        rises("hits", HITS, "cache-aware / round-robin", "documents", FOUR, by=hits_ratio),
        falls("ttft", TTFT, "cache-aware / round-robin", "documents", FOUR, by=ttft_ratio),
        rises("by-load", HITS, "cache-aware / power-of-two", "documents", FOUR, by=hits_ratio),
        rises("hot", BUSIEST, "cache-aware / round-robin", "favourite", FOUR, by=busiest_ratio),
        falls("limited", BUSIEST, "balanced / cache-aware", "favourite", FOUR, by=busiest_ratio),
        unchanged("unlike", TTFT, "cache-aware / power-of-two", "unlike", FOUR, by=ttft_ratio,
                  margin=0.1),
        unchanged("router", TTFT, "passed-on / direct", "alone", ONE, by=no_cost),
    ),
    forecasts=(forecast("hit-rate", HITS, hit_rate, workload="documents"),),
    evidence=(
        counter(metrics.of_replica(metrics.REQUESTS, 0), "absent", "direct"),
        *echoes(metrics.ROUTER, "policy", dict.fromkeys(ROUTED, "--router-policy")),
        *echoes(metrics.ROUTER, "balance_abs_threshold",
                {"balanced": "--router-balance-abs-threshold"}),
        counter(metrics.PREFIX_HITS, "rises", workload="documents"),
        counter(metrics.PREEMPTIONS, "stays"),
    ),
    findings=("replicas", "more-replicas"),
    slo=SLO(ttft_s=1, tpot_s=0.2),
    requests=400,
    warmup_s=4,  # until each replica has seen the documents
    window_s=7,
    repeats=3,
)  # fmt: skip
