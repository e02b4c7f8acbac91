"""Each question a lab answers, in a sentence or two with this run's own figures.

`REPLIES[lab][question id]` reads what was measured, judged and found, and returns None where a run
(a quick one, an ad hoc one, one with failed trials) lacks the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from labs import theory
from labs.filing.results import Summary
from labs.findings import quantization, speculation, streams
from labs.findings.context import Context
from labs.judging.judge import Judgement
from labs.judging.metrics import METRICS
from labs.judging.quality import QualityFigure, compare, gate
from labs.judging.text import number, times
from labs.lab import Point
from labs.multi_lora import adapter_bytes
from loadtests.arrivals import Arrival
from serving import metrics


@dataclass(frozen=True)
class Told:
    """A run as a reply sees it."""

    context: Context
    summary: Summary

    def ratio(self, claim: str) -> str | None:
        """Of the first pair at which the claim was validly judged, with its interval."""
        found = next((j.effect.ratio for j in self.judged(claim) if j.effect), None)
        return times(found) if found else None

    def judged(self, claim: str) -> list[Judgement]:
        return [j for j in self.summary.judgements if j.claim == claim and j.outcome != "not valid"]

    def lines(self, title: str) -> list[str]:
        """Of the finding with that title."""
        return next((f.lines for f in self.summary.findings if f.title == title), [])

    def rows(self, title: str) -> list[list[str]]:
        return next((f.rows[1:] for f in self.summary.findings if f.title == title), [])

    def loads(self, workload: str) -> tuple[Arrival, ...]:
        return next((w.loads for w in self.context.lab.workloads if w.name == workload), ())

    def at(self, variant: str, workload: str, users: int, metric: str) -> float | None:
        point = self.context.point(variant, workload, f"concurrent:{users}")
        return self.context.mean(point, metric) if point else None

    def gain(self, variant: str, workload: str, metric: str) -> float | None:
        """How many times as fast as BF16, one request at a time."""
        ours, plain = (self.at(name, workload, 1, metric) for name in (variant, "bf16"))
        return plain / ours if ours and plain else None


Reply = Callable[[Told], str | None]


def answer(context: Context, summary: Summary) -> dict[str, str]:
    """Question id -> the reply of this run, of those it can answer."""
    told = Told(context, summary)
    replies = REPLIES.get(context.lab.name, {})
    found = {id: replies[id](told) for id in context.lab.answers if id in replies}
    return {id: text for id, text in found.items() if text}


def concurrency_sweep(points: Sequence[Point]) -> list[Point]:
    """The closed-loop points of the first workload, in the order of their load."""
    mine = [p for p in points if p.workload.name == points[0].workload.name]
    return sorted((p for p in mine if p.load.kind == "concurrent"), key=lambda p: p.load.users)


def step_line(points: Sequence[Point], summary: Summary) -> tuple[float, float] | None:
    """(seconds of a step that are there anyway, seconds each request in decode adds to it).

    Least squares through the sweep's repeats; None with fewer than three sizes of the batch.
    """
    sweep = [
        (size, tpot)
        for point in concurrency_sweep(points)
        for row in summary.measurements.get(point.key, {}).values()
        if (size := row.get("batch")) and (tpot := row.get("tpot_mean_s"))
    ]
    if len({round(size) for size, _ in sweep}) < 3:
        return None
    sizes, tpots = zip(*sweep, strict=True)
    slope, fixed = np.polyfit(sizes, tpots, 1)
    return float(fixed), float(slope)


# --------------------------------------------------------------------------- continuous batching


def static(told: Told) -> str | None:
    varied, equal = told.ratio("static"), told.ratio("static-fixed")
    if not varied:
        return None
    (j, *_) = told.judged("static")
    return (
        f"Filling free places at once gave {varied} the throughput of fixed batches where lengths"
        f" vary; waiting for the longest answer was predicted to cost {j.prediction.value:.2f}x."
        + (f" With equal lengths: {equal}." if equal else "")
    )


def larger_batch(told: Told) -> str | None:
    rate, tpot = told.ratio("throughput"), told.ratio("tpot")
    line = step_line(told.context.points, told.summary)
    if not (rate and tpot and line):
        return None
    users = [p.load.users for p in concurrency_sweep(told.context.points)]
    return (
        f"A step serves all requests and reads the weights once for them: {1000 * line[0]:.3g} ms"
        f" are there anyway, each request in decode adds {1000 * line[1]:.3g} ms. From"
        f" {users[0]} to {users[-1]} in flight throughput is {rate}, and TPOT {tpot}."
    )


def ridge(told: Told) -> str | None:
    sweep = concurrency_sweep(told.context.points)
    found = [(p.load.users, i) for p in sweep if (i := told.context.mean(p, "intensity"))]
    if len(found) < 2:
        return None
    (few, low), (many, high) = found[0], found[-1]
    at = sweep[0].ceilings.ridge_flops_per_byte
    batch = theory.ridge_batch(sweep[0].shape, sweep[0].ceilings)
    side = "memory bounds both" if high < at else "memory bounds the first, arithmetic the last"
    return (
        f"FLOP for each byte read: {low:.3g} at {few} in flight, {high:.3g} at {many}. This"
        f" machine's ridge is {at:,.3g}, a batch of about {batch:,.0f}: {side}."
    )


def one_stream(told: Told) -> str | None:
    point = next((p for p in concurrency_sweep(told.context.points) if p.load.users == 1), None)
    tpot_s = told.context.mean(point, "tpot_mean_s") if point else None
    if point is None or tpot_s is None:
        return None
    speed = point.ceilings.memory_bandwidth_bytes_per_s
    most = speed / point.shape.step_bytes(1)
    return (
        f"{speed / 1e9:,.1f} GB/s over {point.shape.step_bytes(1) / 1e6:,.0f} MB of weights is at"
        f" most {number(most, 'tok/s')}. Measured: {number(1 / tpot_s, 'tok/s')} (1 / TPOT),"
        f" {1 / tpot_s / most:.0%} of it."
    )


def both_ends(told: Told) -> str | None:
    most = concurrency_sweep(told.context.points)[-1:]
    ends = [
        (ours, theirs)
        for p in told.context.points
        if (ours := told.context.mean(p, "client_ttft_mean_s")) is not None
        and (theirs := told.context.mean(p, "engine_ttft_mean_s")) is not None
    ]
    session = told.context.folder.session()
    if not most or not ends or not session:
        return None
    (point,) = most
    ttft, itl, e2e, throughput = (
        number(told.summary.value(point.key, metric), METRICS[metric].unit)
        for metric in ("ttft_p50_s", "itl_p50_s", "e2e_p50_s", "output_tokens_per_s")
    )
    figures = f"TTFT {ttft}, ITL {itl}, end to end {e2e} (medians) and {throughput}"
    counts = (a for a in session.agreement if a.engine is not None)
    differ = [a.what for a in counts if len({a.records, a.prometheus or a.records, a.engine}) > 1]
    agree = (
        f"do not agree on {', '.join(differ)}" if differ else "count the same requests and tokens"
    )
    gaps = [ours - theirs for ours, theirs in ends]
    return (
        f"At {point.load.users} in flight: {figures}. Client and server {agree}; the client's mean"
        f" TTFT is {number(min(gaps), 's')} to {number(max(gaps), 's')} the longer."
    )


# -------------------------------------------------------------------------------- prefix caching


def sharing(told: Told) -> str | None:
    shared = [
        f"{ratio} with {text}"
        for claim, text in (
            ("ttft-share-50", "half of the prompt shared"), ("ttft-share-90", "nine tenths"),
            ("ttft-share-97", "all but a question"),
        )
        if (ratio := told.ratio(claim))
    ]  # fmt: skip
    if not shared:
        return None
    rest = [
        f"{text} {ratio}"
        for claim, text in (
            ("thrash", "TTFT with more prefixes than the cache holds:"),
            ("cost", "throughput where nothing is shared:"),
        )
        if (ratio := told.ratio(claim))
    ]
    return _sentences([f"the more is shared: TTFT is {', '.join(shared)}", *rest])


def where_to_look(told: Told) -> str | None:
    """The engine's own split of the time to the first token."""
    said = []
    for variant, workload, users, text in (
        ("off", "share-90", 1, "one prompt at a time, nothing cached"),
        ("off", "share-90", 4, "four at once"),
        ("on", "share-90", 1, "one at a time, its prefix cached"),
    ):
        point = told.context.point(variant, workload, f"concurrent:{users}")
        parts = [
            _engine_mean(told.context, point, name) if point else None
            for name in (metrics.QUEUE_TIME, metrics.PREFILL_TIME)
        ]
        if None in parts:
            return None
        said.append(f"{text}, {number(parts[0], 's')} and {number(parts[1], 's')}")
    return (
        "At the engine's own split, mean time in its queue and in prefill: " + "; ".join(said) + "."
        " A long queue is load; a long prefill is a long prompt, a cold cache, or neighbours that"
        " are prefilled in the same steps."
    )


