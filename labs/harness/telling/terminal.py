"""A document on a terminal, by rich, and the console that shows it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any, Literal

import rich.table
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.text import Text

from labs.harness.telling import document as nodes
from labs.harness.telling.visible import visible

INDENT = "  "
UNREAD = (
    "error: what read the output has ended, and so does this command; a run keeps its finished"
    " trials, and RESUME=1 continues from there"
)


class PlainConsole(Console):
    """A console that leaves out of all text what `labs.harness.telling.visible` does.

    It draws nothing in the place of a text such as `:x:`, and colours no numbers or paths.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """End the program, as rich does, and say why where that can still be read."""
        with contextlib.suppress(OSError):
            print(UNREAD, file=sys.stderr)
        super().on_broken_pipe()

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does; the codes that rich itself adds are no text, and stay."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def show(console: Console, block: nodes.Block) -> None:
    """Print a block with all that stands under it; pictures and folds are for pages alone."""
    match block:
        case nodes.Section(title, blocks):
            console.print(Text.assemble("\n", (text(title).plain, "bold")))
            for inner in blocks:
                show(console, inner)
        case nodes.Table():
            console.print(_table(block))
        case nodes.Paragraph(content):
            _sentence(console, content)
        case nodes.Bullets(items):
            for item in items:
                _sentence(console, item)
        case nodes.Notes(items):
            for item in items:
                console.print(text(item), style="bold yellow")
        case nodes.Figure() | nodes.Fold():
            pass


def _sentence(console: Console, content: nodes.Inline) -> None:
    """Indented; where nobody watches it stays one line, so that it can be searched."""
    if console.is_terminal:
        console.print(Padding(text(content), (0, 0, 0, len(INDENT))))
    else:
        console.print(Text.assemble(INDENT, text(content)), soft_wrap=True)


def _table(table: nodes.Table) -> rich.table.Table:
    """The first column names the row; figures stand to the right."""
    rich_table = rich.table.Table()
    for place, head in enumerate(table.header):
        justify: Literal["left", "right"] = "right" if place else "left"
        rich_table.add_column(text(head), no_wrap=not place, justify=justify, overflow="fold")
    for row in table.rows:
        rich_table.add_row(*(text(cell) for cell in row))
    return rich_table


def text(content: nodes.Inline) -> Text:
    """Styled text; of a link only its words are shown."""
    match content:
        case str():
            return Text(visible(content))  # here too, as they count in a column's width
        case nodes.Code(code):
            return text(f"`{code}`")
        case nodes.Emphasis(inner):
            return _styled(inner, "italic")
        case nodes.Strong(inner):
            return _styled(inner, "bold")
        case nodes.Link(inner):
            return text(inner)
        case tuple():
            return Text.assemble(*(text(part) for part in content))


def _styled(content: nodes.Inline, style: str) -> Text:
    styled = text(content)
    styled.stylize(style)
    return styled
