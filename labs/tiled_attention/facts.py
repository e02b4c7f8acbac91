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
)
from labs.harness.derived.fits import Estimate, polynomial
from labs.harness.derived.run_view import JudgedRun
from labs.harness.derived.tables import Figures, Row, Table, measured, rows
from labs.harness.spec import theory
from labs.harness.spec.lab import Point
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
    splits: Table | None = None  # a step's attention was not timed split

    @property
    def card(self) -> str:
        return CARD.upper()

    @property
    def on_a_card(self) -> Figures:
        return on_a_card()


def facts(run: JudgedRun) -> Facts:
    return Facts(
        tiling(run) if run.finds("tiling") else None,
        prompts(run) if run.finds("long-prompts") else None,
        contexts(run) if run.finds("long-contexts") else (),
        splits(run),
    )


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
    """Both kernels at one length; see `timed` for their figures."""

    tokens: int
    kernels: dict[Kernel, Figures]
    formula_memory: Quantity  # of the scores and their softmax
    times_ratio: Quantity  # with tiles / without, of the means

    @property
    def of_formula(self) -> Quantity:
        """The memory without tiles / that by the formula."""
        return self.kernels["untiled"]["memory"] / self.formula_memory

    @property
    def memory_saved(self) -> Quantity:
        """The memory without tiles / that with."""
        return self.kernels["untiled"]["memory"] / self.kernels["tiled"]["memory"]


@dataclass(frozen=True)
class Tiling:
    """What was timed before the engines started."""

    heads: int
    head_dim: int
    device: str
    threads: int
    memory: dict[Kernel, Growth]
    time: dict[Kernel, Growth]
    lengths: tuple[Length, ...]
    longest: Length | None  # at which both kernels were timed
    memory_outcome: PredictionOutcome | None  # there, of the kernel without tiles
    time_outcome: PredictionOutcome | None  # there, of the ratio, predicted to be 1 at most
    left_out: tuple[tuple[str, int, str], ...]  # kernel, tokens, why

    @property
    def on(self) -> Literal["a GPU", "a core", "cores"]:
        """What the kernels ran on."""
        if self.device == "cuda":
            return "a GPU"
        return "a core" if self.threads == 1 else "cores"

    @property
    def is_above_bf16_rate(self) -> bool:
        """Whether the kernel with tiles is at the longest length."""
        share = self.longest.kernels["tiled"]["of_bf16_rate"].value if self.longest else None
        return share is not None and share > 1


def attention_times(folder: RunFolder) -> AttentionTimes | None:
    """Read how long attention took by itself; None where it was not timed. Raises DamagedError."""
    if (found := folder.probe_result("attention")) is None:
        return None
    try:
        return AttentionTimes.model_validate(found)
    except ValidationError as error:
        raise DamagedError(f"{folder.path}, probe attention{first_error(error)}") from error


def tiling(run: JudgedRun) -> Tiling | None:
    if (times := attention_times(run.folder)) is None:
        return None
    at = {kernel: times.at(kernel) for kernel in KERNELS}
    untiled, tiled = at.values()
    both = max(untiled.keys() & tiled.keys(), default=None)
    held = float(untiled[both].peak_bytes) if both else 0.0
    ratio = compared(untiled[both], tiled[both]) if both else None
    memory_growth, time_growth = dict[Kernel, Growth](), dict[Kernel, Growth]()
    for kernel, of in at.items():
        of_memory = power_of_memory([*of], [t.peak_bytes for t in of.values()])
        of_time = power_of_time([*of], [t.times_s for t in of.values()])
        memory_growth[kernel] = growth(run, f"growth of memory, {kernel}", of_memory)
        time_growth[kernel] = growth(run, f"growth of time, {kernel}", of_time)
    return Tiling(
        times.heads,
        times.head_dim,
        times.device,
        times.threads,
        memory_growth,
        time_growth,
        lengths=tuple(length(run, times, n) for n in sorted(untiled.keys() | tiled.keys())),
        longest=length(run, times, both) if both else None,
        memory_outcome=run.outcome(
            f"memory, untiled at {both}", Interval(value=held, low=held, high=held, n=1)
        ),
        time_outcome=run.outcome(
            f"time, tiled / untiled at {both}",
            ratio.interval(TWO_ONE_SIDED) if ratio else None,
        ),
        left_out=tuple(
            (kernel, int(tokens), why)
            for key, why in times.left_out.items()
            for kernel, _, tokens in [key.partition("/")]
        ),
    )