def _engine_mean(context: Context, point: Point, histogram: str) -> float | None:
    found = [
        trial.engine.histograms[histogram]
        for _, _, trial in context.folder.trials([point], context.lab)
        if trial and trial.engine and histogram in trial.engine.histograms
    ]
    count = sum(h.count for h in found)
    return sum(h.sum for h in found) / count if count else None


def leak_by_time(told: Told) -> str | None:
    return " ".join(told.lines("Does the cache tell tenants about each other?")[:-1]) or None


# -------------------------------------------------- speculative decoding, chunked prefill


def speculation_wins(told: Told) -> str | None:
    found = speculation.speed_ups(told.context)
    if not found:
        return None
    best = max(found, key=lambda s: s.measured)
    where = f"{best.point.workload.name}, {best.point.load.users} in flight"
    turns = " ".join(told.lines("Where does it win?")[:-1])
    return f"Most: {best.measured:.2f}x by `{best.point.variant.name}` on {where}. {turns}"


def chunks_solve(told: Told) -> str | None:
    stall, ttft = told.ratio("stall-sixteenth"), told.ratio("ttft")
    whole = next((p for p in told.context.points if p.variant.name == "whole"), None)
    stall_s = told.context.mean(whole, "stall_mean_s") if whole else None
    if not (stall and ttft and stall_s):
        return None
    return (
        f"A long prompt that is prefilled whole stops every running stream for"
        f" {number(stall_s, 's')}. With a budget of a sixteenth of it the stall is {stall}, and the"
        f" prompt's own first token takes {ttft} as long."
    )


