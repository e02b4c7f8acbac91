"""Compare a repeated run with its original: which figures and verdicts came out the same.

The result is written beside the repetition and its records, as reproduction.json and .md. It is
also kept with the original, in `reproductions/`, without those records: some kilobytes, by which a
collection of results says for each run whether others measured the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel

from labs.comparing import compare, side_by_side
from labs.comparing.compare import ComparedFigure, VerdictPair
from labs.filing import manifest
from labs.filing.committed import tracked
from labs.filing.manifest import Fact
from labs.filing.results import DamagedError, RunFolder, all_runs, read_json, write_json
from labs.judging.judge import Caveat
from labs.judging.machine_speed import Part, relative_speed_text
from labs.judging.text import ONE_SITTING
from labs.telling import markdown
from labs.telling.document import Block, Link, Paragraph, Section, Strong, bullets, parse, section
from serving import whole
from serving.machine import Machine

FILED = "reproductions"
ANSWER_OF_OUTCOME = {
    "same": "reproduced",
    "differs": "differs",
    "undecided": "undecided",
    "not comparable": "not comparable",
}


class ReproducedFigure(BaseModel, frozen=True, extra="forbid"):
    """Says how one figure of the original came out in the repetition."""

    answer: str  # reproduced, differs, undecided, not comparable
    row: ComparedFigure


class Repetition(BaseModel, frozen=True, extra="forbid"):
    """Describes the run that repeated another."""

    run: str
    started_at: str
    machine: Machine
    model: str
    vllm: str | None
    git_commit: str | None
    git_dirty: bool | None


class Reproduction(BaseModel, frozen=True, extra="forbid"):
    """Holds the comparison of a run (A) with its repetition (B)."""

    original: str
    by: Repetition
    verdicts_agree: bool
    remark: str = ""  # written by hand, where it is filed: what was measured of a disagreement
    verdicts: list[VerdictPair]
    answers: list[ReproducedFigure]
    not_comparable: int  # figures with a dimension, of other hardware
    likeliest_cause: str  # of what differs
    caveats: dict[str, list[Caveat]]
    differences: list[Fact]
    unrecorded: list[str]
    same_hardware: bool
    speeds: dict[Part, float] | None = None  # of this machine / the original's, where both timed it

    @property
    def apart(self) -> list[ComparedFigure]:
        """Return the figures that were not reproduced."""
        return [a.row for a in self.answers if a.answer != "reproduced"]

    @property
    def agreement(self) -> str:
        """Say how many verdicts agree."""
        agree = sum(v.agrees for v in self.verdicts)
        return f"{agree} of {len(self.verdicts)} agree"

    @property
    def day(self) -> str:
        """Return the date on which the repetition started."""
        return self.by.started_at[:10]


def compare_with_original(original: RunFolder, new: RunFolder) -> Reproduction:
    """Compare a repetition with its original, and write reproduction.json and .md beside it.

    Raises LabError where the two are not comparable.
    """
    comparison = compare.compare(
        compare.read_side(str(original.path)), compare.read_side(str(new.path))
    )
    rows = [*comparison.rows, *comparison.effects]
    agree = all(v.agrees for v in comparison.verdicts)
    run = new.run()
    result = Reproduction(
        original=comparison.a,
        by=Repetition(
            run=run.run_id,
            started_at=run.started_at,
            machine=run.machine,
            model=run.model,
            vllm=run.environment.vllm,
            git_commit=run.environment.git_commit,
            git_dirty=run.environment.git_dirty,
        ),
        verdicts_agree=agree,
        verdicts=comparison.verdicts,
        answers=[ReproducedFigure(answer=ANSWER_OF_OUTCOME[row.outcome], row=row) for row in rows],
        not_comparable=comparison.left_out,
        likeliest_cause=likeliest_cause(comparison.verdicts, rows, comparison.differences),
        caveats=comparison.caveats,
        differences=comparison.differences,
        unrecorded=comparison.unrecorded,
        same_hardware=comparison.same_hardware,
        speeds=comparison.speeds,
    )
    write_json(new.path / "reproduction.json", result)
    verdict = "agree" if agree else "do not all agree"
    page = section(
        f"Reproduced: the verdicts {verdict}",
        *_blocks(result),
        section("Every figure", side_by_side.figure_table(rows)),
    )
    whole.write(new.path / "reproduction.md", markdown.document(page))
    return result


@dataclass(frozen=True)
class BetweenSittings:
    """Says how far the ratios of claims lie apart between a run and its repetitions."""

    spread: float  # root mean square of the log ratio, as a fraction: 0.05 means 5 %
    ratios: int


def between_sittings(repetitions: Sequence[Reproduction]) -> BetweenSittings | None:
    """Pool the claims of repetitions on the same hardware; None where none has a ratio."""
    logs = [
        math.log(verdict.b_ratio.value / verdict.a_ratio.value)
        for repetition in repetitions
        if repetition.same_hardware
        for verdict in repetition.verdicts
        if verdict.a_ratio and verdict.b_ratio
    ]
    if not logs:
        return None
    spread = math.expm1(math.sqrt(fmean(log**2 for log in logs)))
    return BetweenSittings(spread=spread, ratios=len(logs))


def likeliest_cause(
    verdicts: Sequence[VerdictPair], rows: Sequence[ComparedFigure], differences: Sequence[Fact]
) -> str:
    """Say which difference most likely explains a disagreement; nothing where none was decided."""
    apart = any(v.flips for v in verdicts) or any(r.outcome == "differs" for r in rows)
    return manifest.likeliest_cause(differences) if apart else ""


def sentences(result: Reproduction) -> list[str]:
    """Say in a few sentences which verdicts and figures came out the same."""
    count = Counter(a.answer for a in result.answers)
    count["not comparable"] += result.not_comparable
    counts = ", ".join(f"{n} {what}" for what, n in count.items() if n)
    texts = [f"Verdicts: {result.agreement}.", f"Figures: {counts}."]
    texts += [_disagreement(v) for v in result.verdicts if not v.agrees]
    if result.speeds:
        here, there = "This machine", "the original's"
        texts.append(f"{relative_speed_text(here, result.speeds, there)}.")
    if not result.same_hardware:
        texts.append("Other hardware: only figures without a dimension are compared.")
    if result.likeliest_cause:
        texts.append(f"Likeliest cause of what differs: {result.likeliest_cause}.")
    if result.unrecorded:
        texts.append(f"One of the manifests does not record {', '.join(result.unrecorded)}.")
    return texts


def _disagreement(verdict: VerdictPair) -> str:
    there, here = verdict.a_ratio, verdict.b_ratio
    a, b = (
        side_by_side.outcome_with_ratio(*side) for side in ((verdict.a, there), (verdict.b, here))
    )
    text = f"{verdict.title} ({verdict.where}): {a} there; {b} here"
    if there and here and here.low is not None and here.high is not None:
        holds = here.low <= there.value <= here.high
        text += ", an interval that holds the value there" * (holds and not verdict.flips)
    return text


# ------------------------------------------------------------------------- filed with the original


def original_of(folder: RunFolder) -> RunFolder | None:
    """Find the run that this one repeats; None where it is not recorded here."""
    wanted = folder.run().reproduces
    return next((f for f in all_runs() if f.path.name == wanted), None)


def file_with_original(result: Reproduction, original: RunFolder) -> Path:
    """Keep the result with the original; a remark that was written there by hand stays.

    The page of a published run shows published repetitions alone, so a new one leaves it as it is.
    """
    path = original.path / FILED / f"{result.by.run}.json"
    remark = read_json(path, Reproduction).remark if path.exists() else ""
    write_json(path, result.model_copy(update={"remark": remark}))
    if filed_with(original, committed=True):
        whole.write(path.with_name("README.md"), markdown.document(page(original)))
    return path


def filed_with(original: RunFolder, committed: bool = False) -> list[Reproduction]:
    """Read the results kept with a run, newest first; with `committed`, those that git tracks."""
    paths = sorted((original.path / FILED).glob("*.json"), reverse=True)
    if committed:
        paths = tracked(paths, original.path)
    return [read_json(path, Reproduction) for path in paths]


def page(original: RunFolder) -> Section:
    """Write what came of every published repetition of a run, for its `reproductions/`."""
    title = parse(original.run().lab["title"])
    results = filed_with(original, committed=True)
    return section(
        (Link(title, "../report.md"), ", repeated"),
        *(section(f"{result.day}: {result.agreement}", *_blocks(result)) for result in results),
    )


def problems(original: RunFolder) -> list[str]:
    """List what is wrong with the results kept with a run; empty when they are well formed."""
    texts = []
    try:
        decided = {
            (j.claim, f"{j.treatment} / {j.baseline}"): j.outcome
            for j in original.summary().judgements
        }
    except (OSError, ValueError):
        return []  # the check of the run itself reports it
    for path in sorted((original.path / FILED).glob("*.json")):
        name = path.relative_to(original.path)
        try:
            result = read_json(path, Reproduction)
        except DamagedError as error:
            texts.append(str(error))
            continue
        if path.stem != result.by.run or Path(result.original).name != original.path.name:
            texts.append(f"{name} is about another run, or was renamed")
        elif {(v.claim, v.where): v.a for v in result.verdicts if v.a != "missing"} != decided:
            texts.append(f"{name} answers other verdicts than this run's: reproduce it again")
    return texts


def _blocks(result: Reproduction) -> list[Block | None]:
    """Describe one repetition in sentences, then in tables."""
    by = result.by
    code = f"commit {by.git_commit[:12]}" if by.git_commit else "a commit that is not on file"
    code += " and changes to it" * bool(by.git_dirty)
    return [
        Paragraph(
            f"A is the original, {result.original}; B was run on {by.machine.describe()} with vLLM"
            f" {by.vllm or 'unknown'}, {by.model}, {code} ({by.run})."
        ),
        bullets((*sentences(result), ONE_SITTING)),
        Paragraph((Strong("Remark."), " ", parse(result.remark))) if result.remark else None,
        *(
            section(title, table)
            for title, table in {
                "Verdicts": side_by_side.verdict_table(result.verdicts),
                "What was not reproduced": side_by_side.figure_table(result.apart),
                "Validity": side_by_side.validity_table(result.caveats),
                "What differs in how they were run": side_by_side.difference_table(
                    result.differences
                ),
            }.items()
        ),
    ]
