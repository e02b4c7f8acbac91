"""What weights of fewer bits gain and cost, and which outliers matter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.analysis.verdicts import is_within
from labs.harness.derived.quality_summary import Quality, perplexity, perplexity_ratio, quality
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.derived.step_parts import decode_step, prompt_pass
from labs.harness.derived.weights import KindsOfWeights, kinds_of_weights
from labs.harness.spec.lab import MARGIN, Point
from labs.weight_quantization.lab import KINDS
from serving.hardware.gpus import DATASHEETS
from serving.models import catalog, dummy
from serving.simulator import cards
from serving.simulator.datasheet import EXPECTED, step_times
from serving.simulator.step import Piece, Step

BASE = "bf16"
CONTROL = "w4a16-gptq"
"""Weights alone: products stay in 16 bits, so that a prefill has the same arithmetic."""
InputKind = Literal["q_proj", "o_proj", "gate_proj", "down_proj"]  # by the layer that it enters


@dataclass(frozen=True)
class Facts:
    weights: KindsOfWeights
    outliers: Outliers | None  # None: not studied
    quality: Quality | None  # None: the probe did not run
    throughput: tuple[AtLoad, ...]
    phases: Phases | None  # None: no variant was measured in both
    tokens_per_s: dict[str, Quantity]  # of each variant, one stream

    @property
    def on_a_gpu(self) -> OnCard:
        return on_a_gpu()


def facts(run: JudgedRun) -> Facts:
    alone = {v.name: run.point(v.name, "decode", "concurrent:1") for v in run.lab.variants}
    return Facts(
        kinds_of_weights(run),
        outliers(run),
        quality(run),
        throughput(run),
        phases(run),
        tokens_per_s={
            name: run.quantity(point, "output_tokens_per_s") for name, point in alone.items()
        },
    )


# ------------------------------------------------------------------------------ the outlier problem


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


def outliers(run: Context) -> Outliers | None:
    """Read the study of outliers; None where the run has none."""
    about = run.run.about.get("outliers", {})
    if "loss_nats" not in about:
        return None
    sizes, plain = about["passages_tokens"], about["loss_nats"]["none"]
    ratios = {how: perplexity_ratio(nats, plain, sizes) for how, nats in about["loss_nats"].items()}
    roundings = [
        Rounding(how, perplexity(nats, sizes), ratios[how].brief if how == "none" else ratios[how])
        for how, nats in about["loss_nats"].items()
    ]
    inputs = [
        Inputs(kind, of["largest_over_median_max"], of["kurtosis_mean"], of["kurtosis_max"])
        for kind in get_args(InputKind)
        if (of := about["inputs"].get(kind))
    ]
    by = "activations by {}, weights by channel"
    return Outliers(
        tuple(roundings),
        tuple(inputs),
        by_tensor=ratios[by.format("tensor")],
        smoothed=ratios[by.format("tensor, smoothed")],
        by_token=ratios[by.format("token")],
    )


# ------------------------------------------------------------------------- throughput, load by load


@dataclass(frozen=True)
class Gain:
    """A variant's throughput at a load, beside the base's."""

    variant: str
    ratio: Quantity

    @property
    def beats(self) -> Literal["yes", "no", "open", "not valid"]:
        """Whether it is shown to give more throughput than 16 bits."""
        if self.ratio.low is None or self.ratio.high is None:
            return "not valid"
        return "yes" if self.ratio.low > 1 else "no" if self.ratio.high < 1 else "open"


@dataclass(frozen=True)
class AtLoad:
    """What was measured at a load, the fastest first; what is not valid comes last."""

    users: int
    gains: tuple[Gain, ...]

    @property
    def first(self) -> Gain | None:
        """The fastest format: one recipe of each, as two differ in speed by chance alone."""
        return next((gain for gain in self.gains if gain.variant in KINDS), None)


def throughput(run: Context) -> tuple[AtLoad, ...]:
    """Compare the variants' throughput with the base's, load by load."""
    loads = next((w.loads for w in run.lab.workloads if w.name == "decode"), ())
    at_loads = []
    for load in loads:
        ratios = beside_base(run, "decode", load.users, "output_tokens_per_s")
        gains = [Gain(variant, ratio) for variant, ratio in ratios.items()]
        gains.sort(key=lambda gain: -(gain.ratio.value or 0))
        if gains:
            at_loads.append(AtLoad(load.users, tuple(gains)))
    return tuple(at_loads)


def beside_base(run: Context, workload: str, users: int, metric: str) -> dict[str, Quantity]:
    """Divide each other variant's figure at a load by the base's, where both were measured."""
    at = {v.name: run.point(v.name, workload, f"concurrent:{users}") for v in run.lab.variants}
    return {
        name: run.ratio_of(point, at.get(BASE), metric)
        for name, point in at.items()
        if run.measured_ratio(point, at.get(BASE), metric).known
    }


# --------------------------------------------------------------------- the same on a GPU, forecast

FEW, MANY, CONTEXT_TOKENS = 1, 256, 512
PRECISIONS = {"W8A8": "fp8", "W4A16": "w4a16-gptq"}


@dataclass(frozen=True)
class OfPrecision:
    """The throughput of quantized weights / that of BF16, at both loads."""

    name: str
    few: Quantity
    many: Quantity


@dataclass(frozen=True)
class OnCard:
    """Weights of fewer bits on a GPU that is not here, by its datasheet."""

    card: str
    model: str
    few: int
    many: int
    context: int
    weights: tuple[OfPrecision, ...]

    @property
    def first_for_few(self) -> str:
        return max(self.weights, key=lambda of: of.few.value or 0).name

    @property
    def first_for_many(self) -> str:
        return max(self.weights, key=lambda of: of.many.value or 0).name


@cache
def on_a_gpu() -> OnCard:
    """Forecast a decode step for each precision: unpacking is free where a GPU waits for memory."""
    config, card = dummy.config_of("llama-8b"), DATASHEETS["NVIDIA H100 80GB HBM3"]

    def step_s(precision: str | None, users: int) -> float:
        of = dummy.quantized(config, precision) if precision else config
        eight_bit = cards.has_eight_bit_products(of)
        times = step_times(catalog.shape_of(of), card, EXPECTED, eight_bit=eight_bit)
        return times.seconds(Step([Piece(1, CONTEXT_TOKENS)] * users, users))

    def gain(precision: str, users: int) -> Quantity:
        return Quantity(step_s(None, users) / step_s(precision, users), RATIO)

    return OnCard(
        card.short_name.upper(),
        dummy.SHAPES["llama-8b"].partition(":")[0],
        FEW,
        MANY,
        CONTEXT_TOKENS,
        tuple(OfPrecision(n, gain(of, FEW), gain(of, MANY)) for n, of in PRECISIONS.items()),
    )


# ------------------------------------------------------------------------------- decode and prefill


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
    def gains(self) -> Literal["decode", "both", "neither", "prefill", "open"]:
        """Which phases are shown to take less time."""
        if not (is_settled(self.decode) and is_settled(self.prefill)):
            return "open"
        if is_faster(self.decode):
            return "both" if is_faster(self.prefill) else "decode"
        return "prefill" if is_faster(self.prefill) else "neither"


@dataclass(frozen=True)
class MoreTokens:
    """What more tokens in a pass over the base's weights take, of the time of fewer."""

    users: int  # in a decode step
    decode: Quantity  # the TPOT of so many / that of one
    prompt_times: float  # the tokens of the longer prompt / those of the shorter
    prefill: Quantity  # the TTFT of the longer prompt / that of the shorter, one user

    @property
    def is_valid(self) -> bool:
        return self.decode.known and self.prefill.known


