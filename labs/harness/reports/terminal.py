"""A document's Markdown on a terminal, by rich, and the console that shows it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import rich.box
import rich.table
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.text import Text

from labs.harness.reports import markdown
from labs.harness.reports.markdown import FOLD, Markdown
from labs.harness.spec.visible import visible

INDENT = "  "
NAME_WIDTH = 32  # of the first column of a table; a longer name takes several lines
STYLES = {"em": "italic", "strong": "bold"}
UNREAD = (
    "error: what read the output has ended, and so does this command; a run keeps its finished"
    " trials, and RESUME=1 continues from there"
)


class PlainConsole(Console):
    """A console that leaves out of all text what `labs.harness.spec.visible` does.

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


def show(console: Console, block: Markdown) -> None:
    """Print a block with all that stands under it; pictures and folds are for pages alone."""
    within: list[str] = []
    rows: list[list[Text]] = []
    for token in markdown.tokens_of(FOLD.sub("", block)):
        if token.nesting == 1:
            within.append(token.tag)
        elif token.nesting == -1:
            within.pop()
        if token.type == "table_open":
            rows = []
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "table_close":
            console.print(_table(console, rows))
        elif token.type == "inline" and "table" in within:
            rows[-1].append(_text(token.children or ()))
        elif token.type == "inline":
            _show_text(console, within, _text(token.children or ()))


def _show_text(console: Console, within: Sequence[str], text: Text) -> None:
    """Print what is no table, as the block that it is in is shown."""
    if "blockquote" in within:
        for line in text.split("\n"):
            console.print(line, style="bold yellow")
    elif within[-1] != "p":
        console.print(Text.assemble("\n", (text.plain, "bold")))
    elif text:
        _sentence(console, text)


def _sentence(console: Console, text: Text) -> None:
    """Indented; where nobody watches it stays one line, so that it can be searched."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, len(INDENT))))
    else:
        console.print(Text.assemble(INDENT, text), soft_wrap=True)


def _table(console: Console, rows: Sequence[Sequence[Text]]) -> rich.table.Table:
    """The first column names the row, in one line where it is short; figures stand to the right."""
    header, *body = rows
    longest = max(len(row[0]) for row in rows)
    rich_table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    widths = _widths(console, rows, longest if longest <= NAME_WIDTH else 0)
    for place, (head, width) in enumerate(zip(header, widths, strict=True)):
        first = place == 0
        justify: Literal["left", "right"] = "left" if first else "right"
        rich_table.add_column(
            head,
            no_wrap=first and longest <= NAME_WIDTH,
            justify=justify,
            overflow="fold",
            max_width=width,
        )
    for row in body:
        rich_table.add_row(*row)
    return rich_table


def _widths(console: Console, rows: Sequence[Sequence[Text]], first: int) -> list[int]:
    """Narrow the widest columns until all fit, `first` stays, and no word of a head is broken.

    Where the console is too narrow for that, rich narrows them further.
    """
    columns = [[console.measure(cell) for cell in column] for column in zip(*rows, strict=True)]
    widths = [max(cell.maximum for cell in column) for column in columns]
    least = [column[0].minimum for column in columns]
    least[0] = max(least[0], first)
    available = console.width - 2 * len(columns) - 1  # a space around each and at both edges
    while sum(widths) > available:
        spare = [place for place, width in enumerate(widths) if width > least[place]]
        if not spare:
            break
        widths[max(spare, key=widths.__getitem__)] -= 1
    return widths


def _text(tokens: Sequence[Token]) -> Text:
    """Styled text; of a link only its words are shown, and of a picture nothing."""
    text, styles = Text(), list[str]()
    for token in tokens:
        if token.nesting == 1:
            styles.append(STYLES.get(token.tag, ""))
        elif token.nesting == -1:
            styles.pop()
        elif token.type == "softbreak":
            text.append("\n")
        elif token.type == "code_inline":
            text.append(f"`{token.content}`", " ".join(styles))
        elif token.type != "image":
            text.append(token.content, " ".join(styles))
    return text
