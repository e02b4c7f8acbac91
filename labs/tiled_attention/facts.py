"""What tiling saves, what is left of N^2 in TTFT, and what a context costs a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import scipy
from pydantic import ValidationError

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.analysis.verdicts import (
    TWO_ONE_SIDED,
    Effect,
    Interval,
    PredictionOutcome,
    effect,
    prediction_outcome,
)
from labs.harness.derived.fits import Estimate, polynomial
from labs.harness.derived.run_view import JudgedRun
from labs.harness.spec import theory
from labs.harness.spec.lab import Point, Prediction
from labs.harness.storage.bounded import DamagedError, first_error
from labs.harness.storage.results import RunFolder
from labs.tiled_attention.lab import splits_ratio
from serving.hardware.attention import AttentionTimes, Kernel, KernelTimes, SplitTimes
from serving.models import catalog, dummy
from serving.simulator import kernels
from serving.simulator.kernels import Decoder
from serving.simulator.step import Piece

MB, GB_PER_S = 1e6, 1e9  # bytes, and bytes a second
KERNELS: tuple[Kernel, ...] = ("untiled", "tiled")


@dataclass(frozen=True)
class Facts:
    tiling: Tiling | None  # None: attention was not timed by itself
    long_prompts: Prompts | None
    long_contexts: tuple[Contexts, ...]  # of each variant
    splits: Splits | None = None  # a step's attention was not timed split

    @property
    def on_a_card(self) -> OnCard:
        return on_a_card()


def facts(run: JudgedRun) -> Facts:
    return Facts(
        tiling(run) if run.finds("tiling") else None,
        prompts(run) if run.finds("long-prompts") else None,
        contexts(run) if run.finds("long-contexts") else (),
        splits(run),
    )


def outcome(prediction: Prediction | None, measured: Interval | None) -> PredictionOutcome | None:
    return prediction_outcome(prediction, measured) if prediction else None


def predicted(prediction: Prediction | None, unit: str = "1", scale: float = 1) -> Quantity:
    """Read a prediction as a quantity of the unit, of which it holds `scale` in one."""
    if prediction is None:
        return Quantity.missing("nothing was predicted", unit)
    return Quantity(prediction.value / scale, unit)


# ---------------------------------------------------------------------- with and without tiles


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


@dataclass(frozen=True)
class Growth:
    """With which power of N a figure of a kernel grows."""

    power: Quantity
    predicted: Quantity
    outcome: PredictionOutcome | None


@dataclass(frozen=True)
class Length:
    """Both kernels at one length."""

    tokens: int
    untiled_memory: Quantity
    formula_memory: Quantity  # of the scores and their softmax
    tiled_memory: Quantity
    untiled_s: Quantity  # the least of the passes
    tiled_s: Quantity
    times_ratio: Quantity  # with tiles / without, of the means
    untiled_traffic: Quantity  # by the paper
    tiled_traffic: Quantity


@dataclass(frozen=True)
class Longest:
    """The longest length at which both kernels were timed."""

    at: Length
    of_formula: Quantity  # the memory without tiles / that by the formula
    memory_outcome: PredictionOutcome | None
    memory_saved: Quantity  # the memory without tiles / that with
    time_outcome: PredictionOutcome | None  # of the ratio, predicted to be 1 at most
    untiled_rate: Quantity
    tiled_rate: Quantity
    of_bf16_rate: Quantity  # the rate with tiles / the machine's
    is_above_bf16_rate: bool


@dataclass(frozen=True)
class LeftOut:
    kernel: Kernel
    tokens: int
    why: str


@dataclass(frozen=True)
class Tiling:
    """What was timed before the engines started."""

    heads: int
    head_dim: int
    on: Literal["a core", "cores", "a GPU"]
    threads: int
    memory: dict[Kernel, Growth]
    time: dict[Kernel, Growth]
    lengths: tuple[Length, ...]
    longest: Longest | None
    left_out: tuple[LeftOut, ...]


def attention_times(folder: RunFolder) -> AttentionTimes | None:
    """Read how long attention took by itself; None where it was not timed. Raises DamagedError."""
    if (found := folder.probe_result("attention")) is None:
        return None
    try:
        return AttentionTimes.model_validate(found)
    except ValidationError as error:
        raise DamagedError(f"{folder.path}, probe attention{first_error(error)}") from error


def tiling(run: JudgedRun) -> Tiling | None:
    times = attention_times(run.folder)
    if times is None:
        return None
    on_cores: Literal["a core", "cores"] = "a core" if times.threads == 1 else "cores"
    untiled, tiled = times.at("untiled"), times.at("tiled")
    lengths = {
        tokens: length(run, times, tokens) for tokens in sorted(untiled.keys() | tiled.keys())
    }
    both = max(untiled.keys() & tiled.keys(), default=None)
    memory_growth, time_growth = dict[Kernel, Growth](), dict[Kernel, Growth]()
    for kernel in KERNELS:
        at = times.at(kernel)
        of_memory = power_of_memory([*at], [t.peak_bytes for t in at.values()])
        of_time = power_of_time([*at], [t.times_s for t in at.values()])
        memory_growth[kernel] = growth(run, of_memory, f"memory, {kernel}")
        time_growth[kernel] = growth(run, of_time, f"time, {kernel}")
    return Tiling(
        heads=times.heads,
        head_dim=times.head_dim,
        on="a GPU" if times.device == "cuda" else on_cores,
        threads=times.threads,
        memory=memory_growth,
        time=time_growth,
        lengths=tuple(lengths.values()),
        longest=longest(run, lengths[both], untiled[both], tiled[both]) if both else None,
        left_out=tuple(left_out(key, why) for key, why in times.left_out.items()),
    )


def growth(run: JudgedRun, power: Estimate | None, of: str) -> Growth:
    prediction = run.predictions.arithmetic.get(f"growth of {of}")
    if power is None:
        return Growth(Quantity.missing("too few lengths"), predicted(prediction), None)
    return Growth(power.quantity(), predicted(prediction), power.outcome(prediction))


def length(run: JudgedRun, times: AttentionTimes, tokens: int) -> Length:
    untiled, tiled = (times.at(kernel).get(tokens) for kernel in ("untiled", "tiled"))
    ratio = compared(untiled, tiled) if untiled and tiled else None
    formula = run.predictions.arithmetic.get(f"memory, untiled at {tokens}")
    untiled_traffic, tiled_traffic = traffic(run.points[0], times.cache_bytes, tokens)
    return Length(
        tokens=tokens,
        untiled_memory=memory(untiled),
        formula_memory=predicted(formula, "MB", MB),
        tiled_memory=memory(tiled),
        untiled_s=least_time(untiled),
        tiled_s=least_time(tiled),
        times_ratio=Quantity.of(ratio.ratio if ratio else None, RATIO, "left out"),
        untiled_traffic=untiled_traffic,
        tiled_traffic=tiled_traffic,
    )


def memory(times: KernelTimes | None) -> Quantity:
    return Quantity.given(times.peak_bytes / MB if times else None, "MB", "left out")


def least_time(times: KernelTimes | None) -> Quantity:
    return Quantity.given(min(times.times_s) if times else None, "s", "left out")


def compared(untiled: KernelTimes, tiled: KernelTimes) -> Effect | None:
    """Divide the time with tiles by that without, over the passes."""
    return effect(*(dict(enumerate(side.times_s)) for side in (tiled, untiled)))


def traffic(point: Point, cache_bytes: int | None, tokens: int) -> tuple[Quantity, Quantity]:
    """Compute what moves by the paper, without tiles and with tiles as large as the cache."""
    if not cache_bytes:
        unknown = Quantity.missing("the size of the cache is not known", "MB")
        return unknown, unknown
    without, tiled = (
        Quantity(theory.attention_bytes(point.shape, tokens, cache) / MB, "MB")
        for cache in (None, cache_bytes)
    )
    return without, tiled


def longest(run: JudgedRun, at: Length, untiled: KernelTimes, tiled: KernelTimes) -> Longest:
    arithmetic, point = run.predictions.arithmetic, run.points[0]
    held, flop = float(untiled.peak_bytes), theory.attention_flops(point.shape, at.tokens)
    counted = Interval(value=held, low=held, high=held, n=1)
    ratio = compared(untiled, tiled)
    untiled_rate, tiled_rate = (
        Quantity(flop / min(side.times_s) / 1e9, "GFLOP/s") for side in (untiled, tiled)
    )
    of_rate = tiled_rate / (point.ceilings.bf16_flops_per_s / 1e9)
    return Longest(
        at=at,
        of_formula=at.untiled_memory / at.formula_memory,
        memory_outcome=outcome(arithmetic.get(f"memory, untiled at {at.tokens}"), counted),
        memory_saved=at.untiled_memory / at.tiled_memory,
        time_outcome=outcome(
            arithmetic.get(f"time, tiled / untiled at {at.tokens}"),
            ratio.interval(TWO_ONE_SIDED) if ratio else None,
        ),
        untiled_rate=untiled_rate,
        tiled_rate=tiled_rate,
        of_bf16_rate=of_rate.in_unit("share"),
        is_above_bf16_rate=of_rate.value is not None and of_rate.value > 1,
    )


def left_out(key: str, why: str) -> LeftOut:
    kernel, _, tokens = key.partition("/")
    return LeftOut("tiled" if kernel == "tiled" else "untiled", int(tokens), why)


# ----------------------------------------------------------------------- keys in several pieces


@dataclass(frozen=True)
class Split:
    """Attention of a step over one batch, its keys whole and split."""

    kv_heads: int  # of all requests
    whole_s: Quantity  # the least of the passes
    split_s: Quantity
    ratio: Quantity  # split / whole, of the means
    predicted: Quantity


@dataclass(frozen=True)
class Splits:
    """What splitting each KV head's keys among all processors changed."""

    processors: int
    tokens: int  # of context
    batches: tuple[Split, ...]

    @property
    def one(self) -> Split:
        """One KV head alone."""
        return self.batches[0]

    @property
    def most(self) -> Split:
        """The most KV heads."""
        return self.batches[-1]