def growth(run: JudgedRun, prediction: str, power: Estimate | None) -> Growth:
    expected = run.predicted(prediction)
    if power is None:
        return Growth(Quantity.missing("too few lengths"), expected, None)
    outcome = run.outcome(prediction, power.interval(TWO_ONE_SIDED))
    return Growth(power.quantity(), expected, outcome)


def length(run: JudgedRun, times: AttentionTimes, tokens: int) -> Length:
    at = {kernel: times.at(kernel).get(tokens) for kernel in KERNELS}
    untiled, tiled = at.values()
    ratio = compared(untiled, tiled) if untiled and tiled else None
    return Length(
        tokens,
        {
            kernel: timed(run.points[0], of, tokens)
            | {"traffic": traffic(run.points[0], kernel, times.cache_bytes, tokens)}
            for kernel, of in at.items()
        },
        formula_memory=run.predicted(f"memory, untiled at {tokens}", "MB", MB),
        times_ratio=Quantity.of(ratio.ratio if ratio else None, RATIO, "left out"),
    )


def timed(point: Point, times: KernelTimes | None, tokens: int) -> Figures:
    """Read one kernel at one length; the time is the least of the passes."""
    if times is None:
        units = {"memory": "MB", "time_s": "s", "rate": "GFLOP/s", "of_bf16_rate": "share"}
        return {name: Quantity.missing("left out", unit) for name, unit in units.items()}
    least_s = min(times.times_s)
    rate = Quantity(theory.attention_flops(point.shape, tokens) / least_s / 1e9, "GFLOP/s")
    return {
        "memory": Quantity(times.peak_bytes / MB, "MB"),
        "time_s": Quantity(least_s, "s"),
        "rate": rate,
        "of_bf16_rate": (rate / (point.ceilings.bf16_flops_per_s / 1e9)).in_unit("share"),
    }


def traffic(point: Point, kernel: Kernel, cache_bytes: int | None, tokens: int) -> Quantity:
    """Compute what moves by the paper, with tiles as large as the cache."""
    if not cache_bytes:
        return Quantity.missing("the size of the cache is not known", "MB")
    tile_bytes = cache_bytes if kernel == "tiled" else None
    return Quantity(theory.attention_bytes(point.shape, tokens, tile_bytes) / MB, "MB")


def compared(untiled: KernelTimes, tiled: KernelTimes) -> Effect | None:
    """Divide the time with tiles by that without, over the passes."""
    return effect(*(dict(enumerate(side.times_s)) for side in (tiled, untiled)))

    # ----------------------------------------------------------------------- keys in several pieces


def splits(run: JudgedRun) -> Table | None:
    """Say what splitting each KV head's keys among all processors changed, from one head on."""
    times = attention_times(run.folder)
    if times is None or not times.splits:
        return None
    return Table(
        rows=tuple(Row(str(of.kv_heads), split(of, times.processors)) for of in times.splits),
        figures={
            "processors": Quantity(times.processors),
            "tokens": Quantity(times.splits[0].tokens),  # of context
        },
    )


def split(of: SplitTimes, processors: int) -> Figures:
    """Compare a step's attention over one batch, its keys whole and split."""
    change = effect(dict(enumerate(of.split_s)), dict(enumerate(of.whole_s)))
    return {
        "kv_heads": Quantity(of.kv_heads),  # of all requests
        "whole_s": Quantity(min(of.whole_s), "s"),  # the least of the passes
        "split_s": Quantity(min(of.split_s), "s"),
        "ratio": Quantity.of(change.ratio if change else None, RATIO, "no interval"),
        "predicted": Quantity(splits_ratio(of.kv_heads, processors), RATIO),
    }


