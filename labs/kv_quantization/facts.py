"""Conclude what a quantized KV cache gains in memory and speed, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy

from dashboards.palette import VARIANTS
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import draw_forecasts, plt
from labs.harness.facts.offloading import BREAK_EVEN_LENGTH, CopyOrCompute, break_even_sentence
from labs.harness.facts.parts import IN_PART, Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.facts.quality import QUALITY, compared, in_brief, treatments_of
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval
from labs.harness.judging.metrics import METRICS
from labs.harness.judging.text import between, number, times_with_interval
from labs.harness.spec import Point

# ------------------------------------------------------------------ where preemption begins


@dataclass(frozen=True)
class Load:
    """Holds a load of growing requests, and how many of them the engine preempted."""

    users: int
    capacity_tokens: float | None
    in_decode: float | None  # mean
    preemptions: float  # a trial, mean
    tokens_per_s: float | None


@dataclass(frozen=True)
class Onset:
    """Says from which load on an engine throws running requests' caches away."""

    variant: str
    capacity_tokens: float | None
    longest_request_tokens: float
    mean_request_tokens: float
    loads: tuple[Load, ...]

    @property
    def first_users(self) -> int | None:
        """The smallest load with preemptions."""
        return min((load.users for load in self.loads if load.preemptions), default=None)

    @property
    def calm_users(self) -> int | None:
        """The largest load below that; None where there is none."""
        first = self.first_users
        calm = (load.users for load in self.loads if first and load.users < first)
        return max(calm, default=None)


def onsets(context: Context) -> tuple[Onset, ...]:
    growing: dict[str, list[Point]] = {}
    for point in context.points:
        if point.workload.name == "growing":
            growing.setdefault(point.variant.name, []).append(point)
    tight = []
    for variant, points in growing.items():
        loads = tuple(
            Load(
                users=p.load.users,
                capacity_tokens=context.mean(p, "kv_capacity_tokens"),
                in_decode=context.mean(p, "batch"),
                preemptions=preemptions,
                tokens_per_s=context.mean(p, "output_tokens_per_s"),
            )
            for p in points
            if (preemptions := context.mean(p, "preemptions")) is not None
        )
        if loads:
            tight.append(
                Onset(
                    variant=variant,
                    capacity_tokens=context.mean(points[0], "kv_capacity_tokens"),
                    longest_request_tokens=points[0].prompt_tokens + points[0].output_tokens,
                    mean_request_tokens=points[0].context_tokens,
                    loads=loads,
                )
            )
    return tuple(tight)


def tell_preemption(facts: tuple[Onset, ...]) -> Finding:
    rows = [["Variant", "KV capacity", "In flight", "Requests in decode", "Preemptions per trial",
             "Output throughput"]]  # fmt: skip
    rows += [
        [
            onset.variant,
            number(load.capacity_tokens, "tok"),
            str(load.users),
            number(load.in_decode),
            number(load.preemptions),
            number(load.tokens_per_s, "tok/s"),
        ]
        for onset in facts
        for load in onset.loads
    ]
    lines = [onset_sentence(onset) for onset in facts]
    return Finding(title="Where does preemption begin?", rows=rows, lines=lines)


def onset_sentence(onset: Onset) -> str:
    if onset.first_users is None:
        most = max(load.users for load in onset.loads)
        return f"`{onset.variant}`: no preemption up to {most} in flight."
    tokens = onset.capacity_tokens
    held = (
        f"{tokens:,.0f} tokens hold {tokens / onset.longest_request_tokens:.1f} requests of the"
        f" longest and {tokens / onset.mean_request_tokens:.1f} of the mean length, so preemption"
        " was predicted to begin between these two loads."
        if tokens
        else "how many tokens the engine holds is not known, so nothing was predicted."
    )
    began = (
        f"There was none at {onset.calm_users} in flight, and some at {onset.first_users}."
        if onset.calm_users
        else f"There was some at {onset.first_users} in flight, the smallest load."
    )
    return f"`{onset.variant}`: {held} {began}"


