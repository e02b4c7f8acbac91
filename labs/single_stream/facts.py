"""How near one request comes to the machine's limits, and which flags matter to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from labs.harness import theory
from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.steps import (
    Ceiling,
    Parts,
    decode_s,
    nearer_ceiling,
    prefill_s,
    split,
    stand_in,
)
from labs.harness.judging.judge import VerdictKind, verdict_kind
from labs.harness.judging.quantity import RATIO, Quantity
from labs.harness.spec import Point

DEFAULT = "default"
PhaseName = Literal["decode", "prefill"]
METRIC_OF: dict[PhaseName, str] = {"decode": "tpot_mean_s", "prefill": "ttft_mean_s"}
Matters = Literal["yes", "no", "not settled", "not valid", "not compared"]
MATTERS: dict[VerdictKind, Matters] = {
    "helps": "yes", "hurts": "yes", "no effect": "no", "inconclusive": "not settled",
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """A measured forward pass: a decode step, or the prefill of a whole prompt."""

    tokens: int
    flop: float
    moved_bytes: float  # the weights and what is cached of the context, once each
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


@dataclass(frozen=True)
class FlagEffect:
    """Both phases of a variant."""

    variant: str
    decode: Phase | None
    decode_is_valid: bool
    prefill: Phase | None
    tpot_s: Quantity
    ttft_s: Quantity
    decode_mbu: Quantity
    prefill_mfu: Quantity
    decode_beside: Beside
    prefill_beside: Beside


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
        tpot_s=run.quantity(decode, METRIC_OF["decode"]),
        ttft_s=run.quantity(prefill, METRIC_OF["prefill"]),
        decode_mbu=run.quantity(decode, "mbu").brief,
        prefill_mfu=run.quantity(prefill, "mfu").brief,
        decode_beside=beside(run, variant, "decode"),
        prefill_beside=beside(run, variant, "prefill"),
    )


def point_of(run: Context, variant: str, name: PhaseName) -> Point | None:
    return run.point(variant, name, "concurrent:1")


def phase(run: Context, variant: str, name: PhaseName) -> Phase | None:
    """Measure a pass; None where the run has no such point."""
    if (point := point_of(run, variant, name)) is None:
        return None
    times = stand_in(run, point)
    shape, kv_value_bytes = point.shape, point.flags.kv_value_bytes
    if name == "prefill":
        tokens = round(point.prompt_tokens)
        moved = shape.step_bytes(tokens) + tokens * shape.kv_bytes_per_token(kv_value_bytes)
        flop = theory.prefill_flops(shape, tokens)
        alone_s = prefill_s(times, tokens) if times else None
    else:
        tokens, at = 1, point.context_tokens
        moved = theory.decode_bytes(shape, 1, at, kv_value_bytes)
        flop = theory.decode_flops(shape, 1, at)
        alone_s = decode_s(times, 1, at) if times else None
    measured_s = run.quantity(point, METRIC_OF[name])
    return Phase(
        tokens,
        flop,
        moved,
        split(measured_s, point.ceilings, moved, flop, alone_s),
        Quantity(tokens, "tok/s") / measured_s,
        flop / moved,
        nearer_ceiling(point.ceilings, flop / moved),
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