def splits(run: JudgedRun) -> Splits | None:
    times = attention_times(run.folder)
    if times is None or not times.splits:
        return None
    processors = times.processors
    return Splits(
        processors,
        times.splits[0].tokens,
        tuple(split(of, processors) for of in times.splits),
    )


def split(of: SplitTimes, processors: int) -> Split:
    change = effect(dict(enumerate(of.split_s)), dict(enumerate(of.whole_s)))
    return Split(
        of.kv_heads,
        Quantity(min(of.whole_s), "s"),
        Quantity(min(of.split_s), "s"),
        Quantity.of(change.ratio if change else None, RATIO, "no interval"),
        Quantity(splits_ratio(of.kv_heads, processors), RATIO),
    )


# ------------------------------------------------------------------------- TTFT over the prompt


@dataclass(frozen=True)
class PromptLength:
    """TTFT at one length of the prompt."""

    tokens: float
    ttft_s: Quantity
    each_token_s: Quantity
    squared_share: Quantity  # of TTFT, that grows as N^2, fitted
    flop_share: Quantity  # of the FLOP
    forecast_s: Quantity


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
    """TTFT over the length of the prompt, as measured and as forecast."""

    lengths: tuple[PromptLength, ...]
    fit: Quadratic | None
    forecast: Quadratic | None
    forecast_share: Quantity  # of the longest prompt's TTFT, that grows as N^2
    flop_outcome: PredictionOutcome | None  # of the share of the FLOP as that of the longest TTFT
    even_tokens: Quantity  # where the quadratic part is as long as the linear one

    @property
    def longest(self) -> PromptLength | None:
        return self.lengths[-1] if self.lengths else None

    @property
    def shows(self) -> Literal["yes", "may not", "bends down", "unknown"]:
        """Whether what grows as N^2 shows in the longest prompt's TTFT."""
        if self.fit is None or self.longest is None:
            return "unknown"
        share = self.longest.squared_share
        if share.low is not None:
            return "yes" if share.low > 0 else "may not"
        return "bends down" if self.fit.squared.value <= 0 else "unknown"

    @property
    def is_even_beyond(self) -> bool:
        """Whether that length is beyond what was measured."""
        even, longest = self.even_tokens.value, self.longest
        return even is not None and longest is not None and even > longest.tokens