@dataclass(frozen=True)
class Phases:
    """Whether fewer bytes of weights speed up decode alone, as theory has it."""

    variants: tuple[InPhases, ...]
    decode_flop_per_byte: float  # of the base, with one request
    prefill_flop_per_byte: float
    ridge_flop_per_byte: float
    more_tokens: MoreTokens | None = None  # None: not compared, as in older runs

    @property
    def valid(self) -> list[InPhases]:
        return [of for of in self.variants if of.is_valid]

    @property
    def control(self) -> InPhases | None:
        return next((of for of in self.valid if of.variant == CONTROL), None)

    @property
    def not_in_decode(self) -> list[str]:
        return [of.variant for of in self.valid if not is_faster(of.decode)]

    @property
    def in_prefill_too(self) -> list[str]:
        return [of.variant for of in self.valid if is_faster(of.prefill)]


def phases(run: Context) -> Phases | None:
    in_memory_bytes = {p.variant.name: p.shape.weight_bytes for p in run.points}
    decode = beside_base(run, "decode", 1, "tpot_mean_s")
    prefill = beside_base(run, "prefill", 1, "ttft_mean_s")
    measured = tuple(
        InPhases(name, in_memory_bytes[name] / in_memory_bytes[BASE], decode[name], prefill[name])
        for name in decode
        if name in prefill
    )
    one, prompt = (run.point(BASE, name, "concurrent:1") for name in ("decode", "prefill"))
    if not measured or one is None or prompt is None:
        return None
    return Phases(
        measured,
        decode_step(run, one, 1).flop_per_byte,
        prompt_pass(run, prompt).flop_per_byte,
        one.ceilings.ridge_flops_per_byte,
        more_tokens(run, one, prompt),
    )


def more_tokens(run: Context, one: Point, prompt: Point) -> MoreTokens | None:
    loads = [p for p in run.points if (p.variant, p.workload) == (one.variant, one.workload)]
    most = max(loads, key=lambda point: point.load.users)
    if most == one or prompt.prompt_tokens <= one.prompt_tokens:
        return None
    return MoreTokens(
        most.load.users,
        run.ratio_of(most, one, "tpot_mean_s"),
        prompt.prompt_tokens / one.prompt_tokens,
        run.ratio_of(prompt, one, "ttft_mean_s"),
    )


def is_settled(times: Quantity) -> bool:
    """Whether the interval of a ratio of times says that it differs from 1, or that it does not."""
    if times.low is None or times.high is None:
        return False
    beside = not times.low < 1 < times.high
    return beside or (is_within(times.low, MARGIN) and is_within(times.high, MARGIN))


def is_faster(times: Quantity) -> bool:
    """Whether the interval of a ratio of times shows a gain."""
    return times.high is not None and times.high < 1
