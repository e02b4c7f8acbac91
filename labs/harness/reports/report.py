"""The report of a run: what `report.md` and `digest.md` name, taken from the files of the run.

No figure is computed here: numbers come from the run's summary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from labs import LABS
from labs.harness.analysis.computed import AT, PointForecasts, Predictions, Summary
from labs.harness.analysis.machine_speed import at_forecast
from labs.harness.analysis.metrics import METRICS, main_columns
from labs.harness.analysis.text import (
    ADMISSION_BY_CLIENT,
    ONE_SITTING,
    decided_text,
    number,
    one_load,
    point_label,
    predictions_text,
    verdict_text,
)
from labs.harness.analysis.validity import BLOCKED, OVER_REQUESTS
from labs.harness.analysis.verdicts import Caveat
from labs.harness.derived.lab_modules import parts_of, published_of
from labs.harness.derived.published import Part
from labs.harness.reports import headlines, markdown, method, tables
from labs.harness.reports.document import Figure, parts
from labs.harness.reports.forecasts import on_two_engines
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.rendering import Answer, Told, told
from labs.harness.reports.residuals import median_distance
from labs.harness.reports.templates import filled
from labs.harness.spec.lab import Lab, Point, Prediction
from labs.harness.spec.page import lesson
from labs.harness.spec.questions import QUESTIONS
from labs.harness.storage.manifest import is_stale
from labs.harness.storage.recorded import Run, Session
from labs.harness.storage.results import RunFolder, measured_elsewhere
from serving import atomic
from serving.engines import DEFAULT_ENGINE
from serving.engines.vllm_flags import VllmFlags
from serving.hardware.gpus import admits_one_process

MOST_POINTS_NAMED = 6  # of a caveat that withholds no verdict; more are counted
EFFECTS = "effects"  # the picture of all claims


@dataclass(frozen=True)
class Facts:
    """Holds what a report is written from: the typed files of a run, read once."""

    run: Run
    lab: Lab
    points: Sequence[Point]
    predictions: Predictions
    session: Session | None
    summary: Summary

    @cached_property
    def told(self) -> Told:
        """What the lab's page says of the run."""
        return told(self.run, self.lab, self.summary)

    @classmethod
    def of(cls, folder: RunFolder) -> Facts:
        run = folder.run()
        return cls(
            run,
            run.rebuilt_lab(),
            run.points(),
            folder.predictions(),
            folder.session(),
            folder.summary(),
        )


def draw(folder: RunFolder, save: bool = True) -> list[Figure]:
    """Draw the plots anew from the files of a run; return them with their captions."""
    from labs.harness.reports import plots  # imports matplotlib, which few commands draw with

    facts = Facts.of(folder)
    for old in folder.path.glob("*.svg") if save else ():
        old.unlink()
    return plots.draw(folder, facts.lab, facts.points, facts.summary, save)


def write(folder: RunFolder, figures: Sequence[Figure] | None = None) -> Path:
    """Write report.md from the files of a run; draw the plots first, unless `draw` just has."""
    drawn = draw(folder) if figures is None else figures
    text = markdown.document(document(Facts.of(folder), drawn))
    return atomic.write(folder.path / "report.md", text)


def document(facts: Facts, figures: Sequence[Figure]) -> Markdown:
    """Build the whole report."""
    run, lab, summary = facts.run, facts.lab, facts.summary
    own = [figure for figure in figures if Path(figure.file).stem != EFFECTS]
    of_claims = [figure for figure in figures if figure not in own]
    first, *others = [*(own or of_claims), None]
    name = str(run.lab["name"])
    titles = {
        "claims": {j.claim: j.title for j in summary.judgements},
        "forecasts": {f.name: METRICS[f.metric].title for f in lab.forecasts},
    }
    before = facts.predictions.in_virtual_time
    return filled(
        "report.md",
        **_known(facts),
        figures={
            "first": first or "",
            "effects": of_claims[0] if own and of_claims else "",
            "others": others[:-1],
        },
        compared=tables.compared(lab, summary),
        published={
            "claims": published_lines(lab, "claims", titles["claims"]),
            "forecasts": published_lines(lab, "forecasts", titles["forecasts"]),
        },
        lesson=lesson(name),
        is_stale=bool(lesson(name)) and not run.ad_hoc and is_stale(run),
        limits=lab.limits.get(run.machine.kind),
        is_eager=runs_eager(facts.run, facts.points),
        two_engines=_titled(on_two_engines(lab, before)) if before and before.on_two else None,
        predicted=_predicted(facts),
        agreement={
            "counts": tables.agreement(facts.session),
            "ttft": tables.ttft_at_both_ends(facts.points, lab, summary),
        },
        speed=_machine_speed(facts),
        **method.covers(lab, summary.judgements),
    )


