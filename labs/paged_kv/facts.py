"""This module tells what paging the KV cache gains, what KV heads cost, and what neither does."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dashboards.palette import BLUE, BOUND
from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import BANDS, GREY, draw_forecasts, plt, reach
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval
from labs.harness.judging.measure import counter_increase, output_tokens
from labs.harness.judging.text import number, times_with_interval
from labs.harness.spec import Point
from labs.paged_kv.lab import (
    AINSLIE,
    KWON,
    MOST_REPLAYED,
    Replayed,
    held_tokens,
    kept_free_blocks,
    replay_once,
    replayed,
)
from serving.metrics import PREEMPTIONS

BLOCKS = (1, 8, 16, 32, 64, 128, 256)
DAO = "Dao et al., FlashAttention, NeurIPS 2022"

# ----------------------------------------------------------------------------- the allocator


@dataclass(frozen=True)
class Allocation:
    """Compares an allocation by arithmetic, in the replay, and as an engine ran it."""

    block: int  # 0: contiguous, a stretch for the longest request
    admitted: float  # by arithmetic: C / L_max, or C / the mean held
    replayed: Replayed
    variant: str | None  # that an engine ran
    measured: float | None  # requests in decode at once

    @property
    def name(self) -> str:
        return f"blocks of {self.block}" if self.block else "contiguous"


@dataclass(frozen=True)
class Allocations:
    """Holds the allocations of one workload's lengths, the largest waste first."""

    users: int
    capacity_tokens: float
    stretch_tokens: int  # the longest request that the engine admits
    all: tuple[Allocation, ...]

    @property
    def contiguous(self) -> Allocation | None:
        return next((a for a in self.all if not a.block), None)

    @property
    def served(self) -> tuple[Allocation, ...]:
        """The paged ones that an engine was started with, from the smallest block."""
        paged = (a for a in self.all if a.block and a.variant)
        return tuple(sorted(paged, key=lambda a: a.block))


