"""Checks of more than one trial: the sides of a comparison, repeats, the making of a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labs.harness.analysis import expected_treatment
from labs.harness.analysis.checks.expected import Expected, Found
from labs.harness.analysis.machine_speed import (
    MOST_CHANGED,
    MachineSpeed,
    TimedTrial,
    jump,
    large_jump,
)
from labs.harness.analysis.metrics import Repeats, by_repeat
from labs.harness.spec.lab import Claim, Point, factors

LEAST_FIRST = 0.75  # of the lowest throughput of the later repeats


@dataclass(frozen=True)
class Making:
    """Holds how a run was made, as far as that weakens its conclusions."""

    in_blocks: bool  # engines took turns, and each was measured in a block of its own
    at_endpoint: bool
    parallel: bool  # several copies or parts of a model, at once
    on_cpu: bool


@dataclass(frozen=True)
class CachedRepeats:
    """Holds what the measured repeats of a point found in the prefix cache."""

    point: Point
    measured: Sequence[expected_treatment.CacheHits]
    own: int  # repeats of the lab, of whose mean the forecast is

    @property
    def by_chance(self) -> bool:
        """Whether chance decides how much is found; else each was checked on its own."""
        return any(repeat.by_chance for repeat in self.measured)


def factors_coupled(claim: Claim, treatment: Point, baseline: Point) -> Found:
    differing = factors(treatment, baseline)
    if len(differing) > 1 and claim.coupled:
        yield {"factors": ", ".join(differing), "why": claim.coupled}


def factors_confounded(claim: Claim, treatment: Point, baseline: Point) -> Found:
    differing = factors(treatment, baseline)
    if len(differing) > 1 and not claim.coupled:
        yield {"factors": ", ".join(differing)}


def repeats_missing(repeats: CachedRepeats, _: Expected) -> Found:
    if repeats.by_chance and len(repeats.measured) < repeats.own:
        yield {"measured": len(repeats.measured), "own": repeats.own}


def repeats_cached_too_little(repeats: CachedRepeats, expected: Expected) -> Found:
    measured, key = repeats.measured, repeats.point.key
    if not repeats.by_chance or len(measured) < repeats.own:
        return
    least_rate, least_found = expected.least_hit_rate[key], expected.least_found.get(key, ())
    bounds = expected_treatment.hits_over_repeats(measured, least_rate, least_found)
    hits = sum(repeat.hits for repeat in measured)
    if hits < bounds.low:
        yield {"hits": hits, "repeats": len(measured), "bounds": bounds}


def first_slow(repeats: Repeats) -> Found:
    rates = by_repeat(repeats, "output_tokens_per_s")
    if len(rates) < 3:  # two cannot tell which is odd
        return
    first, *later = (rates[repeat] for repeat in sorted(rates))
    if first < LEAST_FIRST * min(later):
        yield {"share": first / float(np.mean(later))}


def jumped_far(trial: TimedTrial) -> Found:
    if far := large_jump(trial):
        yield {"part": far.part, "ratio": far.ratio}


def jumped_along(trial: TimedTrial, run: MachineSpeed) -> Found:
    if (found := jump(trial, run)) and not found.beside:
        yield {"part": found.part, "ratio": found.ratio, "most": MOST_CHANGED}


def jumped_beside(trial: TimedTrial, run: MachineSpeed) -> Found:
    if (found := jump(trial, run)) and found.beside:
        yield {"part": found.part, "ratio": found.ratio, "most": MOST_CHANGED}


def measured_in_blocks(run: Making) -> Found:
    if run.in_blocks:
        yield {}


def measured_at_an_endpoint(run: Making) -> Found:
    if run.at_endpoint:
        yield {}


def copies_on_a_cpu(run: Making) -> Found:
    if run.parallel and run.on_cpu:
        yield {}


def several_gpus(run: Making) -> Found:
    if run.parallel and not run.on_cpu:
        yield {}
