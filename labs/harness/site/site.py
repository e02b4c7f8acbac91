"""Write the course: a lesson a lab, every question with its answers, every machine, every run.

A lesson follows from the lab's own files: its question, its docstring, its claims, and the newest
published full run of each machine. Nothing here names a lab. Every page is a file that needs no
server; text and pictures are there without scripts.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dashboards.prometheus import WATCH_PORT
from labs import LABS
from labs.harness.analysis.computed import Summary
from labs.harness.analysis.metrics import METRICS
from labs.harness.analysis.text import (
    ceilings_text,
    claim_outcome,
    decided_text,
    point_label,
    prediction_text,
    predictions_text,
    ratio_interval,
    ratio_number,
    ratio_text,
)
from labs.harness.analysis.verdicts import AGREEMENT, Judgement
from labs.harness.derived import apart
from labs.harness.derived.lab_modules import parts_of
from labs.harness.derived.run_view import Context
from labs.harness.reports import (
    chart_data,
    computed,
    dials,
    glossary,
    html,
    planner,
    residuals,
    teaching,
    worksheets,
)
from labs.harness.reports.diagnoses import Case
from labs.harness.reports.document import Inline, Paragraph, parse
from labs.harness.reports.markdown import Markdown
from labs.harness.reports.pages import (
    LESSONS,
    PLOTLY,
    RUN_SCRIPT,
    RUN_SCRIPTS,
    STYLE,
    marks_of,
    page,
    render,
    web,
)
from labs.harness.reports.rendering import Answer, Told, told
from labs.harness.reports.replay import Replayed, replay
from labs.harness.spec.lab import Claim, Lab
from labs.harness.spec.page import lesson
from labs.harness.spec.questions import QUESTIONS, TOPICS
from labs.harness.storage import published_gpu, results
from labs.harness.storage.bounded import DamagedError
from labs.harness.storage.committed import committed_runs
from labs.harness.storage.machine_names import short_name
from labs.harness.storage.manifest import is_stale
from labs.harness.storage.newest import marks, newest_of, on_cpu
from labs.harness.storage.recorded import Run
from labs.harness.storage.results import RunFolder, all_runs, readable
from serving import atomic

RUN_PAGE = re.compile(r"\d{8}T\d{6}Z-\w+\.html")
PAGE_SCRIPT, LESSON_SCRIPT, WATCH_SCRIPT = "page.js", "lesson.js", "watch.js"
PLANNER_SCRIPT, APART_SCRIPT = "planner.js", "apart.js"
SCRIPTS = {  # a script beside the pages: the files that it is made of
    RUN_SCRIPT: RUN_SCRIPTS,
    PAGE_SCRIPT: ("page.js",),
    LESSON_SCRIPT: (
        "page.js", "plot.js", "copy.js", "guess.js", "replay.js", "worksheet.js", "blind.js",
    ),
    WATCH_SCRIPT: ("page.js", "plot.js", "replay.js"),
    APART_SCRIPT: ("page.js", "copy.js"),
    PLANNER_SCRIPT: ("page.js", "copy.js", "theory.js", "planner.js"),
}  # fmt: skip
APART = ("SA-1", "SO-7")  # questions whose lessons lead to prefill and decode apart
BY_RUN = "by-run"  # the section of forecasts that each run's own page tells
DISTANCES = (  # of a measured ratio from what was predicted, up or down: at most, class, in words
    (1.1, "off-10", "within 10%"),
    (AGREEMENT, "off-25", "within 25%"),
    (2, "off-2", "within a factor of 2"),
    (math.inf, "off-more", "further off"),
)
LIVE_PAGE = f"http://127.0.0.1:{WATCH_PORT}/user/"
NO_DISTANCE = ("off-none", "a bound, or not valid")
GUESSES = (  # from, to, and how a person would say it
    (0, 0.5, "less than half as much"),
    (0.5, 0.8, "half to four fifths"),
    (0.8, 1.25, "about the same"),
    (1.25, 2, "a quarter more, up to twice"),
    (2, 4, "two to four times"),
    (4, None, "more than four times"),
)


# ------------------------------------------------------------------------------------- the files


def shared_files() -> dict[str, str]:
    """Return the files that several pages of the course use, by their names."""
    scripts = {name: web(*parts) for name, parts in SCRIPTS.items()}
    return {PLOTLY: get_plotlyjs(), STYLE: web("page.css"), **scripts}


def course_page(template: str, *scripts: str, **fields: Any) -> str:
    """Render a page that lies beside the files it uses."""
    return render(template, scripts=dict.fromkeys(scripts, ""), root="./", **fields)


def write_site(out: Path) -> tuple[Path, dict[str, str]]:
    """Write the course, a page for each run and one copy of the library.

    Returns the index and the runs that cannot be read, each with the reason.
    """
    entries: list[Entry] = []
    left_out: dict[str, str] = {}
    for name, text in shared_files().items():
        atomic.write(out / name, text)
    runs = all_runs()
    most_requests = chart_data.REQUESTS_OF_A_SITE // max(1, len(runs))
    for folder in runs:
        href = f"{folder.place}.html"
        try:
            with readable(folder):
                text = page(folder, "../../", most_requests)
                entry = Entry(folder, folder.run(), folder.summary(), href)
        except (DamagedError, OSError) as error:
            left_out[folder.place] = str(error)
            continue
        atomic.write(out / href, text)
        entries.append(entry)
    course = Course(entries)
    for item in course.lessons:
        atomic.write(out / item.href, course.lesson_page(item))
    _remove_stale(out, {out / e.href for e in entries} | {out / i.href for i in course.lessons})
    for name, text in course.pages().items():
        atomic.write(out / name, text)
    return out / "index.html", left_out


def write_lesson(out: Path, runs: Sequence[RunFolder], lab: str) -> Path:
    """Write the lesson of one lab alone, from these runs; its links lead to pages not written."""
    course = Course([Entry(f, f.run(), f.summary(), f"{f.place}.html") for f in runs])
    item = next(item for item in course.lessons if item.lab.name == lab)
    for name, text in shared_files().items():
        atomic.write(out / name, text)
    return atomic.write(out / item.href, course.lesson_page(item))


def _remove_stale(out: Path, pages: Set[Path]) -> None:
    """Remove pages of runs that were removed or can no longer be read, and of labs that are gone"""
    runs = [path for path in out.glob("*/*/*.html") if RUN_PAGE.fullmatch(path.name)]
    for path in (*runs, *out.glob(f"{LESSONS}/*.html")):
        if path not in pages:
            path.unlink()


# ------------------------------------------------------------------------------------- what is told


@dataclass(frozen=True)
class Entry:
    """Holds a run and the address of its page."""

    folder: RunFolder
    run: Run
    summary: Summary
    href: str

    @property
    def lab(self) -> str:
        return str(self.run.lab["name"])

    @property
    def machine(self) -> str:
        return self.run.machine.describe()

    @cached_property
    def told(self) -> Told:
        """What the lab's page says of the run."""
        return told(self.run, self.run.rebuilt_lab(), self.summary)

    @cached_property
    def stale(self) -> bool:
        """Whether the lab's settings have changed since the run."""
        return is_stale(self.run)

    @property
    def short_name(self) -> str:
        """The machine as tables name it, with the run's marks."""
        return short_name(self.run.machine) + marks(self.run)

    @property
    def marked_name(self) -> str:
        """The machine, with the run's marks where a quick one stands in for a full one."""
        return self.machine + (marks(self.run) if self.run.quick else "")

    @property
    def where(self) -> str:
        """The same, and whether the lab was another one then."""
        return self.marked_name + " (the lab's settings have changed since)" * self.stale

    @property
    def vllm(self) -> str:
        return self.run.environment.vllm or "–"

    @property
    def marks(self) -> list[str]:
        return marks_of(self.run, self.folder.complete) + ["settings changed since"] * self.stale

    @property
    def decided(self) -> str:
        """Say how many claims are decided."""
        return decided_text(self.summary.judgements)

    @property
    def predictions(self) -> str:
        """Say what became of the predictions."""
        return predictions_text(self.summary.judgements)

    @property
    def outcomes(self) -> str:
        """Say how many verdicts of each kind there are."""
        count = Counter(j.outcome for j in self.summary.judgements)
        return ", ".join(f"{n} {outcome}" for outcome, n in count.items()) or "–"

    def of_claim(self, claim: str) -> Judgement | None:
        """Find the first judgement of a claim that has a measured ratio, or the first of all."""
        judgements = [j for j in self.summary.judgements if j.claim == claim]
        return next((j for j in judgements if j.ratio), judgements[0] if judgements else None)


