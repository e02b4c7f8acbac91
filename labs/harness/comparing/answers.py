"""Tabulate every question: what each machine's run answers, and what is computed instead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from labs import LABS
from labs.harness.filing import results
from labs.harness.filing.machine_names import short_name
from labs.harness.filing.newest import marks, on_cpu
from labs.harness.filing.results import RunFolder
from labs.harness.page import GPU, page_of
from labs.harness.questions import QUESTIONS, TOPICS
from labs.harness.telling import computed
from labs.harness.telling.document import (
    Block,
    Code,
    Inline,
    Link,
    Strong,
    Table,
    joined,
    parse,
    section,
    table,
)
from labs.harness.telling.markdown import Markdown
from labs.harness.telling.words import Told

ToldRuns = Sequence[tuple[RunFolder, Told]]  # the newest of each lab and machine, the best first


def in_brief(told: ToldRuns) -> Table:
    """Give each question the answer of one run of each lab, and lead to those of the others."""
    rows: list[list[Inline]] = []
    for id, question in QUESTIONS.items():
        labs = dict.fromkeys(lab for _, lab, _ in _answering(id, told))
        kind = computed.kind_of(id, labs)
        rows.append([id, question, kind, joined(_briefs(id, told), " ")])
    return table(("Id", "Question", "Kind", "Answer"), rows)


def _answering(id: str, told: ToldRuns) -> Iterator[tuple[RunFolder, str, Inline]]:
    """List the runs that answer a question: not those that lack figures for it."""
    for lab in LABS:
        for folder, of_run in told:
            brief = of_run.in_brief(id)
            if folder.lab_name == lab and brief:
                yield folder, lab, brief


def _briefs(id: str, told: ToldRuns) -> Iterator[Inline]:
    by_lab: dict[str, list[tuple[RunFolder, Inline]]] = {}
    for folder, lab, brief in _answering(id, told):
        by_lab.setdefault(lab, []).append((folder, brief))
    for lab, ((first, brief), *others) in by_lab.items():
        yield Code(lab), " on ", _report_of(first, results.RESULTS), ": ", brief
        if others:
            yield "Also on ", joined((_report_of(f, results.RESULTS) for f, _ in others), ", "), "."
    if without := computed.computed(id):
        yield computed.answer_with_command(without)
    elif not by_lab:
        yield _would_answer(id)


def _report_of(folder: RunFolder, page_folder: Path) -> Inline:
    report = os.path.relpath(folder.path / "report.md", page_folder)
    return Link(short_name(folder.run().machine), report), marks(folder.run())


def _would_answer(id: str) -> Inline:
    """Say what would measure a question that no run answers."""
    asking = [Code(f"make lab-{lab.name}") for lab in LABS.values() if id in lab.answers]
    if asking:
        return joined(asking, " or "), " measures it"
    return "no lab asks it yet: ", Link("adding one", "../CONTRIBUTING.md#add-a-lab")


def by_question(told: ToldRuns, page_folder: Path) -> list[Block]:
    """Tabulate each topic: a question, its answer on each machine, and what a GPU would change."""
    topics = (
        section(topic, table(("Question", "Where", "Answer"), _rows(prefix, told, page_folder)))
        for prefix, topic in TOPICS.items()
    )
    return [Markdown(f"#{topic}") for topic in topics]  # below the page's own heading


def _rows(prefix: str, told: ToldRuns, page_folder: Path) -> Iterator[list[Inline]]:
    for id, question in QUESTIONS.items():
        if id.partition("-")[0] != prefix:
            continue
        answers = [*_answering(id, told)]
        rows: list[tuple[Inline, Inline]] = [
            ((_report_of(folder, page_folder), ", ", Code(lab)), brief)
            for folder, lab, brief in answers
        ]
        if without := computed.computed(id):
            rows.append((without.kind, (without.answer.brief, " ", Code(without.command))))
        if all(on_cpu(folder) for folder, *_ in answers):
            rows += [("on a GPU", parse(words)) for words in on_a_gpu(id)]
        kind = computed.kind_of(id, (lab for _, lab, _ in answers))
        asked: Inline = (Strong(id), f" {question} ({kind})")
        for where, answer in rows or [("–", _would_answer(id))]:
            yield [asked, where, answer]
            asked = ""


def on_a_gpu(id: str) -> list[str]:
    """Return what labs say that a GPU would change in their answer to a question."""
    pages = (page_of(lab.name) for lab in LABS.values() if id in lab.answers)
    said = [words for page in pages if page and (words := page[GPU].named.get(id))]
    return [*dict.fromkeys(said)]  # of two labs that say the same, once