PREEMPTION = Conclusion("preemption", onsets, tell_preemption)

# ------------------------------------------------------------------------- TPOT over the context


@dataclass(frozen=True)
class Line:
    """Fits TPOT over the tokens of context by least squares."""

    fixed_s: float
    s_per_token: float
    error_s_per_token: float  # standard error of the slope
    freedom: int  # samples beyond the two parameters
    kv_bytes_per_token: float

    @staticmethod
    def reach(error: float, freedom: int) -> float:
        """Half of the 95% interval; infinite where as many points as parameters were fitted."""
        return error * float(scipy.stats.t.ppf(0.975, freedom)) if freedom else math.inf


@dataclass(frozen=True)
class ContextLines:
    """Holds each variant's line over the context; `base` is the lab's first variant."""

    base: str
    lines: dict[str, Line]


def context_lines(context: Context) -> ContextLines:
    lines = {}
    for variant in context.lab.variants:
        at = [
            (p.context_tokens, tpot_s)
            for p in context.points
            if p.variant.name == variant.name and p.workload.name in ("near", "far")
            for row in context.rows(p)
            if (tpot_s := row.get("tpot_mean_s"))
        ]
        if len({tokens for tokens, _ in at}) < 2:
            continue
        fit = scipy.stats.linregress([tokens for tokens, _ in at], [tpot_s for _, tpot_s in at])
        point = next(p for p in context.points if p.variant.name == variant.name)
        lines[variant.name] = Line(
            fixed_s=float(fit.intercept),
            s_per_token=float(fit.slope),
            error_s_per_token=float(fit.stderr),
            freedom=len(at) - 2,
            kv_bytes_per_token=point.shape.kv_bytes_per_token(point.flags.kv_value_bytes),
        )
    return ContextLines(context.lab.variants[0].name, lines)


def tell_slope(facts: ContextLines) -> Finding:
    """Shows TPOT as a line over the context, and where the quantized cache breaks even."""
    rows = [["Variant", "TPOT without context", "Per 1,000 tokens of context", "95% interval",
             "KV bytes per token"]]  # fmt: skip
    for name, line in facts.lines.items():
        reach = line.reach(line.error_s_per_token, line.freedom)
        low, high = (1000 * (line.s_per_token + side * reach) for side in (-1, 1))
        rows.append(
            [name, number(line.fixed_s, "s"), number(1000 * line.s_per_token, "s"),
             between(low, high, "s") if line.freedom else "–", f"{line.kv_bytes_per_token:,.0f}"]
        )  # fmt: skip
    plain = facts.lines.get(facts.base)
    lines = [
        _even_sentence(name, line, facts.base, plain)
        for name, line in facts.lines.items()
        if plain and name != facts.base
    ]
    lines.append(
        "The line is a least-squares fit to the repeats at two context lengths, with four sequences"
        " in the batch. Published for FP8 on a GPU: 54% of the slope, and a break-even at 7,010"
        " tokens (vLLM, April 2026)."
    )
    return Finding(title="TPOT over context", rows=rows, lines=lines)


def _even_sentence(name: str, line: Line, base: str, plain: Line) -> str:
    """Says where a variant that starts later and climbs less steeply meets the base."""
    gap_s, gain = line.fixed_s - plain.fixed_s, plain.s_per_token - line.s_per_token
    error = math.hypot(line.error_s_per_token, plain.error_s_per_token)
    if abs(gain) <= line.reach(error, line.freedom + plain.freedom):
        even = "; the repeats vary too much to distinguish the two slopes."
    elif gain < 0 and gap_s < 0:
        even = f"; by the fit it is ahead up to {gap_s / gain:,.0f} tokens of context, not beyond."
    elif gain <= 0:
        even = "; it never breaks even: reading less does not pay for widening the values here."
    elif gap_s <= 0:
        even = "; ahead at every context."
    else:
        even = f"; it breaks even at {gap_s / gain:,.0f} tokens of context."
    share = line.s_per_token / plain.s_per_token
    return f"`{name}`: {share:.0%} of the slope of `{base}` (50% by the bytes){even}"


