"""What came of a run that was repeated: which of its figures and verdicts came out the same.

The answer lies beside the repetition and its records, as reproduction.json and .md. It is filed
with the original too, in `reproductions/`, without those records: some kilobytes, by which a
collection of results says of each run whether others got the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from labs.comparing import compare, side_by_side
from labs.comparing.compare import Row, VerdictPair
from labs.filing import manifest
from labs.filing.committed import tracked
from labs.filing.manifest import Fact
from labs.filing.results import DamagedError, RunFolder, all_runs, read_json, write_json
from labs.judging.judge import Caveat
from labs.telling import markdown
from labs.telling.document import Block, Link, Paragraph, Section, Strong, bullets, parse, section
from serving import whole
from serving.machine import Machine

FILED = "reproductions"
ANSWERS = {
    "same": "reproduced",
    "differs": "differs",
    "undecided": "undecided",
    "not comparable": "not comparable",
}


class Answer(BaseModel, frozen=True, extra="forbid"):
    """What became of one figure of the original."""

    answer: str  # reproduced, differs, undecided, not comparable
    row: Row


class Repetition(BaseModel, frozen=True, extra="forbid"):
    """The run that repeated another."""

    run: str
    started_at: str
    machine: Machine
    model: str
    vllm: str | None
    git_commit: str | None
    git_dirty: bool | None


class Reproduction(BaseModel, frozen=True, extra="forbid"):
    """A run (A) and its repetition (B), held against each other."""

    original: str
    by: Repetition
    verdicts_agree: bool
    remark: str = ""  # written by hand, where it is filed: what was measured of a disagreement
    verdicts: list[VerdictPair]
    answers: list[Answer]
    not_comparable: int  # figures with a dimension, of other hardware
    likeliest_cause: str  # of what differs
    caveats: dict[str, list[Caveat]]
    differences: list[Fact]
    unrecorded: list[str]
    same_hardware: bool

    @property
    def apart(self) -> list[Row]:
        return [a.row for a in self.answers if a.answer != "reproduced"]

    @property
    def agreement(self) -> str:
        agree = sum(v.agrees for v in self.verdicts)
        return f"{agree} of {len(self.verdicts)} agree"

    @property
    def day(self) -> str:
        return self.by.started_at[:10]


def answer(original: RunFolder, new: RunFolder) -> Reproduction:
    """Compare, and write reproduction.json and reproduction.md beside the new run."""
    found = compare.compare(compare.side(str(original.path)), compare.side(str(new.path)))
    rows = [*found.rows, *found.effects]
    agree = all(v.agrees for v in found.verdicts)
    run = new.run()
    result = Reproduction(
        original=found.a,
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
        verdicts=found.verdicts,
        answers=[Answer(answer=ANSWERS[row.outcome], row=row) for row in rows],
        not_comparable=found.left_out,
        likeliest_cause=likeliest_cause(found.verdicts, rows, found.differences),
        caveats=found.caveats,
        differences=found.differences,
        unrecorded=found.unrecorded,
        same_hardware=found.same_hardware,
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


def likeliest_cause(
    verdicts: Sequence[VerdictPair], rows: Sequence[Row], differences: Sequence[Fact]
) -> str:
    """Of what differs; what is only left open has none but chance."""
    apart = any(v.flips for v in verdicts) or any(r.outcome == "differs" for r in rows)
    return manifest.likeliest_cause(differences) if apart else ""


def lines(found: Reproduction) -> list[str]:
    """The answer in a few sentences."""
    count = Counter(a.answer for a in found.answers)
    count["not comparable"] += found.not_comparable
    said = ", ".join(f"{n} {what}" for what, n in count.items() if n)
    out = [f"Verdicts: {found.agreement}.", f"Figures: {said}."]
    out += [_disagreement(v) for v in found.verdicts if not v.agrees]
    if not found.same_hardware:
        out.append("Other hardware: only figures without a dimension are compared.")
    if found.likeliest_cause:
        out.append(f"Likeliest cause of what differs: {found.likeliest_cause}.")
    if found.unrecorded:
        out.append(f"One of the manifests does not record {', '.join(found.unrecorded)}.")
    return out


def _disagreement(verdict: VerdictPair) -> str:
    there, here = verdict.a_ratio, verdict.b_ratio
    text = f"{verdict.title} ({verdict.where}): {side_by_side.decided(verdict.a, there)} there;"
    text += f" {side_by_side.decided(verdict.b, here)} here"
    if there and here and here.low is not None and here.high is not None:
        holds = here.low <= there.value <= here.high
        text += ", an interval that holds the value there" * (holds and not verdict.flips)
    return text


# ------------------------------------------------------------------------- filed with the original


def original_of(folder: RunFolder) -> RunFolder | None:
    """The run that this one repeats, where it is on file."""
    wanted = folder.run().reproduces
    return next((f for f in all_runs() if f.path.name == wanted), None)


def file(found: Reproduction, original: RunFolder) -> Path:
    """File it with the original; a remark that stands there already is kept.

    The page of a published run shows published repetitions alone, so a new one leaves it as it is.
    """
    path = original.path / FILED / f"{found.by.run}.json"
    remark = read_json(path, Reproduction).remark if path.exists() else ""
    write_json(path, found.model_copy(update={"remark": remark}))
    if filed(original, committed=True):
        whole.write(path.with_name("README.md"), markdown.document(page(original)))
    return path


def filed(original: RunFolder, committed: bool = False) -> list[Reproduction]:
    """Read the answers filed with a run, newest first; with `committed`, those that git knows."""
    paths = sorted((original.path / FILED).glob("*.json"), reverse=True)
    if committed:
        paths = tracked(paths, original.path)
    return [read_json(path, Reproduction) for path in paths]


def page(original: RunFolder) -> Section:
    """Write what came of every published repetition of a run, for its `reproductions/`."""
    title = parse(original.run().lab["title"])
    answers = filed(original, committed=True)
    return section(
        (Link(title, "../report.md"), ", repeated"),
        *(section(f"{found.day}: {found.agreement}", *_blocks(found)) for found in answers),
    )


def problems(original: RunFolder) -> list[str]:
    """What is wrong with what is filed; empty when it is well formed."""
    wrong = []
    try:
        decided = {
            (j.claim, f"{j.treatment} / {j.baseline}"): j.outcome
            for j in original.summary().judgements
        }
    except (OSError, ValueError):
        return []  # of the run itself, which says so
    for path in sorted((original.path / FILED).glob("*.json")):
        name = path.relative_to(original.path)
        try:
            found = read_json(path, Reproduction)
        except DamagedError as error:
            wrong.append(str(error))
            continue
        if path.stem != found.by.run or Path(found.original).name != original.path.name:
            wrong.append(f"{name} is about another run, or was renamed")
        elif {(v.claim, v.where): v.a for v in found.verdicts if v.a != "missing"} != decided:
            wrong.append(f"{name} answers other verdicts than this run's: reproduce it again")
    return wrong


def _blocks(found: Reproduction) -> list[Block | None]:
    """What came of one repetition: in sentences, then in tables."""
    by = found.by
    code = f"commit {by.git_commit[:12]}" if by.git_commit else "a commit that is not on file"
    code += " and changes to it" * bool(by.git_dirty)
    return [
        Paragraph(
            f"A is the original, {found.original}; B was run on {by.machine.describe()} with vLLM"
            f" {by.vllm or 'unknown'}, {by.model}, {code} ({by.run})."
        ),
        bullets(lines(found)),
        Paragraph((Strong("Remark."), " ", parse(found.remark))) if found.remark else None,
        *(
            section(title, table)
            for title, table in {
                "Verdicts": side_by_side.verdict_table(found.verdicts),
                "What was not reproduced": side_by_side.figure_table(found.apart),
                "Validity": side_by_side.validity_table(found.caveats),
                "What differs in how they were run": side_by_side.difference_table(
                    found.differences
                ),
            }.items()
        ),
    ]
