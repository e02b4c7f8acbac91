"""How well variants answer beside the base, for every lab that probes quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labs.harness.analysis.evaluation import Evaluation
from labs.harness.analysis.quality import GateResult, QualityFigure, compare, gate, over_clusters
from labs.harness.analysis.quantity import POINTS, RATIO, Quantity
from labs.harness.derived.run_view import Context

Figures = Mapping[tuple[str, str], Quantity]
"""By name and by side, or by the texts that they are of; those of all texts have no second name."""
UNITS = {
    "perplexity_ratio": RATIO,
    "needle_retrieval_difference": POINTS,
    "task_accuracy_difference": POINTS,
    "top1_agreement": "share",
    "needle_retrieval": "share",
    "task_accuracy": "share",
}


@dataclass(frozen=True)
class Levels:
    """What one evaluation gave by itself."""

    perplexity: Quantity
    needles_found: Quantity
    tasks_right: Quantity


@dataclass(frozen=True)
class Beside:
    """What an evaluation gave beside another of the same questions; a loss is negative."""

    levels: Levels
    perplexity_ratio: Quantity
    top1_agreement: Quantity
    kl_divergence: Quantity
    needles_change: Quantity
    tasks_change: Quantity
    needles_at: dict[str, Quantity]  # their change by the length of the text, and by depth
    perplexity_gate: GateResult
    needles_gate: GateResult
    tasks_gate: GateResult
    gate: GateResult  # of all three


@dataclass(frozen=True)
class Quality:
    """Each evaluated variant beside the first, the base, and the base beside itself."""

    base: str
    levels: Levels  # of the base
    tokens: int  # scored
    needles: int  # asked for
    tasks: int
    treatments: dict[str, Beside]
    again: Beside | None  # the base asked twice: the gate's own false alarms

    @property
    def compared(self) -> dict[str, Beside]:
        """All that was compared with the base."""
        again = {f"{self.base} again": self.again} if self.again else {}
        return {**again, **self.treatments}


def quality(run: Context) -> Quality | None:
    """Compare what the quality probe asked; None where it did not run on the base and another."""
    base = run.lab.variants[0].name
    asked = {v.name: of for v in run.lab.variants if (of := probe_evaluations(run, v.name))}
    plain = asked.pop(base, [])
    if not plain or not asked:
        return None
    return Quality(
        base,
        _levels(_by_name(compare(plain[0], plain[0])), "baseline"),
        tokens=sum(len(p.logprobs) for p in plain[0].passages),
        needles=len(plain[0].needles),
        tasks=len(plain[0].tasks),
        treatments={name: beside(plain[0], answers[0]) for name, answers in asked.items()},
        again=beside(*plain[:2]) if len(plain) > 1 else None,
    )


def probe_evaluations(context: Context, variant: str) -> list[Evaluation]:
    """Reads each evaluation of a variant by the quality probe; none where it did not run."""
    probe = context.folder.probe_result("quality", variant)
    return [Evaluation.model_validate(a) for a in probe["answers"]] if probe else []


def beside(baseline: Evaluation, treatment: Evaluation) -> Beside:
    figures = compare(baseline, treatment)
    result, margins = gate(figures)
    gates = {of.figure.name: of.result for of in margins}
    of = _by_name(figures)
    needles, tasks = "needle_retrieval_difference", "task_accuracy_difference"
    return Beside(
        _levels(of, "treatment"),
        perplexity_ratio=of["perplexity_ratio", ""],
        top1_agreement=of["top1_agreement", ""],
        kl_divergence=of["kl_divergence", ""],
        needles_change=of[needles, ""],
        tasks_change=of[tasks, ""],
        needles_at={
            where: change for (name, where), change in of.items() if name == needles and where
        },
        perplexity_gate=gates["perplexity_ratio"],
        needles_gate=gates[needles],
        tasks_gate=gates[tasks],
        gate=result,
    )


def _by_name(figures: Sequence[QualityFigure]) -> Figures:
    return {
        (f.name, f.where): Quantity(f.value, UNITS.get(f.name, f.unit), f.low, f.high)
        for f in figures
    }


def _levels(of: Figures, side: str) -> Levels:
    names = ("perplexity", "needle_retrieval", "task_accuracy")
    return Levels(*(of[name, side] for name in names))


def perplexity(nats: Sequence[float], sizes: Sequence[int]) -> float:
    """Compute it from the loss of each passage, in nats, and its number of tokens."""
    return math.exp(sum(nats) / sum(sizes))


def perplexity_ratio(
    nats: Sequence[float], plain_nats: Sequence[float], sizes: Sequence[int]
) -> Quantity:
    """Compare the loss of each passage with that of the plain model, in pairs."""
    lost = over_clusters([n - p for n, p in zip(nats, plain_nats, strict=True)], sizes)
    return Quantity.of(lost.mapped(math.exp), RATIO)
