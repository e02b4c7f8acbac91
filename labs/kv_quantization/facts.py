"""What a quantized KV cache gains in memory and speed, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import scipy

from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.quantity import Quantity
from labs.harness.derived.offloading import CopyOrCompute
from labs.harness.derived.quality_summary import Beside, Quality, quality
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.spec.lab import Point

BYTES_OF_16_BITS, BYTES_OF_8_BITS = 2, 1


@dataclass(frozen=True)
class Load:
    """A load of growing requests, and how many of them the engine preempted."""

    users: int
    capacity: Quantity
    in_decode: Quantity  # mean
    preemptions: Quantity  # a trial, mean
    tokens_per_s: Quantity


@dataclass(frozen=True)
class Onset:
    """From which load on an engine throws running requests' caches away."""

    variant: str
    capacity: Quantity
    longest_held: Quantity  # requests of the longest that the cache holds
    mean_held: Quantity  # requests of the mean length
    loads: tuple[Load, ...]

    @property
    def first_users(self) -> int | None:
        """The smallest load with preemptions."""
        return min((load.users for load in self.loads if load.preemptions.value), default=None)

    @property
    def calm_users(self) -> int | None:
        """The largest load below that; None where there is none."""
        first = self.first_users
        calm = (load.users for load in self.loads if first and load.users < first)
        return max(calm, default=None)

    @property
    def most_users(self) -> int:
        return max(load.users for load in self.loads)


@dataclass(frozen=True)
class Line:
    """TPOT over the tokens of context, by least squares."""

    fixed_s: Quantity
    s_per_token: float
    error_s_per_token: float  # standard error of the slope
    freedom: int  # samples beyond the two parameters
    per_1000_tokens: Quantity
    kv_bytes_per_token: float


@dataclass(frozen=True)
class Slope:
    """How a variant's line lies to the base's, and where the two meet."""

    share: Quantity  # of the base's slope
    share_of_bytes: Quantity
    ahead: Literal["open", "up to", "never", "always", "beyond"]
    tokens: Quantity  # of context at which they meet


@dataclass(frozen=True)
class ContextSlope:
    """Each variant's line over the context; `base` is the lab's first variant."""

    base: str
    lines: dict[str, Line]
    slopes: dict[str, Slope]  # of the other variants, where the base has a line


Place = Literal["far", "near"]
Metric = Literal["tpot_mean_s", "ttft_mean_s", "output_tokens_per_s"]


@dataclass(frozen=True)
class OfBase:
    """A figure of the FP8 cache over that of the BF16 cache, on a workload."""

    place: Place
    metric: Metric
    ratio: Quantity

    @property
    def slower(self) -> float:
        """By what factor the FP8 cache is slower; below 1 where it is faster."""
        ratio = self.ratio.value or 1.0
        return ratio if METRICS[self.metric].better == "lower" else 1 / ratio


@dataclass(frozen=True)
class MemoryLadder:
    """The largest prompt after each remedy for running out of memory, and what an FP8 cache costs.

    What is not measured is arithmetic.
    """

    kv_bytes: int
    kv_bytes_per_token: float  # in BF16
    max_positions: int  # of the model
    capacity_tokens: float
    is_measured: bool
    in_8_bits_tokens: float
    in_8_bits_is_measured: bool
    with_4_bits_tokens: float  # by arithmetic: with weights of 4 bits as well
    quality: Beside | None  # of the FP8 cache
    speeds: tuple[OfBase, ...]  # of the FP8 cache, those that are valid
    returning: Quantity  # TTFT of a prompt copied back / of one computed again
    offload: CopyOrCompute

    @property
    def kv_memory(self) -> Quantity:
        return Quantity(self.kv_bytes / 2**20, "MiB")

    @property
    def worst(self) -> OfBase | None:
        """The speed that loses most with an FP8 cache; None where none loses."""
        slower = [of for of in self.speeds if of.slower > 1]
        return max(slower, key=lambda of: of.slower, default=None)


