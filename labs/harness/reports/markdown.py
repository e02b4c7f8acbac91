"""Markdown (CommonMark with GitHub's tables): the one form of what is said.

A `Markdown` is trusted to be markup, any other `str` is plain text, whatever characters it holds:
`inline` is where it becomes Markdown that is read as that text. A backslash goes before a character
that would otherwise be markup where it stands, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TypeAlias

from markdown_it import MarkdownIt
from markdown_it.token import Token

from labs.harness.spec.visible import visible

MARKUP = re.compile(
    r"""\\(?=[!-/:-@\[-`{-~]|\Z)  # would escape what follows; more markup may follow the end
    |`
    |\*(?!(?<=\s\*)\s)            # emphasis, unless it stands alone between spaces
    |(?<![^\W_])_|_(?![^\W_])   # emphasis, unless within a word
    |~(?=~)
    |<(?=[A-Za-z/!?]|\Z)          # HTML, an automatic link
    |&(?=\#?\w+;|\#?\Z)           # an entity
    |\](?=[(:\[]|\Z)              # a link, a picture, a definition
    |\[(?=[^\]]*(?:\][(:\[]|\]?\Z)) # the same, and a bracket that would be open in a link
    |!(?=\[|\Z)                   # a picture
    |\#(?=\Z)                     # the end of a heading
    """,
    re.VERBOSE,
)
BLOCK_START = re.compile(
    r"#{1,6}(?=\s|$)|[-+](?=\s|$)|>|\||=+\s*$|[-:][-:|\s]*$"
    r"|(?P<number>\d{1,9})(?=[.)](?:\s|$))"
)
READER = MarkdownIt("commonmark").enable("table")


FOLDED = "<details>\n<summary>Show</summary>"  # of a section of which all is folded
FOLD_START = re.compile(r"<details>\n<summary>(.*)</summary>")
FOLD_END = "</details>"
FOLD = re.compile(r"<details>\n<summary>.*?</details>", re.S)


class Markdown(str):
    """Text that is Markdown already; what is made of it by `+` or in an f-string is plain again."""

    def __html__(self) -> str:
        """Templates of Markdown take it as it is."""
        return self


Inline: TypeAlias = "str | tuple[Inline, ...]"


def document(content: Markdown) -> str:
    """The whole of a file."""
    return f"{content}\n"


def fragment(blocks: Iterable[Markdown]) -> Markdown:
    """Blocks one below the other, without a newline at the end."""
    return Markdown("\n\n".join(block for block in blocks if block))


def inline(content: Inline) -> Markdown:
    """Plain text that meets plain text is escaped as one, as two halves may make a mark."""
    runs = groupby(_parts(content), key=lambda part: isinstance(part, Markdown))
    texts = (("".join(run), is_markup) for is_markup, run in runs)
    return Markdown("".join(text if is_markup else _escaped(text) for text, is_markup in texts))


def _parts(content: Inline) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    else:
        for part in content:
            yield from _parts(part)


def _escaped(text: str) -> str:
    return MARKUP.sub(r"\\\g<0>", re.sub(r"\s*\n\s*", "\n", visible(text)))


def line(content: Inline) -> Markdown:
    """Content on one line."""
    return Markdown(re.sub(r"\s*\n\s*", " ", inline(content)))


def lines(content: Inline) -> Markdown:
    """Content as lines of which none begins a block."""
    return Markdown("\n".join(map(_no_block, inline(content).split("\n"))))


def cell(content: Inline) -> Markdown:
    return Markdown(line(content).replace("|", "\\|"))


def escaped(text: str) -> str:
    """Text from outside on one line of a page: nothing in it is markup, whatever it begins with."""
    own_line = _no_block(cell(text))
    return f"{' ' * text.startswith(' ')}{own_line}{' ' * text.endswith(' ')}"


def _no_block(text: str) -> str:
    """The first characters of a line may begin a block: a backslash keeps them text."""
    text = text.strip()
    if not (start := BLOCK_START.match(text)):
        return text
    marked = len(start["number"] or "")
    return f"{text[:marked]}\\{text[marked:]}"


def target(address: str) -> str:
    """Where a link or a picture leads."""
    address = re.sub(r"\s", " ", visible(address))
    if not re.search(r"[\s()<>\\&]", address):
        return address
    return "<" + re.sub(r"[<>\\&]", r"\\\g<0>", address) + ">"


# -------------------------------------------------------------------------------- within a line


def code(text: str) -> Markdown:
    """Write it within as many backticks as no run of them inside has."""
    text = " ".join(re.split(r"\s*\n\s*", visible(text)))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return Markdown(f"{fence}{padding}{text}{padding}{fence}")


def emphasis(content: Inline) -> Markdown:
    return Markdown(f"*{inline(content).strip()}*")


def strong(content: Inline) -> Markdown:
    return Markdown(f"**{inline(content).strip()}**")


def link(content: Inline, address: str) -> Markdown:
    """A link to an address relative to where the document lies."""
    return Markdown(f"[{inline(content)}]({target(address)})")


NOTATION = re.compile(
    r"\\(?P<literal>[!-/:-@\[-`{-~])"
    r"|`(?P<code>[^`]+)`"
    r"|\*\*(?P<strong>\S|\S.*?\S)\*\*(?!\*)"
    r"|(?<!\w)\*(?P<emphasis>[^\s*]|[^\s*][^*]*[^\s*])\*(?!\w)"
)


def parse(notation: str) -> Markdown:
    r"""Read a sentence with `code`, *emphasis*, **strong**; a backslash makes a mark text.

    There is no other markup: no link, no HTML. A mark that opens or closes nothing is text.
    `labs.harness.analysis.text.literal` writes text from outside so that it is read back as it is.
    """
    parts: list[Inline] = []
    end = 0
    for mark in NOTATION.finditer(notation):
        parts.append(notation[end : mark.start()])
        end = mark.end()
        if (literal := mark["literal"]) is not None:
            parts.append(literal)
        elif mark["code"] is not None:
            parts.append(code(mark["code"]))
        elif mark["strong"] is not None:
            parts.append(strong(parse(mark["strong"])))
        else:
            parts.append(emphasis(parse(mark["emphasis"])))
    return inline((*parts, notation[end:]))


# --------------------------------------------------------------------------------------- reading


def tokens_of(text: str) -> list[Token]:
    """Read Markdown; a picture that is a paragraph takes in the next, which is its caption."""
    tokens = READER.parse(text)
    for at, token in enumerate(tokens):
        pictures = token.children or []
        if [child.type for child in pictures] == ["image"]:
            caption = tokens[at + 3]
            pictures[0].meta["caption"], caption.children = caption.children, []
            for border in (at - 1, at + 1, at + 2, at + 4):
                tokens[border].hidden = True
    return tokens


def plain_text(content: Inline) -> str:
    """Return the text that a reader reads, without any markup."""
    (token,) = READER.parseInline(inline(content))
    return "".join(
        "\n" if child.type == "softbreak" else child.content for child in token.children or ()
    )