def quadratic(at: Sequence[tuple[float, float]]) -> Quadratic | None:
    """Fits (tokens, seconds); None for fewer than three different lengths."""
    coefficients = polynomial(at, 2)
    return Quadratic(*coefficients) if coefficients else None


def is_of_prompts(point: Point) -> bool:
    """Tells whether all of a point's prompts are computed."""
    return point.workload.prefix is None


def prompts(run: JudgedRun) -> Prompts | None:
    points = sorted(filter(is_of_prompts, run.points), key=lambda p: p.prompt_tokens)
    measured = [p for p in points if run.quantity(p, "ttft_mean_s").known]
    if not measured:
        return None
    fit = quadratic(samples(run, points, "ttft_mean_s", lambda p: p.prompt_tokens))
    known = [(p.prompt_tokens, run.foreseen(p, "ttft_mean_s").value) for p in points]
    forecast = quadratic([(tokens, ttft_s) for tokens, ttft_s in known if ttft_s is not None])
    tokens = measured[-1].prompt_tokens
    return Prompts(
        lengths=tuple(prompt_length(run, p, fit) for p in measured),
        fit=fit,
        forecast=forecast,
        forecast_share=share(forecast, tokens),
        flop_outcome=fit.share(tokens).outcome(flop_share(run, tokens)) if fit else None,
        even_tokens=even_tokens(fit),
    )