@dataclass(frozen=True)
class BytesPerToken:
    """The bytes of a token's keys and values, by the model's shape and by the engine's count."""

    layers: int
    kv_heads: int
    head_dim: int
    value_bytes: float  # of a value that is not quantized
    plain: float
    in_8_bits: float
    memory: Quantity
    capacity: Quantity  # that the engine fits into it
    by_engine: Quantity  # bytes of it a token


@dataclass(frozen=True)
class OfSequence:
    """What the keys and values of a sequence take, and how many fit."""

    tokens: int
    memory: Quantity
    in_16_bits: Quantity
    in_8_bits: Quantity
    held_in_16_bits: Quantity
    held_in_8_bits: Quantity


@dataclass(frozen=True)
class Facts:
    preemption: tuple[Onset, ...]
    context_slope: ContextSlope
    quality: Quality | None  # None: the probe did not run
    memory_ladder: MemoryLadder | None  # None without ample and tight BF16 caches
    bytes_per_token: BytesPerToken | None
    of_sequence: OfSequence


def facts(run: JudgedRun) -> Facts:
    compared = quality(run)
    return Facts(
        onsets(run),
        context_slope(run),
        compared,
        memory_ladder(run, compared) if run.finds("memory-ladder") else None,
        bytes_per_token(run),
        of_sequence(run.points[0], 8192),
    )


# ------------------------------------------------------------------ where preemption begins


LOAD = ("kv_capacity_tokens", "batch", "preemptions", "output_tokens_per_s")


def onsets(run: Context) -> tuple[Onset, ...]:
    growing: dict[str, list[Point]] = {}
    for point in run.points:
        if point.workload.name == "growing" and run.interval(point, "preemptions"):
            growing.setdefault(point.variant.name, []).append(point)
    found = []
    for variant, (first, *others) in growing.items():
        capacity = run.quantity(first, "kv_capacity_tokens").brief
        longest_tokens = first.prompt_tokens + first.output_tokens
        found.append(
            Onset(
                variant,
                capacity,
                longest_held=(capacity / longest_tokens).in_unit("1"),
                mean_held=(capacity / first.context_tokens).in_unit("1"),
                loads=tuple(
                    Load(p.load.users, *(run.quantity(p, name).brief for name in LOAD))
                    for p in (first, *others)
                ),
            )
        )
    return tuple(found)


# ------------------------------------------------------------------------- TPOT over the context


def context_slope(run: Context) -> ContextSlope:
    base, *others = (v.name for v in run.lab.variants)
    lines = {name: of for name in (base, *others) if (of := context_line(run, name))}
    slopes = {
        name: slope(lines[name], lines[base]) for name in others if name in lines and base in lines
    }
    return ContextSlope(base, lines, slopes)


def context_line(run: Context, variant: str) -> Line | None:
    """Fit a line to the repeats at all lengths of context; None with fewer than two lengths."""
    points = [p for p in run.points if p.variant.name == variant]
    at = [
        (p.context_tokens, tpot_s)
        for p in points
        if p.workload.name in ("near", "far")
        for row in run.rows(p)
        if (tpot_s := row.get("tpot_mean_s"))
    ]
    if len({tokens for tokens, _ in at}) < 2:
        return None
    fit = scipy.stats.linregress([tokens for tokens, _ in at], [tpot_s for _, tpot_s in at])
    value, error, freedom = float(fit.slope), float(fit.stderr), len(at) - 2
    ends = [value + side * reach(error, freedom) for side in (-1, 1)] if freedom else [None, None]
    return Line(
        Quantity(float(fit.intercept), "s"),
        value,
        error,
        freedom,
        per_1000_tokens=1000 * Quantity(value, "s", *ends),
        kv_bytes_per_token=points[0].shape.kv_bytes_per_token(points[0].flags.kv_value_bytes),
    )


def reach(error: float, freedom: int) -> float:
    """Half of the 95% interval; infinite where as many points as parameters were fitted."""
    return error * float(scipy.stats.t.ppf(0.975, freedom)) if freedom else math.inf


