"""Conclude what tiling saves, what is left of N^2 in TTFT, and what a context costs a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from matplotlib.axes import Axes

from dashboards.palette import BLUE, BOUND, ORANGE, VARIANTS
from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import (
    BANDS,
    GREY,
    draw_forecasts,
    legend_above,
    plt,
    reach,
    write_plainly,
)
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import Published, PublishedFigures
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import (
    CONFIDENCE,
    TWO_ONE_SIDED,
    Effect,
    Interval,
    PredictionOutcome,
    effect,
    prediction_outcome,
)
from labs.harness.judging.text import number, times_with_interval, value_with_interval, with_ends
from labs.harness.spec import Point, Prediction
from labs.tiled_attention.lab import DAO, FLASH_DECODING
from serving.attention import AttentionTimes, Kernel, KernelTimes
from serving.machine import Ceilings
from serving.models import Shape

NAMES: dict[Kernel, str] = {"untiled": "without tiles", "tiled": "with tiles"}


@dataclass(frozen=True)
class Estimate:
    """Holds a fitted figure with its standard error; the error is None where none is left over."""

    value: float
    error: float | None
    freedom: int

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        n = max(1, self.freedom)
        if self.error is None:
            return Interval(value=self.value, low=None, high=None, n=n)
        half = float(scipy.stats.t.ppf(0.5 + confidence / 2, self.freedom)) * self.error
        return Interval(value=self.value, low=self.value - half, high=self.value + half, n=n)

    def times(self, factor: float) -> Estimate:
        """Multiplies the figure, and its error, by a positive factor."""
        error = None if self.error is None else factor * self.error
        return Estimate(factor * self.value, error, self.freedom)

    def outcome(self, prediction: Prediction | None) -> PredictionOutcome:
        if prediction is None:
            return "open"
        return prediction_outcome(prediction, self.interval(TWO_ONE_SIDED))


def least_squares(
    columns: Sequence[Sequence[float]], values: Sequence[float]
) -> list[Estimate] | None:
    """Fits values as a sum of columns, each times a coefficient, by their relative errors.

    None where fewer different rows than coefficients are given.
    """
    given, y = np.array(columns).T, np.array(values)
    if len(y) == 0 or np.linalg.matrix_rank(given) < len(columns):
        return None
    x, ones = given / y[:, None], np.ones(len(y))
    scale = np.abs(x).max(axis=0)  # columns of very different sizes
    coefficients, *_ = np.linalg.lstsq(x / scale, ones, rcond=None)
    freedom = len(y) - len(columns)
    errors: Sequence[float | None] = [None] * len(columns)
    if freedom:
        variance = float(np.sum((ones - x / scale @ coefficients) ** 2)) / freedom
        errors = np.sqrt(variance * np.diag(np.linalg.inv((x / scale).T @ (x / scale)))).tolist()
    return [
        Estimate(float(c / s), None if e is None else e / float(s), freedom)
        for c, e, s in zip(coefficients, errors, scale, strict=True)
    ]


# ---------------------------------------------------------------------- with and without tiles


@dataclass(frozen=True)
class Growth:
    """Says with which power of N a figure of a kernel grows."""

    figure: str  # `memory` or `time`
    kernel: Kernel
    exponent: Estimate | None
    prediction: Prediction | None

    @property
    def outcome(self) -> PredictionOutcome:
        return self.exponent.outcome(self.prediction) if self.exponent else "open"


@dataclass(frozen=True)
class Length:
    """Holds both kernels at one length; None where one was left out."""

    tokens: int
    untiled: KernelTimes | None
    tiled: KernelTimes | None
    peak: Prediction | None  # of the untiled kernel
    ratio: Prediction | None  # tiled / untiled, of the times
    traffic_bytes: tuple[float, float] | None  # untiled and tiled, by the paper

    @property
    def times_ratio(self) -> Effect | None:
        """The time with tiles / that without, from the passes."""
        if self.untiled is None or self.tiled is None:
            return None
        sides = (dict(enumerate(side.times_s)) for side in (self.tiled, self.untiled))
        return effect(*sides)

    @property
    def memory_ratio(self) -> float | None:
        """The memory without tiles / that with."""
        if self.untiled is None or self.tiled is None:
            return None
        return self.untiled.peak_bytes / self.tiled.peak_bytes


@dataclass(frozen=True)
class Tiling:
    """Holds what was timed before the engines started; nothing where it was not."""

    times: AttentionTimes | None
    lengths: tuple[Length, ...]
    growths: tuple[Growth, ...]
    shape: Shape | None
    ceilings: Ceilings | None

    @property
    def longest_both(self) -> Length | None:
        """The longest length at which both kernels were timed."""
        both = [length for length in self.lengths if length.untiled and length.tiled]
        return both[-1] if both else None


def power_of_memory(tokens: Sequence[int], peaks: Sequence[int]) -> Estimate | None:
    """Fits peak = fixed + a N^p, where buffers that do not grow are in `fixed`.

    None for fewer than four lengths, which would leave no error, or where no fit is found.
    """
    if len(tokens) < 4:
        return None
    x, y = np.array(tokens, float) / tokens[-1], np.array(peaks, float) / peaks[-1]

    def model(n: object, fixed: float, a: float, p: float) -> object:
        return fixed + a * np.asarray(n) ** p

    try:
        parameters, covariance = scipy.optimize.curve_fit(
            model, x, y, p0=(0.0, 1.0, 1.5), sigma=y, bounds=([-1, 0, 0], [1, 2, 4])
        )
    except RuntimeError:
        return None
    error = float(np.sqrt(covariance[2, 2]))
    return Estimate(float(parameters[2]), error if math.isfinite(error) else None, len(tokens) - 3)


def power_of_time(tokens: Sequence[int], times_s: Sequence[Sequence[float]]) -> Estimate | None:
    """Fits the logarithm of the least time over that of N; None for fewer than two lengths.

    The error is that of the line through the lengths, so a bend counts as well.
    """
    if len(tokens) < 2:
        return None
    fit = scipy.stats.linregress(np.log(tokens), np.log([min(times) for times in times_s]))
    freedom = len(tokens) - 2
    return Estimate(float(fit.slope), float(fit.stderr) if freedom else None, freedom)


def tiling(context: Context) -> Tiling:
    times, predicted = context.folder.attention_times(), context.predictions.arithmetic
    if times is None:
        return Tiling(None, (), (), None, None)
    shape, ceilings = context.points[0].shape, context.points[0].ceilings
    untiled, tiled = times.at("untiled"), times.at("tiled")
    growths = []
    for figure, kernel in itertools.product(("memory", "time"), NAMES):
        at = times.at(kernel)
        exponent = (
            power_of_memory([*at], [t.peak_bytes for t in at.values()])
            if figure == "memory"
            else power_of_time([*at], [t.times_s for t in at.values()])
        )
        growths.append(
            Growth(figure, kernel, exponent, predicted.get(f"growth of {figure}, {kernel}"))
        )
    cache = times.cache_bytes
    return Tiling(
        times=times,
        lengths=tuple(
            Length(
                tokens=n,
                untiled=untiled.get(n),
                tiled=tiled.get(n),
                peak=predicted.get(f"memory, untiled at {n}"),
                ratio=predicted.get(f"time, tiled / untiled at {n}"),
                traffic_bytes=(
                    theory.attention_bytes(shape, n, None),
                    theory.attention_bytes(shape, n, cache),
                )
                if cache
                else None,
            )
            for n in sorted({*untiled, *tiled})
        ),
        growths=tuple(growths),
        shape=shape,
        ceilings=ceilings,
    )


def megabytes(size: float | None) -> str:
    return "–" if size is None else f"{number(size / 1e6)} MB"


def tell_tiling(facts: Tiling) -> Finding:
    """Shows memory and time of both kernels, and with which power of N they grow."""
    title = "What does cutting attention into tiles save?"
    rows = [["Tokens", "Memory without tiles", "By the formula", "With tiles",
             "Time without tiles", "With tiles", "With / without",
             "Traffic by the paper, without / with"]]  # fmt: skip
    if facts.times is None:
        return Finding(
            title=title, rows=rows, lines=["Attention was not timed by itself in this run."]
        )
    for length in facts.lengths:
        ratio = length.times_ratio
        rows.append([
            f"{length.tokens:,}",
            megabytes(length.untiled.peak_bytes if length.untiled else None),
            megabytes(length.peak.value if length.peak else None),
            megabytes(length.tiled.peak_bytes if length.tiled else None),
            number(min(length.untiled.times_s) if length.untiled else None, "s"),
            number(min(length.tiled.times_s) if length.tiled else None, "s"),
            times_with_interval(ratio.ratio) if ratio else "–",
            " / ".join(map(megabytes, length.traffic_bytes)) if length.traffic_bytes else "–",
        ])  # fmt: skip
    where = "the GPU" if facts.times.device == "cuda" else _cores(facts.times.threads)
    lines = [
        *growth_sentences(facts),
        *filter(None, [peak_sentence(facts), time_sentence(facts), rate_sentence(facts)]),
        *left_out_sentences(facts.times),
        f"Both are PyTorch's kernels on {facts.times.heads} heads of {facts.times.head_dim}, one"
        f" layer, on {where}, timed before any engine started. Every query attends to every key, so"
        " that both do the same arithmetic; memory is what PyTorch holds beyond the inputs, times"
        " are the least of the passes and ratios of their means. Traffic is computed, not counted.",
    ]
    return Finding(title=title, rows=rows, lines=lines)


def _cores(count: int) -> str:
    return "one of the engine's cores" if count == 1 else f"the engine's {count} cores"


def growth_sentences(facts: Tiling) -> Iterator[str]:
    for figure in ("memory", "time"):
        clauses = [
            f"{NAMES[g.kernel]} as N^{value_with_interval(g.exponent.interval())}, predicted"
            f" {g.prediction.formula} ({g.outcome})"
            for g in facts.growths
            if g.figure == figure and g.exponent and g.prediction
        ]
        if clauses:
            yield f"{figure.capitalize()} grows {', '.join(clauses)}."


def peak_sentence(facts: Tiling) -> str | None:
    both = facts.longest_both
    if both is None or both.untiled is None or both.tiled is None or both.memory_ratio is None:
        return None
    held = ""
    if both.peak:
        count = both.untiled.peak_bytes
        exact = Interval(value=count, low=count, high=count, n=1)
        held = (
            f", {count / both.peak.value:.2f} times what the scores and their softmax take"
            f" ({prediction_outcome(both.peak, exact)})"
        )
    return (
        f"At {both.tokens:,} tokens attention without tiles holds"
        f" {megabytes(both.untiled.peak_bytes)}{held}; with tiles"
        f" {megabytes(both.tiled.peak_bytes)}, 1/{both.memory_ratio:,.0f} of that."
    )


def time_sentence(facts: Tiling) -> str | None:
    both = facts.longest_both
    ratio = both.times_ratio if both else None
    if both is None or ratio is None:
        return None
    measured_text = (
        f"There attention with tiles takes {times_with_interval(ratio.ratio)} the time of that"
        " without"
    )
    if not both.ratio:
        return f"{measured_text}."
    outcome = prediction_outcome(both.ratio, ratio.interval(TWO_ONE_SIDED))
    return f"{measured_text}, predicted at most 1 ({outcome})."


def rate_sentence(facts: Tiling) -> str | None:
    """Says how near the tiled kernel comes to the machine's arithmetic."""
    both = facts.longest_both
    if not (both and both.untiled and both.tiled and facts.shape and facts.ceilings):
        return None
    flop, ceiling = (
        theory.attention_flops(facts.shape, both.tokens),
        facts.ceilings.bf16_flops_per_s,
    )
    tiled, untiled = (flop / min(side.times_s) for side in (both.tiled, both.untiled))
    return (
        f"That is {tiled / 1e9:,.0f} GFLOP/s, {tiled / ceiling:.0%} of the measured BF16 rate;"
        f" without tiles {untiled / 1e9:,.0f} GFLOP/s, in float32."
        + (
            " The tiled kernel is above that rate: where a CPU has no instructions for BF16, matrix"
            " products in it are slower than those that the kernel does in float32."
            if tiled > ceiling
            else ""
        )
    )