@dataclass(frozen=True)
class Cell:
    """A verdict as a cell of a table: its words, and the classes that colour it."""

    kind: str
    off: str  # the class of its distance from what was predicted
    verdict: str
    measured: str
    predicted: str
    share: str  # measured / predicted; "" where that tells nothing
    machine: str
    href: str

    @classmethod
    def of(cls, entry: Entry, judgement: Judgement) -> Cell:
        interval = ratio_interval(judgement)
        measured = ratio_text(judgement) + (f" ({interval})" if interval != "–" else "")
        predicted = f"{prediction_text(judgement.prediction)}: {claim_outcome(judgement)}"
        kind = judgement.outcome.replace(" ", "-")
        share = _share(judgement)
        return cls(
            kind, _distance(share), judgement.outcome, measured, predicted,
            f"{share:.2f}x" if share else "", entry.machine, entry.href,
        )  # fmt: skip


def _share(of: Judgement) -> float | None:
    """Measured / predicted; None for a bound, and where the measurement is not valid."""
    comparable = of.outcome != "not valid" and of.prediction.kind == "point" and of.prediction.value
    return of.ratio.value / of.prediction.value if comparable and of.ratio else None


def _distance(share: float | None) -> str:
    if not share:
        return NO_DISTANCE[0]
    return next(name for most, name, _ in DISTANCES if max(share, 1 / share) <= most)