# ------------------------------------------------------------------------- TTFT over the prompt


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


@dataclass(frozen=True, kw_only=True)
class Prompts(Table):
    """TTFT over the length of the prompt, from the shortest on, as measured and as forecast."""

    fit: Quadratic | None
    flop_outcome: PredictionOutcome | None  # of the share of the FLOP as that of the longest TTFT

    @property
    def longest(self) -> Row:
        return self.rows[-1]

    @property
    def shows(self) -> Literal["yes", "may not", "bends down", "unknown"]:
        """Whether what grows as N^2 shows in the longest prompt's TTFT."""
        if self.fit is None:
            return "unknown"
        if (low := self.longest["squared_share"].low) is not None:
            return "yes" if low > 0 else "may not"
        return "bends down" if self.fit.squared.value <= 0 else "unknown"

    @property
    def is_even_beyond(self) -> bool:
        """Whether that length is beyond what was measured."""
        even, longest = self["even_tokens"].value, self.longest["tokens"].value
        return even is not None and longest is not None and even > longest


def quadratic(at: Sequence[tuple[float, float]]) -> Quadratic | None:
    """Fits (tokens, seconds); None for fewer than three different lengths."""
    coefficients = polynomial(at, 2)
    return Quadratic(*coefficients) if coefficients else None


def is_of_prompts(point: Point) -> bool:
    """Tells whether all of a point's prompts are computed."""
    return point.workload.prefix is None


def prompts(run: JudgedRun) -> Prompts | None:
    points = sorted(filter(is_of_prompts, run.points), key=lambda p: p.prompt_tokens)
    known = measured(run, points, "ttft_mean_s")
    if not known:
        return None
    fit = quadratic(samples(run, points, "ttft_mean_s", lambda p: p.prompt_tokens))
    foreseen = [(p.prompt_tokens, run.foreseen(p, "ttft_mean_s").value) for p in points]
    forecast = quadratic([(tokens, ttft_s) for tokens, ttft_s in foreseen if ttft_s is not None])
    tokens = known[-1].prompt_tokens
    return Prompts(
        rows=rows(
            run,
            known,
            tokens=lambda p: Quantity(p.prompt_tokens),
            ttft_s="ttft_mean_s",
            each_token_s=lambda p: run.quantity(p, "ttft_mean_s").brief / p.prompt_tokens,
            squared_share=lambda p: share(fit, p.prompt_tokens),  # fitted
            flop_share=lambda p: run.predicted(FLOP_SHARE.format(p.prompt_tokens), "share"),
            forecast_s=lambda p: run.foreseen(p, "ttft_mean_s"),
        ),
        figures={
            "forecast_share": share(forecast, tokens),  # of the longest prompt
            "even_tokens": even_tokens(fit),  # where both parts are as long
        },
        fit=fit,
        flop_outcome=run.outcome(
            FLOP_SHARE.format(tokens), fit.share(tokens).interval(TWO_ONE_SIDED)
        )
        if fit
        else None,
    )


FLOP_SHARE = "share of TTFT that grows as N^2 at {:.0f}"
"""The name of a prediction, by the tokens of the prompt."""


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


@cache
def on_a_card() -> Figures:
    """Return at which rate one request's attention reads keys and values, split by default.

    The bytes of a context are divided by the times of vLLM's kernel that others published.
    """
    config = dummy.config_of(MODEL)
    attention, decoder = kernels.step_times(Decoder.of(config), CARD).attention, Decoder.of(config)
    assert attention

    def rate(tokens: int) -> Quantity:
        read_bytes = tokens * catalog.shape_of(config).kv_bytes_per_token(2)
        return Quantity(read_bytes / attention.seconds([Piece(1, tokens - 1)]) / 1e12, "TB/s")

    return {
        "heads": Quantity(decoder.heads),
        "kv_heads": Quantity(decoder.kv_heads),
        "near_tokens": Quantity(NEAR_TOKENS),
        "near_rate": rate(NEAR_TOKENS),
        "far_tokens": Quantity(FAR_TOKENS),
        "far_rate": rate(FAR_TOKENS),
    }