def slope(line: Line, plain: Line) -> Slope:
    """Say where a variant that starts later and climbs less steeply meets the base."""
    gap, gain = line.fixed_s - plain.fixed_s, plain.s_per_token - line.s_per_token
    error = math.hypot(line.error_s_per_token, plain.error_s_per_token)
    starts_ahead = (gap.value or 0.0) < 0
    ahead: Literal["open", "up to", "never", "always", "beyond"]
    if abs(gain) <= reach(error, line.freedom + plain.freedom):
        ahead = "open"
    elif gain < 0:
        ahead = "up to" if starts_ahead else "never"
    else:
        ahead = "always" if (gap.value or 0.0) <= 0 else "beyond"
    return Slope(
        Quantity(line.s_per_token / plain.s_per_token, "share"),
        Quantity(line.kv_bytes_per_token / plain.kv_bytes_per_token, "share"),
        ahead,
        (gap / gain).in_unit("1"),
    )


# --------------------------------------------------------------------------- out of memory


def memory_ladder(run: Context, compared: Quality | None) -> MemoryLadder | None:
    points = {p.variant.name: p for p in run.points}
    plain, tight = points.get("bf16"), points.get("bf16-tight")
    if plain is None or tight is None:
        return None
    memory = tight.flags.kv_cache_memory_bytes
    per_token = plain.shape.kv_bytes_per_token()
    measured = run.quantity(tight, "kv_capacity_tokens").value
    measured_8_bits = run.quantity(points.get("fp8-tight"), "kv_capacity_tokens").value
    capacity = measured or memory / per_token
    in_8_bits = measured_8_bits or 2 * capacity
    # 3/4 of the bytes of all weights except the output head become cache
    freed_bytes = 0.75 * (plain.shape.weight_bytes - 2 * plain.shape.head_params)
    return MemoryLadder(
        memory,
        per_token,
        plain.shape.max_positions,
        capacity,
        is_measured=measured is not None,
        in_8_bits_tokens=in_8_bits,
        in_8_bits_is_measured=measured_8_bits is not None,
        with_4_bits_tokens=in_8_bits + freed_bytes / (per_token / 2),
        quality=compared.treatments.get("fp8") if compared else None,
        speeds=speeds(run),
        returning=of_base(run, "returning", "ttft_mean_s", "offload", "recompute"),
        offload=CopyOrCompute.of(plain),
    )


def speeds(run: Context) -> tuple[OfBase, ...]:
    found = (
        OfBase(place, metric, of_base(run, place, metric, "fp8", "bf16"))
        for place, metric in product(get_args(Place), get_args(Metric))
    )
    return tuple(of for of in found if of.ratio.known)


def of_base(run: Context, workload: str, metric: str, variant: str, base: str) -> Quantity:
    """Divide a variant's figure on a workload by the base's, where that is valid."""
    at = {p.variant.name: p for p in run.points if p.workload.name == workload}
    return run.ratio_of(at.get(variant), at.get(base), metric)


# ------------------------------------------------------------------------ bytes, by arithmetic


def bytes_per_token(run: Context) -> BytesPerToken | None:
    point = next((p for p in run.points if p.variant.name == "bf16"), None)
    if point is None:
        return None
    shape, memory = point.shape, point.flags.kv_cache_memory_bytes
    capacity = run.quantity(point, "kv_capacity_tokens").brief
    return BytesPerToken(
        shape.layers,
        shape.kv_heads,
        shape.head_dim,
        shape.value_bytes,
        shape.kv_bytes_per_token(),
        shape.kv_bytes_per_token(BYTES_OF_8_BITS),
        mebibytes(memory),
        capacity,
        by_engine=(Quantity(memory) / capacity.in_unit("x")).in_unit("1"),
    )


def of_sequence(point: Point, tokens: int) -> OfSequence:
    memory = mebibytes(point.flags.kv_cache_memory_bytes)
    both = [
        mebibytes(tokens * point.shape.kv_bytes_per_token(value_bytes))
        for value_bytes in (BYTES_OF_16_BITS, BYTES_OF_8_BITS)
    ]
    return OfSequence(tokens, memory, *both, *((memory / of).in_unit("1") for of in both))


def mebibytes(number: float) -> Quantity:
    return Quantity(number / 2**20, "MiB")
