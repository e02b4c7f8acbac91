"""How near one request comes to the machine's limits, and which flags matter to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.analysis.verdicts import VerdictKind, verdict_kind
from labs.harness.derived.run_view import Context, JudgedRun
from labs.harness.derived.step_parts import Ceiling, Parts, decode_step, nearer_ceiling, prompt_pass
from labs.harness.spec.lab import Point

DEFAULT = "default"
PhaseName = Literal["decode", "prefill"]
METRIC_OF: dict[PhaseName, str] = {"decode": "tpot_mean_s", "prefill": "ttft_mean_s"}
Matters = Literal["yes", "no", "not settled", "not valid", "not compared"]
MATTERS: dict[VerdictKind, Matters] = {
    "helps": "yes",
    "hurts": "yes",
    "no effect": "no",
    "inconclusive": "not settled",
}


@dataclass(frozen=True)
class Phase:
    """A measured forward pass: a decode step, or the prefill of a whole prompt."""

    tokens: int
    parts: Parts
    tokens_per_s: Quantity
    flop_per_byte: float
    nearer_ceiling: Ceiling  # by the work alone


@dataclass(frozen=True)
class Phases:
    """One request's prefill and decode by the engine's defaults."""

    decode: Phase | None  # None: this run has no point for it
    prefill: Phase | None
    work: Quantity  # FLOP per byte, prefill / decode
    ridge_flop_per_byte: float

    @property
    def measured(self) -> dict[PhaseName, Phase]:
        both: dict[PhaseName, Phase | None] = {"decode": self.decode, "prefill": self.prefill}
        return {name: p for name, p in both.items() if p and p.parts.measured_s.known}


@dataclass(frozen=True)
class Beside:
    """A phase of a variant beside the same phase by the engine's defaults."""

    ratio: Quantity  # of its time, to that by the defaults
    matters: Matters


NO_POINT = Quantity.missing("this run has no point for it", "s")


@dataclass(frozen=True)
class FlagEffect:
    """Both phases of a variant."""

    variant: str
    decode: Phase | None
    decode_is_valid: bool
    prefill: Phase | None
    decode_mbu: Quantity
    prefill_mfu: Quantity
    decode_beside: Beside
    prefill_beside: Beside

    @property
    def tpot_s(self) -> Quantity:
        return self.decode.parts.measured_s if self.decode else NO_POINT

    @property
    def ttft_s(self) -> Quantity:
        return self.prefill.parts.measured_s if self.prefill else NO_POINT


@dataclass(frozen=True)
class FlagEffects:
    variants: tuple[FlagEffect, ...]

    @property
    def fastest(self) -> FlagEffect | None:
        """The variant with the shortest valid decode step; None where no two are valid."""
        valid = [v for v in self.variants if v.decode_is_valid and v.tpot_s.known]
        return min(valid, key=lambda v: v.tpot_s.value or 0) if len(valid) > 1 else None


@dataclass(frozen=True)
class Facts:
    phases: Phases
    flags: FlagEffects


def facts(run: JudgedRun) -> Facts:
    return Facts(default_phases(run), flag_effects(run))


def default_phases(run: Context) -> Phases:
    decode, prefill = phase(run, DEFAULT, "decode"), phase(run, DEFAULT, "prefill")
    work = Quantity.missing("this run has not both phases")
    if decode and prefill:
        work = Quantity(prefill.flop_per_byte / decode.flop_per_byte)
    return Phases(decode, prefill, work, run.points[0].ceilings.ridge_flops_per_byte)


def flag_effects(run: Context) -> FlagEffects:
    return FlagEffects(tuple(flag_effect(run, v.name) for v in run.lab.variants))


def flag_effect(run: Context, variant: str) -> FlagEffect:
    decode, prefill = (point_of(run, variant, name) for name in METRIC_OF)
    return FlagEffect(
        variant=variant,
        decode=phase(run, variant, "decode"),
        decode_is_valid=decode is not None and not run.withholds(METRIC_OF["decode"], decode),
        prefill=phase(run, variant, "prefill"),
        decode_mbu=run.quantity(decode, "mbu").brief,
        prefill_mfu=run.quantity(prefill, "mfu").brief,
        decode_beside=beside(run, variant, "decode"),
        prefill_beside=beside(run, variant, "prefill"),
    )


def point_of(run: Context, variant: str, name: PhaseName) -> Point | None:
    return run.point(variant, name, "concurrent:1")


def phase(run: Context, variant: str, name: PhaseName) -> Phase | None:
    """Measure a pass, reading the weights and what is cached once each; None without a point."""
    if (point := point_of(run, variant, name)) is None:
        return None
    tokens = 1 if name == "decode" else round(point.prompt_tokens)
    work = decode_step(run, point, 1) if name == "decode" else prompt_pass(run, point)
    measured_s = run.quantity(point, METRIC_OF[name])
    return Phase(
        tokens,
        work.split(measured_s),
        Quantity(tokens, "tok/s") / measured_s,
        work.flop_per_byte,
        nearer_ceiling(point.ceilings, work.flop_per_byte),
    )


def beside(run: Context, variant: str, name: PhaseName) -> Beside:
    """Compare a phase with the defaults; a trial that is not valid gives no verdict."""
    metric = METRIC_OF[name]
    ours, default = (point_of(run, v, name) for v in (variant, DEFAULT))
    effect = run.effect(ours, default, metric) if ours and default else None
    if not (ours and default and effect) or variant == DEFAULT:
        return Beside(Quantity.missing("there is nothing to compare", RATIO), "not compared")
    valid = not run.withholds(metric, ours, default)
    matters = MATTERS[verdict_kind(effect.ratio, metric)] if valid else "not valid"
    return Beside(Quantity.of(effect.ratio, RATIO), matters)