@dataclass(frozen=True)
class Row:
    """A claim at one pair of points, with its cell on each machine; None where it was not run."""

    title: Inline
    where: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Lesson:
    """Holds a lab, its place in the course, and the newest published full run of each machine.

    On a GPU without one a quick run stands in.
    """

    lab: Lab
    place: int
    entries: tuple[Entry, ...]

    @property
    def quick(self) -> bool:
        """Whether a quick run stands in for a full one."""
        return any(entry.run.quick for entry in self.entries)

    @property
    def href(self) -> str:
        return f"{LESSONS}/{self.lab.name}.html"

    @property
    def claim(self) -> Claim:
        """The claim whose ratio the reader guesses: the lab's headline, or its first."""
        headline = parts_of(self.lab.name).headline
        claims = {c.name: c for c in self.lab.claims}
        return claims.get(headline.claim if headline else "", self.lab.claims[0])

    @property
    def asked(self) -> str:
        """Ask for the guess in words that do not give the answer away, as a claim's title does."""
        headline = parts_of(self.lab.name).headline
        if headline and headline.claim == self.claim.name:
            return f"{headline.done}: how does that change {headline.figure}?"
        what, _, which = METRICS[self.claim.metric].title.partition(", ")  # `TPOT, mean`
        sides = " instead of ".join(
            arm.variant or arm.workload or str(arm.load)
            for arm in (self.claim.treatment, self.claim.baseline)
        )
        return f"{sides}: how does that change the {f'{which} {what}'.strip()}?"

    @property
    def guessed(self) -> list[tuple[Entry, Judgement]]:
        """The runs that measured the ratio which is guessed; those not valid only among such."""
        pairs = ((e, e.of_claim(self.claim.name)) for e in self.entries)
        measured = [(e, j) for e, j in pairs if j and j.ratio]
        return [(e, j) for e, j in measured if j.outcome != "not valid"] or measured

    @cached_property
    def predicted(self) -> list[tuple[str, float]]:
        """What is predicted of the guess on cards by their datasheets, where no run measured it."""
        return [] if self.guessed else dials.predicted(self.lab, self.claim.name)

    def revealed(self, entry: Entry, judgement: Judgement) -> str:
        """Say what came of the guessed claim in a run."""
        return (
            f"{ratio_text(judgement)} (95% interval {ratio_interval(judgement)}):"
            f" {judgement.outcome}. Predicted before the engine started:"
            f" {ratio_number(judgement.prediction.value)}x, {claim_outcome(judgement)}."
        )

    @cached_property
    def replayed(self) -> tuple[Entry, list[Replayed]] | None:
        """A trial of each side of the guessed claim, from the newest run that has it."""
        for entry, judgement in sorted(self.guessed, key=lambda g: g[0].run.started_at)[::-1]:
            if panels := replay(entry.folder, (judgement.baseline, judgement.treatment)):
                return entry, panels
        return None

    @property
    def cache(self) -> str:
        """How the replay stands to the KV cache: `shown`, no reading in its seconds, or `older`."""
        caches = [panel.cache for panel in self.replayed[1]] if self.replayed else []
        if any(cache and cache.shares for cache in caches):
            return "shown"
        return "missed" if any(caches) else "older"

    @cached_property
    def cases(self) -> list[Case]:
        """Trials whose cause the reader names, on every machine, in an order that tells nothing."""
        blind = parts_of(self.lab.name).blind
        cases = (
            Case.of(t, entry.machine) for entry in self.entries for t in blind(_context(entry))
        )
        return sorted(cases, key=lambda case: [*case.figures.values()])

    @property
    def newest(self) -> Entry | None:
        return max(self.entries, key=lambda entry: entry.run.started_at, default=None)

    @cached_property
    def worksheets(self) -> list[worksheets.Worksheet]:
        """What a reader computes: for the machine of the newest run, and for a card."""
        measured = [dials.Hardware.of(self.newest.run)] if self.newest else []
        card = [of for of in dials.cards_of(self.lab) if of.name in computed.CARD]
        return worksheets.worksheets(self.lab, measured + card)

    @property
    def taught(self) -> teaching.Taught:
        """What a teacher plans with."""
        run, session = (
            (self.newest.run, self.newest.folder.session()) if self.newest else (None, None)
        )
        return teaching.Taught.of(self.lab.name, self.worksheets, run, session)

    def rows(self) -> Iterator[Row]:
        """Every claim of the runs, machine beside machine."""
        titles = {claim.name: claim.title for claim in self.lab.claims}
        by_claim: dict[tuple[str, str], dict[int, Judgement]] = {}
        for column, entry in enumerate(self.entries):
            lab = entry.run.rebuilt_lab()
            for j in entry.summary.judgements:
                pair = f"{point_label(j.treatment, lab)} / {point_label(j.baseline, lab)}"
                by_claim.setdefault((j.claim, pair), {})[column] = j
        for (claim, pair), by_column in by_claim.items():
            first = next(iter(by_column.values()))
            cells = tuple(
                Cell.of(entry, by_column[column]) if column in by_column else None
                for column, entry in enumerate(self.entries)
            )
            where = f"{METRICS[first.metric].title}: {pair}"
            yield Row(parse(titles.get(claim, first.title)), where, cells)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """What to turn next: commands to copy, each with what to watch."""
        commands = [(f"make lab-{self.lab.name}", "runs the lab on your machine")]
        for knob in self.lab.at("cpu", quick=False).next_knobs:
            setting, explanation = _split(knob)
            commands.append((f"make lab-{self.lab.name} {setting}", explanation))
        return commands


