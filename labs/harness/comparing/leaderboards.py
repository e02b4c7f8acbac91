"""Generate pages from results: parts of README.md, results/README.md, a page for each machine.

Committed pages count the runs that git tracks (filing.committed): a reader's own runs change
none of them until they are added.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from labs import LABS
from labs.harness.comparing import answers, reproduction
from labs.harness.comparing.comparison import (
    ANSWER_OF_OUTCOME,
    Reproduction,
    counted_outcomes,
)
from labs.harness.comparing.reproduction import FILED
from labs.harness.facts.parts import Headline, parts_of
from labs.harness.filing import manifest, results
from labs.harness.filing import published_gpu as filed
from labs.harness.filing.committed import committed_runs
from labs.harness.filing.machine_names import legend, short_name
from labs.harness.filing.newest import marks, newest_runs, on_cpu
from labs.harness.filing.recorded import Run, Session
from labs.harness.filing.results import RunFolder
from labs.harness.judging.judge import Judgement
from labs.harness.judging.metrics import METRICS
from labs.harness.judging.text import (
    ONE_SITTING,
    ceilings_text,
    claim_outcome,
    counted,
    decided_text,
    point_label,
    predictions_text,
    ratio_interval,
    ratio_number,
    ratio_text,
    verdict_text,
)
from labs.harness.questions import QUESTIONS
from labs.harness.telling import (
    headlines,
    instruments,
    markdown,
    method,
    published_gpu,
    residuals,
)
from labs.harness.telling.document import (
    Block,
    Code,
    Emphasis,
    Figure,
    Inline,
    Link,
    Paragraph,
    Section,
    Strong,
    Table,
    bullets,
    named_table,
    parse,
    section,
    table,
)
from labs.harness.telling.words import Told, told_by
from serving import whole
from serving.weights.models import ROOT

READING_FINDINGS = (
    "In parentheses: the 95% interval of one sitting, the prediction, and whether it *held*, is"
    " *refuted*, or is *open* because the interval is too wide to tell; *trivial*: no change was"
    " predicted"
)
VERDICTS = "docs/reading-a-report.md#verdicts-and-predictions"
PAGE = "README.md"
SWEEP = "sweep.svg"
SITTING = "labs-all.md"  # of a machine, for its reader: git ignores it
FORECASTS = "forecasts.md"  # how near predictions came
PUBLISHED = "published-gpu.md"  # to what others measured on GPUs
README = ROOT / PAGE
QUESTIONS_PAGE = ROOT / "docs" / "questions.md"
CLAIMS, REPEATED, INSTRUMENTS = "claims.md", "repeated.md", "instruments.md"
PAGE_OF_ALL = Path(__file__).with_name("collection.md")
MARKS = {"helps": "▲", "hurts": "▼", "no effect": "=", "inconclusive": "?", "not valid": "×"}
RUN_NAME = re.compile(r"\b\d{8}T\d{6}Z-[0-9a-f]{8}\b")
MOST_HEADLINES = 5  # on the front page, which is one page
CLAIMS_EACH = 2  # of each lab on the page of all machines; the machine's page has them all
STANDS_IN = (
    "*(quick)*: that machine has no full run of the lab yet, so one with shorter windows and fewer"
    " repeats stands in."
)
RANDOM_WEIGHTS = (
    "*(random weights)*: the model's shape is real and its weights are random numbers, so speeds"
    " are real; texts, and what they are worth, are not."
)


def _earlier(run: Run) -> str:
    """Mark a run of a lab whose settings have changed since."""
    return " (the lab's settings have changed since)" if manifest.is_stale(run) else ""


def stale() -> dict[Path, str]:
    """Find the generated files that would change, and name the runs that change them."""
    return {
        path: _differing_runs(before, text)
        for path, text in _pages().items()
        if (before := path.read_text() if path.exists() else "") != text
    }


def write() -> list[Path]:
    """Write every generated file, and return those that changed."""
    changed = list(stale())
    for path, text in _pages().items():
        whole.write(path, text)
    return changed


def uncounted() -> list[RunFolder]:
    """List the runs that would be in the tables if git tracked them."""
    counted = {folder.path for folder in newest_runs(committed=True)}
    return [folder for folder in newest_runs() if folder.path not in counted]


def write_machine(home: Path, sitting: Sequence[RunFolder] = ()) -> Path:
    """Write the page of a machine's newest runs, with uncommitted and quick ones.

    A lab of this sitting is there with the sitting's run, whatever its settings.
    """
    its_own = {folder.run().lab["name"]: folder for folder in sitting}
    newest = _by_machine(newest_runs(quick=True)).get(home, [])
    runs = [*its_own.values(), *(f for f in newest if f.run().lab["name"] not in its_own)]
    return whole.write(home / SITTING, markdown.document(_machine(runs, committed=False)))


def _differing_runs(before: str, after: str) -> str:
    """Name the runs in the lines that differ, and say what is wrong with each."""
    lines = [set(text.splitlines()) for text in (before, after)]
    dropped, added = (
        {name for line in these - other for name in RUN_NAME.findall(line)}
        for these, other in (lines, lines[::-1])
    )
    on_file = {folder.path.name for folder in committed_runs()}
    reasons = [
        *(f"{name} is not in it" for name in sorted(added - dropped)),
        *(f"it says otherwise of {name}" for name in sorted(added & dropped)),
        *(f"git does not know {name}" for name in sorted(dropped - added - on_file)),
        *(f"it should not have {name}" for name in sorted((dropped - added) & on_file)),
    ]
    return ", ".join(reasons)


def _pages() -> dict[Path, str]:
    runs, scores = newest_runs(committed=True), residuals.Scores.of(committed_runs())
    return {
        README: generated_parts(README.read_text(), runs),
        results.RESULTS / PAGE: _collection(runs),
        results.RESULTS / CLAIMS: _filled(
            PAGE_OF_ALL.with_name(CLAIMS),
            claims=[*_what_marks_mean(runs), leaderboard(committed=True)],
        ),
        results.RESULTS / REPEATED: _filled(
            PAGE_OF_ALL.with_name(REPEATED), repeated=[_reproduced(results.RESULTS)]
        ),
        results.RESULTS / INSTRUMENTS: _filled(
            PAGE_OF_ALL.with_name(INSTRUMENTS),
            benches=[
                block
                for bench in instruments.published_benches()
                for block in instruments.blocks(bench)
            ],
        ),
        results.RESULTS / FORECASTS: markdown.document(
            residuals.page(scores, residuals.to_reports(results.RESULTS))
        ),
        QUESTIONS_PAGE: _filled(
            PAGE_OF_ALL.with_name(QUESTIONS_PAGE.name),
            questions=answers.by_question(_told(runs), QUESTIONS_PAGE.parent),
        ),
        **_published(filed.on_file()),
        **{
            home / PAGE: markdown.document(_machine(machine_runs, committed=True))
            for home, machine_runs in _by_machine(runs).items()
        },
        **{f.path / FILED / PAGE: markdown.document(reproduction.page(f)) for f in _repeated()},
    }


def _published(judged: Sequence[filed.Judged]) -> dict[Path, str]:
    """Return the page of published runs, and its picture where there are any."""
    from labs.harness.telling import published_gpu_plot  # imports matplotlib

    picture = filed.PICTURE if judged else ""
    pages = {PUBLISHED: markdown.document(published_gpu.page(judged, picture))}
    if picture:
        pages[picture] = published_gpu_plot.picture(judged)
    return {results.RESULTS / name: page for name, page in pages.items()}


def _repeated() -> list[RunFolder]:
    return [f for f in committed_runs() if reproduction.filed_with(f, committed=True)]


def _by_machine(runs: Sequence[RunFolder]) -> dict[Path, list[RunFolder]]:
    """Group runs by the folder of their machine's results."""
    by_home: dict[Path, list[RunFolder]] = {}
    for folder in runs:
        by_home.setdefault(folder.path.parent.parent, []).append(folder)
    return by_home


