"""Conclude how near one request comes to the machine's limits, and which flags matter to it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.drawing import plt
from labs.harness.facts.parts import Conclusion, Headline, ReportParts
from labs.harness.facts.published import ONE_STREAM, Published, PublishedFigures
from labs.harness.facts.steps import (
    BOTH_MEAN,
    Parts,
    alike,
    counted_in_turn,
    decode_s,
    draw_parts,
    header,
    parts_mean,
    prefill_s,
    stand_in,
)
from labs.harness.filing.results import Finding
from labs.harness.judging.judge import Effect, verdict_kind
from labs.harness.judging.text import number, sentences, times_with_interval
from labs.harness.spec import Point

DEFAULT = "default"
TWO_PHASES = "Two phases, two limits"
PASSES = {"decode": "A decode step", "prefill": "The prefill of the long prompt"}
PhaseName = Literal["decode", "prefill"]
METRIC_OF: dict[PhaseName, str] = {"decode": "tpot_mean_s", "prefill": "ttft_mean_s"}


@dataclass(frozen=True)
class Phase:
    """Holds a measured forward pass: a decode step, or the prefill of a whole prompt."""

    tokens: float
    seconds: float
    flop: float
    moved_bytes: float
    point: Point
    stand_in_s: float | None  # as it was timed before the engine started, where it was

    @property
    def parts(self) -> Parts:
        """Splits the pass into reading and computing at the measured ceilings, and what is left."""
        ceilings = self.point.ceilings
        return Parts(
            measured_s=self.seconds,
            reading_s=self.moved_bytes / ceilings.memory_bandwidth_bytes_per_s,
            computing_s=self.flop / ceilings.flops_per_s,
            stand_in_s=self.stand_in_s,
        )

    @property
    def flop_per_byte(self) -> float:
        return self.flop / self.moved_bytes

    @property
    def nearer_ceiling(self) -> str:
        """Names the ceiling that the work alone would meet first."""
        ridge = self.point.ceilings.ridge_flops_per_byte
        return "arithmetic" if self.flop_per_byte > ridge else "memory bandwidth"


def phase(context: Context, variant: str, name: PhaseName) -> Phase | None:
    """Measures a pass; its bytes are the weights and what is cached of the context, once each."""
    point = context.point(variant, name, "concurrent:1")
    seconds = context.mean(point, METRIC_OF[name]) if point else None
    if point is None or not seconds:
        return None
    times = stand_in(context, point)
    shape, prompt, kv_value_bytes = point.shape, point.prompt_tokens, point.flags.kv_value_bytes
    if name == "prefill":
        moved = shape.step_bytes(prompt) + prompt * shape.kv_bytes_per_token(kv_value_bytes)
        flop = theory.prefill_flops(shape, prompt)
        alone_s = prefill_s(times, prompt) if times else None
        return Phase(prompt, seconds, flop, moved, point, alone_s)
    at = point.context_tokens
    moved = theory.decode_bytes(shape, 1, at, kv_value_bytes)
    step_s = decode_s(times, 1, at) if times else None
    return Phase(1, seconds, theory.decode_flops(shape, 1, at), moved, point, step_s)


# ------------------------------------------------------------------------------- the two phases


@dataclass(frozen=True)
class Phases:
    """Holds one request's prefill and decode by the engine's defaults; None if not measured."""

    decode: Phase | None
    prefill: Phase | None

    @property
    def measured(self) -> dict[PhaseName, Phase]:
        both: dict[PhaseName, Phase | None] = {"decode": self.decode, "prefill": self.prefill}
        return {name: phase for name, phase in both.items() if phase}


def default_phases(context: Context) -> Phases:
    return Phases(phase(context, DEFAULT, "decode"), phase(context, DEFAULT, "prefill"))


def tell_phases(facts: Phases) -> Finding:
    """Shows each phase's work, what its time is made of, and which ceiling is nearer."""
    parts = alike(p.parts for p in facts.measured.values())
    rows = [[
        "Phase", "Time of a pass", *header(parts), "Tokens/s", "FLOP per byte", "Nearer ceiling",
    ]]  # fmt: skip
    rows += [
        [
            f"{name}, {p.tokens:,.0f} token{'s' * (p.tokens > 1)}",
            number(p.seconds, "s"),
            *own.cells(),
            number(p.tokens / p.seconds),
            number(p.flop_per_byte),
            p.nearer_ceiling,
        ]
        for (name, p), own in zip(facts.measured.items(), parts, strict=True)
    ]
    lines = []
    if facts.decode and facts.prefill:
        lines = [
            contrast_sentence(facts.decode, facts.prefill),
            f"{parts_mean(parts)} {counted_in_turn(parts)}",
            "FLOP and bytes follow from the model's shape and are not counted on the device. The"
            " *nearer ceiling* compares the work with this machine's ridge,"
            f" {number(facts.decode.point.ceilings.ridge_flops_per_byte)} FLOP per byte: it would"
            " limit the phase if the rest took no time.",
        ]
    return Finding(title=TWO_PHASES, rows=rows, lines=lines)