CONTEXT_SLOPE = Conclusion("context-slope", context_lines, tell_slope)

# --------------------------------------------------------------------------- out of memory


@dataclass(frozen=True)
class Step:
    """Describes a remedy for running out of memory: its largest prompt, and its price."""

    name: str
    largest_prompt_tokens: float
    price: str
    known_from: str
    how: str = ""  # where arithmetic needs a word


@dataclass(frozen=True)
class MemoryLadder:
    """Lists the steps in the order in which to take them."""

    kv_bytes: int
    kv_bytes_per_token: float  # in BF16
    max_positions: int  # of the model
    steps: tuple[Step, ...]
    offload: CopyOrCompute


def memory_ladder(context: Context) -> MemoryLadder | None:
    """Answers KV-7, out of memory on long prompts; None without ample and tight BF16 caches."""
    points = {p.variant.name: p for p in context.points}
    plain, tight = points.get("bf16"), points.get("bf16-tight")
    if plain is None or tight is None:
        return None
    memory = tight.flags.kv_cache_memory_bytes
    per_token = plain.shape.kv_bytes_per_token()
    measured = context.mean(tight, "kv_capacity_tokens")
    capacity = measured or memory / per_token
    eight = points.get("fp8-tight")
    measured_eight = context.mean(eight, "kv_capacity_tokens") if eight else None
    twice = measured_eight or 2 * capacity
    freed_bytes = 0.75 * (plain.shape.weight_bytes - 2 * plain.shape.head_params)
    with_4_bits = twice + freed_bytes / (per_token / 2)
    returning = _of_recomputing(context)
    steps = (
        Step("as it is", capacity, "–", "measured" if measured else "arithmetic"),
        Step(
            "lower `max-model-len`", capacity,
            "longer prompts are refused at once, not half-way", "engine's own check",
        ),
        Step(
            "lower `max-num-seqs` to 1", capacity,
            "one request at a time, which gets the whole cache", "arithmetic",
        ),
        Step(
            "FP8 KV cache", twice, _price(context), "measured" if measured_eight else "arithmetic"
        ),
        Step(
            "4-bit weights as well", with_4_bits,
            "see the weight-quantization lab", "arithmetic",
            how="¾ of the bytes of all weights except the output head become cache",
        ),
        Step(
            "KV offload to the host's memory as well", with_4_bits,
            "a prompt that returns is copied back"
            + (f", with {times_with_interval(returning)} the TTFT of computing it again (measured"
               " in BF16, without the steps above)" if returning else ""),
            "arithmetic",
            how="what runs has to be in the engine's own memory, so no longer prompt fits; what was"
            " evicted is kept",
        ),
    )  # fmt: skip
    offload = CopyOrCompute.of(plain)
    return MemoryLadder(memory, per_token, plain.shape.max_positions, steps, offload)


def _of_recomputing(context: Context) -> Interval | None:
    """Divides the TTFT of a prompt copied back by that of one computed again; None if not valid."""
    at = {p.variant.name: p for p in context.points if p.workload.name == "returning"}
    if not {"offload", "recompute"} <= at.keys():
        return None
    copied, computed = at["offload"], at["recompute"]
    if context.withholds("ttft_mean_s", copied, computed):
        return None
    measured = context.effect(copied, computed, "ttft_mean_s")
    return measured.ratio if measured else None