# -------------------------------------------------------------------------------------- README.md


def generated_parts(text: str, runs: Sequence[RunFolder]) -> str:
    """Replace each generated part of the text by what these runs give."""
    parts: dict[str, Sequence[Block]] = {
        "plot": _plot(runs),
        "labs": [_labs()],
        "findings": [_where_found(runs), bullets(_headlines(runs))],
    }
    for name, blocks in parts.items():
        start, end = f"<!-- {name}: generated by `labs readme` -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = before + start + markdown.fragment(blocks) + "\n" + end + after
    return text


def _standing_first(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Put runs of labs as they are now before stale ones, then GPUs first, then the newest."""
    return sorted(sorted(runs, key=lambda folder: folder.path.name, reverse=True), key=_standing)


def _told(runs: Sequence[RunFolder]) -> list[tuple[RunFolder, Told]]:
    return [(folder, told_by(folder)) for folder in _standing_first(runs)]


def _standing(folder: RunFolder) -> tuple[bool, bool, bool]:
    run = folder.run()
    return manifest.is_stale(run), on_cpu(folder), run.quick


def _plot(runs: Sequence[RunFolder]) -> list[Block]:
    """Show one plot of a real run, if possible of a lab as it is now: a sweep of the load."""
    if not (folder := _plotted(runs)):
        return []
    caption = (
        "Throughput and TPOT against requests in flight, with bounds predicted beforehand"
        f" ({short_name(folder.run().machine)})"
        f"{marks(folder.run())}{_earlier(folder.run())}."
    )
    return [Figure(os.path.relpath(folder.path / SWEEP, ROOT), Emphasis(caption))]


def _plotted(runs: Sequence[RunFolder]) -> RunFolder | None:
    with_plot = (folder for folder in _standing_first(runs) if (folder.path / SWEEP).exists())
    return next(with_plot, None)


def _labs() -> Table:
    """List the labs in the order of the course, each with a link to the text that teaches it."""
    return table(
        ("", "Lab", "Question"),
        (
            [str(place), Link(Code(name), _source(name)), parse(lab.question)]
            for place, (name, lab) in enumerate(LABS.items(), 1)
        ),
    )


def _source(lab: str) -> str:
    return f"labs/{lab.replace('-', '_')}"


def _headlines(runs: Sequence[RunFolder]) -> list[Inline]:
    """Say how the claim that a lab puts forward came out, in one run that decided it."""
    return [_headline(*one) for one in _found(runs)]


def _found(runs: Sequence[RunFolder]) -> list[tuple[RunFolder, Judgement, Headline]]:
    """Choose what the front page tells of labs, each by one run that decided its claim.

    A run of the lab as it is now comes before a stale one, which is marked, one on a GPU before one
    on a CPU, and a newer one before an older; so do labs, of which the front page has room for a
    few. A claim that is undecided, or not valid, is no finding.
    """
    claims = list(_decided(_standing_first(runs)))
    front_page = sorted(claims, key=lambda one: _standing(one[0]))[:MOST_HEADLINES]
    return [one for one in claims if one in front_page]


def _where_found(runs: Sequence[RunFolder]) -> Paragraph:
    """Say on what the findings of the front page were measured, and how to read them.

    What marks mean is said where a finding or the plot has some.
    """
    plotted = _plotted(runs)
    shown = [*(folder for folder, *_ in _found(runs)), *([plotted] if plotted else [])]
    return Paragraph(
        (
            f"{_measured_on(runs)} ",
            *((brief, " ") if (brief := published_gpu.in_brief(filed.on_file())) else ()),
            parse(READING_FINDINGS),
            " (",
            Link("verdicts", VERDICTS),
            ").",
            *(part for text in _meanings(shown) for part in (" ", parse(text))),
        )
    )


def _measured_on(runs: Sequence[RunFolder]) -> str:
    """Name the kinds of machines behind the findings; each GPU is named with its finding."""
    found = [folder for folder, *_ in _found(runs)]
    if not found:
        return "Nothing has been decided yet."
    kinds = []
    if cores := {folder.run().machine.count for folder in found if on_cpu(folder)}:
        kinds.append("CPUs with two cores" if cores == {2} else "CPUs")
    if not all(map(on_cpu, found)):
        kinds.append("GPUs, which are named")
    without = "; no result from a GPU is here yet" if all(map(on_cpu, runs)) else ""
    return f"Measured on {' and on '.join(kinds)}{without}."


def _decided(runs: Sequence[RunFolder]) -> Iterator[tuple[RunFolder, Judgement, Headline]]:
    """Yield each lab's claim for the front page from the first run that decided it."""
    for lab in LABS:
        headline = parts_of(lab).headline
        if not headline or not headline.on_front_page:
            continue
        decided = [
            (folder, judgement, headline)
            for folder in runs
            if folder.lab_name == lab
            for judgement in folder.summary().judgements
            if judgement.claim == headline.claim and judgement.expected is not None
        ]
        yield from decided[:1]


def _headline(folder: RunFolder, judgement: Judgement, headline: Headline) -> Inline:
    run = folder.run()
    gpu = "" if on_cpu(folder) else f" on {run.machine.name.removeprefix('NVIDIA ')}"
    done = Link(headline.done, os.path.relpath(folder.path / "report.md", ROOT))
    return headlines.told(judgement, headline, done, f"{gpu}{marks(run)}", _earlier(run))


def _to_report(folder: RunFolder, page_folder: Path, words: Inline) -> Inline:
    """Link to a run's report, with the run's marks behind it."""
    run = folder.run()
    return (Link(words, os.path.relpath(folder.path / "report.md", page_folder)), marks(run))


# ---------------------------------------------------------------------------- the collection's page


def _collection(runs: Sequence[RunFolder]) -> str:
    """Write the page of all machines: a matrix of verdicts, the machines, and the questions."""
    machines = bullets(
        Link(legend(f.run().machine), f"{home.name}/{PAGE}")
        for home, (f, *_) in _by_machine(runs).items()
    )
    marked = _what_marks_mean(runs)
    marks_used = [f"{mark} {outcome}" for outcome, mark in MARKS.items()]
    return _filled(
        PAGE_OF_ALL,
        marks=[Paragraph((", ".join(marks_used),))],
        matrix=[*marked, _matrix(runs)],
        machines=[machines],
        questions=[answers.in_brief(_told(runs))],
    )


def _filled(page: Path, **parts: Sequence[Block]) -> str:
    """Fill the places of a page with blocks."""
    template = jinja2.Template(
        page.read_text(), keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    filled = {name: markdown.fragment(blocks).strip() for name, blocks in parts.items()}
    return str(template.render(filled))


def _matrix(runs: Sequence[RunFolder]) -> Table:
    """Tabulate labs by machines: the verdicts of the newest run in marks, with its report."""
    by_home = _by_machine(runs)
    names = [short_name(of[0].run().machine) for of in by_home.values()]
    rows: list[list[Inline]] = []
    for lab in dict.fromkeys([*LABS, *(f.lab_name for f in runs)]):
        cells: list[Inline] = []
        for of_machine in by_home.values():
            found = [f for f in of_machine if f.lab_name == lab]
            cells.append(_verdicts(found[0]) if found else "")
        if any(cells):
            rows.append([Code(lab), *cells])
    return table(("Lab", *names), rows)


def _verdicts(folder: RunFolder) -> Inline:
    """Count the verdicts of a run in marks, linked to its report; bold where it is stale."""
    counts = Counter(MARKS[j.outcome] for j in folder.summary().judgements)
    marks_of_run = " ".join(f"{mark}{counts[mark]}" for mark in MARKS.values() if mark in counts)
    words: Inline = marks_of_run or "no claim"
    if manifest.is_stale(folder.run()):
        words = Strong(words)
    return _to_report(folder, results.RESULTS, words)


def _what_marks_mean(runs: Sequence[RunFolder]) -> list[Block]:
    """Say what the marks of these runs mean, where there are some."""
    return [Paragraph(parse(" ".join(told)))] if (told := _meanings(runs)) else []


def _meanings(runs: Sequence[RunFolder]) -> list[str]:
    quick, dummy = any(f.run().quick for f in runs), any(f.run().dummy for f in runs)
    return [*[STANDS_IN] * quick, *[RANDOM_WEIGHTS] * dummy]


def _reproduced(page_folder: Path) -> Table:
    """Tabulate the repetitions of each run, the newest first."""
    rows: list[dict[str, Inline]] = [
        {
            "Lab": original.lab_name,
            "Run": Link(original.path.name, _link(original, page_folder)),
            "Repeated on": short_name(result.by.machine),
            "When": result.day,
            "vLLM": result.by.vllm or "–",
            "Outcome": result.outcome,
            "Verdicts": result.verdict_counts,
            "Figures": counted_outcomes(
                (a.answer for a in result.answers), ANSWER_OF_OUTCOME.values()
            ),
        }
        for original in sorted(_repeated(), key=lambda f: (on_cpu(f), f.path))
        for result in reproduction.filed_with(original, committed=True)
    ]
    return named_table(rows)


def _link(original: RunFolder, page_folder: Path) -> str:
    return os.path.relpath(original.path / FILED / PAGE, page_folder)


def _newest(original: RunFolder, page_folder: Path, committed: bool) -> Inline:
    """Say how a run's newest repetition came out, with a link to all of them."""
    for result in reproduction.filed_with(original, committed):
        return Link(f"{result.verdict_counts} ({result.day})", _link(original, page_folder))
    return "–"


def _between_sittings(committed: bool) -> dict[str, str]:
    """Say for each lab how far its claims' ratios lie apart between two sittings."""
    repetitions: dict[str, list[Reproduction]] = {}
    for folder in committed_runs() if committed else results.all_runs():
        filed = reproduction.filed_with(folder, committed)
        repetitions.setdefault(folder.lab_name, []).extend(filed)
    spreads = {lab: reproduction.between_sittings(of_lab) for lab, of_lab in repetitions.items()}
    return {
        lab: f"{s.spread:.1%} ({counted(s.ratios, 'ratio')})" for lab, s in spreads.items() if s
    }


def leaderboard(committed: bool = False) -> Table:
    """Tabulate lab x claim x machine of the newest runs, with links relative to `results/`."""
    claims = [
        (place, folder, judgement)
        for folder in newest_runs(committed=committed)
        for place, judgement in enumerate(folder.summary().judgements[:CLAIMS_EACH])
        if folder.lab_name in LABS
    ]
    labs, between_sittings = list(LABS), _between_sittings(committed)

    def order(claim: tuple[int, RunFolder, Judgement]) -> tuple[int, int, bool, str]:
        place, folder, _ = claim
        machine = short_name(folder.run().machine)
        return labs.index(folder.lab_name), place, on_cpu(folder), machine

    rows: list[dict[str, Inline]] = [
        {
            "Lab": folder.lab_name,
            "Claim": parse(j.title),
            "Machine": _to_report(folder, results.RESULTS, short_name(folder.run().machine)),
            "Effect": ratio_text(j),
            "95% interval": ratio_interval(j),
            "Between sittings": between_sittings.get(folder.lab_name, "–"),
            "Verdict": j.outcome,
            "Prediction": claim_outcome(j),
            "Settings since then": (
                Strong("changed") if manifest.is_stale(folder.run()) else "unchanged"
            ),
            "Repeated": _newest(folder, results.RESULTS, committed),
        }
        for _, folder, j in sorted(claims, key=order)
    ]
    return named_table(rows)


# ----------------------------------------------------------------------------- a machine's own page


def _claim(folder: RunFolder, judgement: Judgement, page_folder: Path) -> dict[str, Inline]:
    run = folder.run()
    place = point_label(judgement.treatment, run.rebuilt_lab())
    return {
        "Lab": (_to_report(folder, page_folder, run.lab["name"]), _earlier(run)),
        "Claim": (parse(judgement.title), f" ({place})"),
        "Effect": f"{METRICS[judgement.metric].title} {ratio_text(judgement)}",
        "95% interval": ratio_interval(judgement),
        "Predicted": f"{ratio_number(judgement.prediction.value)}x",
        "Did it hold?": claim_outcome(judgement),
        "Verdict": parse(verdict_text(judgement)),
    }


def _machine(runs: Sequence[RunFolder], committed: bool) -> Section:
    """Build a machine's page: every claim of every lab, the checks, and the questions."""
    first = runs[0].run()
    here = runs[0].path.parent.parent
    checks: list[list[Inline]] = [
        [_lab_of(f.run()), finding.title, "passed" if finding.passed else Strong("failed")]
        for f in runs
        for finding in told_by(f).findings
        if finding.passed is not None
    ]
    claims = [_claim(f, j, here) for f in runs for j in f.summary().judgements]
    return section(
        f"What was measured on {legend(first.machine)}",
        Paragraph(f"Ceilings: {ceilings_text(first.ceilings)}. Each lab's newest complete run:"),
        *_what_marks_mean(runs),
        _runs(runs, here, committed),
        section("Every claim", named_table(claims), Paragraph(ONE_SITTING)),
        section("Checks that can fail", table(("Lab", "Check", "Outcome"), checks)),
        section("Question by question", _answers(runs, here)),
    )


def _lab_of(run: Run) -> str:
    """Name a run's lab, with the run's marks where it is quick; the table of runs has them all."""
    return f"{run.lab['name']}{marks(run) if run.quick else ''}"


def _runs(runs: Sequence[RunFolder], page_folder: Path, committed: bool) -> Table:
    """Tabulate the runs: question, model, date, and what became of claims and predictions."""
    rows: list[dict[str, Inline]] = []
    for folder in runs:
        run, session, judgements = folder.run(), folder.session(), folder.summary().judgements
        rows.append(
            {
                "Lab": _to_report(folder, page_folder, run.lab["name"]),
                "Question": parse(run.lab["question"]),
                "Model": run.model,
                "vLLM": run.environment.vllm or "–",
                "When (UTC)": run.started_at[:16].replace("T", " "),
                "Load": _load(run, session) if session else "–",
                "Claims decided": decided_text(judgements),
                "Predictions": predictions_text(judgements),
                "Repeated": _newest(folder, page_folder, committed),
            }
        )
    return named_table(rows)


def _load(run: Run, session: Session) -> str:
    """Say how long the load took; of a resumed run only its last session is on file."""
    last = " (last session)" if method.was_resumed(run, session) else ""
    return f"{session.load_s / 60:.1f} min{last}"


def _answers(runs: Sequence[RunFolder], page_folder: Path) -> Table:
    """Tabulate how each run answers each question of its lab."""
    rows: list[list[Inline]] = []
    for folder in runs:
        run, answers = folder.run(), told_by(folder)
        link = Link(_lab_of(run), os.path.relpath(folder.path / "report.md", page_folder))
        rows += [
            [id, QUESTIONS[id], (link, ": ", answers.in_brief(id) or "not answered by this run")]
            for id in run.lab["answers"]
        ]
    return table(("Id", "Question", "Answered here by"), rows)
