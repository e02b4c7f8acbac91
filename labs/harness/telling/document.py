"""The parts of a report, a comparison and a page, each of which is Markdown.

What goes in is plain text, unless it is one of these parts already or comes from `parse`, the only
reader of what a lab's author or a finding wrote with marks: so a model's name, a path or an error
message can never become markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from labs.harness.telling import markdown
from labs.harness.telling.markdown import Inline as Inline
from labs.harness.telling.markdown import Markdown, inline
from labs.harness.telling.markdown import plain_text as plain_text
from labs.harness.telling.visible import visible

FOLDED = "<details>\n<summary>Show</summary>"
FOLD_END = "</details>"

Block: TypeAlias = Markdown
Section: TypeAlias = Markdown  # or a whole document, which is the outermost one
Bullets: TypeAlias = Markdown


class Code(Markdown):
    def __new__(cls, text: str) -> Code:
        """Write it within as many backticks as no run of them inside has."""
        text = " ".join(re.split(r"\s*\n\s*", visible(text)))
        longest = max((len(run) for run in re.findall("`+", text)), default=0)
        fence = "`" * (longest + 1)
        padding = " " if text[:1] == "`" or text[-1:] == "`" else ""
        return super().__new__(cls, f"{fence}{padding}{text}{padding}{fence}")


class Emphasis(Markdown):
    def __new__(cls, content: Inline) -> Emphasis:
        return super().__new__(cls, f"*{inline(content).strip()}*")


class Strong(Markdown):
    def __new__(cls, content: Inline) -> Strong:
        return super().__new__(cls, f"**{inline(content).strip()}**")


class Link(Markdown):
    """A link to a `target` relative to where the document lies."""

    def __new__(cls, content: Inline, target: str) -> Link:
        return super().__new__(cls, f"[{inline(content)}]({markdown.target(target)})")


class Paragraph(Markdown):
    def __new__(cls, content: Inline) -> Paragraph:
        return super().__new__(cls, markdown.lines(content))


class Notes(Markdown):
    """Holds what a reader must know before the first figure, one sentence each."""

    def __new__(cls, items: Iterable[Inline]) -> Notes:
        return super().__new__(cls, "\n".join(f"> {markdown.line(Strong(i))}" for i in items))


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


def _row(cells: Sequence[Inline]) -> str:
    return f"| {' | '.join(map(markdown.cell, cells))} |"


class Figure(Markdown):
    """A picture in a file beside the document."""

    file: str

    def __new__(cls, file: str, caption: Inline) -> Figure:
        words = markdown.line(plain_text(caption))
        picture = f"![{words}]({markdown.target(file)})\n\n{Paragraph(markdown.line(caption))}"
        made = super().__new__(cls, picture)
        made.file = file
        return made


def section(title: Inline, *blocks: Block | None, folded: bool = False) -> Markdown:
    """A heading and the blocks that hold anything; nothing without one of these.

    A document is the outermost section. A `folded` one is shown when the reader opens it.
    """
    inner = [_deeper(block) for block in blocks if block]
    if folded:
        inner = [Markdown(FOLDED), *inner, Markdown(FOLD_END)]
    heading = Markdown(f"# {markdown.line(title)}")
    return markdown.fragment([heading, *inner]) if any(blocks) else Markdown()


def _deeper(block: Block) -> Block:
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
        if n not in varying and cells[0] not in ("–", "")
    ]
    note = Paragraph(f"The same in every row, so left out: {'; '.join(same)}.") if same else None
    return _with_columns(of, varying), note


def _columns(of: Table) -> list[tuple[int, tuple[Markdown, ...]]]:
    return list(enumerate(zip(*of.rows, strict=True)))


def _with_columns(of: Table, numbers: Sequence[int]) -> Table:
    if not of.rows:
        return of
    return table([of.header[n] for n in numbers], ([row[n] for n in numbers] for row in of.rows))


def joined(parts: Iterable[Inline], separator: str) -> Inline:
    """Text with `separator` between the parts, as `str.join` does it for plain text."""
    spread = [piece for part in parts for piece in (separator, part)]
    return tuple(spread[1:])


# -------------------------------------------------------------------------------- inline notation

NOTATION = re.compile(
    r"\\(?P<literal>[!-/:-@\[-`{-~])"
    r"|`(?P<code>[^`]+)`"
    r"|\*\*(?P<strong>\S|\S.*?\S)\*\*(?!\*)"
    r"|(?<!\w)\*(?P<emphasis>[^\s*]|[^\s*][^*]*[^\s*])\*(?!\w)"
)


def parse(notation: str) -> Markdown:
    r"""Read a sentence with `code`, *emphasis*, **strong**; a backslash makes a mark text.

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
    return inline((*parts, notation[end:]))


# ---------------------------------------------------------------------------- the blocks of a page

FOLD = re.compile(r"<details>\n<summary>.*?</details>", re.S)
FOLD_START = re.compile(r"<details>\n<summary>(.*)</summary>")


def read(page: str) -> tuple[Block, ...]:
    """Read the part of a lab's page: paragraphs, lists, tables, and the borders of folds.

    Within a line only what `parse` reads is markup.
    """
    texts = (text.strip() for text in re.split(r"\n\s*\n", page))
    return tuple(_read_block(text) for text in texts if text)


def _read_block(text: str) -> Block:
    if fold := FOLD_START.fullmatch(text):
        return Markdown(f"<details>\n<summary>{parse(fold[1])}</summary>")
    if text == FOLD_END:
        return Markdown(text)
    if text.startswith("|"):
        header, _, *rows = (_cells(line) for line in text.splitlines())
        return table(header, rows)
    if text.startswith("- "):
        items = re.split(r"^- ", text, flags=re.M)[1:]
        return bullets(parse(" ".join(item.split())) for item in items)
    return Paragraph(parse(" ".join(text.split())))


def _cells(row: str) -> list[Markdown]:
    cells = re.split(r"(?<!\\)\|", row.strip().removeprefix("|").removesuffix("|"))
    return [parse(cell.strip()) for cell in cells]