def digest(facts: Facts) -> Markdown:
    """Build what a terminal shows of a run that has just ended; the report has the rest."""
    names = [*LABS]
    place = names.index(facts.lab.name) + 1 if facts.lab.name in names else 0
    known = _known(facts)
    return filled(
        "digest.md",
        **known,
        claims_in_brief=tables.without_column(known["claims"], tables.HELD),
        main_points=tables.points(facts.points, facts.lab, facts.summary, main_columns()),
        command_of_lab=f"make lab-{facts.lab.name}",
        headline=_headline(facts),
        whole=_whole(facts),
        next_lab=LABS[names[place % len(names)]] if place else None,
    )


def _headline(facts: Facts) -> dict[str, str] | None:
    """The verdict on the claim that the lab puts forward; None where the run has none on it."""
    headline = parts_of(facts.lab.name).headline
    judged = facts.summary.judgements if headline and not facts.run.aa else ()
    for judgement in judged:
        if headline and judgement.claim == headline.claim and judgement.ratio:
            return {
                "text": headlines.told(judgement, headline),
                "verdict": verdict_text(judgement),
            }
    return None


def _whole(facts: Facts) -> dict[str, Any] | None:
    """What the whole lab has beyond a quick run of it; None of any other run."""
    run = facts.run
    if not run.quick or run.aa or facts.lab.name not in LABS:
        return None
    lab = LABS[facts.lab.name].at(run.scale, quick=False, dummy=run.dummy)
    played = {name for point in facts.points for name in point.name.parts}
    parts = dict.fromkeys([v.name for v in lab.variants] + [w.name for w in lab.workloads])
    return {"parts": [name for name in parts if name not in played], "repeats": lab.repeats}


def predicted(
    lab: Lab, predictions: Predictions, shown_tables: Sequence[Markdown | None]
) -> Markdown:
    """Build what a terminal shows before any engine starts."""
    return filled(
        "predicted.md",
        tables=[table for table in shown_tables if table],
        formulas=formulas(lab, predictions),
        brief=False,
    )


def predicted_in_brief(lab: Lab, predictions: Predictions) -> Markdown:
    """Build what a terminal shows of these where the reader did not ask for more: the claims'."""
    without = lab.model_copy(update={"forecasts": ()})
    shown = tables.predictions(without, predictions) or tables.predictions(lab, predictions)
    return filled("predicted.md", tables=[shown] if shown else [], formulas=[], brief=True)


def notes(run: Run, summary: Summary) -> Markdown:
    """Say what a reader must know before the first figure."""
    return filled("notes.md", run=run, summary=summary, **_noted(run, summary))


def validity(caveats: Sequence[Caveat], lab: Lab) -> Markdown:
    """Say each weakness once, with its points and whether it blocks; or that every check passed."""
    nothing = Summary.model_construct(failed={})
    return filled("validity.md", weaknesses=weaknesses(caveats, lab), summary=nothing,
                  measured_again=None, failed=[])  # fmt: skip


# -------------------------------------------------------------------------- what the pages name


def runs_eager(run: Run, points: Sequence[Point]) -> bool:
    """Tell whether every engine that the run started is vLLM without its compilation."""
    started = () if run.endpoint else points
    return bool(started) and all(
        p.variant.engine == DEFAULT_ENGINE and VllmFlags(p.flags).enforce_eager for p in started
    )


def _known(facts: Facts) -> dict[str, Any]:
    """Return what both the report and the digest name."""
    run, lab, summary = facts.run, facts.lab, facts.summary
    varying, same = tables.varying(tables.points(facts.points, lab, summary), keep=("Point",))
    return {
        "run": run,
        "lab": lab,
        "summary": summary,
        **_noted(run, summary),
        **method.known(run, lab, facts.session),
        "questions": questions(facts),
        "weaknesses": weaknesses(summary.caveats, lab),
        "measured_again": measured_again(summary),
        "failed": [(key, why.splitlines()[0]) for key, why in summary.failed.items()],
        "judgements": summary.judgements,
        "claims": tables.claims(lab, summary),
        "decided": decided_text(summary.judgements),
        "held": predictions_text(summary.judgements),
        "forecasts": _forecasts(facts),
        "findings": [
            {
                "title": finding.title,
                "text": finding.text,
                "published": published_lines(
                    lab, "findings", {finding.name: "published by others"}
                ),
            }
            for finding in facts.told.findings
        ],
        "knobs": [knob(text) for text in lab.next_knobs],
        "points": {"table": varying, "same": same},
        "one_load": one_load(lab),
        "window_s": f"{lab.window_s:g}",
        "slo": {"ttft": number(lab.slo.ttft_s, "s"), "tpot": number(lab.slo.tpot_s, "s")},
        "has_server_share": any(
            summary.value(p.key, "server_core_share") is not None for p in facts.points
        ),
        "repeats": method.repeats(lab, summary),
        "one_sitting": ONE_SITTING,
    }