def allocations(context: Context) -> Allocations | None:
    """Allocates what the first paged variant was sent; None without such a point.

    A variant whose own flags limit the requests is contiguous: on a GPU all engines of all labs
    have a limit, which no load here reaches.
    """
    limited = {v.name for v in context.lab.variants if "max-num-seqs" in v.flags}
    mixed = [p for p in context.points if p.workload.name == "mixed"]
    paged = [p for p in mixed if p.variant.name not in limited]
    if not paged:
        return None
    base, users = paged[0], paged[0].load.users
    capacity = context.mean(base, "kv_capacity_tokens") or base.kv_room_tokens
    stretch, lengths = base.flags.max_model_len, base.lengths[:MOST_REPLAYED]
    run: dict[int, Point] = {p.flags.block_size: p for p in paged}
    if whole := next((p for p in mixed if p not in paged), None):
        run[0] = whole
    by_block = []
    for block in (0, *sorted({*BLOCKS, *run} - {0}, reverse=True)):
        # the engine keeps a block for itself; a contiguous allocator has no such block
        room = (capacity // block - 1) * block if block else capacity
        held = held_tokens(base, block) if block else stretch
        done = replay_once(lengths, len(lengths), room, block, 0 if block else stretch)
        point = run.get(block)
        if done:
            by_block.append(
                Allocation(
                    block=block,
                    admitted=room / held if block else room // held,
                    replayed=done,
                    variant=point.variant.name if point else None,
                    measured=context.mean(point, "batch") if point else None,
                )
            )
    return Allocations(users, capacity, stretch, tuple(by_block))


def tell_allocator(facts: Allocations | None) -> Finding:
    title = "What does an allocation hold, and how many requests does that admit?"
    if facts is None:
        return Finding(title=title)
    rows = [["Allocation", "Useful of what is held", "Wasted a request", "(b − 1) / 2",
             "At once, by arithmetic", "At once, replayed", "In decode, measured",
             "Variant"]]  # fmt: skip
    rows += [
        [
            a.name,
            number(a.replayed.useful, "share"),
            number(a.replayed.wasted_tokens, "tok"),
            number((a.block - 1) / 2, "tok") if a.block else "–",
            number(a.admitted),
            number(a.replayed.running),
            number(a.measured),
            f"`{a.variant}`" if a.variant else "–",
        ]
        for a in facts.all
    ]
    lines = [line] if (line := gain_sentence(facts)) else []
    lines.append(
        f"The arithmetic divides {facts.capacity_tokens:,.0f} tokens, the capacity C, by what a"
        f" request holds: {facts.stretch_tokens} tokens, the longest that is admitted, or the mean"
        " in whole blocks. The replay has the lengths that were sent, in a queue without an end,"
        " and gives each running request a token a step; prefill takes no time in it. The engine"
        f" had {facts.users} in flight; one that it preempts has had its first token, and counts"
        " as in decode."
    )
    return Finding(title=title, rows=rows, lines=lines)


def gain_sentence(facts: Allocations) -> str | None:
    """Says what paging admits beside contiguous allocation, replayed and measured."""
    whole, paged = facts.contiguous, next(iter(facts.served), None)
    if whole is None or paged is None:
        return None
    measured = (
        f", and measured {paged.measured / whole.measured:.1f} times with {facts.users} in flight"
        if paged.measured and whole.measured
        else ""
    )
    return (
        f"Of the memory that contiguous allocation holds {number(whole.replayed.useful, 'share')}"
        f" is useful, and of blocks of {paged.block} tokens"
        f" {number(paged.replayed.useful, 'share')}: replayed,"
        f" {paged.replayed.running / whole.replayed.running:.1f} times as many requests run at"
        f" once{measured}."
    )


ALLOCATOR = Conclusion("allocator", allocations, tell_allocator)

# --------------------------------------------------------------------------------- the watermark

WATERMARKS = (0.0, 0.02, 0.05, 0.1, 0.2)
PR = "vLLM, pull request 44594"


@dataclass(frozen=True)
class Served:
    """Holds what an engine made of a watermark: means over repeats, and the forecast."""

    variant: str
    preemptions: float | None  # of a trial
    forecast_preemptions: float | None
    preempted_share: float | None  # of the gaps between tokens
    output_tokens_per_s: float | None
    tpot_mean_s: float | None
    itl_p99_s: float | None
    ttft_mean_s: float | None


@dataclass(frozen=True)
class KeptFree:
    """Compares a watermark in the replay with what an engine that has it served."""

    watermark: float
    blocks: int  # that stay free
    replayed_share: float | None  # preemptions, of the tokens; None where none ever waits
    running: float | None  # requests at once, replayed
    served: Served | None


@dataclass(frozen=True)
class Watermarks:
    """Holds the watermarks, and what one of them changed beside none: treatment / baseline."""

    blocks: int  # of the whole cache
    users: int
    all: tuple[KeptFree, ...]
    preemptions: Interval | None
    itl_p99: Interval | None
    throughput: Interval | None
    ttft: Interval | None

    @property
    def treated(self) -> KeptFree | None:
        """The watermark that an engine ran with, other than none."""
        return next((k for k in self.all if k.served and k.watermark), None)

    @property
    def untreated(self) -> KeptFree | None:
        return next((k for k in self.all if k.served and not k.watermark), None)


def watermarks(context: Context) -> Watermarks | None:
    """Replays the growing requests by several watermarks; None without such a point."""
    run = {p.flags.watermark: p for p in context.points if p.workload.name == "growing"}
    if 0 not in run:
        return None
    base, treated = run[0], next((p for share, p in run.items() if share), None)
    blocks = base.kv_room_tokens / base.flags.block_size

    def kept_free(share: float) -> KeptFree:
        done = replayed(base, share)
        return KeptFree(
            watermark=share,
            blocks=kept_free_blocks(share, blocks),
            replayed_share=done.preempted / done.tokens if done else None,
            running=done.running if done else None,
            served=_served(context, run[share]) if share in run else None,
        )

    def changed(metric: str) -> Interval | None:
        effect = context.effect(treated, base, metric) if treated else None
        return effect.ratio if effect else None

    return Watermarks(
        blocks=int(blocks),
        users=base.load.users,
        all=tuple(kept_free(share) for share in sorted({*WATERMARKS, *run})),
        preemptions=changed("preemptions"),
        itl_p99=changed("itl_p99_s"),
        throughput=changed("output_tokens_per_s"),
        ttft=changed("ttft_mean_s"),
    )


def _served(context: Context, point: Point) -> Served:
    forecast = context.predictions.in_virtual_time
    band = forecast.points.get(point.key, {}).get("preemptions") if forecast else None
    gaps = preemptions = 0.0
    for _, _, trial in context.folder.trials([point], context.lab):
        counted = counter_increase(trial, PREEMPTIONS) if trial else None
        if trial and counted is not None:
            preemptions += counted
            gaps += sum(max(0, output_tokens(r) - 1) for r in trial.streams)
    return Served(
        variant=point.variant.name,
        preemptions=context.mean(point, "preemptions"),
        forecast_preemptions=band.value if band else None,
        preempted_share=preemptions / gaps if gaps else None,
        output_tokens_per_s=context.mean(point, "output_tokens_per_s"),
        tpot_mean_s=context.mean(point, "tpot_mean_s"),
        itl_p99_s=context.mean(point, "itl_p99_s"),
        ttft_mean_s=context.mean(point, "ttft_mean_s"),
    )


def tell_watermarks(facts: Watermarks | None) -> Finding:
    title = "What does a watermark gain?"
    if facts is None:
        return Finding(title=title)
    rows = [["Watermark", "Blocks kept free", "At once, replayed", "Preemptions a token, replayed",
             "Measured", "Preemptions, forecast", "Measured", "Throughput", "TPOT, mean",
             "ITL, p99, mean of repeats", "TTFT, mean", "Variant"]]  # fmt: skip
    for k in facts.all:
        row = [f"{k.watermark:g}", f"{k.blocks} of {facts.blocks}", number(k.running),
               number(k.replayed_share, "share")]  # fmt: skip
        if s := k.served:
            row += [number(s.preempted_share, "share"), number(s.forecast_preemptions),
                    number(s.preemptions), number(s.output_tokens_per_s, "tok/s"),
                    number(s.tpot_mean_s, "s"), number(s.itl_p99_s, "s"),
                    number(s.ttft_mean_s, "s"), f"`{s.variant}`"]  # fmt: skip
        rows.append(row + ["–"] * (len(rows[0]) - len(row)))
    lines = [line] if (line := watermark_sentence(facts)) else []
    lines.append(
        f"With {facts.users} in flight more requests are admitted than fit once they have grown. A"
        " watermark admits none beside others unless that share of all blocks stays free, rounded"
        " down: of few blocks it may keep none. *Preemptions a token* is the share of the gaps"
        " between tokens that hold one: where it is below 1%, a p99 of ITL does not show them."
        " Where nothing is preempted without a watermark, there is nothing to gain."
    )
    return Finding(title=title, rows=rows, lines=lines)


def watermark_sentence(facts: Watermarks) -> str | None:
    """Says what the watermark changed, for better or worse, with intervals."""
    treated, without = facts.treated, facts.untreated
    if not (treated and without and treated.served and without.served and facts.preemptions):
        return None
    changed = [
        f"{name} {times_with_interval(ratio)}"
        for name, ratio in (
            ("p99 of ITL", facts.itl_p99), ("throughput", facts.throughput), ("TTFT", facts.ttft)
        )
        if ratio
    ]  # fmt: skip
    return (
        f"A watermark of {treated.watermark:g} keeps {treated.blocks} of {facts.blocks} blocks"
        f" free: {number(treated.served.preemptions)} preemptions in a trial instead of"
        f" {number(without.served.preemptions)}, {times_with_interval(facts.preemptions)}. Relative"
        f" to no watermark: {', '.join(changed)}."
    )


WATERMARK = Conclusion("watermark", watermarks, tell_watermarks)

# ---------------------------------------------------------------------------------- KV heads


@dataclass(frozen=True)
class Heads:
    """Says what a number of KV heads costs; None where no engine was measured with it."""

    kv_heads: int
    kv_bytes_per_token: float
    capacity_tokens: float  # of the same memory: measured, or by arithmetic
    is_measured: bool
    near_s: float | None  # TPOT over a short context
    far_s: float | None  # and over a long one
    more_tokens: float  # of context, from the one to the other

    @property
    def s_per_token(self) -> float | None:
        """How much longer a step takes for each token of context."""
        if self.near_s is None or self.far_s is None:
            return None
        return (self.far_s - self.near_s) / self.more_tokens


@dataclass(frozen=True)
class HeadsCompared:
    """Compares numbers of KV heads, from one for each query head down to one for all."""

    query_heads: int
    of_model: int  # KV heads
    memory_bytes: int
    far_tokens: float  # of context
    all: tuple[Heads, ...]

    def name(self, kv_heads: int) -> str:
        if kv_heads == self.query_heads:
            return "multi-head (MHA)"
        return "multi-query (MQA)" if kv_heads == 1 else "grouped (GQA)"

    @property
    def model(self) -> Heads:
        return next(h for h in self.all if h.kv_heads == self.of_model)


def heads_compared(context: Context) -> HeadsCompared | None:
    """Compares the served model's KV heads with as many as query heads, and with one.

    None without the points that serve the model as it is.
    """
    at = {(p.variant.name, p.workload.name): p for p in context.points}
    near, far = at.get(("gqa", "near")), at.get(("gqa", "far"))
    if near is None or far is None:
        return None
    shape, flags = near.shape, near.flags
    served = {p.shape.kv_heads: n for n in ("mqa", "mha", "gqa") if (p := at.get((n, "near")))}
    heads = []
    for count in sorted({shape.heads, shape.kv_heads, 1}, reverse=True):
        of, variant = replace(shape, kv_heads=count), served.get(count, "")
        here = {w: p for w in ("near", "far") if (p := at.get((variant, w)))}
        measured = context.mean(here["near"], "kv_capacity_tokens") if "near" in here else None
        by_arithmetic = theory.kv_tokens(
            of, flags.kv_cache_memory_bytes, flags.kv_value_bytes, flags.block_size
        )
        near_s, far_s = (
            context.mean(here[w], "tpot_mean_s") if w in here else None for w in ("near", "far")
        )
        heads.append(
            Heads(
                kv_heads=count,
                kv_bytes_per_token=of.kv_bytes_per_token(flags.kv_value_bytes),
                capacity_tokens=measured or by_arithmetic,
                is_measured=measured is not None,
                near_s=near_s,
                far_s=far_s,
                more_tokens=far.context_tokens - near.context_tokens,
            )
        )
    return HeadsCompared(
        shape.heads, shape.kv_heads, flags.kv_cache_memory_bytes, far.context_tokens, tuple(heads)
    )


def tell_heads(facts: HeadsCompared | None) -> Finding:
    title = "What do KV heads cost?"
    if facts is None:
        return Finding(title=title)
    rows = [["Attention", "KV heads", "Bytes a token", "Tokens in the same memory", "Known from",
             "TPOT, short context", "TPOT, long context", "Per 1,000 tokens more"]]  # fmt: skip
    rows += [
        [
            facts.name(h.kv_heads),
            str(h.kv_heads),
            f"{h.kv_bytes_per_token:,.0f}",
            f"{h.capacity_tokens:,.0f}",
            "measured" if h.is_measured else "arithmetic",
            number(h.near_s, "s"),
            number(h.far_s, "s"),
            number(1000 * s if (s := h.s_per_token) is not None else None, "s"),
        ]
        for h in facts.all
    ]
    lines = [
        f"The memory is {facts.memory_bytes / 2**20:,.0f} MiB; the model has {facts.query_heads}"
        f" query heads and {facts.of_model} KV heads. With other KV heads it has the same answers"
        " where heads are copied, and none worth reading where one is their mean; what that would"
        " cost in quality after training is not measured here."
    ]
    return Finding(title=title, rows=rows, lines=lines)


HEADS = Conclusion("heads", heads_compared, tell_heads)

# --------------------------------------------------------------------------- tiles and pages


@dataclass(frozen=True)
class TilesAndPages:
    """Holds what tiling the attention and paging the cache each change, and what they do not."""

    prompt_tokens: float
    inputs_bytes: float  # queries, keys, values and outputs, which move at least once
    scores_bytes: float  # and the scores, where they are written to memory
    bytes_per_s: float  # the machine's bandwidth
    contiguous: float | None  # requests in decode, measured
    paged: float | None


def tiles_and_pages(context: Context) -> TilesAndPages | None:
    """Counts the memory traffic of a long prompt's attention, with its scores and without."""
    allocated = context.once(allocations)
    far = next((p for p in context.points if p.workload.name == "far"), None)
    if allocated is None or far is None:
        return None
    shape, tokens, whole = far.shape, far.prompt_tokens, allocated.contiguous
    smallest = next(iter(allocated.served), None)
    heads = 2 * shape.heads + 2 * shape.kv_heads
    return TilesAndPages(
        prompt_tokens=tokens,
        inputs_bytes=2 * shape.layers * tokens * shape.head_dim * heads,
        # scores and their softmax, each written once and read once, two bytes a number
        scores_bytes=4 * 2 * shape.layers * shape.heads * tokens**2,
        bytes_per_s=far.ceilings.memory_bandwidth_bytes_per_s,
        contiguous=whole.measured if whole else None,
        paged=smallest.measured if smallest else None,
    )


def tell_tiles(facts: TilesAndPages | None) -> Finding:
    title = "FlashAttention or PagedAttention?"
    if facts is None:
        return Finding(title=title)
    rows = [["Scores of attention", "KV cache", f"Traffic of {facts.prompt_tokens:,.0f} tokens",
             "At the bandwidth", "In decode at once", "Served here"]]  # fmt: skip
    for scores, moved in (("in memory", facts.inputs_bytes + facts.scores_bytes),
                          ("in tiles, on the chip", facts.inputs_bytes)):  # fmt: skip
        for cache, at_once in (("contiguous", facts.contiguous), ("paged", facts.paged)):
            tiled = moved == facts.inputs_bytes
            served = "yes" if cache == "paged" else "emulated"
            rows.append(
                [scores, cache, f"{moved / 1e9:.3g} GB", number(moved / facts.bytes_per_s, "s"),
                 number(at_once), served if tiled else "no: arithmetic"]
            )  # fmt: skip
    lines = [
        "The traffic is arithmetic: queries, keys, values and outputs of all layers once, and where"
        " scores go to memory these and their softmax written and read. Every kernel of this engine"
        " tiles, so that only two of the four can be served. What requests hold does not depend on"
        " where scores are: the upper half repeats the lower one's requests."
    ]
    return Finding(title=title, rows=rows, lines=lines)


TILES = Conclusion("tiles-and-pages", tiles_and_pages, tell_tiles)

# ------------------------------------------------------------------------------------ the answers


def heads_saved(run: JudgedRun) -> str | None:
    """Arithmetic, and what was measured of it, if anything was."""
    facts = HEADS.facts_of(run)
    if facts is None:
        return None
    most, model, least = facts.all[0], facts.model, facts.all[-1]
    text = (
        f"With {facts.of_model} KV heads for {facts.query_heads} query heads a token takes"
        f" {model.kv_bytes_per_token:,.0f} bytes; with one for each query head"
        f" {most.kv_bytes_per_token:,.0f}, {most.kv_bytes_per_token / model.kv_bytes_per_token:.3g}"
        f" times as many; with one for all {least.kv_bytes_per_token:,.0f} (arithmetic)."
    )
    held, step = run.ratio("heads"), run.ratio("context")
    if held:
        text += f" Measured, grouped beside multi-head: {held} the tokens in the same memory"
        text += f", and {step} the TPOT over {facts.far_tokens:,.0f} tokens" if step else ""
        one = run.ratio("one-head")
        text += f"; one for all beside grouped: {one} the tokens" if one else ""
        text += "."
    return text


def block_size(run: JudgedRun) -> str | None:
    facts, blocks = ALLOCATOR.facts_of(run), run.ratio("blocks")
    if facts is None or blocks is None:
        return None
    wasted = ", ".join(
        f"{number(a.replayed.wasted_tokens)} tokens with blocks of {a.block}" for a in facts.served
    )
    step = run.ratio("step")
    watermark = WATERMARK.facts_of(run)
    kept_free = watermark_sentence(watermark) if watermark else None
    return (
        "Keys and values lie in blocks, which a table finds wherever they are, so that a request"
        " holds what it has written in whole blocks and wastes about half of the last one"
        f" (replayed: {wasted}). The small blocks run {blocks} the requests at once that the large"
        f" ones do{f'; TPOT of one request alone is {step}' if step else ''}."
        " What was admitted may be preempted once it has grown."
        f"{f' {kept_free}' if kept_free else ''}"
    )


def contiguous(run: JudgedRun) -> str | None:
    facts, at_once = ALLOCATOR.facts_of(run), run.ratio("admitted")
    gain = facts and gain_sentence(facts)
    if not facts or not gain or at_once is None:
        return None
    rate = run.ratio("throughput")
    return (
        f"It reserves {facts.stretch_tokens} tokens, the longest that may come, for requests that"
        f" end sooner. {gain} Paged beside contiguous: {at_once} the requests in decode"
        f"{f', and {rate} the throughput' if rate else ''}."
    )


def tiles_or_pages(run: JudgedRun) -> str | None:
    facts, at_once = TILES.facts_of(run), run.ratio("admitted")
    if facts is None or at_once is None:
        return None
    with_scores = (facts.inputs_bytes + facts.scores_bytes) / 1e9
    step = run.ratio("step")
    return (
        "Both, as they mend different things. Tiling is about time: for a prompt of"
        f" {facts.prompt_tokens:,.0f} tokens attention moves {facts.inputs_bytes / 1e9:.3g} GB"
        f" where scores in memory would make it {with_scores:.3g} GB (arithmetic: every kernel here"
        f" tiles), and each request holds as much as before. Paging is about capacity: {at_once}"
        " the requests in decode that contiguous allocation has, measured"
        f"{f', and small blocks make a step {step} as long as large ones' if step else ''}."
    )


# --------------------------------------------------------------------------------------- its plot


def draw_allocator(run: JudgedRun) -> str | None:
    """Draws how many requests run at once for each allocation: replayed, forecast, measured."""
    facts = ALLOCATOR.facts_of(run)
    if facts is None or not facts.all:
        return None
    allocated = facts.all[::-1]  # from the smallest block to contiguous
    places = {a.name: i for i, a in enumerate(allocated)}
    _, ax = plt.subplots(figsize=(7.5, 3.8))
    ax.plot(range(len(places)), [a.replayed.running for a in allocated], "o-", color=BLUE,
            mfc="white", lw=1, label="replayed")  # fmt: skip
    ax.plot(range(len(places)), [a.admitted for a in allocated], "x", color=BOUND,
            label="by arithmetic: capacity / held")  # fmt: skip
    ax.axhline(facts.users, color=GREY, ls=":", lw=1, label="all in flight")
    mixed = {p.variant.name: p for p in run.points if p.workload.name == "mixed"}
    served = [(places[a.name], mixed[a.variant]) for a in allocated if a.variant in mixed]
    known = [run.forecast(p, "batch") for _, p in served]
    forecast = draw_forecasts(ax, [x for x, _ in served], known)
    means = [(x, m) for x, p in served if (m := run.interval(p, "batch"))]
    bars = reach([m for _, m in means])
    ax.errorbar([x for x, _ in means], [m.value for _, m in means], yerr=bars, fmt="D",
                color=BLUE, capsize=4, zorder=4, label="measured")  # fmt: skip
    ax.set_xticks(range(len(places)), [str(a.block or "contiguous") for a in allocated])
    ax.set_xlabel(f"tokens in a block; contiguous: {facts.stretch_tokens} for each request")
    ax.set_ylabel("requests at once")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8)
    return (
        f"How many requests {facts.capacity_tokens:,.0f} tokens of cache run at once: the smaller"
        " the blocks, the less each holds beyond what it has written. What is measured and forecast"
        f" has {facts.users} in flight; arithmetic and replay have as many as fit."
        + BANDS
        * forecast
    )


