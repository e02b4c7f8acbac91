"""A document's Markdown as HTML: every text escaped, no tag but Markdown's and our own folds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

from labs.harness.reports import markdown
from labs.harness.reports.document import parts
from labs.harness.reports.markdown import (
    FOLD_END,
    FOLD_START,
    FOLDED,
    READER,
    Inline,
    Markdown,
    plain_text,
)

UNQUOTED = " !$'()*+,-./:;<=>?@[]_~{}|^"  # in a data address within double quotation marks
STACKED = "Claim"  # the first heading of a table whose rows a phone shows one below the other
Picture = Callable[[str, str, Markup], Markup]  # of a file, with its words and its caption


@dataclass(frozen=True)
class PageSection:
    """A section as a page's template places it."""

    title: str
    id: str
    body: Markup
    folded: bool


def introduction(document: Markdown, picture: Picture) -> Markup:
    """Return what stands before the first section."""
    _, before, _ = parts(document)
    return fragment([before], picture)


def sections(document: Markdown, picture: Picture) -> list[PageSection]:
    """The sections of a document, each with the anchor that links to it."""
    _, _, inner = parts(document)
    return [_section(section, picture) for section in inner]


def _section(section: Markdown, picture: Picture) -> PageSection:
    heading, _, body = section.partition("\n\n")
    title = plain_text(Markdown(heading.removeprefix("# ")))
    folded = body.startswith(FOLDED)
    if folded:
        body = body.removeprefix(FOLDED).removesuffix(FOLD_END)
    return PageSection(title, anchor(title), fragment([body], picture, title, level=2), folded)


def anchor(title: str) -> str:
    """The id by which a link finds the section."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def fragment(blocks: Iterable[str], picture: Picture, label: str = "", level: int = 3) -> Markup:
    """Blocks one below the other; `label` is what a screen reader calls their tables.

    Sections within have headings of this level, and their titles label their own tables.
    """
    tokens = markdown.tokens_of("\n\n".join(blocks))
    for at, token in enumerate(tokens):
        if token.type == "heading_open":
            label = plain_text(Markdown(tokens[at + 1].content))
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{int(token.tag[1]) + level - 1}"
        token.meta["label"] = label
    _name_cells(tokens)
    return Markup(RENDERER.render(tokens, READER.options, {"picture": picture}))


def _name_cells(tokens: Sequence[Token]) -> None:
    """Give each cell of a table of claims the name of its column, under which a phone shows it."""
    table, heads, column = None, list[str](), 0
    for token, following in pairwise(tokens):
        if token.type == "table_open":
            table, heads = token, []
        elif token.type == "th_open":
            heads.append(plain_text(Markdown(following.content)))
        elif token.type == "tr_open":
            column = 0
        elif token.type == "td_open" and table and heads[0] == STACKED:
            table.meta["stacked"] = " stacked claims"
            if column:
                token.attrSet("data-of", heads[column])
            column += 1


def inline(content: Inline) -> Markup:
    tokens = READER.parseInline(markdown.inline(content))
    return Markup(RENDERER.render(tokens, READER.options, {}))


class _Renderer(RendererHTML):
    """Each method renders the tokens of its name."""

    def table_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """A wide one scrolls in a box of its own, which a keyboard can reach."""
        box = Markup('<div class="table{}" role="region" aria-label="{}" tabindex="0"><table>\n')
        return box.format(tokens[idx].meta.get("stacked", ""), tokens[idx].meta["label"])

    def table_close(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return "</table></div>\n"

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        """Only with a caption is it one of ours."""
        token = tokens[idx]
        if "caption" not in token.meta:
            return escape(token.content)
        caption = Markup(self.renderInline(token.meta["caption"], options, env))
        picture: Picture = env["picture"]
        return picture(unquote(str(token.attrs["src"])), token.content, caption)

    def html_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        text = tokens[idx].content.strip()
        if fold := FOLD_START.fullmatch(text):
            summary = inline(Markdown(fold[1]))
            return f"<details>\n<summary>{summary}</summary>\n"
        return f"{text}\n" if text == FOLD_END else escape(text)

    def html_inline(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        return escape(tokens[idx].content)


RENDERER = _Renderer()


def as_address(svg: str) -> str:
    """Return a picture as an address that holds it, for an attribute in double quotation marks.

    A page shows it as an image, so that whatever the file holds, nothing in it runs.
    """
    return "data:image/svg+xml," + quote(svg, safe=UNQUOTED)


def embedded(home: Path) -> Picture:
    """Pictures that lie in `home`, written into the page."""

    def picture(file: str, words: str, caption: Markup) -> Markup:
        path = home / file
        if path.parent != home or path.suffix != ".svg" or not path.exists():
            return Markup("<p>{}</p>\n").format(f"({words}: {file} is missing)")
        source = Markup(as_address(path.read_text()))  # it has neither quotation mark nor &
        return Markup(
            '<figure><div class="picture"><img src="{}" alt="{}"></div>'
            "<figcaption>{}</figcaption></figure>\n"
        ).format(source, words, caption)

    return picture
