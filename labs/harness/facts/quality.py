"""How well variants answer beside the base, for every lab that probes quality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from labs.harness.facts.context import Context, JudgedRun
from labs.harness.facts.parts import Conclusion
from labs.harness.filing.results import Finding
from labs.harness.judging.evaluation import Evaluation
from labs.harness.judging.quality import SOURCES, GateResult, QualityFigure, compare, gate
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


# ------------------------------------------------------- for labs whose words are not on a page


@dataclass(frozen=True)
class Compared:
    """Compares each evaluated variant with the first, the base, and the base with itself."""

    base: str
    treatments: Mapping[str, Figures]  # none where the probe did not run
    again: Figures | None  # the base asked twice: the gate's own false alarms


def compared(context: Context) -> Compared:
    base, *treatments = (v.name for v in context.lab.variants)
    first = probe_evaluations(context, base)
    figures = {
        name: compare(first[0], answers[0])
        for name in treatments
        if first and (answers := probe_evaluations(context, name))
    }
    again = compare(first[0], first[1]) if len(first) > 1 else None
    return Compared(base, figures, again)


def tell_quality(facts: Compared) -> Finding:
    """Shows every variant against the first, with the quality gate and its false alarms."""
    if not facts.treatments:
        return Finding(title="Quality", lines=["The probe did not run."])
    columns = {
        **({f"{facts.base} again": facts.again} if facts.again else {}), **facts.treatments
    }  # fmt: skip
    first = next(iter(facts.treatments.values()))
    rows = [["Figure", f"`{facts.base}`", *(f"`{name}`" for name in columns)]]
    for figure in (f for f in first if f.where in ("", "baseline")):
        if figure.where == "baseline":
            rows.append(_level_row(figure, columns))
        else:
            unit = "" if figure.unit == "1" else f", {figure.unit}"
            rows.append([_words(figure.name) + unit, "", *(
                with_interval(figure_of(figures, figure.name)) for figures in columns.values()
            )])  # fmt: skip
    rows.append(["**gate**", "", *(f"**{gate(f)[0]}**" for f in columns.values())])
    lines = [
        f"`{name}`: {gate(figures)[0]}; "
        + ", ".join(f"{_words(v.figure.name)} {v.result}" for v in gate(figures)[1])
        + "."
        for name, figures in columns.items()
    ]
    n = {f.name: f.n for f in first if f.where == ""}
    lines.append(
        f"Evaluated on the served engine: {n['perplexity_ratio']:,} tokens of held-out text scored,"
        f" {n['needle_retrieval_difference']} needles and {n['task_accuracy_difference']} tasks."
        " Sources: "
        + ", ".join(
            f"{_words(name)} ({source.replace(';', ',')})"
            for name, source in SOURCES.items()
            if name != "perplexity_ratio"
        )
        + "."
    )
    lines.append(
        "The gate passes if the whole interval keeps the margin (perplexity at most 2% higher,"
        " needles and tasks at most 5 points lower), fails if the whole interval breaks it, and is"
        " undecided in between. Intervals are 95% intervals over passages or questions, paired."
        + (
            f" `{facts.base} again` is the same engine, evaluated a second time: it shows the"
            " gate's false alarms."
            if facts.again
            else ""
        )
    )
    return Finding(title="Quality", rows=rows, lines=lines)


def figure_of(figures: Figures, name: str, where: str = "") -> QualityFigure:
    """Returns the figure of that name, over all texts or those that `where` names."""
    return next(f for f in figures if (f.name, f.where) == (name, where))


def with_interval(figure: QualityFigure) -> str:
    """Writes a figure with its interval; a difference of two shares in points, with its sign."""
    is_difference = figure.name.endswith("_difference")

    def text(value: float) -> str:
        return f"{100 * value:+z.1f}" if is_difference else f"{value:.3g}"

    value = text(figure.value) + " points" * is_difference
    if figure.low is None or figure.high is None:
        return value
    return f"{value} ({text(figure.low)} to {text(figure.high)})"


def _words(name: str) -> str:
    """Writes a figure's name as a reader would."""
    names = {"top1_agreement": "top-1 agreement", "kl_divergence": "KL divergence"}
    return names.get(name, name.replace("_", " "))


def _level_row(figure: QualityFigure, columns: Mapping[str, Figures]) -> list[str]:
    treated = [figure_of(figures, figure.name, "treatment") for figures in columns.values()]
    cells = [f"{f.value:.3g}" for f in treated]
    return [_words(figure.name), f"{figure.value:.3g}", *cells]


QUALITY = Conclusion("quality", compared, tell_quality)

# ------------------------------------------------------------------------------------ in answers


def in_brief(figures: Figures) -> str:
    """Writes a clause that compares a variant's quality with the base's."""
    perplexity = figure_of(figures, "perplexity_ratio").value - 1
    needles = figure_of(figures, "needle_retrieval_difference").value
    return (
        f"perplexity {perplexity:+.1%}, needles found {100 * needles:+.0f} points, the quality gate"
        f" says *{gate(figures)[0]}*"
    )


def treatments_of(run: JudgedRun) -> Mapping[str, Figures]:
    """Maps each variant to its figures against the base's; empty without the quality probe."""
    quality = QUALITY.facts_of(run)
    return quality.treatments if quality else {}


def quality_gate(run: JudgedRun) -> str | None:
    """Answers ME-2: what the gate says of every variant."""
    quality = QUALITY.facts_of(run)
    if not quality or not quality.treatments:
        return None
    gates = ", ".join(f"`{name}` {gate(f)[0]}" for name, f in quality.treatments.items())
    again = (
        f" `{quality.base}` against itself: {gate(quality.again)[0]}; a gate without false alarms"
        " would say pass."
        if quality.again
        else ""
    )
    return (
        f"Compare with `{quality.base}` over the same passages and questions, in pairs, and gate by"
        f" the interval. Here: {gates}.{again}"
    )
