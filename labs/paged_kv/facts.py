"""What paging the KV cache gains, what KV heads cost, and what neither does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from labs.harness.analysis.measure import counter_increase, output_tokens
from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
from labs.paged_kv.lab import (
    MOST_REPLAYED,
    held_tokens,
    kept_free_blocks,
    replay_once,
    replayed,
)
from serving.metrics import PREEMPTIONS

BLOCKS = (1, 8, 16, 32, 64, 128, 256)
WATERMARKS = (0.0, 0.02, 0.05, 0.1, 0.2)
MB, MIB = 1e6, 2**20  # bytes


@dataclass(frozen=True)
class Facts:
    """None where a finding has no points."""

    allocator: Allocations | None
    watermark: Watermarks | None
    heads: HeadsCompared | None
    tiles_and_pages: TilesAndPages | None


def facts(run: JudgedRun) -> Facts:
    allocated = allocations(run)
    return Facts(
        allocated if run.finds("allocator") else None,
        watermarks(run) if run.finds("watermark") else None,
        heads_compared(run) if run.finds("heads") else None,
        tiles_and_pages(run, allocated) if run.finds("tiles-and-pages") else None,
    )


# ----------------------------------------------------------------------------- the allocator


@dataclass(frozen=True)
class Allocation:
    """An allocation by arithmetic, in the replay, and as an engine ran it."""

    block: int  # 0: contiguous, a stretch for the longest request
    variant: str | None  # that an engine ran
    half_block: Quantity  # (b - 1) / 2, what a request wastes where lengths are spread evenly
    useful: Quantity  # of the memory held, replayed
    wasted: Quantity  # that each request holds and has not written, replayed
    admitted: float  # at once, by arithmetic: C / L_max, or C / the mean held
    running: float  # at once, replayed
    in_decode: Quantity  # at once, measured


@dataclass(frozen=True)
class Allocations:
    """The allocations of one workload's lengths, the largest waste first."""

    users: int
    capacity_tokens: float
    stretch_tokens: int  # the longest request that the engine admits
    all: tuple[Allocation, ...]
    gain_replayed: Quantity  # of the smallest blocks that were served: at once, / contiguous
    gain_measured: Quantity

    @property
    def contiguous(self) -> Allocation | None:
        return next((a for a in self.all if not a.block), None)

    @property
    def served(self) -> tuple[Allocation, ...]:
        """The paged ones that an engine was started with, from the smallest block."""
        return tuple(a for a in reversed(self.all) if a.block and a.variant)


def allocations(run: JudgedRun) -> Allocations | None:
    """Allocate what the first paged variant was sent; None without such a point.

    A variant whose own flags limit the requests is contiguous: on a GPU all engines of all labs
    have a limit, which no load here reaches.
    """
    limited = {v.name for v in run.lab.variants if "max-num-seqs" in v.flags}
    mixed = [p for p in run.points if p.workload.name == "mixed"]
    paged = [p for p in mixed if p.variant.name not in limited]
    if not paged:
        return None
    base = paged[0]
    capacity = run.mean(base, "kv_capacity_tokens") or base.kv_room_tokens
    by_block = {p.flags.block_size: p for p in paged}
    if whole := next((p for p in mixed if p not in paged), None):
        by_block[0] = whole
    blocks = (0, *sorted({*BLOCKS, *by_block} - {0}, reverse=True))
    found = (allocation(run, base, capacity, block, by_block.get(block)) for block in blocks)
    at_once = Quantity.missing("both were not allocated", RATIO)
    allocated = Allocations(
        users=base.load.users,
        capacity_tokens=capacity,
        stretch_tokens=base.flags.max_model_len,
        all=tuple(a for a in found if a),
        gain_replayed=at_once,
        gain_measured=at_once,
    )
    if not allocated.served or not (whole_stretch := allocated.contiguous):
        return allocated
    smallest = allocated.served[0]
    return replace(
        allocated,
        gain_replayed=Quantity(smallest.running / whole_stretch.running, RATIO),
        gain_measured=smallest.in_decode / whole_stretch.in_decode,
    )


