"""A document as Markdown (CommonMark with GitHub's tables).

Plain text is written so that it is read as plain text: a backslash goes before a character that
would otherwise be markup where it stands, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from labs.harness.telling import document as nodes
from labs.harness.telling.visible import visible

MARKUP = re.compile(
    r"""\\(?=[!-/:-@\[-`{-~])     # would escape what follows
    |`
    |\*(?!(?<=\s\*)\s)            # emphasis, unless it stands alone between spaces
    |(?<![^\W_])_|_(?![^\W_])   # emphasis, unless within a word
    |~(?=~)
    |<(?=[A-Za-z/!?])             # HTML, an automatic link
    |&(?=\#?\w+;)                 # an entity
    |\](?=[(:\[])                 # a link, a picture, a definition
    """,
    re.VERBOSE,
)
FOLD = "<details>\n<summary>Show</summary>"
BLOCK_START = re.compile(
    r"#{1,6}(?=\s|$)|[-+](?=\s|$)|>|\||(?:-+|=+)\s*$|(?P<number>\d{1,9})(?=[.)](?:\s|$))"
)


def document(content: nodes.Section) -> str:
    """The whole of a file."""
    return "\n\n".join(_block(content, level=1)) + "\n"


def fragment(blocks: Iterable[nodes.Block], level: int = 1) -> str:
    """Blocks as part of another text, without a newline at the end; sections begin at `level`."""
    return "\n\n".join(part for block in blocks for part in _block(block, level) if part)


def _block(block: nodes.Block, level: int) -> list[str]:
    """Return the parts that blank lines separate."""
    match block:
        case nodes.Paragraph(content):
            return ["\n".join(_line(line) for line in _inline(content).split("\n"))]
        case nodes.Bullets(items):
            return ["\n".join(f"- {_line(_one_line(_inline(item)))}" for item in items)]
        case nodes.Notes(items):
            return ["\n".join(f"> {_one_line(_inline(nodes.Strong(item)))}" for item in items)]
        case nodes.Figure(file, caption):
            words = _one_line(_text(nodes.plain_text(caption)))
            return [f"![{words}]({_target(file)})", _line(_one_line(_inline(caption)))]
        case nodes.Table():
            return ["\n".join(_table(block))]
        case nodes.Fold(summary, blocks):
            opening = f"<details>\n<summary>{_one_line(_inline(summary))}</summary>"
            return [
                opening,
                *(part for inner in blocks for part in _block(inner, level)),
                "</details>",
            ]
        case nodes.Section(title, blocks, folded):
            heading = f"{'#' * level} {_one_line(_inline(title))}"
            parts = [part for inner in blocks for part in _block(inner, level + 1)]
            return [heading, FOLD, *parts, "</details>"] if folded else [heading, *parts]


def _table(table: nodes.Table) -> list[str]:
    return [
        _row(table.header),
        _row(["---"] * len(table.header)),
        *(_row(row) for row in table.rows),
    ]


def _row(cells: Sequence[nodes.Inline]) -> str:
    return "| " + " | ".join(_one_line(_inline(cell)).replace("|", "\\|") for cell in cells) + " |"


def _line(text: str) -> str:
    """The first characters of a line may begin a block: a backslash keeps them text."""
    text = text.strip()
    if not (start := BLOCK_START.match(text)):
        return text
    marked = len(start["number"] or "")
    return f"{text[:marked]}\\{text[marked:]}"


def _inline(content: nodes.Inline) -> str:
    match content:
        case str():
            return _text(content)
        case nodes.Code(text):
            return _code(text)
        case nodes.Emphasis(inner):
            return f"*{_inline(inner)}*"
        case nodes.Strong(inner):
            return f"**{_inline(inner)}**"
        case nodes.Link(inner, target):
            return f"[{_inline(inner)}]({_target(target)})"
        case tuple():
            return "".join(_inline(part) for part in content)


def _text(text: str) -> str:
    return MARKUP.sub(r"\\\g<0>", re.sub(r"\s*\n\s*", "\n", visible(text)))


def escaped(text: str) -> str:
    """Text from outside on one line of a page: nothing in it is markup, whatever it begins with."""
    line = _line(_one_line(_text(text))).replace("|", "\\|")
    return f"{' ' * text.startswith(' ')}{line}{' ' * text.endswith(' ')}"


def _code(text: str) -> str:
    """Within as many backticks as no run of them inside has."""
    text = visible(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{padding}{_one_line(text)}{padding}{fence}"


def _target(target: str) -> str:
    target = visible(target)
    return f"<{target}>" if re.search(r"[\s()<>]", target) else target


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text)