def split(told: Told) -> str | None:
    link = told.lines("Which token budget?")[-1:]
    whole = next((p for p in told.context.points if p.variant.name == "whole"), None)
    stall_s = told.context.mean(whole, "stall_mean_s") if whole else None
    if not link or not stall_s:
        return None
    return (
        f"On one engine a prefill stops the streams for {number(stall_s, 's')}; on two it would not"
        f" touch them. {link[0]} The split itself was not run."
    )


# ---------------------------------------------------------------------------------- quantization


def kv_bytes(told: Told) -> str | None:
    point = next((p for p in told.context.points if p.variant.name == "bf16"), None)
    capacity = told.context.mean(point, "kv_capacity_tokens") if point else None
    if point is None or not capacity:
        return None
    shape, memory = point.shape, point.flags.kv_cache_memory_bytes
    return (
        f"2 x {shape.layers} layers x {shape.kv_heads} KV heads x {shape.head_dim} x 2 bytes ="
        f" {shape.kv_bytes_per_token():,.0f} bytes in BF16, {shape.kv_bytes_per_token(1):,.0f} in 8"
        f" bits. The engine made {capacity:,.0f} tokens of {memory / 2**20:,.0f} MiB,"
        f" {memory / capacity:,.0f} bytes each."
    )


def kv_of_a_sequence(told: Told) -> str | None:
    point = told.context.points[0]
    memory = point.flags.kv_cache_memory_bytes
    both = [8192 * point.shape.kv_bytes_per_token(b) for b in (2, 1)]
    onset = " ".join(told.lines("Where does preemption begin?"))
    return (
        f"8,192 tokens take {both[0] / 2**20:,.0f} MiB in BF16 and {both[1] / 2**20:,.0f} in 8"
        f" bits, so {memory / 2**20:,.0f} MiB hold {memory / both[0]:.1f} such sequences or"
        f" {memory / both[1]:.1f}. {onset}".strip()
    )


def kv_in_8_bits(told: Told) -> str | None:
    capacity, batch, far = (told.ratio(claim) for claim in ("capacity", "batch", "far"))
    if not capacity:
        return None
    said = [f"{capacity} the tokens in the same memory"]
    said += [f"{batch} the requests at once where it is short"] if batch else []
    said += [f"TPOT over a long context {far}"] if far else []
    figures = quantization.compared(told.context).get("fp8")
    return f"{', '.join(said)}. Quality: {_quality(figures)}." if figures else ", ".join(said) + "."