def flop_share(run: JudgedRun, tokens: float) -> Prediction | None:
    """Read the prediction of how much of TTFT grows as N^2."""
    return run.predictions.arithmetic.get(f"share of TTFT that grows as N^2 at {tokens:.0f}")


def prompt_length(run: JudgedRun, point: Point, fit: Quadratic | None) -> PromptLength:
    tokens, ttft_s = point.prompt_tokens, run.quantity(point, "ttft_mean_s")
    return PromptLength(
        tokens=tokens,
        ttft_s=ttft_s,
        each_token_s=ttft_s.brief / tokens,
        squared_share=share(fit, tokens),
        flop_share=predicted(flop_share(run, tokens), "share"),
        forecast_s=run.foreseen(point, "ttft_mean_s"),
    )


def share(fit: Quadratic | None, tokens: float) -> Quantity:
    if fit is None:
        return Quantity.missing("too few lengths", "share")
    return fit.share(tokens).quantity("share")


def even_tokens(fit: Quadratic | None) -> Quantity:
    """Return where the quadratic part is as long as the linear one, if there is one for sure."""
    low = fit.squared.interval().low if fit else None
    if fit is None or fit.even_tokens is None or low is None or low <= 0:
        return Quantity.missing("no part surely grows as N^2")
    return Quantity(fit.even_tokens)


def samples(
    run: JudgedRun, points: Sequence[Point], metric: str, at: Callable[[Point], float]
) -> list[tuple[float, float]]:
    """List the metric of each repeat of the points with the place of its point."""
    return [(at(p), s) for p in points for row in run.rows(p) if (s := row.get(metric))]


# ------------------------------------------------------------- the same on a GPU, as published

CARD, MODEL = "h100", "llama-8b"
NEAR_TOKENS, FAR_TOKENS = 8192, 65_536


@dataclass(frozen=True)
class OnCard:
    """At which rate the attention of one request reads its keys and values, split by default."""

    card: str
    heads: int
    kv_heads: int
    near_tokens: int
    near_rate: Quantity
    far_tokens: int
    far_rate: Quantity


@cache
def on_a_card() -> OnCard:
    """Divide the bytes of a context by the times of vLLM's kernel that others published."""
    config = dummy.config_of(MODEL)
    attention, decoder = kernels.step_times(Decoder.of(config), CARD).attention, Decoder.of(config)
    assert attention

    def rate(tokens: int) -> Quantity:
        read_bytes = tokens * catalog.shape_of(config).kv_bytes_per_token(2)
        return Quantity(read_bytes / attention.seconds([Piece(1, tokens - 1)]) / 1e12, "TB/s")

    return OnCard(
        CARD.upper(), decoder.heads, decoder.kv_heads,
        NEAR_TOKENS, rate(NEAR_TOKENS), FAR_TOKENS, rate(FAR_TOKENS),
    )  # fmt: skip


