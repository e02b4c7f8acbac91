"""The blocks of a document that is written in Python: tables, lists, and sections of these.

What goes in is plain text, unless it is Markdown already: so a model's name, a path or an error
message can never become markup. Whole pages of sentences are templates (`reports.templates`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from labs.harness.reports import markdown
from labs.harness.reports.markdown import FOLD_END, FOLDED, Markdown, inline, plain_text
from labs.harness.reports.markdown import Inline as Inline
from labs.harness.reports.markdown import link as Link
from labs.harness.reports.markdown import parse as parse

__all__ = [
    "Figure", "Inline", "Link", "Paragraph", "Table", "bullets", "parse", "parts", "plain_text",
    "section", "table", "table_of",
]  # fmt: skip


class Paragraph(Markdown):
    def __new__(cls, content: Inline) -> Paragraph:
        return super().__new__(cls, markdown.lines(content))


class Table(Markdown):
    """A table, empty without rows; its cells can be read again."""

    header: tuple[Markdown, ...]
    rows: tuple[tuple[Markdown, ...], ...]

    def __new__(cls, header: Sequence[Inline], rows: Iterable[Sequence[Inline]]) -> Table:
        head, *body = [tuple(map(inline, row)) for row in (header, *rows)]
        if any(len(row) != len(head) for row in body):
            raise ValueError(f"a row is longer or shorter than the header {head}")
        lines = map(_row, (head, [Markdown("---")] * len(head), *body))
        made = super().__new__(cls, "\n".join(lines) if body else "")
        made.header, made.rows = head, tuple(body)
        return made

    def columns(self) -> list[tuple[Markdown, tuple[Markdown, ...]]]:
        """Each column: its heading and its cells."""
        return list(zip(self.header, zip(*self.rows, strict=True), strict=False))


def _row(cells: Sequence[Inline]) -> str:
    return f"| {' | '.join(map(markdown.cell, cells))} |"


class Figure(Markdown):
    """A picture in a file beside the document, with its caption.

    Who does not see the picture is told the first sentence of the caption in its place.
    """

    file: str

    def __new__(cls, file: str, caption: Inline) -> Figure:
        first_sentence = re.split(r"(?<=\.)\s", plain_text(caption))[0]
        words = markdown.line(first_sentence)
        picture = f"![{words}]({markdown.target(file)})\n\n{Paragraph(markdown.line(caption))}"
        made = super().__new__(cls, picture)
        made.file = file
        return made


def section(title: Inline, *blocks: Markdown | None, folded: bool = False) -> Markdown:
    """A heading and the blocks that hold anything; nothing without one of these.

    A document is the outermost section. A `folded` one is shown when the reader opens it.
    """
    inner = [_deeper(block) for block in blocks if block]
    if folded:
        inner = [Markdown(FOLDED), *inner, Markdown(FOLD_END)]
    heading = Markdown(f"# {markdown.line(title)}")
    return markdown.fragment([heading, *inner]) if any(blocks) else Markdown()


def _deeper(block: Markdown) -> Markdown:
    return Markdown(re.sub(r"^#{1,6} ", r"#\g<0>", block, flags=re.M))


def parts(of: Markdown) -> tuple[Markdown, Markdown, list[Markdown]]:
    """Take a section apart: its title, what stands before the first section in it, and these."""
    heading, _, body = of.partition("\n\n")
    higher = re.sub(r"^#(#{1,6} )", r"\1", body, flags=re.M)
    before, *inner = re.split(r"^(?=# )", higher, flags=re.M)
    sections = [Markdown(text.strip()) for text in inner]
    return Markdown(heading.removeprefix("# ")), Markdown(before.strip()), sections


def bullets(items: Iterable[Inline]) -> Markdown:
    lines = (markdown.lines(markdown.line(item)) for item in items)
    return Markdown("\n".join(f"- {line}" for line in lines))


def table(header: Sequence[Inline], rows: Iterable[Sequence[Inline]]) -> Table:
    return Table(header, rows)


def table_of(rows: Sequence[Sequence[Inline]]) -> Table:
    """A table of rows of which the first is the header; without rows an empty one."""
    header, *body = rows or ((),)
    return Table(header, body)
