"""What weights of fewer bits gain and cost, and which outliers matter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.quality import Quality, quality
from labs.harness.facts.weights import KindsOfWeights, kinds_of_weights
from labs.harness.judging.judge import is_within
from labs.harness.judging.quality import over_clusters
from labs.harness.judging.quantity import RATIO, Quantity
from labs.harness.spec import MARGIN

BASE = "bf16"
InputKind = Literal["q_proj", "o_proj", "gate_proj", "down_proj"]  # by the layer that it enters


@dataclass(frozen=True)
class Rounding:
    """What rounding to 8 bits in one way makes of perplexity."""

    how: str
    perplexity: float
    ratio: Quantity  # to that of nothing rounded


@dataclass(frozen=True)
class Inputs:
    """How far the channels of what enters the linear layers of one kind stand out."""

    kind: InputKind
    largest_over_median: float  # channel, in the worst layer
    mean_kurtosis: float
    max_kurtosis: float


@dataclass(frozen=True)
class Outliers:
    """Which activations are outliers, and what rounding to 8 bits makes of them."""

    roundings: tuple[Rounding, ...]
    inputs: tuple[Inputs, ...]
    by_tensor: Quantity  # ratio of perplexity with one scale for a whole tensor of activations
    smoothed: Quantity  # with that, after SmoothQuant
    by_token: Quantity  # with one scale for each token


@dataclass(frozen=True)
class Gain:
    """A variant's throughput at a load, beside the base's."""

    variant: str
    ratio: Quantity


@dataclass(frozen=True)
class AtLoad:
    """What was measured at a load, the fastest first."""

    users: int
    gains: tuple[Gain, ...]


@dataclass(frozen=True)
class InPhases:
    """What a variant's decode and prefill take of the base's time."""

    variant: str
    bytes_ratio: float
    decode: Quantity
    prefill: Quantity

    @property
    def is_valid(self) -> bool:
        return self.decode.known and self.prefill.known

    @property
    def gains_in_decode(self) -> bool:
        return _shows_gain(self.decode)

    @property
    def gains_in_prefill(self) -> bool:
        return _shows_gain(self.prefill)

    @property
    def is_settled(self) -> bool:
        return _is_decided(self.decode) and _is_decided(self.prefill)


Explained = Literal["both", "decode", "prefill", "neither", "open", "not valid"]


@dataclass(frozen=True)
class Phases:
    """Whether fewer bytes of weights speed up decode alone, as theory has it."""

    variants: tuple[InPhases, ...]

    @property
    def not_in_decode(self) -> list[str]:
        return [of.variant for of in self.variants if of.is_valid and not of.gains_in_decode]

    @property
    def in_prefill_too(self) -> list[str]:
        return [of.variant for of in self.variants if of.is_valid and of.gains_in_prefill]

    @property
    def explained(self) -> Explained:
        """Of which phases the bytes alone explain the time."""
        valid = [of for of in self.variants if of.is_valid]
        if not valid:
            return "not valid"
        if not all(of.is_settled for of in valid):
            return "open"
        if self.not_in_decode:
            return "neither" if self.in_prefill_too else "prefill"
        return "decode" if self.in_prefill_too else "both"


@dataclass(frozen=True)
class Facts:
    weights: KindsOfWeights
    outliers: Outliers | None  # None: not studied
    quality: Quality | None  # None: the probe did not run
    throughput: tuple[AtLoad, ...]
    phases: Phases | None  # None: no variant was measured in both
    tokens_per_s: dict[str, Quantity]  # of each variant, one stream


def facts(run: JudgedRun) -> Facts:
    variants = [v.name for v in run.lab.variants]
    alone = {name: run.point(name, "decode", "concurrent:1") for name in variants}
    return Facts(
        kinds_of_weights(run),
        outliers(run) if run.finds("outliers") else None,
        quality(run),
        throughput(run),
        phases(run),
        tokens_per_s={
            name: run.quantity(point, "output_tokens_per_s") for name, point in alone.items()
        },
    )


def outliers(run: Context) -> Outliers | None:
    """Read the study of outliers; None where the run has none."""
    about = run.run.about.get("outliers", {})
    if "loss_nats" not in about:
        return None
    sizes, plain = about["passages_tokens"], about["loss_nats"]["none"]
    roundings = {how: rounding(how, nats, plain, sizes) for how, nats in about["loss_nats"].items()}
    tensor, smoothed, token = (
        roundings[f"activations by {scales}, weights by channel"].ratio
        for scales in ("tensor", "tensor, smoothed", "token")
    )
    inputs = tuple(
        Inputs(kind, of["largest_over_median_max"], of["kurtosis_mean"], of["kurtosis_max"])
        for kind in get_args(InputKind)
        if (of := about["inputs"].get(kind))
    )
    return Outliers(tuple(roundings.values()), inputs, tensor, smoothed, token)


def rounding(how: str, nats: list[float], plain: list[float], sizes: list[int]) -> Rounding:
    """Compare the loss of each passage, in nats, with that of nothing rounded."""
    lost = over_clusters([n - p for n, p in zip(nats, plain, strict=True)], sizes)
    ratio = Quantity.of(lost.mapped(math.exp), RATIO)
    return Rounding(how, math.exp(sum(nats) / sum(sizes)), ratio.brief if how == "none" else ratio)


def throughput(run: Context) -> tuple[AtLoad, ...]:
    """Compare the variants' throughput with the base's, load by load."""
    loads = next((w.loads for w in run.lab.workloads if w.name == "decode"), ())
    at_loads = (AtLoad(load.users, tuple(gains(run, load.users))) for load in loads)
    return tuple(at_load for at_load in at_loads if at_load.gains)


def gains(run: Context, users: int) -> list[Gain]:
    """Rank what was measured; what is not valid comes last."""
    measured = [
        Gain(v.name, ratio)
        for v in run.lab.variants
        if (ratio := beside_base(run, v.name, "decode", users, "output_tokens_per_s"))
    ]
    return sorted(measured, key=lambda gain: -(gain.ratio.value or 0))


def phases(run: Context) -> Phases | None:
    in_memory_bytes = {p.variant.name: p.shape.weight_bytes for p in run.points}
    measured = tuple(
        InPhases(v.name, in_memory_bytes[v.name] / in_memory_bytes[BASE], decode, prefill)
        for v in run.lab.variants[1:]
        if (decode := beside_base(run, v.name, "decode", 1, "tpot_mean_s"))
        and (prefill := beside_base(run, v.name, "prefill", 1, "ttft_mean_s"))
    )
    return Phases(measured) if measured else None


def beside_base(
    run: Context, variant: str, workload: str, users: int, metric: str
) -> Quantity | None:
    """Divide a variant's figure at a load by the base's, where it is valid.

    None where it was not measured, and for the base itself.
    """
    ours, base = (run.point(name, workload, f"concurrent:{users}") for name in (variant, BASE))
    if ours is None or base is None or variant == BASE or not run.effect(ours, base, metric):
        return None
    return run.ratio_of(ours, base, metric)


def _is_decided(times: Quantity) -> bool:
    """Whether the interval of a ratio of times says that it differs from 1, or that it does not."""
    if times.low is None or times.high is None:
        return False
    beside = not times.low < 1 < times.high
    return beside or (is_within(times.low, MARGIN) and is_within(times.high, MARGIN))


def _shows_gain(times: Quantity) -> bool:
    """Whether the interval of a ratio of times shows a gain."""
    return times.high is not None and times.high < 1