def _context(entry: Entry) -> Context:
    """The view of a run for whatever reads its trials, and none of its figures."""
    return Context(entry.folder, entry.run, entry.run.rebuilt_lab(), entry.run.points(), {})


def _split(knob: str) -> tuple[str, str]:
    """Take `SET="a=1" tells what` apart; a shell's own rules say where the setting ends."""
    words = knob.split(" ")
    for end in range(1, len(words) + 1):
        try:
            shlex.split(" ".join(words[:end]))
        except ValueError:
            continue  # a quote is still open
        return " ".join(words[:end]), " ".join(words[end:])
    return knob, ""


@dataclass(frozen=True)
class RunAnswer:
    """An answer to a question from one run."""

    answer: Answer
    lesson: Lesson
    entry: Entry

    @property
    def body(self) -> Markup:
        return html.fragment([self.answer.whole], html.embedded(Path()))


SENTENCE = re.compile(r"(?<=\.) (?=[A-Z*`])")


@dataclass(frozen=True)
class LabAnswer:
    """What a lab answers to a question: what all of its machines say alike, and a row for each."""

    mechanism: Markdown
    rows: Sequence[tuple[RunAnswer, Markdown]]

    @classmethod
    def of(cls, answers: Sequence[RunAnswer]) -> LabAnswer:
        """Take what the brief answers begin with alike, in whole sentences, out of each of them."""
        said = [SENTENCE.split(of.answer.brief) for of in answers]
        alike = 0
        while len(said) > 1 and all(
            len(one) > alike + 1 and one[alike] == said[0][alike] for one in said
        ):
            alike += 1
        rows = [Markdown(" ".join(one[alike:])) for one in said]
        return cls(Markdown(" ".join(said[0][:alike])), list(zip(answers, rows, strict=True)))

    @property
    def lesson(self) -> Lesson:
        return self.rows[0][0].lesson

    @property
    def depth(self) -> Markup:
        """What stands behind the fold of the first machine's answer."""
        return html.fragment([self.rows[0][0].answer.depth], html.embedded(Path()))


