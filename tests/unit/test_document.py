"""The document and its renderers: what is markup, and what never becomes markup."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from rich.markup import escape

from labs.harness.analysis.text import literal
from labs.harness.reports import html, markdown, terminal
from labs.harness.reports.document import (
    Figure,
    Link,
    Paragraph,
    bullets,
    parse,
    plain_text,
    section,
    table,
)
from labs.harness.reports.markdown import Inline, Markdown, code, emphasis, escaped, inline, strong
from labs.harness.reports.templates import filled_text
from tests.cases import each

FROM_OUTSIDE = [
    "*a* **b** _c_ __d__ `e` ``f`` ***g***", "</script><script>hacked()</script>", "<b>x</b> a<b",
    "[a](javascript:hacked())", "![a](b.svg)", "[a]: http://b", "&amp; &#60; AT&T &c", "a|b|c",
    r"C:\new\*folder\`x`", "\\", "# heading", "## x", "- item", "+ item", "* item", "1. one",
    "12) two", "> quote", "---", "===", "***", "```", "~~~", "~~gone~~", "| a | b |", "2 * 3 * 4",
    "calibration_code.txt", "_private", "cores [0] and [1]", "--max-loras", "a\nb", "a\n\n# b",
    "a\n- b", "http://example.org/_x_", "<http://example.org>", "a <!-- b -->", "*", "**", "!",
    "3 repeats", "1.5x", "-1 to 1", "a #", "a | b\n--- | ---", ":-: | -", "a]", "a&", "a<", "a~",
    "<details>\n<summary>Show</summary>", "</details>", "    code", "a  \nb",
]  # fmt: skip


class Read(HTMLParser):
    """The text a reader reads, and the tags it is in."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.feed(str(page))  # a Markup would escape what the parser adds to it

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def read_back(block: Markdown) -> Read:
    """What a reader of the Markdown sees; everything that GitHub has is switched on."""
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return Read(reader.render(markdown.fragment([block])))