# ------------------------------------------------------------------------ TPOT over the context


@dataclass(frozen=True)
class Line:
    """Fits TPOT = fixed + each x tokens of context, in seconds."""

    fixed: Estimate
    each: Estimate


@dataclass(frozen=True, kw_only=True)
class Contexts(Table):
    """One variant's steps, from the shortest context on."""

    variant: str
    line: Line | None  # None where fewer than two contexts were measured
    adds: bool  # whether a longer context adds anything, as far as the interval tells
    outcome: PredictionOutcome | None  # of the bound by the bytes


def contexts(run: JudgedRun) -> tuple[Contexts, ...]:
    found = (contexts_of(run, variant.name) for variant in run.lab.variants)
    return tuple(of for of in found if of.rows)


def contexts_of(run: JudgedRun, variant: str) -> Contexts:
    points = [p for p in run.points if p.variant.name == variant and not is_of_prompts(p)]
    known = measured(run, points, "tpot_mean_s")
    fit = polynomial(samples(run, points, "tpot_mean_s", lambda p: p.context_tokens), 1)
    line, bound = Line(*fit) if fit else None, "TPOT for each token of context"
    slope = line.each.quantity("s") if line else Quantity.missing("too few contexts", "s")
    least = slope.value if slope.low is None else slope.low
    return Contexts(
        rows=steps(run, sorted(known, key=lambda p: p.context_tokens)),
        figures={
            "per_thousand_s": slope * 1000,  # what 1,000 tokens of context add to a step
            "least_per_thousand_s": run.predicted(bound, "s") * 1000,  # at the bandwidth
            "rate": rate(slope, points[0].shape.kv_bytes_per_token()) if points else slope,
        },
        variant=variant,
        line=line,
        adds=least is not None and least > 0,
        outcome=run.outcome(bound, line.each.interval(TWO_ONE_SIDED)) if line else None,
    )


def steps(run: JudgedRun, points: Sequence[Point]) -> tuple[Row, ...]:
    """Set TPOT beside the bytes of weights, keys and values, which follow from the shape."""

    def step_bytes(point: Point) -> float:
        return point.shape.step_bytes(1) + point.kv_bytes()

    def rate(point: Point) -> Quantity:
        read = Quantity(step_bytes(point) / GB_PER_S, "GB/s")
        return read / run.quantity(point, "tpot_mean_s").brief

    def bandwidth(point: Point) -> float:
        return point.ceilings.memory_bandwidth_bytes_per_s

    return rows(
        run,
        points,
        tokens=lambda p: Quantity(p.context_tokens),
        tpot_s="tpot_mean_s",
        kv=lambda p: Quantity(p.kv_bytes() / MB, "MB"),
        rate=rate,  # over the whole step
        of_bandwidth=lambda p: (rate(p) / (bandwidth(p) / GB_PER_S)).in_unit("share"),
        least_s=lambda p: Quantity(step_bytes(p) / bandwidth(p), "s"),  # at the bandwidth
    )


def rate(slope: Quantity, kv_bytes: float) -> Quantity:
    """Return the rate of reading from the time that each token of context adds to a step.

    It has no ends where a longer context may cost nothing.
    """
    if slope.value is None or slope.value <= 0:
        return Quantity.missing("a longer context costs nothing", "GB/s")

    def at(each_s: float) -> float:
        return kv_bytes / each_s / GB_PER_S

    if slope.low is None or slope.high is None or slope.low <= 0:
        return Quantity(at(slope.value), "GB/s")
    return Quantity(at(slope.value), "GB/s", at(slope.high), at(slope.low))
