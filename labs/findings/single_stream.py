"""What one request alone makes of the machine, and which flags of the engine matter to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from labs import theory
from labs.filing.results import Finding
from labs.findings.context import Context, JudgedRun
from labs.findings.parts import Conclusion, ReportParts
from labs.findings.published import ONE_STREAM, Published, PublishedFigures
from labs.judging.judge import Effect, effect, verdict_kind
from labs.judging.metrics import by_repeat
from labs.judging.text import number, sentences, times_with_interval
from labs.lab import Point

DEFAULT = "default"
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

    @property
    def mfu(self) -> float:
        """Divides the FLOP/s by the measured BF16 rate (PaLM, Chowdhery et al. 2022)."""
        return self.flop / self.seconds / self.point.ceilings.bf16_flops_per_s

    @property
    def mbu(self) -> float:
        """Divides the bytes/s by the measured memory bandwidth (Databricks 2023)."""
        return self.moved_bytes / self.seconds / self.point.ceilings.memory_bandwidth_bytes_per_s

    @property
    def flop_per_byte(self) -> float:
        return self.flop / self.moved_bytes

    @property
    def bound(self) -> str:
        """Names what limits the phase in theory, by the work alone."""
        ridge = self.point.ceilings.ridge_flops_per_byte
        return "arithmetic" if self.flop_per_byte > ridge else "memory bandwidth"


def phase(context: Context, variant: str, name: PhaseName) -> Phase | None:
    """Measures a pass; its bytes are the weights and what is cached of the context, once each."""
    point = context.point(variant, name, "concurrent:1")
    seconds = context.mean(point, METRIC_OF[name]) if point else None
    if point is None or not seconds:
        return None
    shape, prompt = point.shape, point.prompt_tokens
    if name == "prefill":
        moved = shape.step_bytes(prompt) + prompt * shape.kv_bytes_per_token()
        return Phase(prompt, seconds, theory.prefill_flops(shape, prompt), moved, point)
    at = point.context_tokens
    return Phase(
        1, seconds, theory.decode_flops(shape, 1, at), theory.decode_bytes(shape, 1, at), point
    )


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
    """Shows each phase's work and time, and what limits it."""
    rows = [[
        "Phase", "Time of a pass", "Tokens/s", "FLOP a byte", "FLOP/s (MFU)", "Bytes/s (MBU)",
        "Bound by",
    ]]  # fmt: skip
    rows += [
        [
            f"{name}, {p.tokens:,.0f} token{'s' * (p.tokens > 1)}",
            number(p.seconds, "s"),
            number(p.tokens / p.seconds),
            number(p.flop_per_byte),
            f"{p.flop / p.seconds / 1e12:.3g} T ({p.mfu:.0%})",
            f"{p.moved_bytes / p.seconds / 1e9:.3g} G ({p.mbu:.0%})",
            p.bound,
        ]
        for name, p in facts.measured.items()
    ]
    lines = []
    if facts.decode and facts.prefill:
        lines = [
            contrast_sentence(facts.decode, facts.prefill),
            "FLOP and bytes are those of the model's shape, not what the device happened to do;"
            f" *bound by* is the work beside this machine's ridge,"
            f" {number(facts.decode.point.ceilings.ridge_flops_per_byte)} FLOP a byte.",
        ]
    return Finding(title="Two phases, two limits", rows=rows, lines=lines)