def _price(context: Context) -> str:
    """Prices the FP8 cache in quality and in speed, the worst measured side among them."""
    figures = context.once(compared).treatments.get("fp8")
    parts = [in_brief(figures)] if figures is not None else []
    slower = {
        f"*{METRICS[metric].title}* {times_with_interval(ratio)} {where}": worse
        for workload, where in (("far", "over a long context"), ("near", "over a short context"))
        for metric in ("tpot_mean_s", "ttft_mean_s", "output_tokens_per_s")
        if (ratio := _of_base(context, workload, metric))
        and (worse := ratio.value if METRICS[metric].better == "lower" else 1 / ratio.value) > 1
    }
    if slower:
        parts.append(f"at worst {max(slower, key=slower.__getitem__)}")
    return ", ".join(parts) or "–"


def _of_base(context: Context, workload: str, metric: str) -> Interval | None:
    """Divides the FP8 cache's figure on a workload by the BF16 cache's; None if not valid."""
    at = {p.variant.name: p for p in context.points if p.workload.name == workload}
    if "fp8" not in at or "bf16" not in at:
        return None
    if context.withholds(metric, at["fp8"], at["bf16"]):
        return None
    measured = context.effect(at["fp8"], at["bf16"], metric)
    return measured.ratio if measured else None


def tell_ladder(facts: MemoryLadder | None) -> Finding:
    title = "Out of memory on long prompts: in which order?"
    if facts is None:
        return Finding(title=title)
    rows = [["Step", "Largest prompt", "Price", "Known from"]]
    rows += [
        [s.name, f"{s.largest_prompt_tokens:,.0f} tokens", s.price,
         f"{s.known_from}: {s.how}" if s.how else s.known_from]
        for s in facts.steps
    ]  # fmt: skip
    lines = [
        f"For {facts.kv_bytes / 2**20:.0f} MiB of KV memory and {facts.kv_bytes_per_token:,.0f}"
        " bytes a token in BF16. The steps before the FP8 cache change no answer. From there on"
        " each step has a price in quality or time; the worst measured one is given. The"
        f" model itself ends at {facts.max_positions:,} positions.",
        f"{break_even_sentence(facts.offload)} {BREAK_EVEN_LENGTH}",
    ]
    return Finding(title=title, rows=rows, lines=lines)


MEMORY_LADDER = Conclusion("memory-ladder", memory_ladder, tell_ladder)

# ------------------------------------------------------------------------------------ the answers


def kv_bytes(run: JudgedRun) -> str | None:
    point = next((p for p in run.points if p.variant.name == "bf16"), None)
    capacity = run.mean(point, "kv_capacity_tokens") if point else None
    if point is None or not capacity:
        return None
    shape, memory = point.shape, point.flags.kv_cache_memory_bytes
    return (
        f"2 x {shape.layers} layers x {shape.kv_heads} KV heads x {shape.head_dim} x 2 bytes ="
        f" {shape.kv_bytes_per_token():,.0f} bytes in BF16, {shape.kv_bytes_per_token(1):,.0f} in 8"
        f" bits. The engine fits {capacity:,.0f} tokens into {memory / 2**20:,.0f} MiB,"
        f" {memory / capacity:,.0f} bytes each."
    )


def kv_of_a_sequence(run: JudgedRun) -> str | None:
    """Answers by arithmetic, and says where preemption began, if that was measured."""
    point = run.points[0]
    memory = point.flags.kv_cache_memory_bytes
    both = [8192 * point.shape.kv_bytes_per_token(b) for b in (2, 1)]
    onset = " ".join(onset_sentence(o) for o in PREEMPTION.facts_of(run) or ())
    return (
        f"8,192 tokens take {both[0] / 2**20:,.0f} MiB in BF16 and {both[1] / 2**20:,.0f} MiB in 8"
        f" bits, so {memory / 2**20:,.0f} MiB hold {memory / both[0]:.1f} such sequences in BF16"
        f" and {memory / both[1]:.1f} in 8 bits. {onset}".strip()
    )


