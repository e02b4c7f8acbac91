"""A document as typed nodes: what a report, a comparison and a page are before they are rendered.

Facts become such a tree once; `markdown`, `html` and `terminal` each render it. A `str` in the tree
is plain text, whatever characters it holds: only the typed nodes are markup. So a model's name, a
path or an error message can never become markup; what a lab's author or a finding wrote with marks
becomes nodes in `parse`, the only reader of that notation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Emphasis:
    content: Inline


@dataclass(frozen=True)
class Strong:
    content: Inline


@dataclass(frozen=True)
class Link:
    content: Inline
    target: str  # relative to where the document lies


Inline: TypeAlias = "str | Code | Emphasis | Strong | Link | tuple[Inline, ...]"


@dataclass(frozen=True)
class Paragraph:
    content: Inline


@dataclass(frozen=True)
class Bullets:
    items: tuple[Inline, ...]


@dataclass(frozen=True)
class Notes:
    """Holds what a reader must know before the first figure, one sentence each."""

    items: tuple[Inline, ...]


@dataclass(frozen=True)
class Table:
    header: tuple[Inline, ...]
    rows: tuple[tuple[Inline, ...], ...]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"a row is longer or shorter than the header {self.header}")


@dataclass(frozen=True)
class Figure:
    """A picture in a file beside the document."""

    file: str
    caption: Inline


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; the document itself is the outermost section."""

    title: Inline
    blocks: tuple[Block, ...]
    folded: bool = False  # shown when the reader opens it


@dataclass(frozen=True)
class Fold:
    """What explains further, within a section: shown when the reader opens it."""

    summary: Inline
    blocks: tuple[Block, ...]


Block: TypeAlias = "Paragraph | Bullets | Notes | Table | Figure | Section | Fold"
Node = TypeVar("Node", Paragraph, Bullets, Notes, Table, Figure)


def section(title: Inline, *blocks: Block | None, folded: bool = False) -> Section:
    """A section of the blocks that hold anything."""
    filled_blocks = tuple(block for block in blocks if block and holds_anything(block))
    return Section(title, filled_blocks, folded)


def holds_anything(block: Block) -> bool:
    """Whether there is anything to show: rows, items, or blocks."""
    match block:
        case Bullets(items) | Notes(items):
            return bool(items)
        case Table(_, rows):
            return bool(rows)
        case Section(blocks=blocks) | Fold(blocks=blocks):
            return bool(blocks)
    return True


def bullets(items: Iterable[Inline]) -> Bullets:
    return Bullets(tuple(items))


def table(header: Sequence[Inline], rows: Iterable[Sequence[Inline]]) -> Table:
    return Table(tuple(header), tuple(tuple(row) for row in rows))


def table_of(rows: Sequence[Sequence[Inline]]) -> Table:
    """A table of rows of which the first is the header; without rows an empty one."""
    header, *body = rows or ((),)
    return table(header, body)


def without_empty_columns(of: Table) -> Table:
    """The table without the columns that have nothing but dashes."""
    return _with_columns(of, [n for n, cells in _columns(of) if not set(cells) <= {"–", ""}])


def without_constant_columns(of: Table, keep: Sequence[str] = ()) -> tuple[Table, Paragraph | None]:
    """The table without the columns that say the same in every row, and what those say.

    Columns with a heading to `keep` stay.
    """
    if len(of.rows) < 2:
        return of, None
    varying = [n for n, cells in _columns(of) if len(set(cells)) > 1 or of.header[n] in keep]
    same = [
        f"{plain_text(of.header[n])} = {plain_text(cells[0])}"
        for n, cells in _columns(of)
        if n not in varying and plain_text(cells[0]) not in ("–", "")
    ]
    note = Paragraph(f"The same in every row, so left out: {'; '.join(same)}.") if same else None
    return _with_columns(of, varying), note


def _columns(of: Table) -> list[tuple[int, tuple[Inline, ...]]]:
    return list(enumerate(zip(*of.rows, strict=True)))


def _with_columns(of: Table, numbers: Sequence[int]) -> Table:
    if not of.rows:
        return of
    return table([of.header[n] for n in numbers], ([row[n] for n in numbers] for row in of.rows))


def joined(parts: Iterable[Inline], separator: str) -> Inline:
    """Text with `separator` between the parts, as `str.join` does it for plain text."""
    spread = [piece for part in parts for piece in (separator, part)]
    return tuple(spread[1:])


def plain_text(content: Inline) -> str:
    """Return the text that a reader reads, without any markup."""
    match content:
        case str():
            return content
        case Code(text):
            return text
        case tuple():
            return "".join(plain_text(part) for part in content)
    return plain_text(content.content)


# -------------------------------------------------------------------------------- inline notation

NOTATION = re.compile(
    r"\\(?P<literal>[!-/:-@\[-`{-~])"
    r"|`(?P<code>[^`]+)`"
    r"|\*\*(?P<strong>\S|\S.*?\S)\*\*(?!\*)"
    r"|(?<!\w)\*(?P<emphasis>[^\s*]|[^\s*][^*]*[^\s*])\*(?!\w)"
)


def parse(notation: str) -> Inline:
    r"""Nodes of a sentence with `code`, *emphasis*, **strong**; a backslash makes a mark text.

    There is no other markup: no link, no HTML. A mark that opens or closes nothing is text.
    `labs.harness.judging.text.literal` writes text from outside so that it is read back as it is.
    """
    parts: list[Inline] = []
    end = 0
    for mark in NOTATION.finditer(notation):
        parts.append(notation[end : mark.start()])
        end = mark.end()
        if (literal := mark["literal"]) is not None:
            parts.append(literal)
        elif (code := mark["code"]) is not None:
            parts.append(Code(code))
        elif (strong := mark["strong"]) is not None:
            parts.append(Strong(parse(strong)))
        else:
            parts.append(Emphasis(parse(mark["emphasis"])))
    nodes = [part for part in [*parts, notation[end:]] if part != ""]
    return nodes[0] if len(nodes) == 1 else tuple(nodes)


# ---------------------------------------------------------------------------- the blocks of a page

FOLD = re.compile(
    r"<details>\s*<summary>(?P<summary>[^\n]*)</summary>(?P<inner>.*?)</details>", re.S
)


def read(markdown: str) -> tuple[Block, ...]:
    """Nodes of the part of a lab's page: paragraphs, lists, tables, and folds of these.

    Within a line only what `parse` reads is markup.
    """
    blocks: list[Block] = []
    end = 0
    for fold in FOLD.finditer(markdown):
        blocks += _read_plain(markdown[end : fold.start()])
        blocks.append(Fold(parse(fold["summary"]), read(fold["inner"])))
        end = fold.end()
    return (*blocks, *_read_plain(markdown[end:]))


def _read_plain(markdown: str) -> list[Block]:
    texts = (text.strip() for text in re.split(r"\n\s*\n", markdown))
    return [_read_block(text) for text in texts if text]


def _read_block(text: str) -> Block:
    if text.startswith("|"):
        header, _, *rows = (_cells(line) for line in text.splitlines())
        return table(header, rows)
    if text.startswith("- "):
        items = re.split(r"^- ", text, flags=re.M)[1:]
        return bullets(parse(" ".join(item.split())) for item in items)
    return Paragraph(parse(" ".join(text.split())))


def _cells(row: str) -> list[Inline]:
    cells = re.split(r"(?<!\\)\|", row.strip().removeprefix("|").removesuffix("|"))
    return [parse(cell.strip()) for cell in cells]
