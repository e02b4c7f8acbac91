"""README and docs/: small enough, every link leads somewhere, and what they name exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.main import get_command

from labs import LABS
from labs.harness.cli.cli import app
from labs.harness.derived.lab_modules import parts_of
from labs.harness.site.leaderboards import MOST_HEADLINES
from serving.models.catalog import ROOT
from tests.makefile import LINES, PAGES, SETTINGS

README_BYTES = 8 * 1024  # a page, of which a lab takes a row
A_FINDING = 232  # bytes around a headline's words: a link to a report, the ratio, its prediction
PICTURE_BYTES = 200_000
DOCS_WORDS = 15_000
PARAGRAPH = 600  # characters
INDEX = ROOT / "docs" / "README.md"
QUESTIONS = INDEX.with_name("questions.md")  # generated, and long
SECRETS = next(line.split("#")[0].split()[2:] for line in LINES if line.startswith("SECRETS :="))
TARGETS = {
    name
    for line in LINES
    if (rule := re.match(r"([a-z][a-z -]*):", line))
    for name in rule[1].split()
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def tokens(page: Path) -> Iterator[Token]:
    """Every token of a page, those within a line included."""
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        yield token
        yield from token.children or ()


def links(page: Path) -> list[str]:
    """The relative targets of a page's links and pictures."""
    found = [str(t.attrs.get("href") or t.attrs.get("src") or "") for t in tokens(page)]
    return [unquote(target) for target in found if target and "://" not in target]


def code(page: Path) -> list[str]:
    """What a page shows as code, in a line or in a block of its own."""
    return [t.content for t in tokens(page) if t.type in ("code_inline", "fence")]


def test_the_site_is_published_by_pinned_actions_with_few_permissions() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "site.yml").read_text())
    build, deploy = workflow["jobs"]["build"], workflow["jobs"]["deploy"]
    assert workflow["permissions"] == {}
    assert build["permissions"] == {"contents": "read"}
    assert deploy["permissions"] == {"pages": "write", "id-token": "write"}
    steps = [*build["steps"], *deploy["steps"]]
    for action in (step["uses"] for step in steps if "uses" in step):
        assert re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", action), action
    (command,) = (step["run"] for step in steps if "run" in step)
    (uploaded,) = (step["with"]["path"] for step in steps if "upload" in step.get("uses", ""))
    assert command == f"make site OUT={uploaded}"


def test_the_readme_is_one_page_and_its_picture_is_small() -> None:
    assert len((ROOT / "README.md").read_bytes()) < README_BYTES
    assert (ROOT / "docs" / "report.png").stat().st_size < PICTURE_BYTES


def test_the_readme_stays_one_page_whatever_is_found() -> None:
    """It is as long as with the longest headlines that there are."""
    before, _, rest = (ROOT / "README.md").read_text().partition("<!-- findings")
    found, _, after = rest.partition("<!-- /findings -->")
    lines = found.splitlines()[1:]
    around = "\n".join([before, *(line for line in lines if not line.startswith("- ")), after])
    shown = [h for h in (parts_of(name).headline for name in LABS) if h and h.on_front_page]
    words = sorted(len((h.done + h.figure).encode()) for h in shown)[-MOST_HEADLINES:]
    most = sum(words) + MOST_HEADLINES * A_FINDING
    assert len(around.encode()) + most < README_BYTES
    for line in (line for line in lines if line.startswith("- ")):
        (headline,) = (h for h in shown if f"[{h.done}]" in line)
        assert len(line.encode()) - len((headline.done + headline.figure).encode()) < A_FINDING


def test_the_pages_stay_short() -> None:
    """Their words are counted as `wc -w` does, with what draws the tables."""
    pages = [page for page in PAGES if page.parent == INDEX.parent and page != QUESTIONS]
    assert sum(len(page.read_text().split()) for page in pages) <= DOCS_WORDS
    said = [t.content for page in pages for t in tokens(page) if t.type == "inline"]
    assert [text for text in said if len(re.sub(r"\]\([^)]*\)", "]", text)) > PARAGRAPH] == []


def test_the_index_and_every_page_link_to_each_other() -> None:
    pages = [page for page in PAGES if page.parent == INDEX.parent and page != INDEX]
    assert not {page.name for page in pages} - set(links(INDEX))
    for page in pages:
        assert INDEX.name in links(page), page.name


@each_page
def test_what_a_page_calls_exists(page: Path) -> None:
    """Targets of make, the settings behind them, and commands of `labs`."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    targets = TARGETS | {f"lab-{name}" for name in (*LABS, "<name>")}
    for text in code(page):
        for target in re.findall(r"\bmake ([a-z][\w<>-]*)", text):
            assert target in targets, text
        for setting in re.findall(r"(?<![\w.])([A-Z][A-Z_]+)=", text):
            assert setting in (*SETTINGS, *SECRETS, *map("LABS_{}".format, SETTINGS)), text
        for command in re.findall(r"(?:^|bin/)labs ([a-z][\w-]*)", text):
            assert command in commands, text