def kv_in_8_bits(run: JudgedRun) -> str | None:
    capacity, batch, far = (run.ratio(claim) for claim in ("capacity", "batch", "far"))
    if not capacity:
        return None
    parts = [f"{capacity} the tokens in the same memory"]
    parts += [f"{batch} the requests at once where it is short"] if batch else []
    parts += [f"TPOT over a long context {far}"] if far else []
    figures = treatments_of(run).get("fp8")
    return f"{', '.join(parts)}." + (f" Quality: {in_brief(figures)}." if figures else "")


def memory_steps(run: JudgedRun) -> str | None:
    ladder = MEMORY_LADDER.facts_of(run)
    if ladder is None:
        return None
    steps = [
        f"{s.name} ({s.largest_prompt_tokens:,.0f} tokens, {s.known_from};"
        f" price: {s.price if s.price != '–' else 'none'})"
        for s in ladder.steps
    ]
    return (
        f"In this order, with the largest prompt and the price of each: {'; '.join(steps)}."
        f" {break_even_sentence(ladder.offload)}"
    )


# -------------------------------------------------------------------------------------- its plots


def draw_preemption(run: JudgedRun) -> str | None:
    """Draws requests in decode and preemptions over the requests in flight."""
    growing = [p for p in run.points if p.workload.name == "growing"]
    if not growing:
        return None
    _, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    names = list(dict.fromkeys(p.variant.name for p in growing))
    for name, colour in zip(names, VARIANTS, strict=False):
        points = sorted((p for p in growing if p.variant.name == name), key=lambda p: p.load.users)
        x = [p.load.users for p in points]
        for ax, metric in ((axes[0], "batch"), (axes[1], "preemptions")):
            means = [run.interval(p, metric) for p in points]
            ax.plot(x, [m.value if m else np.nan for m in means], "o-", color=colour, label=name)
            known = [run.forecast(p, metric) for p in points]
            draw_forecasts(ax, x, known, colour=colour, label=f"forecast, {name}")
        full = points[0].prompt_tokens + points[0].output_tokens
        capacity = run.interval(points[0], "kv_capacity_tokens")
        if capacity:
            axes[1].axvspan(
                capacity.value / full, capacity.value / points[0].context_tokens,
                color=colour, alpha=0.15, lw=0, label=f"predicted onset, {name}",
            )  # fmt: skip
    for ax, label in ((axes[0], "requests in decode, mean"), (axes[1], "preemptions a trial")):
        ax.set_xlabel("requests in flight")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=8)
    return (
        "Requests that run (left) and preemptions (right) with the same memory, in which a"
        " quantized cache has room for more tokens. Shaded: where capacity / request length"
        " predicts the onset, from the longest to the mean length."
    )


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "claims": {
        "capacity": (Published(figure="2.6x memory", source="KIVI"),),
        "far": (Published(figure="450 to 518 tok/s", source="vLLM, April 2026"),),
    },
    "findings": {
        "context-slope": (
            Published(
                figure="54%",
                setting="slope of ITL over the context, break-even at 7,010 tokens",
                source="vLLM, April 2026",
            ),
        ),
        "quality": (
            Published(
                figure="91 to 13%",
                setting="needle in 128K tokens, FlashAttention 3 accumulating in FP8, 89% once"
                " mended",
                source="vLLM, April 2026",
            ),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(PREEMPTION, CONTEXT_SLOPE, QUALITY, MEMORY_LADDER),
    answers={
        "KV-1": kv_bytes,
        "KV-2": kv_of_a_sequence,
        "KV-6": kv_in_8_bits,
        "KV-7": memory_steps,
    },
    kinds={"KV-7": IN_PART},
    plots={"preemption": draw_preemption},
    published=PUBLISHED,
    headline=Headline(
        claim="batch",
        done="Storing keys and values in 8 bits, where memory is short",
        figure="the requests that run at once",
        on_front_page=False,
    ),
)