def left_out_sentences(times: AttentionTimes) -> Iterator[str]:
    for key, why in times.left_out.items():
        kernel, _, tokens = key.partition("/")
        yield f"Left out: {int(tokens):,} tokens {'with' if kernel == 'tiled' else 'without'}" \
            f" tiles, as {why}."  # fmt: skip


TILING = Conclusion("tiling", tiling, tell_tiling)

# ------------------------------------------------------------------------- TTFT over the prompt


@dataclass(frozen=True)
class PromptLength:
    """Holds TTFT at one length of the prompt; the forecast is None where there was none."""

    tokens: float
    ttft: Interval
    forecast_s: float | None
    flop_share: Prediction | None  # that grows as N^2, of the FLOP


@dataclass(frozen=True)
class Quadratic:
    """Fits TTFT = fixed + each N + squared N^2, in seconds."""

    fixed: Estimate
    each: Estimate
    squared: Estimate

    def at(self, tokens: float) -> float:
        return self.fixed.value + self.each.value * tokens + self.squared.value * tokens**2

    def share(self, tokens: float) -> Estimate:
        """The share of TTFT at a length that grows as N^2."""
        return self.squared.times(tokens**2 / self.at(tokens))

    @property
    def even_tokens(self) -> float | None:
        """The length at which the quadratic part is as long as the linear one."""
        if self.squared.value <= 0 or self.each.value <= 0:
            return None
        return self.each.value / self.squared.value


