"""What a lab's page says of a run: its answers, its findings, the captions of its plots.

A page says figures and compares none. It reads the lab's facts by the names of their fields, the
ratio of a claim by `claim("name")`, and the name of a point by `label(key)`. An answer of which
nothing is left before its fold, as it lacks a quantity, is none, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jinja2

from labs.harness.analysis.computed import Summary
from labs.harness.analysis.quantity import RATIO, Quantity
from labs.harness.analysis.text import point_label
from labs.harness.analysis.validity import SERVER_BUSY
from labs.harness.derived.lab_modules import kept, parts_of
from labs.harness.derived.run_view import ratio_of_claim
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.templates import Filled, filled, filled_text
from labs.harness.spec.lab import Lab
from labs.harness.spec.page import ANSWERS, FINDINGS, PLOTS, Page, PageError, page_of
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import RunFolder
from serving.models.catalog import BUNDLED

FOLD = "<details>"
NOTHING = Markdown("Nothing was measured for this.")
OLD = "its summary is from before the lab had these facts: `make report RUN=..` computes them"


@dataclass(frozen=True)
class Answer:
    """An answer to a question: what stands before its fold, and what follows."""

    brief: Markdown
    depth: Markdown

    @classmethod
    def of(cls, text: Markdown) -> Answer:
        """Part an answer at its fold; `brief` is empty where nothing stands before that."""
        brief, fold, depth = text.partition(FOLD)
        return cls(Markdown(" ".join(brief.split())), Markdown(f"{fold}{depth}"))

    @property
    def whole(self) -> Markdown:
        return Markdown("\n\n".join(part for part in (self.brief, self.depth) if part))


@dataclass(frozen=True)
class ToldFinding:
    """A conclusion beyond the claims, in words; `passed` is None for one that cannot fail."""

    name: str
    title: str
    text: Markdown
    passed: bool | None


@dataclass(frozen=True)
class Told:
    """What a run says: answers by their question's id, and why it has none of the others.

    Answers that rest on claims which are not valid are kept apart, with each such figure marked.
    """

    answers: Mapping[str, Answer]
    doubtful: Mapping[str, Answer]
    unanswered: Mapping[str, str]
    findings: Sequence[ToldFinding]
    captions: Mapping[str, Markdown]  # of the lab's own plots

    def in_brief(self, id: str) -> Markdown | None:
        """What stands before an answer's fold; None where the run does not answer the question."""
        return self.answers[id].brief if id in self.answers else None


@dataclass(frozen=True)
class _NotValid(Quantity):
    """A quantity that is shown although it is not valid, and marked."""

    def __str__(self) -> str:
        return f"{super().__str__()} (not valid)"


def told_by(folder: RunFolder) -> Told:
    """Tell a run on file from its summary."""
    run = folder.run()
    return told(run, run.rebuilt_lab(), folder.summary())


def told(run: Run, lab: Lab, summary: Summary) -> Told:
    """Tell a run from its summary."""
    page, facts = page_of(lab.name), kept(lab.name, summary.facts)
    if page is None:
        return Told({}, {}, {}, [], {})
    if facts is None and parts_of(lab.name).facts:
        return Told({}, {}, dict.fromkeys(lab.answers, OLD), [], {})
    known = _known(run, lab, summary, facts)
    marked = known | {"claim": lambda name: _also_not_valid(summary, name)}
    limited = _limited_by_server(run, summary)
    answers, doubtful = dict[str, Answer](), dict[str, Answer]()
    unanswered = dict[str, str]()
    for id in () if run.aa else lab.answers:  # an engine beside its twin answers nothing
        text, why = _fill(page, ANSWERS, id, known)
        if answer := _answer(text, limited):
            answers[id] = answer
            continue
        unanswered[id] = why
        if answer := _answer(_fill(page, ANSWERS, id, marked).text, limited):
            doubtful[id] = answer
    findings = [
        ToldFinding(
            name,
            page[FINDINGS].parts[name].title,
            _fill(page, FINDINGS, name, known).text or NOTHING,
            getattr(getattr(facts, name.replace("-", "_"), None), "passed", None),
        )
        for name in lab.findings
        if name in page[FINDINGS].parts
    ]
    if run.quick:  # it has no points for most
        findings = [finding for finding in findings if finding.text != NOTHING]
    captions = {name: _fill(page, PLOTS, name, known).text for name in page[PLOTS].parts}
    return Told(answers, doubtful, unanswered, findings, captions)


def _answer(text: Markdown, limited: Markdown) -> Answer | None:
    """Part an answer at its fold; None where nothing stands before that."""
    answer = Answer.of(text)
    if not answer.brief:
        return None
    return replace(
        answer, depth=Markdown("\n\n".join(part for part in (answer.depth, limited) if part))
    )


def _known(run: Run, lab: Lab, summary: Summary, facts: Any) -> dict[str, Any]:
    """Return what a page may name."""
    return {
        **{name: getattr(facts, name) for name in _names(facts)},
        "claim": lambda name: ratio_of_claim(summary, name),
        "label": lambda key: point_label(key, lab),
        "on_gpu": run.machine.kind == "gpu",
        "was_forecast": bool(summary.in_virtual_time),
        "is_from_4_bits": run.model == BUNDLED,
    }


def _names(facts: Any) -> list[str]:
    """Return the names of the fields and properties of a lab's facts."""
    properties = [n for n, of in vars(type(facts)).items() if isinstance(of, property)]
    return [f.name for f in fields(facts)] + properties if facts else []


def _also_not_valid(summary: Summary, claim: str) -> Quantity:
    """Return a claim's ratio, marked where it is measured and not valid."""
    valid = ratio_of_claim(summary, claim)
    ratios = [j.ratio for j in summary.judgements if j.claim == claim and j.ratio]
    if valid.known or not ratios:
        return valid
    return _NotValid(ratios[0].value, RATIO, ratios[0].low, ratios[0].high)


def _fill(page: Page, section: str, part: str, known: Mapping[str, Any]) -> Filled:
    """Fill a part of a page; one that is not there is empty. Raises PageError."""
    parts = page[section].parts
    if part not in parts:
        return Filled(Markdown(), "")
    try:
        return filled_text(parts[part].text, known)
    except (jinja2.TemplateError, TypeError) as error:
        raise PageError(f"{page.title}, {section}, {part}: {error}") from error


def _limited_by_server(run: Run, summary: Summary) -> Markdown:
    """Say behind an answer from a GPU at how many points its figures may be the API server's."""
    busy = {caveat.point for caveat in summary.caveats if caveat.name == SERVER_BUSY}
    if run.machine.kind != "gpu" or not busy:
        return Markdown()
    return filled("limited_by_server.md", busy=len(busy), points=len(summary.measurements))