# ------------------------------------------------------------------------ TPOT over the context


@dataclass(frozen=True)
class Step:
    """A step of decode behind one context; bytes follow from the model's shape."""

    tokens: float
    tpot_s: Quantity
    kv: Quantity  # keys and values read
    rate: Quantity  # at which weights, keys and values are read, over the whole step
    of_bandwidth: Quantity
    least_s: Quantity  # for its bytes, at the bandwidth


@dataclass(frozen=True)
class Line:
    """Fits TPOT = fixed + each x tokens of context, in seconds."""

    fixed: Estimate
    each: Estimate


@dataclass(frozen=True)
class Contexts:
    """One variant's steps; `line` is None where fewer than two contexts were measured."""

    variant: str
    steps: tuple[Step, ...]
    line: Line | None
    per_thousand_s: Quantity  # what 1,000 tokens of context add to a step
    adds: bool  # whether they add anything, as far as the interval tells
    rate: Quantity  # at which a longer context is read; no ends where it may cost nothing
    least_per_thousand_s: Quantity  # at the measured bandwidth
    outcome: PredictionOutcome | None  # of this bound


def contexts(run: JudgedRun) -> tuple[Contexts, ...]:
    found = (contexts_of(run, variant.name) for variant in run.lab.variants)
    return tuple(of for of in found if of.steps)


def contexts_of(run: JudgedRun, variant: str) -> Contexts:
    points = [p for p in run.points if p.variant.name == variant and not is_of_prompts(p)]
    measured = [p for p in points if run.quantity(p, "tpot_mean_s").known]
    at = samples(run, points, "tpot_mean_s", lambda p: p.context_tokens)
    fit = polynomial(at, 1)
    line = Line(*fit) if fit else None
    floor = run.predictions.arithmetic.get("TPOT for each token of context")
    slope = line.each.quantity("s") if line else Quantity.missing("too few contexts", "s")
    least = slope.value if slope.low is None else slope.low
    return Contexts(
        variant=variant,
        steps=tuple(step(run, p) for p in sorted(measured, key=lambda p: p.context_tokens)),
        line=line,
        per_thousand_s=slope * 1000,
        adds=least is not None and least > 0,
        rate=rate(slope, points[0].shape.kv_bytes_per_token()) if points else slope,
        least_per_thousand_s=predicted(floor, "s") * 1000,
        outcome=line.each.outcome(floor) if line else None,
    )


def step(run: JudgedRun, point: Point) -> Step:
    tpot_s, kv_bytes = run.quantity(point, "tpot_mean_s"), point.kv_bytes()
    all_bytes = point.shape.step_bytes(1) + kv_bytes
    bandwidth = point.ceilings.memory_bandwidth_bytes_per_s
    reading = Quantity(all_bytes / GB_PER_S, "GB/s") / tpot_s.brief
    return Step(
        tokens=point.context_tokens,
        tpot_s=tpot_s,
        kv=Quantity(kv_bytes / MB, "MB"),
        rate=reading,
        of_bandwidth=(reading / (bandwidth / GB_PER_S)).in_unit("share"),
        least_s=Quantity(all_bytes / bandwidth, "s"),
    )


def rate(slope: Quantity, kv_bytes: float) -> Quantity:
    """Return the rate of reading from the time that each token of context adds to a step."""
    if slope.value is None or slope.value <= 0:
        return Quantity.missing("a longer context costs nothing", "GB/s")

    def at(each_s: float) -> float:
        return kv_bytes / each_s / GB_PER_S

    if slope.low is None or slope.high is None or slope.low <= 0:
        return Quantity(at(slope.value), "GB/s")
    return Quantity(at(slope.value), "GB/s", at(slope.high), at(slope.low))