PUBLISHED: PublishedFigures = {
    "claims": {
        "throughput": (
            Published(figure="2 to 4x", setting="at equal latency, against FasterTransformer and"
                      " Orca; OPT-13B to 175B and LLaMA-13B, A100", source=KWON),
        ),
        "blocks": (
            Published(figure="16 to 128 tokens serve best", setting="chats of ShareGPT; with the"
                      " short texts of Alpaca 16 and 32, and larger ones much worse", source=KWON),
        ),
        "watermark": (
            Published(figure="1,065 to 187", setting="watermark 0.05, 128 in flight, prompts of"
                      " 1,000 and answers of 5,000 tokens, Qwen2.5-7B, GB200", source=PR),
        ),
        "context": (
            Published(figure="0.19x the time a sample", setting="8 KV heads against multi-head, T5"
                      " XXL; multi-query 0.16x, with more lost in quality", source=AINSLIE),
        ),
    },
    "findings": {
        "allocator": (
            Published(figure="20.4 to 38.2% useful", setting="of the KV memory of systems that"
                      " allocate contiguously; nearly all with paging", source=KWON),
        ),
        "watermark": (
            Published(figure="ITL p99 40.6 to 17.7 ms, TTFT p50 6.6 to 11.2 s, 5% more tokens/s",
                      setting="on the same GB200", source=PR),
            Published(figure="no gain", setting="on another system", source="StaticCore"),
        ),
        "tiles-and-pages": (
            Published(figure="40.3 to 4.4 GB", setting="traffic of attention, forward and backward,"
                      " GPT-2 medium at 1,024 tokens, A100; 7.3 ms for 41.7", source=DAO),
        ),
    },
}  # fmt: skip

PARTS = ReportParts(
    conclusions=(ALLOCATOR, WATERMARK, HEADS, TILES),
    answers={
        "KV-3": heads_saved,
        "KV-4": block_size,
        "KV-5": contiguous,
        "KO-3": tiles_or_pages,
    },
    plots={"allocator": draw_allocator},
    published=PUBLISHED,
    headline=Headline(
        claim="throughput",
        done="Holding only what a request has written, in blocks, instead of reserving its longest",
        figure="the throughput",
    ),
)