def contrast_sentence(decode: Phase, prefill: Phase) -> str:
    work = prefill.flop_per_byte / decode.flop_per_byte
    return (
        f"Each weight that prefill reads is multiplied with the prompt's {prefill.tokens:,.0f}"
        f" tokens, in decode with one token: {number(work)} times the FLOP per byte. So prefill"
        f" takes in {number(prefill.tokens / prefill.seconds)} tokens/s where decode, with the"
        f" same weights, puts out {number(1 / decode.seconds)}."
    )


PHASES = Conclusion("phases", default_phases, tell_phases)

# ------------------------------------------------------------------------- which flag matters

Matters = Literal["yes", "no", "not settled", "not valid"]
MATTERS: dict[str, Matters] = {
    "helps": "yes", "hurts": "yes", "no effect": "no", "inconclusive": "not settled",
}  # fmt: skip


@dataclass(frozen=True)
class PhaseComparison:
    """Compares a phase of a variant with the same phase by the engine's defaults."""

    effect: Effect
    matters: Matters


@dataclass(frozen=True)
class FlagEffect:
    """Holds both phases of a variant; a comparison is None for the defaults and if not made."""

    variant: str
    decode: Phase | None
    decode_is_valid: bool
    prefill: Phase | None
    decode_mbu: float | None
    prefill_mfu: float | None
    decode_beside: PhaseComparison | None
    prefill_beside: PhaseComparison | None


@dataclass(frozen=True)
class FlagEffects:
    """Holds the effects of every variant that was measured."""

    variants: tuple[FlagEffect, ...]

    @property
    def fastest(self) -> tuple[str, Phase] | None:
        """Finds the variant with the shortest valid decode step, and that step.

        None where no two are valid.
        """
        valid = [(v.variant, v.decode) for v in self.variants if v.decode and v.decode_is_valid]
        return min(valid, key=lambda v: v[1].seconds) if len(valid) > 1 else None


def flag_effects(context: Context) -> FlagEffects:
    effects = (
        FlagEffect(
            variant=v.name,
            decode=phase(context, v.name, "decode"),
            decode_is_valid=is_valid(context, v.name, "decode"),
            prefill=phase(context, v.name, "prefill"),
            decode_mbu=context.mean_at(v.name, "decode", 1, "mbu"),
            prefill_mfu=context.mean_at(v.name, "prefill", 1, "mfu"),
            decode_beside=beside(context, v.name, "decode"),
            prefill_beside=beside(context, v.name, "prefill"),
        )
        for v in context.lab.variants
    )
    return FlagEffects(tuple(v for v in effects if v.decode or v.prefill))


def is_valid(context: Context, variant: str, name: PhaseName) -> bool:
    """Whether nothing withholds a verdict on a phase of a variant."""
    point = context.point(variant, name, "concurrent:1")
    return point is None or not context.withholds(METRIC_OF[name], point)


def beside(context: Context, variant: str, name: PhaseName) -> PhaseComparison | None:
    """Compares a phase with the defaults; a trial that is not valid gives no verdict.

    None for the defaults themselves, and where a phase was not measured.
    """
    metric = METRIC_OF[name]
    ours, default = (context.point(v, name, "concurrent:1") for v in (variant, DEFAULT))
    if variant == DEFAULT or ours is None or default is None:
        return None
    measured = context.effect(ours, default, metric)
    if measured is None:
        return None
    if context.withholds(metric, ours, default):
        return PhaseComparison(measured, "not valid")
    return PhaseComparison(measured, MATTERS[verdict_kind(measured.ratio, metric)])


def tell_flags(facts: FlagEffects) -> Finding:
    """Shows every variant beside the defaults: which settings matter to one stream."""
    rows = [[
        "Variant", "TPOT", "MBU", "TPOT beside the defaults", "Matters to decode",
        "TTFT, mean", "MFU", "TTFT beside the defaults", "Matters to prefill",
    ]]  # fmt: skip
    rows += [
        [
            v.variant,
            number(v.decode.seconds if v.decode else None, "s"),
            _share(v.decode_mbu),
            *_beside_cells(v.decode_beside),
            number(v.prefill.seconds if v.prefill else None, "s"),
            _share(v.prefill_mfu),
            *_beside_cells(v.prefill_beside),
        ]
        for v in facts.variants
    ]
    lines = [sentence] if (sentence := fastest_sentence(facts)) else []
    lines += ["TPOT and MBU are those of decode, TTFT and MFU those of the long prompt's prefill."]
    groups: tuple[tuple[str, Matters], ...] = (
        ("These flags matter to decode, by TPOT beside the defaults", "yes"),
        ("These do not matter to decode", "no"),
        ("Not settled by these repeats", "not settled"),
        ("Not valid, as *Validity* says", "not valid"),
    )
    for text, matters in groups:
        members = [
            f"`{v.variant}` {times_with_interval(v.decode_beside.effect.ratio)}"
            for v in facts.variants
            if v.decode_beside and v.decode_beside.matters == matters
        ]
        lines += [f"{text}: {', '.join(members)}."] if members else []
    return Finding(title="Which flag matters to one stream?", rows=rows, lines=lines)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _beside_cells(compared: PhaseComparison | None) -> tuple[str, str]:
    return (
        (times_with_interval(compared.effect.ratio), compared.matters) if compared else ("–", "–")
    )