def contrast_sentence(decode: Phase, prefill: Phase) -> str:
    work = prefill.flop_per_byte / decode.flop_per_byte
    return (
        f"A prompt's {prefill.tokens:,.0f} tokens are multiplied with each weight that is read,"
        f" a decoded token alone: {number(work)} times the FLOP for each byte. So prefill"
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
    prefill: Phase | None
    decode_beside: PhaseComparison | None
    prefill_beside: PhaseComparison | None


@dataclass(frozen=True)
class FlagEffects:
    """Holds the effects of every variant that was measured."""

    variants: tuple[FlagEffect, ...]

    @property
    def fastest(self) -> tuple[str, Phase] | None:
        """Finds the variant with the shortest valid decode step, and that step."""
        valid = [
            (v.variant, v.decode)
            for v in self.variants
            if v.decode and not (v.decode_beside and v.decode_beside.matters == "not valid")
        ]
        return min(valid, key=lambda v: v[1].seconds, default=None)


def flag_effects(context: Context) -> FlagEffects:
    effects = (
        FlagEffect(
            variant=v.name,
            decode=phase(context, v.name, "decode"),
            prefill=phase(context, v.name, "prefill"),
            decode_beside=beside(context, v.name, "decode"),
            prefill_beside=beside(context, v.name, "prefill"),
        )
        for v in context.lab.variants
    )
    return FlagEffects(tuple(v for v in effects if v.decode or v.prefill))


def beside(context: Context, variant: str, name: PhaseName) -> PhaseComparison | None:
    """Compares a phase with the defaults; a trial that is not valid gives no verdict.

    None for the defaults themselves, and where a phase was not measured.
    """
    metric = METRIC_OF[name]
    pair = [context.point(v, name, "concurrent:1") for v in (variant, DEFAULT)]
    keys = [point.key for point in pair if point]
    if variant == DEFAULT or len(keys) < len(pair):
        return None
    measured = effect(*(by_repeat(context.values.get(key, {}), metric) for key in keys))
    if measured is None:
        return None
    if any(caveat.hits(metric, *keys) for caveat in context.caveats):
        return PhaseComparison(measured, "not valid")
    return PhaseComparison(measured, MATTERS[verdict_kind(measured, metric)])


def tell_flags(facts: FlagEffects) -> Finding:
    """Shows every variant beside the defaults: which of their settings one stream feels."""
    rows = [[
        "Variant", "TPOT", "MBU", "Beside the defaults", "Matters to decode",
        "TTFT of the long prompt", "MFU", "Beside the defaults", "Matters to prefill",
    ]]  # fmt: skip
    rows += [
        [
            v.variant,
            number(v.decode.seconds if v.decode else None, "s"),
            f"{v.decode.mbu:.0%}" if v.decode else "–",
            *_beside_cells(v.decode_beside),
            number(v.prefill.seconds if v.prefill else None, "s"),
            f"{v.prefill.mfu:.0%}" if v.prefill else "–",
            *_beside_cells(v.prefill_beside),
        ]
        for v in facts.variants
    ]
    lines = [sentence] if (sentence := fastest_sentence(facts)) else []
    groups: tuple[tuple[str, Matters], ...] = (
        ("It matters to decode, TPOT beside the defaults", "yes"),
        ("It does not", "no"),
        ("Not settled by these repeats", "not settled"),
        ("Not valid, see validity", "not valid"),
    )
    for text, matters in groups:
        members = [
            f"`{v.variant}` {times_with_interval(v.decode_beside.effect.ratio)}"
            for v in facts.variants
            if v.decode_beside and v.decode_beside.matters == matters
        ]
        lines += [f"{text}: {', '.join(members)}."] if members else []
    return Finding(title="Which flag matters to one stream?", rows=rows, lines=lines)


def _beside_cells(compared: PhaseComparison | None) -> tuple[str, str]:
    return (
        (times_with_interval(compared.effect.ratio), compared.matters) if compared else ("–", "–")
    )


def fastest_sentence(facts: FlagEffects) -> str | None:
    if facts.fastest is None:
        return None
    variant, best = facts.fastest
    return (
        f"`{variant}` decodes fastest, with {best.mbu:.0%} of the measured bandwidth; the"
        f" rest of a step, {number(best.seconds * (1 - best.mbu), 's')}, is not reading."
    )


FLAGS = Conclusion("flags", flag_effects, tell_flags)

# ------------------------------------------------------------------------------------ the answers


def two_phases(run: JudgedRun) -> str | None:
    phases = PHASES.facts_of(run)
    if not (phases and phases.decode and phases.prefill):
        return None
    limits = " and ".join(f"{p.bound} limits {name}" for name, p in phases.measured.items())
    return f"{contrast_sentence(phases.decode, phases.prefill)} On this machine {limits}."


def fused(run: JudgedRun) -> str | None:
    """Answers what compiling and CUDA graphs, many operations in a launch, gain a stream."""
    decode, prefill = run.ratio("eager"), run.ratio("eager-prefill")
    if not decode:
        return None
    graphs, fusion = run.ratio("no-graphs"), run.ratio("no-fusion")
    parts = [f"with every operation launched for itself TPOT is {decode} the defaults'"]
    parts += [f"TTFT of a long prompt {prefill}"] if prefill else []
    parts += [f"compiled but without CUDA graphs TPOT is {graphs}"] if graphs else []
    parts += [f"with graphs but not compiled {fusion}"] if fusion else []
    flags = FLAGS.facts_of(run)
    return f"{sentences(parts)} {fastest_sentence(flags) or '' if flags else ''}"


# ------------------------------------------------------------------- what others published

PUBLISHED: PublishedFigures = {
    "forecasts": {
        "tpot": ONE_STREAM,
        "ttft": (
            Published(figure="at least 51 % MFU", setting="prefill in BF16", source="vLLM"),
            Published(figure="43 % MFU", setting="prefill, 8B in FP8", source="TensorRT-LLM"),
        ),
    },
}

PARTS = ReportParts(
    conclusions=(PHASES, FLAGS),
    answers={"IP-1": two_phases, "KO-2": fused},
    published=PUBLISHED,
)
