"""The machines that a page predicts for: those that were measured, and cards by their datasheets.

There is no second copy of a formula: a claim's own function predicts, of the lab as it is resolved
there. A card that was not measured has its datasheet's figures as ceilings, and the shape that it
serves under WEIGHTS=dummy.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from labs.harness.analysis.text import ceilings_text
from labs.harness.spec.lab import Claim, Lab, LabError, Point
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import UNREADABLE
from loadtests.workload import BLOCK
from serving.hardware import gpus
from serving.hardware.machine import Ceilings
from serving.models import catalog, dummy
from serving.models.catalog import Shape
from serving.models.dummy import HOME, SHAPES

REQUESTS = BLOCK  # whose lengths are drawn for a card: any number of blocks has the same mean
Points = tuple[Point, ...]


@dataclass(frozen=True)
class Hardware:
    """Something to predict for: a machine of a published run, or a card by its datasheet."""

    name: str
    model: str
    limits: str  # its ceilings, and where they come from
    card: str  # by which MACHINE= asks for it; "" for a machine that was measured
    scale: str
    shape: Shape
    ceilings: Ceilings
    weights: Mapping[str, Shape]
    about: Mapping[str, Any]

    @property
    def basis(self) -> str:
        """What a prediction rests on."""
        return f"{self.limits}; {self.model}"

    @classmethod
    def of(cls, run: Run) -> Hardware:
        """The machine of a run, with the shapes of what it served."""
        weights = {name: Shape(**shape) for name, shape in run.weights.items()}
        return cls(
            run.machine.describe(), run.model, ceilings_text(run.ceilings), "", run.scale,
            Shape(**run.model_shape), run.ceilings, weights, run.about,
        )  # fmt: skip


@cache
def shipped_shape(name: str) -> Shape:
    """The shape of an architecture that ships with the lab."""
    return catalog.shape_of(json.loads((HOME / f"{name}.json").read_text()))


def shape_text(name: str) -> str:
    """A shape that ships with the lab in words, e.g. `a made-up mixture of 40 experts`."""
    public, _, made_up = SHAPES[name].partition("nobody's: ")
    if not made_up:
        return f"the shape of {public}"
    return f"a made-up {made_up[2:] if made_up.startswith('a ') else f'one, {made_up}'}"


@cache
def cards() -> tuple[Hardware, ...]:
    """Every card that has a datasheet here, with the shape it serves by default."""
    hardware = []
    for name, sheet in gpus.DATASHEETS.items():
        of = gpus.class_of(sheet.memory_bytes)
        ceilings = Ceilings(
            memory_bandwidth_bytes_per_s=sheet.memory_bandwidth_bytes_per_s,
            bf16_flops_per_s=sheet.bf16_flops_per_s, fp8_flops_per_s=sheet.fp8_flops_per_s,
            threads=1, torch="", measured_at="",
        )  # fmt: skip
        model = shape_text(of.dummy)
        hardware.append(
            Hardware(name.removeprefix("NVIDIA "), model, ceilings_text(ceilings, "datasheet"),
                     sheet.short_name, f"gpu-{of.gb}", shipped_shape(of.dummy), ceilings, {}, {})
        )  # fmt: skip
    return tuple(hardware)


def cards_of(lab: Lab) -> list[Hardware]:
    """Every such card with what this lab serves there: a shape of its own, where it has one."""
    if not lab.shape:
        return list(cards())
    return [_in_its_shape(lab.at(card.scale, quick=False), card) for card in cards()]


def _in_its_shape(lab: Lab, card: Hardware) -> Hardware:
    """The card with the shape that a resolved lab serves, and those of its derived models."""
    config = dummy.config_of(lab.shape)
    weights = {
        v.name: catalog.shape_of(dummy.dense(config, v.weights)) for v in lab.variants if v.weights
    }
    model = shape_text(lab.shape)
    return replace(card, model=model, shape=shipped_shape(lab.shape), weights=weights)


def predicted(lab: Lab, name: str) -> list[tuple[str, float]]:
    """What a claim predicts at the lab's own settings on each card that its formula answers for."""
    (claim,) = (c for c in lab.claims if c.name == name)
    predictions = []
    for card in cards_of(lab):
        pair = pair_of(lab, claim, card)
        if pair and has_shapes(pair, card):
            with contextlib.suppress(LabError, *UNREADABLE):
                predictions.append((card.name, claim.predict(*pair).value))
    return predictions


def pair_of(lab: Lab, claim: Claim, on: Hardware) -> Points:
    """The first two points that a claim compares, as they are by default on this hardware.

    Empty where there are none. One whose weights have no known shape there has the base model's.
    """
    drawn = lab.at(on.scale, quick=False)
    if on.card:
        requests = min(drawn.requests, REQUESTS)
        drawn = drawn.model_copy(update={"requests": requests, "repeats": 1})
    points = drawn.points(on.shape, on.ceilings, on.weights, on.about)
    pairs = [pair for c in drawn.claims if c.name == claim.name for pair in drawn.pairs(c, points)]
    return tuple(
        # an engine's devices, as many as share its layers
        replace(point, ceilings=on.ceilings.times(point.flags.tensor_parallel_size))
        for point in (pairs[0] if pairs else ())
    )


def has_shapes(points: Points, on: Hardware) -> bool:
    """Whether the shape of everything that these points serve is known there."""
    return all(not p.variant.weights or p.variant.name in on.weights for p in points)
