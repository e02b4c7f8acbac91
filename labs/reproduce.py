"""Did I get their numbers? A run on file is repeated from its manifest, and the two are compared.

The lab comes from the manifest, knob for knob, with its seeds; what predicts comes from the lab of
that name in this checkout. What the manifest names and this machine has otherwise is listed, the
likeliest cause of other figures first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel

from labs import LABS, compare, manifest, side_by_side
from labs.compare import Comparison, Row, VerdictPair
from labs.lab import LabError
from labs.manifest import Difference
from labs.report import markdown
from labs.resolve import Request, engine_environment, model_of
from labs.results import Run, RunFolder, reread, write_json
from serving import machine as machines
from serving import models
from serving.dummy import SUFFIX
from serving.engine import SERVER

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


class Reproduction(BaseModel, frozen=True, extra="forbid"):
    """reproduction.json, beside the new run."""

    original: str
    reproduced_by: str
    verdicts_agree: bool
    verdicts: list[VerdictPair]
    answers: list[Answer]
    not_comparable: int  # figures with a dimension, of other hardware
    likeliest_cause: str  # of what differs
    differences: list[Difference]
    unrecorded: list[str]
    same_hardware: bool

    @property
    def apart(self) -> list[Row]:
        return [a.row for a in self.answers if a.answer != "reproduced"]


def request(
    run: Run, model: str = "", resume: bool = False, engine_command: Sequence[str] = SERVER
) -> Request:
    """What to ask for to run the same again; raises LabError where this checkout cannot."""
    name, commit = run.lab["name"], run.environment.git_commit
    there = f"`git checkout {commit[:12]}` has it" if commit else "the commit is not on file"
    if run.endpoint:
        raise LabError("it was measured on an endpoint: only its owner can bring that back")
    if name not in LABS:
        raise LabError(f"there is no lab {name} in this checkout: {there}")
    now = LABS[name]
    now = now.at(run.scale, run.quick, dummy=True) if run.dummy else now
    now = now.against_itself() if run.aa else now
    lost = [
        part["name"]
        for kind in ("claims", "forecasts")
        for part in run.lab[kind]
        if part["name"] not in [known.name for known in getattr(now, kind)]
    ]
    if lost:
        raise LabError(
            f"nothing in this checkout predicts {', '.join(lost)} of {name} any more: {there}"
        )
    try:
        lab = reread(run.lab, now)
    except ValueError as error:
        raise LabError(
            f"this checkout cannot read the run's lab any more ({str(error).splitlines()[0]}):"
            f" {there}"
        ) from error
    return Request(
        lab=lab,
        quick=run.quick,
        changes=run.changes,
        model=model or _asked_for(run),
        weights="dummy" if run.dummy else "",
        resume=resume,
        reproduces=run.run_id,
        engine_command=engine_command,
    )


def _asked_for(run: Run) -> str:
    """The MODEL that serves what the run served."""
    if run.dummy:
        return run.model.removesuffix(SUFFIX)
    return "" if run.model == models.default_name(machines.detect()) else run.model


def differs_here(run: Run, asked: Request) -> list[Difference]:
    """What of the run's environment this machine has otherwise, before anything starts."""
    host = machines.detect()
    model = model_of(host, asked.model, asked.weights)
    here = run.model_copy(
        update={
            "machine": host,
            "environment": engine_environment(host.kind, model, run.rebuilt_lab()),
            "model": model.name,
            "model_revision": models.revision(model.path),
            "model_files": models.file_hashes(model.path),
        }
    )
    return manifest.differences(manifest.facts(run), manifest.facts(here))


def stale_note(run: Run) -> str:
    """How the lab of this checkout departs from the one that is rerun, if it does."""
    if not manifest.is_stale(run):
        return ""
    commit = run.environment.git_commit
    return (
        "This checkout's lab has other knobs by now; the run's own are used, from its manifest."
        + (f" To use its code too: git checkout {commit[:12]}" if commit else "")
    )


def answer(original: RunFolder, new: RunFolder) -> Reproduction:
    """Compare, and write reproduction.json and reproduction.md beside the new run."""
    a, b = compare.side(str(original.path)), compare.side(str(new.path))
    found = compare.compare(a, b)
    rows = [*found.rows, *found.effects]
    apart = any(r.outcome == "differs" for r in rows) or not all(v.agrees for v in found.verdicts)
    result = Reproduction(
        original=found.a,
        reproduced_by=found.b,
        verdicts_agree=all(v.agrees for v in found.verdicts),
        verdicts=found.verdicts,
        answers=[Answer(answer=ANSWERS[row.outcome], row=row) for row in rows],
        not_comparable=found.left_out,
        likeliest_cause=manifest.likeliest_cause(found.differences) if apart else "",
        differences=found.differences,
        unrecorded=found.unrecorded,
        same_hardware=found.same_hardware,
    )
    write_json(new.path / "reproduction.json", result)
    path = new.path / "reproduction.md"
    half = path.with_suffix(".half")
    half.write_text(_page(result, found))
    half.rename(path)
    return result


def lines(found: Reproduction) -> list[str]:
    """The answer in a few sentences."""
    count = Counter(a.answer for a in found.answers)
    count["not comparable"] += found.not_comparable
    said = ", ".join(f"{n} {what}" for what, n in count.items() if n)
    agree = sum(v.agrees for v in found.verdicts)
    out = [
        f"Verdicts: {agree} of {len(found.verdicts)} agree.",
        f"Figures: {said}.",
    ]
    out += [
        f"{v.title} ({v.where}): {v.a} there, {v.b} here" for v in found.verdicts if not v.agrees
    ]
    if not found.same_hardware:
        out.append("Other hardware: only figures without a dimension are compared.")
    if found.likeliest_cause:
        out.append(f"Likeliest cause of what differs: {found.likeliest_cause}.")
    if found.unrecorded:
        out.append(f"One of the manifests does not record {', '.join(found.unrecorded)}.")
    return out


def _page(found: Reproduction, comparison: Comparison) -> str:
    verdict = "agree" if found.verdicts_agree else "do not all agree"
    out = [
        f"# Reproduced: the verdicts {verdict}",
        "",
        f"Original: {found.original}; reproduced by {found.reproduced_by}.",
        "",
        *(f"- {line}" for line in lines(found)),
        "",
    ]
    for title, rows in side_by_side.tables(comparison):
        out += [f"## {title}", "", *markdown(rows), ""]
    return "\n".join(out)