@dataclass(frozen=True)
class Prompts:
    """Holds TTFT over the length of the prompt, as measured and as forecast."""

    lengths: tuple[PromptLength, ...]
    fit: Quadratic | None
    forecast: Quadratic | None

    @property
    def longest(self) -> PromptLength | None:
        return self.lengths[-1] if self.lengths else None


def quadratic(at: Sequence[tuple[float, float]]) -> Quadratic | None:
    """Fits (tokens, seconds); None for fewer than three different lengths."""
    tokens, seconds = [n for n, _ in at], [s for _, s in at]
    coefficients = least_squares([[1.0] * len(at), tokens, [n**2 for n in tokens]], seconds)
    return Quadratic(*coefficients) if coefficients else None


def is_of_prompts(point: Point) -> bool:
    """Tells whether all of a point's prompts are computed."""
    return point.workload.prefix is None


def prompts(context: Context) -> Prompts:
    predicted, forecasts = context.predictions.arithmetic, ttft_forecasts(context)
    lengths, samples, forecast = [], [], []
    for point in sorted(filter(is_of_prompts, context.points), key=lambda p: p.prompt_tokens):
        n, band = point.prompt_tokens, forecasts.get(point.key)
        measured = context.interval(point, "ttft_mean_s")
        if band is not None:
            forecast.append((n, band))
        samples += [(n, s) for row in context.rows(point) if (s := row.get("ttft_mean_s"))]
        if measured:
            lengths.append(
                PromptLength(
                    n, measured, band, predicted.get(f"share of TTFT that grows as N^2 at {n:.0f}")
                )
            )
    return Prompts(tuple(lengths), quadratic(samples), quadratic(forecast))