def allocation(
    run: JudgedRun, base: Point, capacity: float, block: int, point: Point | None
) -> Allocation | None:
    """Allocate in blocks of this size, or contiguously; None where no request ever waits."""
    lengths, stretch = base.lengths[:MOST_REPLAYED], base.flags.max_model_len
    # the engine keeps a block for itself; a contiguous allocator has no such block
    room = (capacity // block - 1) * block if block else capacity
    done = replay_once(lengths, len(lengths), room, block, 0 if block else stretch)
    if done is None:
        return None
    half = Quantity((block - 1) / 2, "tok") if block else Quantity.missing("no blocks", "tok")
    return Allocation(
        block=block,
        variant=point.variant.name if point else None,
        half_block=half,
        useful=Quantity(done.useful, "share"),
        wasted=Quantity(done.wasted_tokens, "tok"),
        admitted=room / held_tokens(base, block) if block else room // stretch,
        running=done.running,
        in_decode=run.quantity(point, "batch"),
    )


# --------------------------------------------------------------------------------- the watermark


@dataclass(frozen=True)
class KeptFree:
    """A watermark in the replay, and what an engine that has it served."""

    watermark: float
    blocks: int  # that stay free
    running: Quantity  # requests at once, replayed
    preempted: Quantity  # share of the tokens, replayed
    variant: str | None
    served: dict[str, Quantity]  # means over repeats, the forecast, preempted of the gaps


SERVED = {
    "preemptions": "preemptions",  # of a trial
    "throughput": "output_tokens_per_s",
    "tpot_s": "tpot_mean_s",
    "itl_p99_s": "itl_p99_s",
    "ttft_s": "ttft_mean_s",
}
CHANGED = {
    "preemptions": "preemptions",
    "itl_p99": "itl_p99_s",
    "throughput": "output_tokens_per_s",
    "ttft": "ttft_mean_s",
}


@dataclass(frozen=True)
class Changed:
    """What a watermark changed beside none: treatment / baseline."""

    treated: KeptFree
    untreated: KeptFree
    preemptions: Quantity
    itl_p99: Quantity
    throughput: Quantity
    ttft: Quantity


@dataclass(frozen=True)
class Watermarks:
    blocks: int  # of the whole cache
    users: int
    all: tuple[KeptFree, ...]
    changed: Changed | None  # None where no engine had a watermark


def watermarks(run: JudgedRun) -> Watermarks | None:
    """Replay the growing requests by several watermarks; None without such a point."""
    at = {p.flags.watermark: p for p in run.points if p.workload.name == "growing"}
    if 0 not in at:
        return None
    base, blocks = at[0], at[0].kv_room_tokens / at[0].flags.block_size
    shares = sorted({*WATERMARKS, *at})
    kept = {share: kept_free(run, base, share, blocks, at.get(share)) for share in shares}
    changed = None
    if treated := next((share for share in at if share), None):
        ratios = {name: run.ratio_of(at[treated], base, metric) for name, metric in CHANGED.items()}
        changed = Changed(kept[treated], kept[0], **ratios)
    return Watermarks(int(blocks), base.load.users, tuple(kept.values()), changed)


def kept_free(
    run: JudgedRun, base: Point, share: float, blocks: float, point: Point | None
) -> KeptFree:
    done, none_waits = replayed(base, share), "no request ever waits"
    preempted_share = done.preempted / done.tokens if done else None
    return KeptFree(
        watermark=share,
        blocks=kept_free_blocks(share, blocks),
        running=Quantity.given(done.running if done else None, why=none_waits),
        preempted=Quantity.given(preempted_share, "share", none_waits),
        variant=point.variant.name if point else None,
        served={
            "preempted": preempted(run, point),
            "preemptions_forecast": run.foreseen(point, "preemptions"),
            **{name: run.quantity(point, metric) for name, metric in SERVED.items()},
        },
    )


def preempted(run: JudgedRun, point: Point | None) -> Quantity:
    """Count the preemptions of a point's trials for each gap between two tokens."""
    gaps = preemptions = 0.0
    for trial in run.trials(point):
        if (counted := counter_increase(trial, PREEMPTIONS)) is not None:
            preemptions += counted
            gaps += sum(max(0, output_tokens(r) - 1) for r in trial.streams)
    return Quantity.given(preemptions / gaps if gaps else None, "share")


# ---------------------------------------------------------------------------------- KV heads


@dataclass(frozen=True)
class Heads:
    """What a number of KV heads costs."""

    kind: Literal["multi-head", "grouped", "multi-query"]
    kv_heads: int
    kv_bytes_per_token: float
    capacity_tokens: float  # of the same memory: measured, or by arithmetic
    is_measured: bool
    near_s: Quantity  # TPOT over a short context
    far_s: Quantity  # and over a long one
    per_thousand_s: Quantity  # for 1,000 tokens of context more


@dataclass(frozen=True)
class HeadsCompared:
    """Numbers of KV heads, from one for each query head down to one for all."""

    query_heads: int
    of_model: int  # KV heads
    memory: Quantity
    far_tokens: float  # of context
    all: tuple[Heads, ...]
    bytes_ratio: Quantity  # a token's, with one for each query head / of the model

    @property
    def most(self) -> Heads:
        return self.all[0]

    @property
    def model(self) -> Heads:
        return next(h for h in self.all if h.kv_heads == self.of_model)

    @property
    def least(self) -> Heads:
        return self.all[-1]


def heads_compared(run: JudgedRun) -> HeadsCompared | None:
    """Compare the served model's KV heads with as many as query heads, and with one.

    None without the points that serve the model as it is.
    """
    at = {(p.variant.name, p.workload.name): p for p in run.points}
    near, far = at.get(("gqa", "near")), at.get(("gqa", "far"))
    if near is None or far is None:
        return None
    shape = near.shape
    more_tokens = far.context_tokens - near.context_tokens
    served = {p.shape.kv_heads: n for n in ("mqa", "mha", "gqa") if (p := at.get((n, "near")))}

    counts = sorted({shape.heads, shape.kv_heads, 1}, reverse=True)
    compared = tuple(
        heads(
            run,
            replace(near, shape=replace(shape, kv_heads=count)),
            at.get((served.get(count, ""), "near")),
            at.get((served.get(count, ""), "far")),
            more_tokens,
        )
        for count in counts
    )
    of_model = compared[counts.index(shape.kv_heads)]
    return HeadsCompared(
        query_heads=shape.heads,
        of_model=shape.kv_heads,
        memory=Quantity(near.flags.kv_cache_memory_bytes / MIB, "MiB"),
        far_tokens=far.context_tokens,
        all=compared,
        bytes_ratio=Quantity(compared[0].kv_bytes_per_token / of_model.kv_bytes_per_token, RATIO),
    )


def heads(
    run: JudgedRun, with_heads: Point, near: Point | None, far: Point | None, more_tokens: float
) -> Heads:
    """Say what a model's KV heads cost, served at two contexts or else by arithmetic."""
    shape, flags = with_heads.shape, with_heads.flags
    count, value_bytes, memory = shape.kv_heads, flags.kv_value_bytes, flags.kv_cache_memory_bytes
    measured = run.mean(near, "kv_capacity_tokens") if near else None
    near_s, far_s = (run.quantity(point, "tpot_mean_s") for point in (near, far))
    return Heads(
        kind="multi-head" if count == shape.heads else "multi-query" if count == 1 else "grouped",
        kv_heads=count,
        kv_bytes_per_token=shape.kv_bytes_per_token(value_bytes),
        capacity_tokens=measured or theory.kv_tokens(shape, memory, value_bytes, flags.block_size),
        is_measured=measured is not None,
        near_s=near_s,
        far_s=far_s,
        per_thousand_s=1000 * ((far_s - near_s) / more_tokens),
    )


# --------------------------------------------------------------------------- tiles and pages


@dataclass(frozen=True)
class TilesAndPages:
    """What tiling the attention and paging the cache each change, and what they do not."""

    prompt_tokens: float
    untiled_traffic: Quantity  # of one layer, by `theory.attention_bytes`
    tiled_traffic: Quantity  # in tiles as large as the cache; missing where its size is unknown
    untiled_s: Quantity  # at the bandwidth
    tiled_s: Quantity
    contiguous: Quantity  # requests in decode, measured
    paged: Quantity


def tiles_and_pages(run: JudgedRun, allocated: Allocations | None) -> TilesAndPages | None:
    """Compute the traffic of one layer's attention over a long prompt, without tiles and with."""
    far = next((p for p in run.points if p.workload.name == "far"), None)
    if allocated is None or far is None:
        return None
    cache_bytes = run.run.machine.caches_bytes.get("L2")
    untiled = Quantity(theory.attention_bytes(far.shape, far.prompt_tokens, None), "B")
    tiled = Quantity.missing("the size of the cache is not known", "B")
    if cache_bytes:
        tiled_bytes = theory.attention_bytes(far.shape, far.prompt_tokens, cache_bytes)
        tiled = Quantity(tiled_bytes, "B")
    bandwidth = far.ceilings.memory_bandwidth_bytes_per_s
    whole, smallest = allocated.contiguous, next(iter(allocated.served), None)
    return TilesAndPages(
        prompt_tokens=far.prompt_tokens,
        untiled_traffic=(untiled * (1 / MB)).in_unit("MB"),
        tiled_traffic=(tiled * (1 / MB)).in_unit("MB"),
        untiled_s=(untiled * (1 / bandwidth)).in_unit("s"),
        tiled_s=(tiled * (1 / bandwidth)).in_unit("s"),
        contiguous=whole.in_decode if whole else Quantity.missing("not served"),
        paged=smallest.in_decode if smallest else Quantity.missing("not served"),
    )