def _noted(run: Run, summary: Summary) -> dict[str, Any]:
    judged = {j.claim for j in summary.judgements}
    other = measured_elsewhere(run)
    return {
        "measured_elsewhere": other.describe() if other else "",
        "admission_by_client": ADMISSION_BY_CLIENT,
        "several_load_processes": run.lab.get("load_processes", 1) > 1,
        "false_alarms": sum(j.outcome in ("helps", "hurts") for j in summary.judgements),
        "changes": [f"{k}={v}" for k, v in run.changes.items()],
        "without_points": [c["name"] for c in run.lab["claims"] if c["name"] not in judged],
    }


@dataclass(frozen=True)
class Question:
    """A question of the lab, and what the run says to it."""

    id: str
    text: str
    answer: Answer | None
    doubtful: bool  # the answer rests on figures that are not valid, each of them marked
    why: str  # there is no answer
    left_out: Sequence[str]

    @property
    def brief(self) -> Markdown:
        return self.answer.brief if self.answer else Markdown()

    @property
    def depth(self) -> Markdown:
        """What follows the answer, in a fold whose title names the question."""
        depth = self.answer.depth if self.answer else ""
        return Markdown(depth.replace("<summary>", f"<summary>{self.id}: ", 1))


def questions(facts: Facts) -> list[Question]:
    """Each question of the lab with its answer; none where an engine ran beside its twin."""
    given = facts.told
    return [
        Question(
            id,
            QUESTIONS[id],
            given.answers.get(id) or given.doubtful.get(id),
            id in given.doubtful,
            given.unanswered.get(id, ""),
            facts.lab.left_out if facts.lab.absent else (),
        )
        for id in facts.lab.answers
        if not facts.lab.aa
    ]


@dataclass(frozen=True)
class Weakness:
    """The caveats of one name that weigh the same, told as one."""

    name: str
    blocks: bool
    figures: str  # on which there is no verdict; "" for all
    points: Sequence[str]
    text: str
    one_of_several: bool  # texts, of which this is an example

    @property
    def extent(self) -> str:
        """How many points it weakens."""
        if not self.points:
            return "the run"
        return f"{len(self.points)} point{'s' * (len(self.points) > 1)}"

    @property
    def where(self) -> str:
        """Which points it weakens; many of which a verdict stands are counted."""
        few = self.blocks or len(self.points) <= MOST_POINTS_NAMED
        return "; ".join(self.points) if self.points and few else self.extent


def weaknesses(caveats: Sequence[Caveat], lab: Lab) -> list[Weakness]:
    groups: dict[tuple[str, bool], list[Caveat]] = {}
    for caveat in caveats:
        groups.setdefault((caveat.name, caveat.blocks), []).append(caveat)
    return [
        Weakness(
            name,
            blocks,
            _blocked(members[0].metrics) if members[0].metrics else "",
            list(dict.fromkeys(point_label(c.point, lab) for c in members if c.point)),
            members[0].text,
            len({m.text for m in members}) > 1,
        )
        for (name, blocks), members in groups.items()
    ]


def _blocked(names: Sequence[str]) -> str:
    """Word which figures a caveat is about."""
    return next((words for words, known in BLOCKED.items() if {*names} <= {*known}), OVER_REQUESTS)


def measured_again(summary: Summary) -> dict[str, Any] | None:
    """Count the trials that were measured again because they were disturbed, with the reasons."""
    if not summary.measured_again:
        return None
    attempts = list(summary.measured_again.values())
    reasons = Counter(name for tried in attempts for names in tried for name in names.split(", "))
    return {
        "trials": len(attempts),
        "twice": sum(len(tried) > 1 for tried in attempts),
        "reasons": [f"{name} ({n})" for name, n in reasons.most_common()],
    }


@dataclass(frozen=True)
class Knob:
    """A setting to try next, and what it changes."""

    setting: str
    explanation: str


def knob(text: str) -> Knob:
    """Part `SET="..." explanation`; a quoted setting may hold blanks."""
    setting = re.match(r"""\w+=("[^"]*"|'[^']*'|\S+)""", text)
    return Knob(setting[0], text[setting.end() :].strip()) if setting else Knob("", text)