def _quality(figures: list[QualityFigure]) -> str:
    overall = {f.name: f.value for f in figures if f.where == ""}
    return (
        f"perplexity {overall['perplexity_ratio'] - 1:+.1%}, needles found"
        f" {100 * overall['needle_retrieval_difference']:+.0f} points, the gate says"
        f" *{gate(figures)[0]}*"
    )


def memory_steps(told: Told) -> str | None:
    rows = told.rows("Out of memory on long prompts: in which order?")
    steps = [f"{step} ({most}, {known.partition(':')[0]})" for step, most, _, known in rows]
    return f"In this order, with the largest prompt each: {'; '.join(steps)}." if steps else None


def winners(told: Told) -> str | None:
    said = []
    for load in told.loads("decode"):
        rates = {
            v.name: rate
            for v in told.context.lab.variants
            if (rate := told.at(v.name, "decode", load.users, "output_tokens_per_s"))
        }
        if "bf16" not in rates or len(rates) < 2:
            return None
        order = sorted(rates, key=lambda name: -rates[name])
        ratios = (f"`{n}` {rates[n] / rates['bf16']:.2f}x" for n in order if n != "bf16")
        said.append(f"{load.users} in flight: {', '.join(ratios)}")
    return (
        f"Throughput beside BF16's, the fastest first. {_sentences(said)} An 8-bit KV cache is the"
        " KV quantization lab's."
    )


def outlier_problem(told: Told) -> str | None:
    lines = told.lines("What is the outlier problem?")
    return lines[1] if len(lines) > 1 else None


def recipes(told: Told) -> str | None:
    found = quantization.compared(told.context)
    pairs = (
        ("w8a8", "w8a8-rtn", "SmoothQuant with GPTQ", "round to nearest (8 bits)"),
        ("w4a16-awq", "w4a16-gptq", "AWQ", "GPTQ (4 bits)"),
    )
    said = [
        f"{ours}: {_quality(found[one])}; {theirs}: {_quality(found[other])}"
        for one, other, ours, theirs in pairs
        if one in found and other in found
    ]
    rtn = " 4 bits rounded to nearest stand beside both in `make lab-quantization-tools`."
    return _sentences(said) + rtn if said else None


def worth(told: Told) -> str | None:
    found = quantization.compared(told.context)
    if "w4a16-rtn" not in found:
        return None
    said = [
        f"{name}: {_quality(found[made])}"
        for made, name in (
            ("w4a16-rtn", "4 bits rounded to nearest"), ("w4a16-gptq", "GPTQ"),
            ("w4a16-awq", "AWQ (with zero points)"),
        )
        if made in found
    ]  # fmt: skip
    eight = " SmoothQuant beside 8 bits rounded to nearest is `make lab-weight-quantization`'s."
    return f"All beside BF16. {_sentences(said)}{eight}"


def formats(told: Told) -> str | None:
    found = quantization.compared(told.context)
    said = []
    for name in ("w4a16-gptq", "w4a16-awq"):
        rate = told.at(name, "decode", 1, "output_tokens_per_s")
        point = told.context.point(name, "decode", "concurrent:1")
        if point and rate and name in found:
            size = f"{point.shape.weight_bytes / 1e6:,.0f} MB"
            said.append(f"`{name}`: {size}, {number(rate, 'tok/s')}, {_quality(found[name])}")
    return f"{_sentences(said)} GGUF was not served." if said else None


def quality_gate(told: Told) -> str | None:
    base = told.context.lab.variants[0].name
    found = quantization.compared(told.context)
    if not found:
        return None
    twice = quantization.asked(told.context, base)
    gates = ", ".join(f"`{name}` {gate(figures)[0]}" for name, figures in found.items())
    again = (
        f" {base} asked twice: {gate(compare(twice[0], twice[1]))[0]}, which is what a"
        " gate without false alarms says."
        if len(twice) > 1
        else ""
    )
    return (
        f"Paired with {base} over the same passages and questions, with intervals: {gates}.{again}"
    )