def ttft_forecasts(context: Context) -> Mapping[str, float]:
    """Reads the forecast mean TTFT of each point, in seconds."""
    forecasts = context.predictions.in_virtual_time
    points = forecasts.points if forecasts else {}
    return {key: of["ttft_mean_s"].value for key, of in points.items() if "ttft_mean_s" in of}


def tell_prompts(facts: Prompts) -> Finding:
    rows = [["Prompt tokens", "TTFT, mean", "Each token", "Grows as N^2, fitted", "Of the FLOP",
             "Forecast TTFT"]]  # fmt: skip
    rows += [
        [
            f"{length.tokens:,.0f}",
            number(length.ttft.value, "s"),
            number(length.ttft.value / length.tokens, "s"),
            share_text(facts.fit.share(length.tokens)) if facts.fit else "–",
            number(length.flop_share.value if length.flop_share else None, "share"),
            number(length.forecast_s, "s"),
        ]
        for length in facts.lengths
    ]
    lines = [line for line in (prompt_sentence(facts), even_sentence(facts)) if line]
    lines.append(
        "TTFT is fitted as a + b N + c N^2, by relative errors, over all repeats; an interval is"
        " the fit's. Beyond the measured lengths the fit is a guess."
    )
    return Finding(title="From which length on does N^2 show in TTFT?", rows=rows, lines=lines)


