"""Compare a repeated run with its original: which figures and verdicts came out the same.

A verdict of the original is *reproduced* where the repetition decides alike, *not reproduced* where
the two intervals have nothing in common, and else *undecided*: what the repetition measured admits
what the original says, or it is not valid. Where the original decided nothing there is nothing to
reproduce.

The result is told beside the repetition and its records, in reproduction.md. It is kept with the
original, in `reproductions/`, packed: some kilobytes, by which a collection of results says for
each run whether others measured the same. Who adds a remark there by hand unpacks the file
(`xz -d`), and packs it again (`xz`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from labs.harness.analysis.text import ONE_SITTING
from labs.harness.analysis.verdicts import Judgement, VerdictKind, verdict_kind
from labs.harness.comparison import compare, outcomes, side_by_side
from labs.harness.comparison.comparison import (
    NO_VERDICT,
    ComparedFigure,
    Repetition,
    ReproducedFigure,
    Reproduction,
    VerdictPair,
)
from labs.harness.comparison.sides import read_side
from labs.harness.reports import markdown
from labs.harness.reports.document import Link, parse, section
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.templates import filled
from labs.harness.storage import manifest
from labs.harness.storage.bounded import DamagedError, read_json
from labs.harness.storage.committed import tracked, tracked_names
from labs.harness.storage.manifest import Fact
from labs.harness.storage.results import RunFolder, all_runs
from labs.harness.storage.writing import write_packed_json
from serving import atomic

FILED, PACKED_JSON = "reproductions", ".json.xz"


def compare_with_original(original: RunFolder, new: RunFolder) -> Reproduction:
    """Compare a repetition with its original, and write reproduction.md beside it.

    Raises LabError where the two are not comparable.
    """
    comparison = compare.compare(read_side(str(original.path)), read_side(str(new.path)))
    rows = comparison.rows
    run = new.run()
    by = Repetition(
        run=run.run_id,
        started_at=run.started_at,
        machine=run.machine,
        model=run.model,
        vllm=run.environment.vllm,
        git_commit=run.environment.git_commit,
        git_dirty=run.environment.git_dirty,
    )
    result = Reproduction.model_validate(
        {
            **dict(comparison),
            "original": comparison.a,
            "by": by,
            "answers": [ReproducedFigure(row=row) for row in rows],
            "not_comparable": comparison.left_out,
            "likeliest_cause": likeliest_cause(comparison.verdicts, rows, comparison.differences),
        }
    )
    page = section(f"The run as a whole: {result.outcome}", told(result, every_figure=True))
    atomic.write(new.path / "reproduction.md", markdown.document(page))
    return result


@dataclass(frozen=True)
class BetweenSittings:
    """Says how far the ratios of claims lie apart between a run and its repetitions."""

    spread: float  # root mean square of the log ratio, as a fraction: 0.05 means 5%
    ratios: int


def between_sittings(repetitions: Sequence[Reproduction]) -> BetweenSittings | None:
    """Pool the claims of repetitions on the same hardware; None where none has a valid ratio."""
    logs = [
        math.log(verdict.b_ratio.value / verdict.a_ratio.value)
        for repetition in repetitions
        if repetition.same_hardware
        for verdict in repetition.verdicts
        if verdict.a_ratio and verdict.b_ratio
        if not {verdict.a, verdict.b} & set(NO_VERDICT)
    ]
    if not logs:
        return None
    spread = math.expm1(math.sqrt(fmean(log**2 for log in logs)))
    return BetweenSittings(spread=spread, ratios=len(logs))


def likeliest_cause(
    verdicts: Sequence[VerdictPair], rows: Sequence[ComparedFigure], differences: Sequence[Fact]
) -> str:
    """Say which difference most likely explains what was not reproduced; empty where all was."""
    outcomes = [*(v.outcome for v in verdicts), *(r.outcome for r in rows)]
    return manifest.likeliest_cause(differences) if "differs" in outcomes else ""


# ------------------------------------------------------------------------- filed with the original


def original_of(folder: RunFolder) -> RunFolder | None:
    """Find the run that this one repeats; None where it is not recorded here."""
    wanted = folder.run().reproduces
    return next((f for f in all_runs() if f.path.name == wanted), None)


def file_with_original(result: Reproduction, original: RunFolder) -> Path:
    """Keep the result with the original; a remark that was written there by hand stays.

    The page of a published run shows published repetitions alone, so a new one leaves it as it is.
    """
    path = _file_of(result, original)
    remark = read_json(path, Reproduction).remark if path.exists() else ""
    write_packed_json(path, result.model_copy(update={"remark": remark}))
    if tracked([path], original.path):
        atomic.write(path.with_name("README.md"), markdown.document(page(original)))
    return path


def is_published(result: Reproduction, original: RunFolder) -> bool:
    """Tell whether git tracks what is filed of this repetition."""
    return bool(tracked_names(original.path, f"{FILED}/{_file_of(result, original).name}"))


def _file_of(result: Reproduction, original: RunFolder) -> Path:
    return original.path / FILED / f"{result.by.run}{PACKED_JSON}"


def judge_again(original: RunFolder) -> list[Path]:
    """Judge the results kept with a run by today's rules, and return the files that changed.

    The original's side is read from its summary. Of the repetition the ratios with their intervals
    are on file, from which its verdicts follow; those that it withheld stay withheld.
    """
    judgements = {(j.claim, j.where): j for j in original.summary().judgements}
    changed = []
    for path in _files(original):
        before = read_json(path, Reproduction)
        verdicts = [_judged_again(v, judgements.get((v.claim, v.where))) for v in before.verdicts]
        rows = [answer.row for answer in before.answers]
        rows = outcomes.judged(outcomes.of_claims(rows, list(judgements.values())))
        after = before.model_copy(
            update={
                "verdicts": verdicts,
                "answers": [ReproducedFigure(row=row) for row in rows],
                "likeliest_cause": likeliest_cause(verdicts, rows, before.differences),
            }
        )
        if after != before:
            write_packed_json(path, after)
            changed.append(path)
    return changed


def _judged_again(pair: VerdictPair, now: Judgement | None) -> VerdictPair:
    """Judge both sides of a verdict by the claim's margin of today."""
    if now is None:
        return pair
    b: VerdictKind | str = pair.b
    if pair.b_ratio and pair.b not in NO_VERDICT:
        b = verdict_kind(pair.b_ratio, now.metric, now.margin)
    return pair.model_copy(update={"a": now.outcome, "a_ratio": now.ratio, "b": b})