def phases(told: Told) -> str | None:
    said, as_bound = [], []
    for variant in told.context.lab.variants[1:]:
        decode, prefill = (
            told.gain(variant.name, workload, metric)
            for workload, metric in (("decode", "tpot_mean_s"), ("prefill", "ttft_mean_s"))
        )
        if decode is None or prefill is None:
            continue
        ours, plain = (
            next(p.shape.weight_bytes for p in told.context.points if p.variant.name == name)
            for name in (variant.name, "bf16")
        )
        as_bound.append(decode > 1.03 > prefill)
        said.append(
            f"with {ours / plain:.2f} of the bytes (`{variant.name}`) decode runs {decode:.2f}x and"
            f" prefill {prefill:.2f}x as fast"
        )
    if not said:
        return None
    verdict = (
        "they speed up decode and not prefill, as memory bounds the one and arithmetic the other"
        if all(as_bound)
        else "on this machine the bytes alone explain neither phase: what a format's arithmetic"
        " takes counts in both"
    )
    text = _sentences(["fewer bytes of weights should speed up decode alone", "; ".join(said)])
    return f"{text} So {verdict}."


def tools(told: Told) -> str | None:
    return " ".join(told.lines("Tool against tool, text against text")[:-1]) or None


# ------------------------------------------------------------------------------------ multi-LoRA


def many_adapters(told: Told) -> str | None:
    point = next((p for p in told.context.points if p.workload.adapters), None)
    one = told.ratio("one")
    if point is None or not one:
        return None
    base, each = point.shape.weight_bytes, adapter_bytes(point)
    return (
        f"Eight tenants on one engine take {(base + 8 * each) / 1e9:.2f} GB of weights, with a"
        f" server each {8 * base / 1e9:.2f}. With adapters applied throughput is {one} the base's."
    )


def mixed_adapters(told: Told) -> str | None:
    parts = (
        ("eight", "TPOT of eight adapters in one batch over one adapter's:"),
        ("swap", "TTFT with two slots for the eight over eight slots:"),
        ("skew", "there with a skewed mix over a uniform one:"),
    )
    said = [f"{text} {ratio}" for claim, text in parts if (ratio := told.ratio(claim))]
    return f"In one batch, each request with its own. {_sentences(said)}" if said else None


def leak_by_answer(told: Told) -> str | None:
    lines = told.lines("Does any answer come from another tenant's adapter?")
    return " ".join([lines[0], *lines[-1:]]) if len(lines) > 1 else None


# ----------------------------------------------------------------------------------- one stream


def two_phases(told: Told) -> str | None:
    lines = told.lines("Two phases, two limits")
    found = {name: streams.phase(told.context, "default", name) for name in streams.METRIC_OF}
    if not lines:
        return None
    limits = " and ".join(f"{phase.bound} limits {name}" for name, phase in found.items() if phase)
    return f"{lines[0]} On this machine {limits}."


def fused(told: Told) -> str | None:
    decode, prefill = told.ratio("eager"), told.ratio("eager-prefill")
    if not decode:
        return None
    graphs, fusion = told.ratio("no-graphs"), told.ratio("no-fusion")
    said = [f"with every operation launched for itself TPOT is {decode} the defaults'"]
    said += [f"TTFT of a long prompt {prefill}"] if prefill else []
    said += [f"compiled but without CUDA graphs TPOT is {graphs}"] if graphs else []
    said += [f"with graphs but not compiled {fusion}"] if fusion else []
    return f"{_sentences(said)} {' '.join(told.lines('Which flag matters to one stream?')[:1])}"


def _sentences(parts: Iterable[str]) -> str:
    return " ".join(f"{part[0].upper()}{part[1:]}." for part in parts)


REPLIES: dict[str, dict[str, Reply]] = {
    "continuous-batching": {
        "SO-1": static, "SD-1": larger_batch, "IP-3": ridge, "IP-7": one_stream, "ME-1": both_ends,
    },
    "prefix-caching": {"SO-4": sharing, "IP-5": where_to_look, "SA-4": leak_by_time},
    "speculative-decoding": {"SO-5": speculation_wins},
    "chunked-prefill": {"SO-3": chunks_solve, "SA-1": split},
    "kv-quantization": {
        "KV-1": kv_bytes, "KV-2": kv_of_a_sequence, "KV-6": kv_in_8_bits, "KV-7": memory_steps,
    },
    "weight-quantization": {
        "CO-1": winners, "CO-2": outlier_problem, "CO-3": recipes, "CO-7": formats,
        "ME-2": quality_gate, "IP-2": phases,
    },
    "multi-lora": {"SA-2": many_adapters, "SA-3": mixed_adapters, "SA-4": leak_by_answer},
    "single-stream": {"IP-1": two_phases, "KO-2": fused},
    "quantization-tools": {"CO-3": worth, "CO-7": tools, "ME-2": quality_gate},
}  # fmt: skip
