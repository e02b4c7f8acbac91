"""Prefix caching: what is asked of it. Its words stand in page.md, its sizes in sizes.toml."""

from __future__ import annotations

import math
from itertools import pairwise

from labs.harness import theory
from labs.harness.spec import SLO, Arm, Claim, Evidence, Forecast, Lab, Point, Prediction, Variant
from loadtests.arrivals import Concurrent
from loadtests.workload import Chat, Fixed, Prefix, Workload
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
    return theory.prefill_left_s(
        point.shape, point.ceilings, point.prompt_tokens, cached_tokens(point)
    )


def ttft_left(on: Point, off: Point) -> Prediction:
    return Prediction(
        value=first_token_s(on) / first_token_s(off),
        formula="max(FLOP left / rate, weight bytes / bandwidth) / (FLOP / rate)",
        assumptions=(
            "prefill runs at the measured rate, or at least at one rate whatever its length",
            "a prefix is cached while all groups' prompts fit the KV memory, else never",
            "tokenizing, scheduling and HTTP take no time",
        ),
        source="FLOP: Kaplan et al. 2020; blocks: Kwon et al., PagedAttention, SOSP 2023",
    )


def throughput_gain(on: Point, off: Point) -> Prediction:
    def request_s(point: Point) -> float:
        """Return the time of one of B requests in flight: its prefill, and its share of steps."""
        step_s = theory.decode_step_s(
            point.shape, point.ceilings, point.load.users, point.prompt_tokens
        )
        return first_token_s(point) + point.output_tokens * step_s / point.load.users

    return Prediction(
        value=request_s(off) / request_s(on),
        formula="(t_prefill + L t(B) / B) off / on",
        assumptions=("prefill and decode take turns on the device",),
        source="Williams et al., Roofline, 2009",
    )


def hit_rate(point: Point) -> Prediction:
    return Prediction(
        value=cached_tokens(point) / point.prompt_tokens,
        formula="floor(shared / block) block / prompt; 0 where the groups do not fit the cache",
        assumptions=("each group's first request was sent before the trial",),
        source="Kwon et al., PagedAttention, SOSP 2023",
    )


def hits_left(shuffled: Point, ordered: Point) -> Prediction:
    return Prediction(
        value=cached_tokens(shuffled) / cached_tokens(ordered),
        formula="E[tokens of the leading documents that agree] / shared tokens, in whole blocks",
        assumptions=("the cache holds as many whole prompts as fit, the last ones seen",),
        source="Kwon et al., PagedAttention, SOSP 2023",
    )


OFF = Variant(name="off", flags={"enable-prefix-caching": False})
ON = OFF.but("on", {"enable-prefix-caching": True})
ONE, FOUR = Concurrent(users=1), Concurrent(users=4)


def workload(name: str, shared_tokens: int, groups: int = 1, *loads: Concurrent) -> Workload:
    return Workload(
        name=name,
        prompt_tokens=Fixed(tokens=512),
        output_tokens=Fixed(tokens=4),
        prefix=Prefix(tokens=shared_tokens, groups=groups) if shared_tokens else None,
        primed=bool(shared_tokens),
        loads=loads or (ONE,),
    )


def documents(name: str, shuffled: bool) -> Workload:
    """Put four retrieved documents before each question, in a fixed or in a random order."""
    plain = workload(name, 448)
    prefix = Prefix(tokens=448, documents=4, shuffled=shuffled)
    only = ("on",) if shuffled else ()  # without a cache their order does not matter
    return plain.model_copy(update={"prefix": prefix, "only": only})


LAB = Lab(
    name="prefix-caching",
    answers=("SO-4", "IP-5", "SA-4"),
    variants=(OFF, ON),
    flags={
        "max-model-len": 1024,
        "enforce-eager": True,
        "block-size": 32,
        "kv-cache-memory-bytes": 64 * 2**20,  # five prompts: enough to fill, little to overflow
    },
    workloads=(
        workload("share-0", 0, 1, ONE, FOUR),
        workload("share-50", 256),
        workload("share-90", 460, 1, ONE, FOUR),
        workload("share-97", 484),
        workload("few", 460, 4),
        workload("many", 460, 8),
        documents("documents", shuffled=False),
        documents("shuffled", shuffled=True),
        Workload(
            name="chat",
            prompt_tokens=Fixed(tokens=160),
            output_tokens=Fixed(tokens=4),
            chat=Chat(turns=6, grows_tokens=120),
            loads=(ONE,),
        ),
    ),
    claims=(
        *(
            Claim(
                name=f"ttft-{name}",
                metric="ttft_mean_s",
                treatment=Arm(variant="on", workload=name, load="concurrent:1"),
                baseline=Arm(variant="off", workload=name, load="concurrent:1"),
                expect="falls",
                predict=ttft_left,
            )
            for name in ("share-50", "share-90", "share-97", "few", "documents", "chat")
        ),
        Claim(
            name="thrash",
            metric="ttft_mean_s",
            treatment=Arm(variant="on", workload="many"),
            baseline=Arm(variant="off", workload="many"),
            expect="unchanged",
            predict=ttft_left,
        ),
        Claim(
            name="order",
            metric="prefix_hit_rate",
            treatment=Arm(variant="on", workload="shuffled"),
            baseline=Arm(variant="on", workload="documents"),
            expect="falls",
            predict=hits_left,
        ),
        Claim(
            name="cost",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="share-0"),
            baseline=Arm(variant="off", workload="share-0"),
            expect="unchanged",
            predict=throughput_gain,
        ),
        Claim(
            name="throughput",
            metric="output_tokens_per_s",
            treatment=Arm(variant="on", workload="share-90", load="concurrent:4"),
            baseline=Arm(variant="off", workload="share-90", load="concurrent:4"),
            expect="rises",
            predict=throughput_gain,
        ),
    ),
    forecasts=(
        Forecast(
            name="hit-rate",
            metric="prefix_hit_rate",
            arm=Arm(variant="on", load="concurrent:1"),
            predict=hit_rate,
        ),
    ),
    evidence=(
        *(
            Evidence.echo(name, metrics.CACHE_CONFIG, "enable_prefix_caching", str(name == "on"))
            for name in ("off", "on")
        ),
        Evidence(arm=Arm(variant="off"), kind="stays", metric=metrics.PREFIX_HITS),
        Evidence(
            arm=Arm(variant="on", workload="share-90"), kind="rises", metric=metrics.PREFIX_HITS
        ),
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
