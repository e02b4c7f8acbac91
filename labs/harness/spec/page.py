"""Read the folder of a lab: its words in `page.md`, its sizes in `sizes.toml`.

A page is Markdown that reads as a text. Under its title stands the question; its sections have the
headings of `SECTIONS`, and their parts headings of the third level: `### SO-4` begins an answer,
`### timing-leak: Does the cache tell ..?` a finding. Answers, findings and the captions of plots
have Jinja, which `labs.harness.reports.rendering` fills from the facts of a run; the rest has none.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from labs.harness.spec.errors import LabError

LABS = Path(__file__).parents[2]
HOW, ANSWERS, FINDINGS, PLOTS = "How it works", "Answers", "Findings", "Plots"
CLAIMS, HEADLINE = "Claims", "Headline"
LIMITS, NEXT = "What a machine can and cannot show", "What to turn next"
WORKSHEET = "Worksheet"  # of a lesson: what a reader computes
GPU = "What a GPU would change"  # of the answer to a question, by its id
SECTIONS = (HOW, WORKSHEET, ANSWERS, FINDINGS, PLOTS, CLAIMS, LIMITS, GPU, NEXT, HEADLINE)
ON = {"On a CPU": "cpu", "On a GPU": "gpu"}
TURNED_ON = {"On a GPU": ("gpu",), "On a GPU of 80 GB or more": ("gpu-80", "gpu-141")}
_ITEM = re.compile(r"`(?P<name>[^`]+)`: (?P<text>.+)")


class PageError(LabError):
    """A page is not as a page has to be; the message says which and where."""


class Part(NamedTuple):
    """A part of a section: what follows its name in the heading, and what stands under it."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """What stands under a heading: text, then parts by their names."""

    text: str = ""
    parts: Mapping[str, Part] = field(default_factory=dict)

    @property
    def items(self) -> list[str]:
        """The items of a list that is all of the text, each on one line."""
        return [" ".join(item.split()) for item in re.split(r"^- ", self.text, flags=re.M)[1:]]

    @property
    def named(self) -> dict[str, str]:
        """The texts of the items that begin with a name, by these names."""
        return {m["name"]: m["text"] for m in map(_ITEM.fullmatch, self.items) if m}


@dataclass(frozen=True)
class Page:
    """All words of a lab."""

    title: str
    question: str
    sections: Mapping[str, Section]

    def __getitem__(self, heading: str) -> Section:
        return self.sections.get(heading, Section())

    @property
    def how_it_works(self) -> list[str]:
        """The paragraphs that explain the mechanism, each on one line."""
        return [" ".join(text.split()) for text in self[HOW].text.split("\n\n") if text]

    @property
    def fields(self) -> dict[str, Any]:
        """The words that are fields of a `Lab`."""
        return {
            "title": self.title,
            "question": self.question,
            "limits": {
                ON[place]: " ".join(part.text.split()) for place, part in self[LIMITS].parts.items()
            },
            "next_knobs": tuple(self[NEXT].items),
        }

    @property
    def titles(self) -> dict[str, str]:
        """The titles of claims by their names, also of those that only some scales have."""
        parts = self[CLAIMS].parts.values()
        of_scales = {name: title for of in parts for name, title in Section(of.text).named.items()}
        return of_scales | self[CLAIMS].named

    @property
    def words_on(self) -> dict[str, dict[str, Any]]:
        """By scale, the fields that have other words there, by their paths."""
        fields: dict[str, dict[str, Any]] = {scale: {} for of in TURNED_ON.values() for scale in of}
        for place, scales in TURNED_ON.items():
            claims, knobs = (self[heading].parts.get(place) for heading in (CLAIMS, NEXT))
            named = Section(claims.text).named if claims else {}
            for scale in scales:
                fields[scale] |= {f"claims.{name}.title": title for name, title in named.items()}
                fields[scale] |= {"next_knobs": tuple(Section(knobs.text).items)} if knobs else {}
        return {scale: of for scale, of in fields.items() if of}


def folder_of(lab: str) -> Path:
    """Return the folder of the lab of that name; a lab that is not from here has none."""
    return LABS / lab.replace("-", "_")


@cache
def page_of(lab: str) -> Page | None:
    """Read the page of the lab of that name; None where it has none. Raises PageError."""
    path = folder_of(lab) / "page.md"
    return read(path.read_text(), str(path)) if path.exists() else None


def lesson(lab: str) -> list[str]:
    """Return the paragraphs that explain a lab's mechanism; none where it has no page here."""
    page = page_of(lab)
    return page.how_it_works if page else []


@cache
def sizes_of(lab: str) -> dict[str, dict[str, Any]]:
    """Read the sizes of each scale; none where the lab has no file of them."""
    path = folder_of(lab) / "sizes.toml"
    return tomllib.loads(path.read_text()) if path.exists() else {}


def read(text: str, name: str = "the page") -> Page:
    """Part a page into its sections. Raises PageError."""
    opening, *rest = re.split(r"^## (?=\S)", text, flags=re.M)
    title, _, question = opening.strip().removeprefix("# ").partition("\n")
    if not opening.startswith("# ") or not question.strip():
        raise PageError(f"{name} has to begin with `# title` and, under it, the lab's question")
    sections = dict(_section(part) for part in rest)
    if unknown := sections.keys() - set(SECTIONS):
        known = ", ".join(SECTIONS)
        raise PageError(f"{name} has a section {min(unknown)!r}; a page's sections are {known}")
    return Page(title.strip(), " ".join(question.split()), sections)


def _section(part: str) -> tuple[str, Section]:
    heading, _, text = part.partition("\n")
    first, *rest = re.split(r"^### (?=\S)", text, flags=re.M)
    return heading.strip(), Section(first.strip(), dict(_parts(rest)))


def _parts(texts: list[str]) -> Iterator[tuple[str, Part]]:
    for text in texts:
        heading, _, body = text.partition("\n")
        name, _, title = heading.strip().partition(": ")
        yield name, Part(title, body.strip())
