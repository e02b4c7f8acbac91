"""Fill templates of Markdown: the pages of labs, reports, and what a terminal shows at the end.

Python computes what a template names, and a template computes nothing. What it names is escaped, so
that nothing in it is markup, unless it is Markdown already; `notation` reads what a lab's author
wrote with marks, and `code` writes code. A quantity that is missing is told in one way: a cell of a
table shows a dash, and a paragraph or an item of a list that needs it is left out. So is a heading,
or a fold, of which nothing is left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from labs.harness.analysis.quantity import Quantity
from labs.harness.analysis.text import counted, number
from labs.harness.reports.markdown import (
    FOLD_END,
    FOLD_START,
    Markdown,
    code,
    escaped,
    link,
    parse,
    strong,
)
from labs.harness.spec.page import LABS

SHARED = Path(__file__).parent / "partials"  # what the pages of several labs include
COMPARING = LABS / "harness" / "site" / "pages"  # the pages of results/ and README.md
FOLDERS = (Path(__file__).parent / "templates", SHARED, COMPARING)
MISSING, END = "\ue000", "\ue001"  # around why a quantity is missing; no font has these
_RESERVED = dict.fromkeys(map(ord, (MISSING, END)))
_WHY = re.compile(f"{MISSING}(.*?){END}", re.S)
_EMPTY_TABLE = re.compile(r"\|[^\n]*\n\|[-| :]+\|")
_LINES_STAY = ("|", ">", "<details>", FOLD_END)  # what a block begins with whose lines are kept


class Filled(NamedTuple):
    """What a template says, and why the first thing that it lacks is missing."""

    text: Markdown
    why: str


def filled(name: str, **known: Any) -> Markdown:
    """Fill the template of that name."""
    return _told(_environment().get_template(name).render(known)).text


def filled_text(template: str, known: Mapping[str, Any]) -> Filled:
    """Fill a template that is given as text. Raises jinja2.TemplateError."""
    return _told(_environment().from_string(template).render(known))


def _told(rendered: str) -> Filled:
    why = _WHY.search(rendered)
    blocks = (_without_missing(block) for block in re.split(r"\n\s*\n", rendered))
    kept = _without_empty([_on_one_line(block) for block in blocks if block])
    return Filled(Markdown("\n\n".join(kept)), why[1] if why else "")


def _without_missing(block: str) -> str:
    """Leave out of a block what lacks a quantity; nothing may be left of it."""
    block = block.strip()
    if block.startswith("|"):
        table = _WHY.sub("–", block)
        return "" if _EMPTY_TABLE.fullmatch(table) else table
    items = re.split(r"\n(?=- )", block)
    return "\n".join(item for item in items if MISSING not in item)


def _on_one_line(block: str) -> str:
    """Write a paragraph, or an item of a list, on one line each."""
    if block.startswith(_LINES_STAY):
        return "\n".join(line.strip() for line in block.splitlines())
    return "\n".join(" ".join(item.split()) for item in re.split(r"\n(?=- )", block))


def _without_empty(blocks: Sequence[str]) -> list[str]:
    """Leave out folds and headings under which nothing stands."""
    kept: list[str] = []
    for block in [*blocks, ""]:
        if block.startswith("- ") and kept and kept[-1].startswith("- "):
            kept[-1] += f"\n{block}"  # one list, whatever it was filled from
            continue
        if block == FOLD_END and FOLD_START.fullmatch(kept[-1]):
            kept.pop()
            continue
        while kept and _level(kept[-1]) and (not block or 0 < _level(block) <= _level(kept[-1])):
            kept.pop()
        kept.append(block)
    return kept[:-1]


def _level(block: str) -> int:
    """The level of a heading; 0 of anything else."""
    return len(block) - len(block.lstrip("#")) if re.match(r"#{1,6} ", block) else 0


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDERS),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "code": code,
        "counted": counted,
        "in_unit": number,
        "link": link,
        "gb": lambda of_bytes: f"{of_bytes / 1e9:.1f} GB",
        "notation": parse,
        "shown": format,
        "strong": strong,
    }
    return environment


def _shown(value: Any) -> Any:
    """Write a value into a page: nothing in it is markup unless the page itself wrote it."""
    match value:
        case Quantity(value=None, why=why):
            return Markup(f"{MISSING}{escaped(why)}{END}")
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
            return Markup(escaped(str(value).translate(_RESERVED)))