def published_lines(lab: Lab, part: Part, titles: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    """List what others published on these parts of the lab (name -> title)."""
    return [
        (title, list(map(str, figures)))
        for name, title in titles.items()
        if (figures := published_of(lab.name, part, name))
    ]


# ------------------------------------------------------------------------ predictions and forecasts


def _forecasts(facts: Facts) -> dict[str, Any] | None:
    """The forecasts beside what was measured, and which points have none; None without any."""
    before = facts.predictions.in_virtual_time
    if before is None:
        return None
    table, same = tables.varying(
        tables.forecast_beside_measured(facts.lab, facts.summary), keep=("Forecast", "Measured")
    )
    return {
        "table": table,
        "same": same,
        "has_points": bool(before.points),
        "score": forecast_score(facts.summary),
        "usual_change": f"{before.machine_spread:.2f}" if before.machine_spread > 1 else "",
        "closed_forms": tables.closed_forms(facts.lab, facts.summary, facts.predictions),
        "kv_use": tables.kv_use(facts.lab, before, facts.summary.kv_use),
        "without": list(before.without.items()),
    }


def forecast_score(summary: Summary) -> dict[str, Any] | None:
    """How near the forecasts came; None where nothing was measured beside them."""
    shown = [f for f in summary.in_virtual_time if METRICS[f.metric].forecast == "shown"]
    shares = [f.share for f in shown if f.share is not None]
    if not shares:
        return None
    return {
        "within": sum(bool(f.within) for f in shown if f.share is not None),
        "measured": len(shares),
        "distance": median_distance(shares),
    }


def _predicted(facts: Facts) -> dict[str, Any]:
    table, same = tables.varying(
        tables.forecasts(facts.lab, facts.summary), keep=("Where", "Measured", "Predicted")
    )
    of = formulas(facts.lab, facts.predictions)
    return {"table": table, "same": same, "formulas": of}


@dataclass(frozen=True)
class Formula:
    """A formula, the figures that it predicts, and what it assumes for all claims or for one."""

    figures: Sequence[str]
    formula: str
    source: str
    assumptions: Sequence[
        tuple[str, str]
    ]  # the title of the only claim that assumes it, or "", and what


def formulas(lab: Lab, predictions: Predictions) -> list[Formula]:
    """List each formula once; what only one claim assumes stands with the title of that claim."""
    stated = [
        (f"{METRICS[c.metric].title}, treatment / baseline", c.title, p)
        for c in lab.claims
        for p in predictions.effects[c.name].values()
    ]
    stated += [
        (METRICS[f.metric].title, "", p)
        for f in lab.forecasts
        for p in predictions.forecasts[f.name].values()
    ]
    stated += [(what.partition(AT)[0], "", p) for what, p in predictions.arithmetic.items()]
    uses_of: dict[tuple[str, str, str], list[tuple[str, Prediction]]] = {}
    for what, title, p in stated:
        uses_of.setdefault((what, p.formula, p.source), []).append((title, p))
    figures_of: dict[tuple[str, str, tuple[tuple[str, str], ...]], list[str]] = {}
    for (what, formula, source), uses in uses_of.items():
        figures_of.setdefault((formula, source, _assumptions(uses)), []).append(what)
    return [Formula(figures, *description) for description, figures in figures_of.items()]


def _assumptions(uses: Sequence[tuple[str, Prediction]]) -> tuple[tuple[str, str], ...]:
    """What every use of a formula assumes, then what one claim alone assumes."""
    assumptions = [p.assumptions for _, p in uses]
    shared = [text for text in assumptions[0] if all(text in other for other in assumptions)]
    own = dict.fromkeys(
        (title, text) for title, p in uses for text in p.assumptions if text not in shared
    )
    return (*(("", text) for text in shared), *own)


def _titled(section: Markdown) -> dict[str, Markdown]:
    """Part a section that was written in Python into its title and its text."""
    title, text, _ = parts(section)
    return {"title": title, "text": text}


def _machine_speed(facts: Facts) -> dict[str, Any]:
    """The reference steps beside the trials; in a run that timed none, why, if it is known."""
    speed, compute_mode = facts.summary.machine_speed, facts.run.environment.compute_mode
    if speed is None:
        return {"one_process": admits_one_process(compute_mode) and compute_mode, "table": ""}
    before: PointForecasts | None = facts.predictions.in_virtual_time
    ratios = at_forecast(before.references if before else (), speed)
    return {
        "one_process": "",
        "table": tables.machine_speed(speed),
        "steps": speed.steps,
        "at_forecast": [(part, f"{ratio:.2f}") for part, ratio in ratios.items()],
    }
