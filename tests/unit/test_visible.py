"""What is never shown: in no file of a report, no page, no picture and on no terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from rich.markup import escape

from labs.harness.comparison import side_by_side
from labs.harness.comparison.compare import compare_named
from labs.harness.derived.summarize import summarise
from labs.harness.reports import markdown, pages, report, terminal
from labs.harness.reports.document import Link, bullets, section, table
from labs.harness.reports.markdown import code
from labs.harness.spec.visible import LEFT_OUT, visible, visible_data
from labs.harness.storage.results import RunFolder
from labs.harness.storage.writing import write_json
from loadtests import records
from tests.unit.builders import make_claim, make_record, write_run
from tests.unit.hostile import HIDDEN

OUTSIDE = f"out{HIDDEN}side"
ESCAPED = re.compile(r"\\u([0-9a-f]{4})|%([0-9A-F]{2})|&#x?([0-9a-f]+);")


def hidden_in(written: str) -> set[str]:
    """Which of them a text holds, as they are or escaped for JSON, an address or HTML."""
    text = written.replace(get_plotlyjs(), "")
    codes = {int(j or a or h, 16) for j, a, h in ESCAPED.findall(text)} - {0x3C, 0x3E, 0x26, 0x27}
    return set(HIDDEN) & {*text, *map(chr, codes)}


def test_nothing_else_is_left_out() -> None:
    assert visible(OUTSIDE) == "outside"
    assert set(map(chr, LEFT_OUT)) == set(HIDDEN)
    assert visible_data({OUTSIDE: [(OUTSIDE, 1, None)]}) == {"outside": [["outside", 1, None]]}


def strange_run(results: Path) -> RunFolder:
    """Whatever a run may hold as text from outside has them."""
    folder = write_run(results, claims=(make_claim(title=OUTSIDE),), title="Tiny")
    run = folder.run()
    changed: dict[str, Any] = {
        "model": OUTSIDE,
        "lab": {**run.lab, "title": OUTSIDE, "question": OUTSIDE},
        "changes": {"title": OUTSIDE},
        "argv": {name: ["--flag", OUTSIDE] for name in run.argv},
        "endpoint": OUTSIDE,
    }
    write_json(folder.path / "run.json", run.model_copy(update=changed))
    point = run.points()[0]
    broken = [make_record([(11.0, 1), (12.0, 3)]), make_record([], error=OUTSIDE, index=1)]
    records.write(folder.trial_folder(point, 1) / "requests.jsonl.gz", broken)
    summarise(folder)
    return folder


@pytest.mark.filterwarnings("ignore:Glyph")
def test_no_file_of_a_run_shows_them(tmp_path: Path) -> None:
    folder = strange_run(tmp_path)
    figures = report.draw(folder)
    assert figures
    report.write(folder, figures)
    pages.write(folder, figures)
    names = ("report.md", "report.html", "effects.svg")
    written = {name: (folder.path / name).read_text() for name in names}
    assert not {name: found for name, text in written.items() if (found := hidden_in(text))}
    assert all("outside" in written[name] for name in names[:2])
    compared = compare_named(str(folder.path), str(folder.path))
    assert not hidden_in(markdown.document(side_by_side.document(*compared)))


def test_a_mark_that_is_left_out_separates_no_markup() -> None:
    """Without it, `](` would be a link."""
    assert markdown.fragment([section("x", bullets(["[a]\u200e(b)"]))]).endswith(r"\[a\](b)")


@pytest.mark.parametrize("watched", [True, False])
def test_no_terminal_shows_them(watched: bool) -> None:
    file = io.StringIO()
    console = terminal.PlainConsole(file=file, width=80, force_terminal=watched)
    content = section(
        OUTSIDE, bullets([code(OUTSIDE), Link(OUTSIDE, "x")]), table([OUTSIDE], [[OUTSIDE]])
    )
    terminal.show(console, content)
    console.print(f"[bold]{escape(OUTSIDE)}[/]")
    assert not hidden_in(re.sub(r"\x1b\[[\d;]*m", "", file.getvalue()))
    assert file.getvalue().count("outside") == 6
