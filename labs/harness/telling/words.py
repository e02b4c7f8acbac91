"""Fill a lab's page with the facts of a run: its answers, its findings, the captions of its plots.

A page says figures and compares none. It reads the lab's facts by the names of their fields, the
ratio of a claim by `claim("name")`, and the name of a point by `label(key)`. A quantity that is
missing is told in one way, wherever it stands: a cell of a table shows a dash, and a paragraph or
an item of a list that needs it is left out. An answer of which nothing is left before its fold is
none, and says why.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from labs.harness.facts.context import ratio_of_claim
from labs.harness.facts.parts import kept, parts_of
from labs.harness.filing.results import Run, RunFolder, Summary
from labs.harness.judging.quantity import Quantity
from labs.harness.judging.text import number, point_label
from labs.harness.judging.validity import SERVER_BUSY
from labs.harness.page import ANSWERS, FINDINGS, LABS, PLOTS, Page, PageError, page_of
from labs.harness.spec import Lab
from labs.harness.telling import document, markdown
from labs.harness.telling.document import Block, Inline, Paragraph, parse

MISSING, END = "\ue000", "\ue001"  # around why a quantity is missing; no font has these
_RESERVED = dict.fromkeys(map(ord, (MISSING, END)))
_WHY = re.compile(f"{MISSING}(.*?){END}", re.S)
_EMPTY_TABLE = re.compile(r"\|[^\n]*\n\|[-| :]+\|")
_EMPTY_FOLD = re.compile(r"<details>\s*<summary>[^\n]*</summary>\s*</details>")
SHARED = LABS / "harness" / "facts"  # what the pages of several labs include
FOLD = "<details>"
NOTHING = "Nothing was measured for this."
OLD = "its summary is from before the lab had these facts: `make report RUN=..` computes them"


@dataclass(frozen=True)
class ToldFinding:
    """A conclusion beyond the claims, in words; `passed` is None for one that cannot fail."""

    name: str
    title: str
    blocks: tuple[Block, ...]
    passed: bool | None


@dataclass(frozen=True)
class Told:
    """What a run says: answers by their question's id, and why it has none of the others."""

    answers: Mapping[str, tuple[Block, ...]]
    unanswered: Mapping[str, str]
    findings: Sequence[ToldFinding]
    captions: Mapping[str, Inline]  # of the lab's own plots

    def in_brief(self, id: str) -> Inline | None:
        """What stands before an answer's fold; None where the run does not answer the question."""
        told = itertools.takewhile(lambda b: isinstance(b, Paragraph), self.answers.get(id, ()))
        return document.joined(told, " ") or None


def told_by(folder: RunFolder) -> Told:
    """Tell a run on file from its summary."""
    run = folder.run()
    return told(run, run.rebuilt_lab(), folder.summary())


def told(run: Run, lab: Lab, summary: Summary) -> Told:
    """Tell a run from its summary."""
    page, facts = page_of(lab.name), kept(lab.name, summary.facts)
    if page is None:
        return Told({}, {}, [], {})
    if facts is None and parts_of(lab.name).facts:
        return Told({}, dict.fromkeys(lab.answers, OLD), [], {})
    fill = _Filling(page, _known(run, lab, summary, facts))
    limited = _limited_by_server(run, summary)
    answers, unanswered = dict[str, tuple[Block, ...]](), dict[str, str]()
    for id in () if run.aa else lab.answers:  # an engine beside its twin answers nothing
        text, why = fill(ANSWERS, id)
        if text.partition(FOLD)[0].strip():
            answers[id] = (*document.read(text), *limited)
        else:
            unanswered[id] = why
    findings = [
        ToldFinding(
            name,
            page[FINDINGS].parts[name].title,
            document.read(fill(FINDINGS, name)[0]) or (Paragraph(NOTHING),),
            getattr(getattr(facts, name.replace("-", "_"), None), "passed", None),
        )
        for name in lab.findings
        if name in page[FINDINGS].parts
    ]
    captions = {name: parse(" ".join(fill(PLOTS, name)[0].split())) for name in page[PLOTS].parts}
    return Told(answers, unanswered, findings, captions)


def _known(run: Run, lab: Lab, summary: Summary, facts: Any) -> dict[str, Any]:
    """Return what a page may name."""
    return {
        **{name: getattr(facts, name) for name in _names(facts)},
        "claim": lambda name: ratio_of_claim(summary, name),
        "label": lambda key: point_label(key, lab),
        "on_gpu": run.machine.kind == "gpu",
        "was_forecast": bool(summary.in_virtual_time),
    }


def _names(facts: Any) -> list[str]:
    """Return the names of the fields and properties of a lab's facts."""
    properties = [n for n, of in vars(type(facts)).items() if isinstance(of, property)]
    return [f.name for f in fields(facts)] + properties if facts else []


@dataclass(frozen=True)
class _Filling:
    """Fills parts of a page."""

    page: Page
    known: Mapping[str, Any]

    def __call__(self, section: str, part: str) -> tuple[str, str]:
        """Return a part's text without what lacks a quantity, and why the first of these does.

        The part of a page that is not there is empty.
        """
        parts = self.page[section].parts
        if part not in parts:
            return "", ""
        try:
            filled = _templates().from_string(parts[part].text).render(self.known)
        except (jinja2.TemplateError, TypeError) as error:
            raise PageError(f"{self.page.title}, {section}, {part}: {error}") from error
        why = _WHY.search(filled)
        blocks = (_without_missing(block) for block in re.split(r"\n\s*\n", filled))
        text = "\n\n".join(block for block in blocks if block)
        return _EMPTY_FOLD.sub("", text).strip(), why[1] if why else ""


def _without_missing(block: str) -> str:
    """Leave out of a block what lacks a quantity; nothing may be left of it."""
    if block.startswith("|"):
        table = _WHY.sub("–", block).strip()
        return "" if _EMPTY_TABLE.fullmatch(table) else table
    items = re.split(r"\n(?=- )", block.strip("\n"))
    return "\n".join(item for item in items if MISSING not in item).strip()


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(SHARED), autoescape=True, finalize=_shown,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def shared(name: str, **known: Any) -> Inline:
    """Fill by itself what the pages of labs include."""
    return parse(" ".join(_templates().get_template(name).render(known).split()))


def _shown(value: Any) -> Any:
    """Write a value into a page: nothing in it is markup unless the page itself wrote it."""
    match value:
        case Quantity(value=None, why=why):
            return Markup(f"{MISSING}{markdown.escaped(why)}{END}")
        case None:
            return Markup(f"{MISSING}not measured{END}")
        case bool():
            raise TypeError("a page branches on yes and no, and does not print them")
        case int():
            return f"{value:,}"
        case float():
            return number(value)
        case Quantity():
            return Markup(value)
        case _ if hasattr(value, "__html__") or isinstance(value, jinja2.Undefined):
            return value
        case _:
            return Markup(markdown.escaped(str(value).translate(_RESERVED)))


def _limited_by_server(run: Run, summary: Summary) -> tuple[Block, ...]:
    """Say behind an answer from a GPU at how many points its figures may be the API server's."""
    busy = {caveat.point for caveat in summary.caveats if caveat.name == SERVER_BUSY}
    if run.machine.kind != "gpu" or not busy:
        return ()
    text = (
        f"But at {len(busy)} of {len(summary.measurements)} points vLLM's API server was at its"
        " limit: what is said of these may be its limit and not the engine's (*Validity* in the"
        " report names them)."
    )
    return (Paragraph(parse(text)),)
