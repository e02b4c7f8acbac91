"""A document on a terminal, by rich."""

from __future__ import annotations

from typing import Literal

import rich.table
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from labs.telling.document import (
    Block,
    Bullets,
    Code,
    Emphasis,
    Figure,
    Inline,
    Link,
    Notes,
    Paragraph,
    Section,
    Strong,
    Table,
)

INDENT = "  "


def show(console: Console, block: Block) -> None:
    """Print a block with all that stands under it; pictures are for pages, not for terminals."""
    match block:
        case Section(title, blocks):
            console.print(Text.assemble("\n", (text(title).plain, "bold")))
            for inner in blocks:
                show(console, inner)
        case Table():
            console.print(_table(block))
        case Paragraph(content):
            _sentence(console, content)
        case Bullets(items):
            for item in items:
                _sentence(console, item)
        case Notes(items):
            for item in items:
                console.print(text(item), style="bold yellow")
        case Figure():
            pass


def _sentence(console: Console, content: Inline) -> None:
    """Indented; where nobody watches it stays one line, so that it can be searched."""
    if console.is_terminal:
        console.print(Padding(text(content), (0, 0, 0, len(INDENT))))
    else:
        console.print(Text.assemble(INDENT, text(content)), soft_wrap=True)


def _table(table: Table) -> rich.table.Table:
    """The first column names the row; figures stand to the right."""
    shown = rich.table.Table()
    for place, head in enumerate(table.header):
        justify: Literal["left", "right"] = "right" if place else "left"
        shown.add_column(text(head), no_wrap=not place, justify=justify, overflow="fold")
    for row in table.rows:
        shown.add_row(*(text(cell) for cell in row))
    return shown


def text(content: Inline) -> Text:
    """Styled text; of a link only its words are shown."""
    match content:
        case str():
            return Text(content)
        case Code(code):
            return Text(f"`{code}`")
        case Emphasis(inner):
            return _styled(inner, "italic")
        case Strong(inner):
            return _styled(inner, "bold")
        case Link(inner):
            return text(inner)
        case tuple():
            return Text.assemble(*(text(part) for part in content))


def _styled(content: Inline, style: str) -> Text:
    styled = text(content)
    styled.stylize(style)
    return styled
