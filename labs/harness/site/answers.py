"""Every question: what each machine's run answers, and what is computed instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from labs import LABS
from labs.harness.comparison.on_file import OnFile
from labs.harness.reports import computed
from labs.harness.reports.computed import Computed
from labs.harness.reports.markdown import Markdown, code, inline, parse
from labs.harness.reports.templates import filled
from labs.harness.spec.page import GPU, page_of
from labs.harness.spec.questions import QUESTIONS, TOPICS


@dataclass(frozen=True)
class Given:
    """The answer of a run, before its fold."""

    run: OnFile
    brief: Markdown


@dataclass(frozen=True)
class OfLab:
    """A lab's answer, by one run, and the other runs that answer it."""

    lab: str
    first: Given
    others: Sequence[Given]


@dataclass(frozen=True)
class Row:
    """A row of a question: a run's answer, or another with its kind in the place of the run."""

    run: OnFile | None
    kind: str
    answer: Markdown


@dataclass(frozen=True)
class Asked:
    """A question, and all answers to it."""

    id: str
    text: str
    kind: str
    given: Sequence[Given]  # in the order of the labs, the best run first
    computed: Computed | None

    @property
    def by_lab(self) -> list[OfLab]:
        return [
            OfLab(lab, first, others)
            for lab, (first, *others) in groupby(self.given, key=lambda of: of.run.lab)
        ]

    @property
    def computed_in_brief(self) -> Markdown:
        """The computed answer with its kind and its command; empty where there is none."""
        return inline(computed.answer_with_command(self.computed)) if self.computed else Markdown()

    @property
    def asking(self) -> list[str]:
        """The commands of labs that would measure it."""
        return [f"make lab-{lab.name}" for lab in LABS.values() if self.id in lab.answers]

    @property
    def rows(self) -> list[Row]:
        """Its answers machine by machine, and what a GPU would change; none where it has none."""
        rows = [Row(of.run, "", of.brief) for of in self.given]
        if found := self.computed:
            text = inline((found.answer.brief, " ", code(found.command)))
            rows.append(Row(None, found.kind, text))
        if all(of.run.on_cpu for of in self.given):
            rows += [Row(None, "on a GPU", parse(words)) for words in on_a_gpu(self.id)]
        return rows


def asked(runs: Sequence[OnFile]) -> list[Asked]:
    """Answer every question from these runs, of which the best stand first."""
    return [_asked(id, list(_given(id, runs))) for id in QUESTIONS]


def _asked(id: str, given: Sequence[Given]) -> Asked:
    kind = computed.kind_of(id, dict.fromkeys(of.run.lab for of in given))
    return Asked(id, QUESTIONS[id], kind, given, computed.computed(id))


def _given(id: str, runs: Sequence[OnFile]) -> Iterator[Given]:
    """List the answers to a question: not of runs that lack figures for it."""
    for lab in LABS:
        for run in runs:
            if run.lab == lab and (brief := run.told.in_brief(id)):
                yield Given(run, brief)


def page(questions: Sequence[Asked], folder: Path) -> Markdown:
    """Write the page of all questions by topic, in that folder."""
    topics = [
        (topic, [asked for asked in questions if asked.id.partition("-")[0] == prefix])
        for prefix, topic in TOPICS.items()
    ]
    return filled("questions.md", topics=topics, here=folder)


def on_a_gpu(id: str) -> list[str]:
    """Return what labs say that a GPU would change in their answer to a question."""
    pages = (page_of(lab.name) for lab in LABS.values() if id in lab.answers)
    said = [words for page in pages if page and (words := page[GPU].named.get(id))]
    return [*dict.fromkeys(said)]  # of two labs that say the same, once