def fastest_sentence(facts: FlagEffects) -> str | None:
    if facts.fastest is None:
        return None
    variant, best = facts.fastest
    return f"`{variant}` decodes fastest. {best.parts.sentence('Its step')}"


def draw_flags(facts: FlagEffects) -> str | None:
    """Draws what a decode step and the long prompt's prefill are made of, variant by variant."""
    if not facts.variants:
        return None
    decode, prefill = (
        {v.variant: p.parts for v in facts.variants if (p := phase_of(v))}
        for phase_of in (attrgetter("decode"), attrgetter("prefill"))
    )
    measured = [
        (phases, label)
        for phases, label in (
            (decode, "TPOT, mean (ms)"), (prefill, "TTFT of the long prompt, mean (ms)")
        )
        if phases
    ]  # fmt: skip
    figure, axes = plt.subplots(
        1, len(measured), figsize=(9.5 / 2 * len(measured), 3.8), squeeze=False
    )
    for ax, (phases, label) in zip(axes[0], measured, strict=True):
        draw_parts(ax, phases)
        ax.tick_params(axis="x", rotation=30 if len(facts.variants) > 3 else 0)
        ax.set_ylabel(label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center",
                  ncols=2 * len(measured), frameon=False)  # fmt: skip
    both = "decode (left) and prefill (right)"
    what = both if len(measured) == 2 else "decode" if decode else "the long prompt's prefill"
    timed = {p.stand_in_s is not None for p in (*decode.values(), *prefill.values())}
    return (
        f"What the time of a pass goes to, in {what}. The report explains the parts under"
        f' "{TWO_PHASES}".{BOTH_MEAN * (len(timed) > 1)}'
    )


FLAGS = Conclusion("flags", flag_effects, tell_flags, draw_flags)

# ------------------------------------------------------------------------------------ the answers


def two_phases(run: JudgedRun) -> str | None:
    phases = PHASES.facts_of(run)
    if not (phases and phases.decode and phases.prefill):
        return None
    nearer = " and ".join(
        f"{p.nearer_ceiling} is the nearer ceiling of {name}" for name, p in phases.measured.items()
    )
    made_of = " ".join(p.parts.sentence(PASSES[name]) for name, p in phases.measured.items())
    limits = " and ".join(f"{p.parts.limit} {name}" for name, p in phases.measured.items())
    return (
        f"{contrast_sentence(phases.decode, phases.prefill)} By the work alone, {nearer}. {made_of}"
        f" {parts_mean(p.parts for p in phases.measured.values())} On this machine {limits}."
    )


def fused(run: JudgedRun) -> str | None:
    """Answers what compiling and CUDA graphs, many operations in a launch, gain a stream."""
    decode, prefill = run.ratio("eager"), run.ratio("eager-prefill")
    if not decode:
        return None
    graphs, fusion = run.ratio("no-graphs"), run.ratio("no-fusion")
    parts = [f"with every operation launched separately, TPOT is {decode} that of the defaults"]
    parts += [f"TTFT of a long prompt is then {prefill}"] if prefill else []
    parts += [f"compiled but without CUDA graphs, TPOT is {graphs}"] if graphs else []
    parts += [f"with CUDA graphs but not compiled, it is {fusion}"] if fusion else []
    told, flags = [sentences(parts)], FLAGS.facts_of(run)
    if flags and flags.fastest and (fastest := fastest_sentence(flags)):
        told += [fastest, parts_mean([flags.fastest[1].parts])]
    return " ".join(told)


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "forecasts": {
        "tpot": ONE_STREAM,
        "ttft": (
            Published(figure="at least 51% MFU", setting="prefill in BF16", source="vLLM"),
            Published(figure="43% MFU", setting="prefill, 8B in FP8", source="TensorRT-LLM"),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(PHASES, FLAGS),
    answers={"IP-1": two_phases, "KO-2": fused},
    published=PUBLISHED,
    headline=Headline(
        claim="eager",
        done="Launching every operation of a step for itself, instead of compiling them together",
        figure="the time per token",
        on_front_page=False,
    ),
)