def share_text(share: Estimate) -> str:
    interval = share.interval()
    if interval.low is None or interval.high is None:
        return f"{interval.value:.0%}"
    return f"{interval.value:.0%} ({interval.low:.0%} to {interval.high:.0%})"


def prompt_sentence(facts: Prompts) -> str | None:
    """Says how much of the longest prompt's TTFT grows as N^2, measured, forecast and by FLOP."""
    longest, fit = facts.longest, facts.fit
    if longest is None or fit is None:
        return None
    share = fit.share(longest.tokens)
    interval = share.interval()
    so = ""
    if interval.low is not None:
        so = ": it shows" if interval.low > 0 else ": the interval includes 0"
    by_flop = (
        f"; of the FLOP it is {longest.flop_share.value:.0%} ({share.outcome(longest.flop_share)})"
        if longest.flop_share
        else ""
    )
    forecast = (
        f", forecast {facts.forecast.share(longest.tokens).value:.0%}" if facts.forecast else ""
    )
    if interval.value <= 0 and not so:
        so = ": a fit that bends down shows none"
    return (
        f"At {longest.tokens:,.0f} tokens {share_text(share)} of TTFT grows as N^2{forecast}"
        f"{by_flop}{so}."
    )


def even_sentence(facts: Prompts) -> str | None:
    """Says where the quadratic part would be as long as the linear one."""
    fit, longest = facts.fit, facts.longest
    if fit is None or longest is None or fit.even_tokens is None:
        return None
    if (low := fit.squared.interval().low) is None or low <= 0:
        return None
    beyond = ", beyond what was measured" if fit.even_tokens > longest.tokens else ""
    return (
        f"Attention would take as long as all that grows as N at {number(fit.even_tokens)}"
        f" tokens{beyond}."
    )


PROMPTS = Conclusion("long-prompts", prompts, tell_prompts)

# ------------------------------------------------------------------------ TPOT over the context


@dataclass(frozen=True)
class Step:
    """Holds a step of decode behind one context."""

    tokens: float
    tpot: Interval
    kv_bytes: float
    weight_bytes: float

    @property
    def bytes_per_s(self) -> float:
        """The rate at which weights, keys and values are read, over the whole step."""
        return (self.weight_bytes + self.kv_bytes) / self.tpot.value


@dataclass(frozen=True)
class Line:
    """Fits TPOT = fixed + each x tokens of context, in seconds."""

    fixed: Estimate
    each: Estimate


