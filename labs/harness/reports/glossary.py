"""Read the glossary of the documentation, so that the site has the same words."""

from __future__ import annotations

import re

from labs.harness.reports.document import parse, section, table
from labs.harness.reports.markdown import Markdown
from serving.places import DOCS

PAGE = DOCS / "glossary.md"
HEADING = re.compile(r"^## ", re.MULTILINE)
ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| `[^|`]+` \|$", re.MULTILINE)


def document() -> Markdown:
    """Build the glossary: a section a part of the page, each with its words and their meanings."""
    _, *parts = HEADING.split(PAGE.read_text())
    return section("Glossary", *(_part(*text.split("\n", 1)) for text in parts))


def _part(title: str, text: str) -> Markdown:
    rows = ([parse(word), parse(meaning)] for word, meaning in ROW.findall(text))
    return section(title, table(("Word", "What it means"), rows))