@dataclass(frozen=True)
class Asked:
    """Holds a question, the answers of runs to it, and the lessons that ask it."""

    id: str
    question: str
    answers: Sequence[RunAnswer]
    asking: Sequence[Lesson]

    @property
    def by_lab(self) -> list[LabAnswer]:
        labs = dict.fromkeys(answer.lesson.lab.name for answer in self.answers)
        return [LabAnswer.of([a for a in self.answers if a.lesson.lab.name == lab]) for lab in labs]

    @property
    def kind(self) -> str:
        """How it is answered: measured, arithmetic, forecast, or not yet."""
        return computed.kind_of(self.id, (answer.lesson.lab.name for answer in self.answers))

    @property
    def computed(self) -> Markup:
        """The answer that needs no run, where there is one."""
        if not (answer := computed.computed(self.id)):
            return Markup()
        brief = Paragraph(computed.answer_with_command(answer))
        return html.fragment([brief, answer.answer.depth], html.embedded(Path()))


class Course:
    """Everything that the site's pages tell beside the runs' own."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        on_file = {folder.path for folder in committed_runs()}
        self.published = {e.folder.path: e for e in entries if e.folder.path in on_file}
        newest = newest_of(e.folder for e in self.published.values())
        self.newest = [self.published[folder.path] for folder in newest]
        self.lessons = [
            Lesson(lab, place, tuple(e for e in self.newest if e.lab == name))
            for place, (name, lab) in enumerate(LABS.items(), 1)
        ]

    def pages(self) -> dict[str, str]:
        """Render the pages of the whole, by their names."""
        machines = {
            e.machine: e for e in sorted(self.entries, key=lambda entry: on_cpu(entry.folder))
        }
        return {
            "index.html": self.index_page(),
            "questions.html": course_page(
                "questions.html",
                PAGE_SCRIPT,
                topics=self.topics(),
                machines=sorted({(e.short_name, e.machine) for e in self.newest}),
                show=html.inline,
                parsed=parse,
            ),
            "machines.html": course_page(
                "machines.html",
                PAGE_SCRIPT,
                entries=self.entries[::-1],
                machines=[
                    (
                        name,
                        ceilings_text(e.run.ceilings),
                        sum(o.machine == name for o in self.entries),
                    )
                    for name, e in machines.items()
                ],
                labs=sorted({e.lab for e in self.entries}),
                lessons=self.lessons,
                live_page=LIVE_PAGE,
                distances=[*(of[1:] for of in DISTANCES), NO_DISTANCE],
                show=html.inline,
                parsed=parse,
            ),
            "planner.html": self.planner_page(),
            **({"apart.html": self.apart_page(self.apart)} if self.apart else {}),
            "teach.html": course_page(
                "teach.html",
                PAGE_SCRIPT,
                lessons=[(item, item.taught) for item in self.lessons],
                apart=self.apart,
                words=teaching.WORDS_A_MINUTE,
                question_min=teaching.QUESTION_MIN,
                show=html.inline,
            ),
            "forecasts.html": self.forecasts_page(),
            "glossary.html": course_page(
                "glossary.html",
                PAGE_SCRIPT,
                sections=html.sections(glossary.document(), html.embedded(Path())),
            ),
        }

    def index_page(self) -> str:
        """Render the index; its first picture is a replay in which several requests run at once."""
        replays = ((item, item.replayed[1]) for item in self.lessons if item.replayed)
        several = ((item, panels) for item, panels in replays if all(p.places > 1 for p in panels))
        watched, panels = next(several, (None, []))
        return course_page(
            "index.html",
            WATCH_SCRIPT if watched else PAGE_SCRIPT,
            course=self,
            blind=next((item for item in self.lessons if item.cases), None),
            watched=watched,
            data={"replay": [panel.times for panel in panels]},
            show=html.inline,
            parsed=parse,
        )

    def forecasts_page(self) -> str:
        """Render what was predicted beside what came, of every published full run."""
        published = [e.folder for e in self.published.values()]
        document = residuals.page(residuals.Scores.of(published), self.page_of)
        no_picture = html.embedded(Path())  # the document has none
        others = html.embedded(results.RESULTS)(
            published_gpu.PICTURE, "Figures over the rate of arrivals", Markup()
        )
        return course_page(
            "forecasts.html",
            PAGE_SCRIPT,
            intro=html.introduction(document, no_picture),
            sections=[of for of in html.sections(document, no_picture) if of.id != BY_RUN],
            others=others if published_gpu.on_file() else "",
        )

    def page_of(self, folder: RunFolder) -> str:
        """Return the address of a published run's page."""
        return quote(self.published[folder.path].href)

    def planner_page(self) -> str:
        """Render the planner; each figure links to the first lesson that shows it."""
        lessons = {
            id: (item.lab.title, item.href)
            for item in reversed(self.lessons)
            for id in item.lab.answers
        }
        data = planner.data([e.run for e in self.newest], lessons)
        fits = html.fragment([planner.what_fits()], html.embedded(Path()), "What fits which card")
        return course_page("planner.html", PLANNER_SCRIPT, data=data, fits=fits)

    @property
    def apart(self) -> Lab | None:
        """The lab whose question prefill and decode apart answer."""
        return next((lab for lab in LABS.values() if APART[0] in lab.answers), None)

    def apart_page(self, lab: Lab) -> str:
        """Render the lesson on prefill and decode apart, beside that lab's."""
        href = next((item.href for item in self.lessons if item.lab.name == lab.name), "index.html")
        return course_page(
            "apart.html",
            APART_SCRIPT,
            lesson={"lab": lab, "href": href},
            leading=[of for of in self.lessons if not {*APART}.isdisjoint(of.lab.answers)],
            of=apart.apart(),
        )

    def lesson_page(self, item: Lesson) -> str:
        """Render a lab's lesson."""
        neighbours = {other.place: other for other in self.lessons}
        paragraphs = [html.inline(parse(text)) for text in lesson(item.lab.name)]
        return render(
            "lesson.html",
            scripts={LESSON_SCRIPT: ""},  # a file beside the index
            root="../",
            lesson=item,
            lessons=len(self.lessons),
            before=neighbours.get(item.place - 1),
            after=neighbours.get(item.place + 1),
            paragraphs=paragraphs,
            leads_apart=self.apart and not {*APART}.isdisjoint(item.lab.answers),
            answers=self.answers_of(item),
            guesses=GUESSES,
            show=html.inline,
            parsed=parse,
            data=self.data_of(item),
        )

    def data_of(self, item: Lesson) -> dict[str, Any]:
        """Gather what the scripts of a lesson need."""
        replayed = item.replayed
        return {
            "measured": [
                {"machine": e.marked_name, "ratio": j.ratio.value}
                for e, j in item.guessed
                if j.ratio
            ],
            "foretold": [{"machine": name, "ratio": ratio} for name, ratio in item.predicted],
            "replay": [panel.times for panel in replayed[1]] if replayed else [],
        }

    def answers_of(self, item: Lesson) -> list[tuple[str, str, list[RunAnswer]]]:
        """Give each question of a lesson with its answers."""
        return [(id, QUESTIONS[id], self.answers(id, item)) for id in item.lab.answers]

    def answers(self, id: str, of: Lesson) -> list[RunAnswer]:
        """Give the answers of a lesson's runs to a question, each from its own run."""
        return [RunAnswer(answer, of, e) for e in of.entries if (answer := e.told.answers.get(id))]

    def topics(self) -> list[tuple[str, list[Asked]]]:
        """Give every question under its topic: its answers, and the lessons that ask it."""
        by_topic: dict[str, list[Asked]] = {topic: [] for topic in TOPICS.values()}
        for id, question in QUESTIONS.items():
            asking = [item for item in self.lessons if id in item.lab.answers]
            answers = [a for item in asking for a in self.answers(id, item)]
            by_topic[TOPICS[id.partition("-")[0]]].append(Asked(id, question, answers, asking))
        return list(by_topic.items())
