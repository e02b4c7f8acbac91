"""Conclude what weights of fewer bits gain and cost, and which outliers matter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.facts.quality import (
    QUALITY,
    Quality,
    compared,
    figure_of,
    in_brief,
    quality_gate,
    treatments_of,
    with_interval,
)
from labs.harness.facts.weights import WEIGHTS, draw_tradeoff
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Interval, is_within
from labs.harness.judging.quality import over_clusters
from labs.harness.judging.text import number, sentences, times_with_interval
from labs.harness.spec import MARGIN

BASE = "bf16"
INPUTS = {
    "q_proj": "attention's input", "o_proj": "attention's output", "gate_proj": "MLP's input",
    "down_proj": "MLP's middle",
}  # fmt: skip

# -------------------------------------------------------------------------- the outlier problem


@dataclass(frozen=True)
class Rounding:
    """Holds what rounding to 8 bits in one way makes of perplexity."""

    how: str
    perplexity: float
    ratio: float  # to that of nothing rounded
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Inputs:
    """Measures how far the channels of what enters the linear layers of one kind stand out."""

    of: str
    largest_over_median: float  # channel, in the worst layer
    mean_kurtosis: float
    max_kurtosis: float


@dataclass(frozen=True)
class Outliers:
    """Answers CO-2: which activations are outliers, and what 8-bit rounding makes of them."""

    roundings: Mapping[str, Rounding]
    inputs: tuple[Inputs, ...]

    def ratio(self, scales: str) -> float:
        """Gives perplexity, as a ratio, with scales for the activations by tensor or token."""
        return self.roundings[f"activations by {scales}, weights by channel"].ratio


def outliers(context: Context) -> Outliers | None:
    """Reads the study of outliers; None where the run has none."""
    about = context.run.about.get("outliers", {})
    if "loss_nats" not in about:
        return None
    sizes, plain = about["passages_tokens"], about["loss_nats"]["none"]
    roundings = {}
    for how, nats in about["loss_nats"].items():
        lost = over_clusters([n - p for n, p in zip(nats, plain, strict=True)], sizes)
        low, high = (lost.low, lost.high) if how != "none" else (None, None)
        roundings[how] = Rounding(
            how=how,
            perplexity=math.exp(sum(nats) / sum(sizes)),
            ratio=math.exp(lost.value),
            low=None if low is None else math.exp(low),
            high=None if high is None else math.exp(high),
        )
    inputs = tuple(
        Inputs(
            title, of["largest_over_median_max"], of["kurtosis_mean"], of["kurtosis_max"]
        )
        for kind, title in INPUTS.items()
        if (of := about["inputs"].get(kind))
    )  # fmt: skip
    return Outliers(roundings, inputs)


def tell_outliers(facts: Outliers | None) -> Finding:
    title = "What is the outlier problem?"
    if facts is None:
        return Finding(title=title, lines=["Not studied in this run."])
    rows = [["Rounded to 8 bits", "Perplexity", "Ratio to unrounded", "95% interval"]]
    for r in facts.roundings.values():
        known = r.low is not None and r.high is not None
        beside = [f"{r.ratio:.3f}", f"{r.low:.3f} to {r.high:.3f}"] if known else ["–", "–"]
        rows.append([r.how, f"{r.perplexity:.2f}", *beside])
    channel_text = "; ".join(
        f"{i.of}: {i.largest_over_median:,.0f} times the median channel, kurtosis"
        f" {i.mean_kurtosis:,.0f} on average and {i.max_kurtosis:,.0f} at most"
        for i in facts.inputs
    )
    lines = [
        "The largest channel among the inputs of the linear layers, in the worst layer:"
        f" {channel_text}. A normal distribution has kurtosis 3.",
        scales_sentence(facts),
        "Simulated in float32 with the model itself on the held-out text, a third of which sets the"
        " scales; intervals are paired over passages. The quality of the served weights is below.",
    ]
    return Finding(title=title, rows=rows, lines=lines)


def scales_sentence(facts: Outliers) -> str:
    return (
        f"One scale for a whole tensor multiplies perplexity by {facts.ratio('tensor'):.2f};"
        " dividing the channels by their sizes first (SmoothQuant) by"
        f" {facts.ratio('tensor, smoothed'):.2f}; a scale for each token, which the"
        f" served W8A8 has, by {facts.ratio('token'):.3f}."
    )


OUTLIERS = Conclusion("outliers", outliers, tell_outliers)

# ------------------------------------------------------------------ needles by length and depth


def tell_needles(facts: Quality) -> Finding:
    """Shows by length and depth how the share of needles found changes."""
    title, treatments = "Needles by length and depth", facts.treatments
    if not treatments:
        return Finding(title=title, lines=["The probe did not run."])
    first = next(iter(treatments.values()))
    name = "needle_retrieval_difference"
    places = [f.where for f in first if f.name == name and f.where]
    rows = [["Where", *(f"`{variant}`" for variant in treatments)]]
    rows += [
        [where, *(with_interval(figure_of(f, name, where)) for f in treatments.values())]
        for where in places
    ]
    lines = ["Each figure is the change in the share of needles found, against the first variant."]
    return Finding(title=title, rows=rows, lines=lines)


NEEDLES = Conclusion("needles", compared, tell_needles)

# ------------------------------------------------------------------------------------ the answers


def winners(run: JudgedRun) -> str | None:
    """Compares the variants' throughput with the base's, load by load; only what is valid."""
    loads = next((w.loads for w in run.lab.workloads if w.name == "decode"), ())
    parts = []
    for load in loads:
        gains = {
            v.name: gain
            for v in run.lab.variants
            if (gain := _beside_base(run, v.name, "decode", load.users, "output_tokens_per_s"))
        }
        order = sorted(gains, key=lambda name: -gains[name].ratio.value)
        told = [
            f"`{name}` {times_with_interval(gains[name].ratio)}"
            for name in order
            if gains[name].is_valid
        ]
        told += [f"`{name}` not valid" for name, gain in gains.items() if not gain.is_valid]
        if told:
            parts.append(f"{load.users} in flight: {', '.join(told)}")
    if not parts:
        return None
    return (
        "Throughput relative to weights that are not quantized, the fastest first."
        f" {sentences(parts)} For an 8-bit KV cache see the lab kv-quantization."
    )


def outlier_problem(run: JudgedRun) -> str | None:
    facts = OUTLIERS.facts_of(run)
    if facts is None:
        return None
    return (
        "A few channels of the activations are far larger than the others, so that one scale for"
        f" all rounds the others coarsely. {scales_sentence(facts)}"
    )


def recipes(run: JudgedRun) -> str | None:
    treatments = treatments_of(run)
    pairs = (
        ("w8a8", "w8a8-rtn", "SmoothQuant with GPTQ", "round to nearest (8 bits)"),
        ("w4a16-awq", "w4a16-gptq", "AWQ", "GPTQ (4 bits)"),
    )
    parts = [
        f"{first_name}: {in_brief(treatments[one])}; {second_name}: {in_brief(treatments[other])}"
        for one, other, first_name, second_name in pairs
        if one in treatments and other in treatments
    ]
    rtn = " `make lab-quantization-tools` also compares them with 4 bits rounded to nearest."
    return sentences(parts) + rtn if parts else None


def formats(run: JudgedRun) -> str | None:
    treatments, parts = treatments_of(run), []
    for name in ("w4a16-gptq", "w4a16-awq"):
        rate = run.mean_at(name, "decode", 1, "output_tokens_per_s")
        point = run.point(name, "decode", "concurrent:1")
        if point and rate and name in treatments:
            size = f"{point.shape.weight_bytes / 1e6:,.0f} MB"
            parts.append(f"`{name}`: {size}, {number(rate, 'tok/s')}, {in_brief(treatments[name])}")
    return f"{sentences(parts)} GGUF was not served." if parts else None


def phases(run: JudgedRun) -> str | None:
    """Answers IP-2: whether fewer bytes of weights speed up decode alone, as theory has it."""
    parts, not_valid, settled = [], [], True
    not_in_decode, in_prefill_too = [], []  # variants that do otherwise than the bytes say
    in_memory_bytes = {p.variant.name: p.shape.weight_bytes for p in run.points}
    for variant in run.lab.variants[1:]:
        in_decode = _beside_base(run, variant.name, "decode", 1, "tpot_mean_s")
        in_prefill = _beside_base(run, variant.name, "prefill", 1, "ttft_mean_s")
        if in_decode is None or in_prefill is None:
            continue
        if not (in_decode.is_valid and in_prefill.is_valid):
            not_valid.append(f"the figures of `{variant.name}` are not valid")
            continue
        decode, prefill = in_decode.ratio, in_prefill.ratio
        ours, plain = (in_memory_bytes[name] for name in (variant.name, BASE))
        not_in_decode += [] if _shows_gain(decode) else [f"`{variant.name}`"]
        in_prefill_too += [f"`{variant.name}`"] if _shows_gain(prefill) else []
        settled &= _is_decided(decode) and _is_decided(prefill)
        parts.append(
            f"with {ours / plain:.2f} of the bytes (`{variant.name}`) decode takes"
            f" {times_with_interval(decode)} the time and prefill {times_with_interval(prefill)}"
        )
    theory = "fewer bytes of weights should speed up decode alone"
    if not parts:
        return sentences([theory, "; ".join(not_valid)]) if not_valid else None
    if not settled:
        verdict = "the repeats do not settle whether the bytes explain both phases on this machine"
    elif not_in_decode and in_prefill_too:
        verdict = (
            "on this machine the bytes alone explain neither phase: the time for a format's"
            " arithmetic matters in both"
        )
    elif not_in_decode:
        verdict = (
            "on this machine the bytes alone explain prefill, which is no faster, but not decode,"
            f" which is no faster either with {' and '.join(not_in_decode)}: there the time for a"
            " format's arithmetic takes up what reading less gains"
        )
    elif in_prefill_too:
        verdict = (
            "on this machine the bytes alone explain decode, but not prefill, which is faster, too,"
            f" with {' and '.join(in_prefill_too)}: a format's own arithmetic matters there"
        )
    else:
        verdict = (
            "they speed up decode and not prefill, as memory limits the one and arithmetic the"
            " other"
        )
    told = "; ".join([*parts, *not_valid])
    text = sentences([theory, told])
    return f"{text} So {verdict}."


@dataclass(frozen=True)
class Beside:
    """Divides a variant's figure by the base's."""

    ratio: Interval
    is_valid: bool  # whether nothing withholds a verdict on it


def _beside_base(
    run: JudgedRun, variant: str, workload: str, users: int, metric: str
) -> Beside | None:
    """Compares a variant's figure at a load with the base's; None for the base itself."""
    ours, base = (run.point(name, workload, f"concurrent:{users}") for name in (variant, BASE))
    if ours is None or base is None or variant == BASE:
        return None
    measured = run.effect(ours, base, metric)
    return Beside(measured.ratio, not run.withholds(metric, ours, base)) if measured else None


def _is_decided(times: Interval) -> bool:
    """Whether the interval of a ratio of times says that it differs from 1, or that it does not."""
    if times.low is None or times.high is None:
        return False
    beside = not times.low < 1 < times.high
    return beside or (is_within(times.low, MARGIN) and is_within(times.high, MARGIN))


def _shows_gain(times: Interval) -> bool:
    """Whether the interval of a ratio of times shows a gain."""
    return times.high is not None and times.high < 1


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "claims": {
        "w4-one": (
            Published(figure="up to 2.8x faster", setting="end to end", source="Marlin"),
            Published(figure="57 to 150 tok/s", setting="RTX 4090", source="AWQ"),
        ),
    },
    "findings": {
        "quality": (
            Published(
                figure="74.06, 73.55, 74.29, 73.11",
                setting="8B in BF16, FP8, INT8, INT4",
                source="Kurtic et al., ACL 2025",
            ),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(WEIGHTS, OUTLIERS, QUALITY, NEEDLES),
    answers={
        "CO-1": winners,
        "CO-2": outlier_problem,
        "CO-3": recipes,
        "CO-7": formats,
        "ME-2": quality_gate,
        "IP-2": phases,
    },
    plots={"tradeoff": draw_tradeoff},
    published=PUBLISHED,
    headline=Headline(
        claim="w4-one",
        done="Storing the weights in 4 bits, for a single user",
        figure="the time per token",
    ),
)