def written_on(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def note(text: str) -> Markdown:
    return Markdown(f"> **{escaped(text).strip()}**")


def words(text: str) -> str:
    return " ".join(text.split())


@each("text", FROM_OUTSIDE)
def test_text_from_outside_is_never_markup(text: str) -> None:
    seen = read_back(Paragraph(text))
    assert (words(seen.text), seen.tags) == (words(text), {"p"})
    seen = read_back(bullets([text, ("of ", strong("x"), text)]))
    assert words(seen.text) == words(f"{text} of x{text}")
    assert seen.tags == {"ul", "li", "strong"}
    filled, _ = filled_text("{{ text }}\n\n- {{ text }} of *it*\n", {"text": text})
    seen = read_back(filled)
    assert words(seen.text) == words(f"{text} {text} of it")
    assert seen.tags == {"p", "ul", "li", "em"}
    seen = read_back(section(text, table([text, "b"], [[text, code(text)]])))
    assert words(seen.text) == words(f"{text} {text} b {text} {text}")
    assert seen.tags == {"h1", "table", "thead", "tbody", "tr", "th", "td", "code"}


@each("text", FROM_OUTSIDE)
def test_html_has_the_same_text_and_no_tag_of_its_own(text: str) -> None:
    document = section(
        "Title",
        note(text),
        Paragraph((text, Link(text, "x.md"))),
        section(text, bullets([code(text), emphasis(text)]), table([text], [[text]])),
    )
    seen = Read(html.introduction(document, html.embedded(Path())))
    assert words(seen.text) == words(f"{text} {text}{text}")
    assert seen.tags == {"blockquote", "p", "strong", "a"}
    (inner,) = html.sections(document, html.embedded(Path()))
    assert words(inner.title) == words(text)
    seen = Read(inner.body)
    assert words(seen.text) == words(f"{text} {text} {text} {text}")
    cells = {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert seen.tags == {"ul", "li", "code", "em", *cells}
    assert words(Read(html.inline(text)).text) == words(text)


@each("text", FROM_OUTSIDE)
def test_a_terminal_has_the_same_text(text: str) -> None:
    console = Console(file=io.StringIO(), width=80)
    terminal.show(console, bullets([(text, code(text), strong(text))]))
    told = f"{text}`{text}`{text}"
    assert "".join(written_on(console).split()) == "".join(told.split())


@each("address", ["javascript:hacked()", "a b<c>d.md", "a\n\n# b", r"a\)(b", '"onclick="hacked()'])
def test_a_links_address_ends_no_link_and_runs_nothing(address: str) -> None:
    seen = read_back(Paragraph(("see ", Link("it", address), " there")))
    assert seen.tags <= {"p", "a"}
    page = str(html.inline(("see ", Link("it", address), " there")))
    assert Read(page).tags <= {"a"}
    assert 'href="javascript' not in page


@pytest.mark.parametrize(
    "parts",
    [
        ("[a]", "(b)"), (parse("[a]"), "(b)"), ("<", parse("b>")), ("&", parse("amp;")),
        ("a\\", code("b")), ("!", Link("a", "b.md")), ("a\\", strong("b")),
    ],
)  # fmt: skip
def test_two_texts_beside_each_other_make_no_mark(parts: tuple[str, str]) -> None:
    apart = [Read(html.inline(part)) for part in parts]
    seen = Read(html.inline(parts))
    assert seen.text == "".join(part.text for part in apart)
    assert seen.tags == apart[0].tags | apart[1].tags
    assert read_back(Paragraph(parts)).tags == {"p", *seen.tags}


def test_html_in_markdown_never_reaches_a_page() -> None:
    raw = Markdown("<b>x</b> y\n\n<div onclick='hacked()'>\n\n<details open>\n<summary>x</summary>")
    seen = Read(html.fragment([raw], html.embedded(Path())))
    assert seen.tags == {"p"}


def test_what_is_made_of_markdown_as_text_is_text() -> None:
    assert Read(html.inline(f"{strong('a')} b")).tags == set()
    assert Read(html.inline(strong("a") + " b")).tags == set()


@each("text", FROM_OUTSIDE)
def test_what_was_written_literally_is_read_back(text: str) -> None:
    assert plain_text(parse(literal(text))) == re.sub(r"\s*\n\s*", "\n", text)
    assert read_back(Paragraph(parse(literal(text)))).tags == {"p"}


@pytest.mark.parametrize(
    ("notation", "content"),
    [
        ("plain [b](c) <b>", "plain [b](c) <b>"),
        ("`a*b*` c", (code("a*b*"), " c")),
        ("*a b* and **c**", (emphasis("a b"), " and ", strong("c"))),
        ("**a *b* `c`**", strong(("a ", emphasis("b"), " ", code("c")))),
        ("2 * 3 * 4, a*b*c, `open, **open", "2 * 3 * 4, a*b*c, `open, **open"),
        (r"\*a\* \`b\` \\ \n", ("*", "a", "*", " ", "`", "b", "`", " ", "\\", r" \n")),
    ],
)
def test_the_notation_has_three_marks_and_a_backslash(notation: str, content: Inline) -> None:
    assert parse(notation) == inline(content)


def test_blocks_as_markdown() -> None:
    document = section(
        ("On ", emphasis("x")),
        Paragraph("one\ntwo"),
        section("Inner", bullets([("see ", Link("it", "a b.md"))]), Figure("x.svg", "A plot.")),
        section("Empty", bullets([]), table(["a"], []), None),
        section("Numbers", table(["a", "b"], [["x|y", code("|")]])),
    )
    assert markdown.document(document) == (
        "# On *x*\n\none\ntwo\n\n## Inner\n\n- see [it](<a b.md>)\n\n"
        "![A plot.](x.svg)\n\nA plot.\n\n## Numbers\n\n| a | b |\n| --- | --- |\n"
        "| x\\|y | `\\|` |\n"
    )


def test_code_that_holds_backticks_is_read_back() -> None:
    assert read_back(Paragraph(("a ", code("`b`` c`")))).text.strip() == "a `b`` c`"


def test_a_row_has_as_many_cells_as_the_header() -> None:
    with pytest.raises(ValueError, match="longer or shorter"):
        table(["a", "b"], [["x"]])


def test_a_terminal_shows_styles_and_no_markup_of_its_own() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="standard")
    terminal.show(
        console,
        section(
            "Title",
            note("[red]note"),
            bullets([("a ", strong("bold"), " [b] ", emphasis("c"), Link(" link", "x.md"))]),
            table(["Name", "Figure"], [["[dim]x", "1"], ["y", strong("22")], ["", "3"]]),
            Figure("x.svg", "A plot."),
        ),
    )
    written = written_on(console)
    assert "\x1b[1mbold\x1b[0m" in written
    assert "\x1b[3mc\x1b[0m" in written
    plain = re.sub(r"\x1b\[[\d;]*m", "", written)
    lines = [line.rstrip() for line in plain.splitlines()]
    assert lines[:4] == ["", "Title", "[red]note", "  a bold [b] c link"]
    assert " [dim]x       1" in plain
    assert "              3" in plain
    assert "plot" not in plain


def test_no_word_of_a_tables_head_is_broken_where_the_columns_have_room() -> None:
    heads = ["Offered", "Within the objective", "TTFT p99", "Prefix hits", "Preemptions"]
    rows = [["11 /s", "56.3% (36.6% to 82.8%)", "124 (96 to 162) ms", "0 (0 to 0)", "0"]]
    console = Console(file=io.StringIO(), width=54)
    terminal.show(console, table(heads, rows))
    lines = written_on(console).splitlines()
    assert {*" ".join(heads).split()} <= {*" ".join(lines).split()}
    assert max(map(len, lines)) <= 54
    narrow = Console(file=io.StringIO(), width=24)
    terminal.show(narrow, table(heads, rows))
    assert max(map(len, written_on(narrow).splitlines())) <= 24


def test_text_from_outside_moves_no_cursor_and_clears_no_screen() -> None:
    """It could hide what was said, or set the clipboard; rich leaves out five of these alone."""
    hostile = "a\x1b[2J\x1b]52;c;eA==\x07b\x9b1Ac\x7f\u0085\rd\nf:x:"
    console = terminal.PlainConsole(
        file=io.StringIO(), width=80, force_terminal=True, color_system="standard"
    )
    terminal.show(
        console,
        section(
            hostile,
            note(hostile),
            bullets([hostile, code(hostile)]),
            table([hostile, "x"], [[hostile, "1"]]),
        ),
    )
    console.print(f"[bold]{escape(hostile)}[/]", soft_wrap=True)
    written = written_on(console)
    styled = re.sub(r"\x1b\[[\d;]*m", "", written)
    assert "\x1b[1m" in written
    assert not [c for c in styled if not c.isprintable() and c != "\n"]
    assert styled.count("a[2J]52;c;eA==b1Acd") == 7
    assert styled.count("f:x:") == 7  # no picture in its place


# ---------------------------------------------------------------------------------------- tables


def test_what_is_folded_opens_on_a_page_and_is_left_out_on_a_terminal() -> None:
    folded = section("Trust", Paragraph("All is well."), folded=True)
    assert folded == "# Trust\n\n<details>\n<summary>Show</summary>\n\nAll is well.\n\n</details>"
    console = Console(file=io.StringIO(), width=80)
    terminal.show(console, section("More", Paragraph("In brief."), folded))
    assert "In brief." in written_on(console)
    assert "All is well." not in written_on(console)


def test_of_what_is_empty_neither_fold_nor_heading_stays() -> None:
    """The blocks of a list are one list, whatever they were filled from."""
    page = (
        "# A\n\n## B\n\n<details>\n<summary>C</summary>\n\n{{ lost }}\n\n</details>\n\n"
        "## D\n\n- one\n\n- two\n  lines\n\n### E\n\n## F\n"
    )
    assert filled_text(page, {"lost": None}).text == "# A\n\n## D\n\n- one\n- two lines"
