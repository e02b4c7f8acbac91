"""Prefix caching: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

import math
from itertools import pairwise

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
    variants,
)
from labs.harness.spec.lab import SLO, Lab, Point
from labs.harness.spec.theory import KAPLAN, KWON, ROOFLINE
from loadtests.arrivals import Concurrent
from loadtests.workload import Chat, Prefix, Workload
from serving import metrics


def cached_tokens(point: Point) -> float:
    """Return a prompt's tokens that stay in the cache: the shared ones, in whole blocks."""
    prefix, chat, flags = point.workload.prefix, point.workload.chat, point.flags
    if not flags.enable_prefix_caching:
        return 0
    block = flags.block_size
    if chat:  # all earlier turns; the first of each conversation finds nothing
        earlier = [point.lengths[0][0] + i * chat.grows_tokens for i in range(chat.turns - 1)]
        return sum(tokens // block * block for tokens in earlier) / chat.turns
    request_bytes = (point.prompt_tokens + point.output_tokens) * point.shape.kv_bytes_per_token()
    fits = flags.kv_cache_memory_bytes // request_bytes
    if prefix is None or prefix.groups > fits:
        return 0
    if prefix.shuffled:
        return shuffled_tokens(prefix, int(fits), block)
    return prefix.tokens // block * block


def shuffled_tokens(prefix: Prefix, fits: int, block: int) -> float:
    """Return the tokens shared with the best of the last `fits` prompts: whole blocks, expected.

    Prompts are alike only as far as their documents come in the same order: the first k of n agree
    with chance (n - k)! / n!, for each prompt that is still cached.
    """
    n, each = prefix.documents, prefix.tokens // prefix.documents
    reached = [1 - (1 - 1 / math.perm(n, k)) ** fits for k in range(1, n + 1)]
    return sum(
        (a - b) * (k * each // block * block)
        for k, (a, b) in enumerate(pairwise([*reached, 0.0]), start=1)
    )


def first_token_s(point: Point) -> float:
    return theory.first_token_of(point, cached_tokens(point))


@predicts(
    "max(FLOP left / rate, weight bytes / bandwidth) / (FLOP / rate)",
    "prefill runs at the measured rate, or at least at one rate whatever its length",
    "a prefix is cached while all groups' prompts fit the KV memory, else never",
    "tokenizing, scheduling and HTTP take no time",
    source=f"FLOP: {KAPLAN}; blocks: {KWON}",
)
def ttft_left(on: Point, off: Point) -> float:
    return first_token_s(on) / first_token_s(off)


@predicts(
    "(t_prefill + L t(B) / B) off / on",
    "prefill and decode take turns on the device",
    source=ROOFLINE,
)
def throughput_gain(on: Point, off: Point) -> float:
    def request_s(point: Point) -> float:
        """Return the time of one of B requests in flight: its prefill, and its share of steps."""
        step_s = theory.step_of(point, point.prompt_tokens)
        return first_token_s(point) + point.output_tokens * step_s / point.load.users

    return request_s(off) / request_s(on)


@predicts(
    "floor(shared / block) block / prompt; 0 where the groups do not fit the cache",
    "each group's first request was sent before the trial",
    source=KWON,
)
def hit_rate(point: Point) -> float:
    return cached_tokens(point) / point.prompt_tokens


@predicts(
    "E[tokens of the leading documents that agree] / shared tokens, in whole blocks",
    "the cache holds as many whole prompts as fit, the last ones seen",
    source=KWON,
)
def hits_left(shuffled: Point, ordered: Point) -> float:
    return cached_tokens(shuffled) / cached_tokens(ordered)


ONE, FOUR = users(1, 4)


def shares(name: str, tokens: int, *loads: Concurrent, groups: int = 1) -> Workload:
    """Send prompts of which so many tokens are alike, and cached before a trial begins."""
    prefix = Prefix(tokens=tokens, groups=groups)
    return sends(name, 512, 4, *(loads or (ONE,)), prefix=prefix, primed=True)


def documents(name: str, shuffled: bool, *only: str) -> Workload:
    """Put four retrieved documents before each question, in a fixed or in a random order."""
    prefix = Prefix(tokens=448, documents=4, shuffled=shuffled)
    return sends(name, 512, 4, ONE, prefix=prefix, primed=True, only=only)


LAB = Lab(
    name="prefix-caching",
    answers=("SO-4", "IP-5", "SA-4"),
    variants=variants("enable-prefix-caching", off=False, on=True),
    flags={
        "max-model-len": 1024,
        "enforce-eager": True,
        "block-size": 32,
        "kv-cache-memory-bytes": 64 * 2**20,  # five prompts: enough to fill, little to overflow
    },
    workloads=(
        sends("share-0", 512, 4, ONE, FOUR),
        shares("share-50", 256),
        shares("share-90", 460, ONE, FOUR),
        shares("share-97", 484),
        shares("few", 460, groups=4),
        shares("many", 460, groups=8),
        documents("documents", False),
        documents("shuffled", True, "on"),  # without a cache their order does not matter
        sends("chat", 160, 4, ONE, chat=Chat(turns=6, grows_tokens=120)),
    ),
    claims=(
        *(
            falls(f"ttft-{name}", "ttft_mean_s", "on / off", name, ONE, by=ttft_left)
            for name in ("share-50", "share-90", "share-97", "few", "documents", "chat")
        ),
        unchanged("thrash", "ttft_mean_s", "on / off", "many", by=ttft_left),
        falls("order", "prefix_hit_rate", "on", "shuffled / documents", by=hits_left),
        unchanged("cost", "output_tokens_per_s", "on / off", "share-0", by=throughput_gain),
        rises(
            "throughput", "output_tokens_per_s", "on / off", "share-90", FOUR, by=throughput_gain
        ),
    ),
    forecasts=(forecast("hit-rate", "prefix_hit_rate", hit_rate, "on", load=ONE),),
    evidence=(
        *echoes(metrics.CACHE_CONFIG, "enable_prefix_caching", {"off": "False", "on": "True"}),
        counter(metrics.PREFIX_HITS, "stays", "off"),
        counter(metrics.PREFIX_HITS, "rises", "on", "share-90"),
    ),
    probes=("salt",),
    probed=("on",),
    findings=("timing-leak",),
    plots=("variants",),
    slo=SLO(ttft_s=0.5, tpot_s=0.1),
    requests=64,
    warmup_s=0.5,
    window_s=2.5,  # held open for five prompts of most of a second
    repeats=4,
)
