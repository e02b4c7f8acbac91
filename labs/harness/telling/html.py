"""A document as HTML: every text escaped, no tag but those written here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from labs.harness.telling import document as nodes
from labs.harness.telling.pictures import as_address

Picture = Callable[[nodes.Figure], Markup]


@dataclass(frozen=True)
class PageSection:
    """A section as a page's template places it."""

    title: str
    id: str
    body: Markup
    folded: bool


def introduction(document: nodes.Section, picture: Picture) -> Markup:
    """Return what stands before the first section."""
    return fragment((b for b in document.blocks if not isinstance(b, nodes.Section)), picture)


def sections(document: nodes.Section, picture: Picture) -> list[PageSection]:
    """The sections of a document, each with the anchor that links to it."""
    return [
        PageSection(
            title, anchor(title), fragment(block.blocks, picture, label=title), block.folded
        )
        for block in document.blocks
        if isinstance(block, nodes.Section)
        for title in (nodes.plain_text(block.title),)
    ]


def anchor(title: str) -> str:
    """The id by which a link finds the section."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def fragment(
    blocks: Iterable[nodes.Block], picture: Picture, label: str = "", level: int = 3
) -> Markup:
    """Blocks one below the other; `label` is what a screen reader calls their tables.

    Sections within have headings of this level, and their titles label their own tables.
    """
    return Markup("").join(_block(block, picture, label, level) for block in blocks)


def _block(block: nodes.Block, picture: Picture, label: str, level: int) -> Markup:
    match block:
        case nodes.Paragraph(content):
            return Markup("<p>{}</p>\n").format(inline(content))
        case nodes.Bullets(items):
            listed = Markup("").join(Markup("<li>{}</li>\n").format(inline(i)) for i in items)
            return Markup("<ul>\n{}</ul>\n").format(listed)
        case nodes.Notes(items):
            lines = Markup("\n").join(inline(nodes.Strong(item)) for item in items)
            return Markup("<blockquote>\n<p>{}</p>\n</blockquote>\n").format(lines)
        case nodes.Table():
            return _table(block, label)
        case nodes.Figure():
            return picture(block)
        case nodes.Fold(summary, blocks):
            return Markup("<details>\n<summary>{}</summary>\n{}</details>\n").format(
                inline(summary), fragment(blocks, picture, label, level)
            )
        case nodes.Section(title, blocks):  # folded or not: within a section all is in sight
            heading = Markup("<h{0}>{1}</h{0}>\n").format(level, inline(title))
            return heading + fragment(blocks, picture, nodes.plain_text(title), level + 1)


def _table(table: nodes.Table, label: str) -> Markup:
    """A wide one scrolls in a box of its own, which a keyboard can reach."""
    return Markup(
        '<div class="table" role="region" aria-label="{}" tabindex="0"><table>\n'
        "<thead>\n{}</thead>\n<tbody>\n{}</tbody>\n</table></div>\n"
    ).format(
        label, _row("th", table.header), Markup("").join(_row("td", row) for row in table.rows)
    )


def _row(tag: str, cells: Sequence[nodes.Inline]) -> Markup:
    content = Markup("").join(Markup("<{0}>{1}</{0}>\n").format(tag, inline(c)) for c in cells)
    return Markup("<tr>\n{}</tr>\n").format(content)


def inline(content: nodes.Inline) -> Markup:
    match content:
        case str():
            return escape(content)
        case nodes.Code(text):
            return Markup("<code>{}</code>").format(text)
        case nodes.Emphasis(inner):
            return Markup("<em>{}</em>").format(inline(inner))
        case nodes.Strong(inner):
            return Markup("<strong>{}</strong>").format(inline(inner))
        case nodes.Link(inner, target):
            return Markup('<a href="{}">{}</a>').format(target, inline(inner))
        case tuple():
            return Markup("").join(inline(part) for part in content)


def embedded(home: Path) -> Picture:
    """Pictures that lie in `home`, written into the page."""

    def picture(figure: nodes.Figure) -> Markup:
        path = home / figure.file
        if path.parent != home or path.suffix != ".svg" or not path.exists():
            missing = f"({nodes.plain_text(figure.caption)}: {figure.file} is missing)"
            return Markup("<p>{}</p>\n").format(missing)
        source = Markup(as_address(path.read_text()))  # it has neither quotation mark nor &
        return Markup(
            '<figure><div class="picture"><img src="{}" alt="{}"></div>'
            "<figcaption>{}</figcaption></figure>\n"
        ).format(source, nodes.plain_text(figure.caption), inline(figure.caption))

    return picture
