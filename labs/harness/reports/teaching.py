"""The teacher's page: what each lesson takes, and the key of its worksheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from labs.harness.analysis.text import number
from labs.harness.reports.document import Inline
from labs.harness.reports.worksheets import Worksheet
from labs.harness.spec.page import lesson
from labs.harness.storage.recorded import Run, Session
from serving.models.catalog import Shape

WORDS_A_MINUTE = 200  # of a text that explains; assumed
QUESTION_MIN = 4  # to compute one figure; assumed


@dataclass(frozen=True)
class Taught:
    """What a lesson takes: minutes, and what its run needs; None where no run says it."""

    reading_min: int
    worksheet_min: int
    run_min: int | None
    engines: int | None
    model: str
    largest: str  # weights of what it serves, in memory
    made: Sequence[str]  # models that are derived before the first run
    machines: Sequence[str]
    key: Sequence[tuple[Inline, Sequence[str]]]  # a question, and its answer on each machine

    @classmethod
    def of(
        cls, lab: str, sheets: Sequence[Worksheet], run: Run | None, session: Session | None
    ) -> Taught:
        """`run` is the newest of the lab, and `session` how it went."""
        words = sum(len(text.split()) for text in lesson(lab))
        questions = dict.fromkeys(task.question for sheet in sheets for task in sheet.tasks)
        answers = [{task.question: task.answer for task in sheet.tasks} for sheet in sheets]
        shapes = [run.model_shape, *run.weights.values()] if run else []
        held = max((Shape(**shape).held_bytes for shape in shapes), default=0)
        return cls(
            math.ceil(words / WORDS_A_MINUTE),
            QUESTION_MIN * len(questions),
            math.ceil(session.wall_s / 60) if session else None,
            len(run.argv) if run else None,
            run.model if run else "",
            number(held / 1e6, "MB") if run else "",
            sorted(run.about) if run else (),
            [sheet.machine for sheet in sheets],
            [(q, [on.get(q, "–") for on in answers]) for q in questions],
        )
