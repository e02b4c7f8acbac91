"""How well variants answer beside the base, for every lab that probes quality."""

from __future__ import annotations

from dataclasses import dataclass

from labs.harness.facts.context import Context
from labs.harness.judging.evaluation import Evaluation
from labs.harness.judging.quality import GateResult, QualityFigure, compare, gate
from labs.harness.judging.quantity import POINTS, RATIO, Quantity

Figures = list[QualityFigure]
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
    base, *treatments = (v.name for v in run.lab.variants)
    if not run.finds("quality") or not (first := probe_evaluations(run, base)):
        return None
    compared = {
        name: beside(first[0], answers[0])
        for name in treatments
        if (answers := probe_evaluations(run, name))
    }
    if not compared:
        return None
    plain = first[0]
    return Quality(
        base,
        _levels(compare(plain, plain), "baseline"),
        tokens=sum(len(p.logprobs) for p in plain.passages),
        needles=len(plain.needles),
        tasks=len(plain.tasks),
        treatments=compared,
        again=beside(*first[:2]) if len(first) > 1 else None,
    )


def probe_evaluations(context: Context, variant: str) -> list[Evaluation]:
    """Reads each evaluation of a variant by the quality probe; none where it did not run."""
    probe = context.folder.probe_result("quality", variant)
    return [Evaluation.model_validate(a) for a in probe["answers"]] if probe else []


def beside(baseline: Evaluation, treatment: Evaluation) -> Beside:
    figures = compare(baseline, treatment)
    result, margins = gate(figures)
    gates = {of.figure.name: of.result for of in margins}
    needles = "needle_retrieval_difference"
    return Beside(
        _levels(figures, "treatment"),
        perplexity_ratio=_quantity(figure_of(figures, "perplexity_ratio")),
        top1_agreement=_quantity(figure_of(figures, "top1_agreement")),
        kl_divergence=_quantity(figure_of(figures, "kl_divergence")),
        needles_change=_quantity(figure_of(figures, needles)),
        tasks_change=_quantity(figure_of(figures, "task_accuracy_difference")),
        needles_at={f.where: _quantity(f) for f in figures if f.name == needles and f.where},
        perplexity_gate=gates["perplexity_ratio"],
        needles_gate=gates[needles],
        tasks_gate=gates["task_accuracy_difference"],
        gate=result,
    )


def _levels(figures: Figures, where: str) -> Levels:
    names = ("perplexity", "needle_retrieval", "task_accuracy")
    return Levels(*(_quantity(figure_of(figures, name, where)) for name in names))


def _quantity(figure: QualityFigure) -> Quantity:
    unit = UNITS.get(figure.name, figure.unit)
    return Quantity(figure.value, unit, figure.low, figure.high)


def figure_of(figures: Figures, name: str, where: str = "") -> QualityFigure:
    """Return the figure of that name, over all texts or those that `where` names."""
    return next(f for f in figures if (f.name, f.where) == (name, where))