@dataclass(frozen=True)
class Contexts:
    """Holds one variant's steps; `line` is None where fewer than two contexts were measured."""

    variant: str
    steps: tuple[Step, ...]
    line: Line | None
    kv_bytes_per_token: float
    ceilings: Ceilings
    floor: Prediction | None  # of the seconds for each token of context

    @property
    def kv_bytes_per_s(self) -> Interval | None:
        """The rate at which a longer context is read; no bounds where the slope may be none."""
        if self.line is None or self.line.each.value <= 0:
            return None
        slope = self.line.each.interval()
        value = self.kv_bytes_per_token / slope.value
        if slope.low is None or slope.high is None or slope.low <= 0:
            return Interval(value=value, low=None, high=None, n=slope.n)
        return Interval(
            value=value,
            low=self.kv_bytes_per_token / slope.high,
            high=self.kv_bytes_per_token / slope.low,
            n=slope.n,
        )


def contexts(context: Context) -> tuple[Contexts, ...]:
    floor, by_variant = context.predictions.arithmetic.get("TPOT for each token of context"), []
    for variant in context.lab.variants:
        points = [
            p for p in context.points if p.variant.name == variant.name and not is_of_prompts(p)
        ]
        steps = tuple(
            Step(p.context_tokens, tpot, p.kv_bytes(), p.shape.step_bytes(1))
            for p in sorted(points, key=lambda p: p.context_tokens)
            if (tpot := context.interval(p, "tpot_mean_s"))
        )
        samples = [
            (p.context_tokens, s)
            for p in points
            for row in context.rows(p)
            if (s := row.get("tpot_mean_s"))
        ]
        if not steps:
            continue
        fit = least_squares(
            [[1.0] * len(samples), [n for n, _ in samples]], [s for _, s in samples]
        )
        shape = points[0].shape
        by_variant.append(
            Contexts(
                variant.name, steps, Line(*fit) if fit else None, shape.kv_bytes_per_token(),
                points[0].ceilings, floor,
            )
        )  # fmt: skip
    return tuple(by_variant)


def gigabytes_per_s(rate: float | None) -> str:
    return "–" if rate is None else f"{number(rate / 1e9)} GB/s"


def tell_contexts(facts: tuple[Contexts, ...]) -> Finding:
    rows = [["Variant", "Context tokens", "TPOT, mean", "Keys and values read", "All bytes / TPOT",
             "Of the bandwidth"]]  # fmt: skip
    rows += [
        [
            of.variant,
            f"{step.tokens:,.0f}",
            number(step.tpot.value, "s"),
            megabytes(step.kv_bytes),
            gigabytes_per_s(step.bytes_per_s),
            f"{step.bytes_per_s / of.ceilings.memory_bandwidth_bytes_per_s:.0%}",
        ]
        for of in facts
        for step in of.steps
    ]
    lines = [line for of in facts if (line := slope_sentence(of))]
    lines.append(
        "One request at a time. Bytes follow from the model's shape: the weights and the context's"
        " keys and values, once each. TPOT is fitted as a line over the context, over all repeats."
    )
    return Finding(title="What does a longer context cost each token?", rows=rows, lines=lines)


def slope_sentence(of: Contexts) -> str | None:
    if of.line is None:
        return None
    slope = of.line.each.times(1000).interval()
    if slope.low is None or slope.high is None:
        per_thousand = number(slope.value, "s")
    else:
        per_thousand = with_ends(slope.value, slope.low, slope.high, "s")
    if (slope.low is not None and slope.low <= 0) or slope.value <= 0:
        return (
            f"`{of.variant}`: 1,000 tokens of context add {per_thousand} to a step; the interval"
            " includes 0."
        )
    rate = of.kv_bytes_per_s
    read = f", so they are read at {gigabytes_per_s(rate.value if rate else None)}"
    if rate and rate.low is not None and rate.high is not None:
        read += f" ({number(rate.low / 1e9)} to {number(rate.high / 1e9)})"
    floor = (
        f"; at the measured bandwidth it would be {number(1000 * of.floor.value, 's')} at least"
        f" ({of.line.each.outcome(of.floor)})"
        if of.floor
        else ""
    )
    return f"`{of.variant}`: 1,000 tokens of context add {per_thousand} to a step{read}{floor}."