def filed_with(original: RunFolder, committed: bool = False) -> list[Reproduction]:
    """Read the results kept with a run, newest first; with `committed`, those that git tracks."""
    paths = _files(original)
    if committed:
        paths = tracked(paths, original.path)
    return [read_json(path, Reproduction) for path in paths]


def _files(original: RunFolder) -> list[Path]:
    return sorted((original.path / FILED).glob(f"*{PACKED_JSON}"), reverse=True)


def page(original: RunFolder) -> Markdown:
    """Write how every published repetition of a run came out, for its `reproductions/`."""
    title = parse(original.run().lab["title"])
    results = filed_with(original, committed=True)
    report = original.path / "report.md"  # of an older run it is written when asked for
    return section(
        (Link(title, f"../{report.name}") if report.exists() else title, ", repeated"),
        *(section(f"{result.day}: {result.outcome}", told(result)) for result in results),
    )


def problems(original: RunFolder) -> list[str]:
    """List what is wrong with the results kept with a run; empty when they are well formed."""
    texts = []
    try:
        decided = {(j.claim, j.where): j.outcome for j in original.summary().judgements}
    except (OSError, ValueError):
        return []  # the check of the run itself reports it
    for path in _files(original):
        name = path.relative_to(original.path)
        try:
            result = read_json(path, Reproduction)
        except DamagedError as error:
            texts.append(str(error))
            continue
        if (
            path.name != f"{result.by.run}{PACKED_JSON}"
            or Path(result.original).name != original.path.name
        ):
            texts.append(f"{name} is about another run, or was renamed")
        elif {(v.claim, v.where): v.a for v in result.verdicts if v.a != "missing"} != decided:
            texts.append(
                f"{name} is about other verdicts than this run's: `make report` judges it again"
            )
    return texts


def told(result: Reproduction, every_figure: bool = False) -> Markdown:
    """Describe one repetition in sentences, then in tables.

    These show the figures that were not reproduced, or are undecided, unless they show all.
    """
    sentences = filled(
        "reproduced.md",
        found=result,
        by=result.by,
        speeds=side_by_side.speeds("This machine", result, "the original's"),
        with_ratio=side_by_side.with_ratio,
        one_sitting=ONE_SITTING,
    )
    rows, title = result.apart, "What was not reproduced, or is undecided"
    if every_figure:
        rows, title = [answer.row for answer in result.answers], "Every figure"
    return markdown.fragment([sentences, side_by_side.tables(result, rows, title)])