CONTEXTS = Conclusion("long-contexts", contexts, tell_contexts)

# ------------------------------------------------------------------------------------ the answers


def cuts_traffic(run: JudgedRun) -> str | None:
    facts = TILING.facts_of(run)
    both = facts.longest_both if facts else None
    if facts is None or both is None:
        return None
    saved = (
        f"By the paper {megabytes(both.traffic_bytes[0])} would move there without tiles, and"
        f" {megabytes(both.traffic_bytes[1])} with them (arithmetic)."
        if both.traffic_bytes
        else None
    )
    texts = [*growth_sentences(facts), peak_sentence(facts), time_sentence(facts), saved]
    return (
        "It never writes the scores down: a tile of them is made, used and thrown away in the"
        f" caches. {' '.join(filter(None, texts))}"
    )


def splitting(run: JudgedRun) -> str | None:
    facts = CONTEXTS.facts_of(run)
    default = facts[0] if facts else None
    slope = slope_sentence(default) if default else None
    if default is None or slope is None:
        return None
    split, near = run.ratio("split"), run.ratio("split-near")
    if split:
        beside = f"; behind a short one {near}" if near else ""
        return (
            "With one request there are fewer KV heads than processors, and without splits the"
            f" others wait. Measured, split beside one piece: {split} the TPOT behind a long"
            f" context{beside}. {slope}"
        )
    return (
        "It lets processors read that have no KV head of their own. That was not compared here:"
        f" {NOT_COMPARED[run.run.machine.kind]}. {slope}"
    )


NOT_COMPARED = {
    "cpu": "on a CPU vLLM splits the keys among the engine's threads by default, and with one"
    " thread there is nothing to split",
    "gpu": "vLLM limits the splits of FlashAttention 3 alone, which needs Hopper",
}

# --------------------------------------------------------------------------------------- its plots


def draw_growth(run: JudgedRun) -> str | None:
    """Draws memory and time of both kernels over N, on logarithmic axes."""
    facts = TILING.facts_of(run)
    if facts is None or facts.times is None or not facts.lengths:
        return None
    _, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    kernels: tuple[tuple[Kernel, str, str], ...] = (
        ("untiled", ORANGE, "o"), ("tiled", BLUE, "s"),
    )  # fmt: skip
    values: tuple[tuple[str, Callable[[KernelTimes], float]], ...] = (
        ("memory", lambda t: t.peak_bytes / 1e6), ("time", lambda t: min(t.times_s)),
    )  # fmt: skip
    for ax, (figure, value) in zip((left, right), values, strict=True):
        for kernel, colour, marker in kernels:
            at = facts.times.at(kernel)
            if not at:
                continue
            growth = next(g for g in facts.growths if (g.figure, g.kernel) == (figure, kernel))
            power = f", N^{growth.exponent.value:.2f}" if growth.exponent else ""
            ax.loglog([*at], [value(t) for t in at.values()], f"{marker}-", color=colour, lw=1,
                      base=2, label=f"{NAMES[kernel]}{power}")  # fmt: skip
        ax.set_xlabel("tokens, N")
        ax.set_xticks([length.tokens for length in facts.lengths],
                      [f"{length.tokens:,}" for length in facts.lengths])  # fmt: skip
        ax.minorticks_off()
        ax.set_yscale("log", base=10)
        ax.legend(frameon=False, fontsize=8)
    formula = [(n.tokens, n.peak.value / 1e6) for n in facts.lengths if n.peak and n.untiled]
    if formula:
        left.plot(*zip(*formula, strict=True), "_", color=BOUND, ms=14, mew=2, zorder=4,
                  label="2 heads N^2 4 bytes")  # fmt: skip
        left.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        write_plainly(ax.yaxis)
    left.set_ylabel("memory beyond the inputs (MB)")
    right.set_ylabel("time of one layer (s)")
    return (
        "Memory (left) and time (right) of attention with and without tiles, on the model's heads,"
        " before any engine started. Both axes are logarithmic: a power of N is a straight line."
    )


def draw_lengths(run: JudgedRun) -> str | None:
    """Draws TTFT over the prompt, and TPOT over the context, with what was fitted."""
    asked, decoded = PROMPTS.facts_of(run), CONTEXTS.facts_of(run)
    if not asked or not asked.lengths or not decoded:
        return None
    _, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    points = [p for p in run.points if is_of_prompts(p)]
    forecast = draw_forecasts(
        left, [p.prompt_tokens for p in points], [run.forecast(p, "ttft_mean_s") for p in points]
    )
    _bars(left, [(n.tokens, n.ttft) for n in asked.lengths], BLUE, "measured", 1)
    if fit := asked.fit:
        x = np.linspace(0, asked.lengths[-1].tokens * 1.03, 60)
        left.plot(x, [fit.at(n) for n in x], "-", color=BLUE, lw=1, label="a + b N + c N^2")
        left.plot(x, fit.fixed.value + fit.each.value * x, ":", color=GREY, lw=1.2,
                  label="a + b N of it")  # fmt: skip
    left.set_xlabel("prompt tokens, N")
    left.set_ylabel("TTFT, mean (s)")
    decoding = [p for p in run.points if not is_of_prompts(p)]
    known = [run.forecast(p, "tpot_mean_s") for p in decoding]
    forecast |= draw_forecasts(right, [p.context_tokens for p in decoding], known, scale=1000)
    for of, colour in zip(decoded, VARIANTS, strict=False):
        _bars(right, [(s.tokens, s.tpot) for s in of.steps], colour,
              of.variant if len(decoded) > 1 else "measured", 1000)  # fmt: skip
        if of.line:
            ends = np.array([0, of.steps[-1].tokens * 1.03])
            at = 1000 * (of.line.fixed.value + of.line.each.value * ends)
            right.plot(ends, at, "-", color=colour, lw=1)
    first = decoded[0]
    bandwidth = first.ceilings.memory_bandwidth_bytes_per_s
    least = [1000 * (s.weight_bytes + s.kv_bytes) / bandwidth for s in first.steps]
    right.plot([s.tokens for s in first.steps], least, "--", color=BOUND, lw=1.2,
               label="its bytes at the bandwidth")  # fmt: skip
    right.set_xlabel("tokens of context")
    right.set_ylabel("TPOT, mean (ms)")
    for ax in (left, right):
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        legend_above(ax)
    return (
        "TTFT over the length of the prompt, split into what grows as N and as N^2 (left), and TPOT"
        f" over the context, one request at a time (right).{BANDS * forecast}"
    )


def _bars(
    ax: Axes, at: Sequence[tuple[float, Interval]], colour: str, label: str, scale: float
) -> None:
    bars = reach([m for _, m in at], scale)
    ax.errorbar([x for x, _ in at], [scale * m.value for _, m in at], yerr=bars, fmt="D",
                color=colour, capsize=4, zorder=4, label=label)  # fmt: skip


PUBLISHED: PublishedFigures = {
    "findings": {
        "tiling": (
            Published(figure="40.3 to 4.4 GB", setting="traffic of attention, forward and backward,"
                      " GPT-2 medium at 1,024 tokens, A100; 7.3 ms for 41.7", source=DAO),
        ),
    },
    "claims": {
        "split": (
            Published(figure="up to 8x", setting="faster decoding of very long sequences, of the"
                      " whole model", source=FLASH_DECODING),
        ),
    },
}  # fmt: skip

PARTS = ReportParts(
    conclusions=(TILING, PROMPTS, CONTEXTS),
    answers={"KO-1": cuts_traffic, "KO-4": splitting},
    kinds={"KO-4": "measured in part"},
    plots={"growth": draw_growth, "lengths": draw_lengths},
    published=PUBLISHED,
    headline=Headline(
        claim="context",
        done="Decoding behind a long context instead of a short one",
        figure="the time per token",
    ),
)
