"""Every word of a report: `make words LAB=..` writes it anew and shows the difference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import annotated_report
from labs import LABS
from labs.harness.reports import markdown, pages, report
from labs.harness.storage import results
from labs.harness.storage.results import RunFolder
from tests.committed import in_git


@pytest.mark.parametrize("lab", LABS)
def test_the_newest_run_of_a_lab_is_told_as_its_report_on_file_tells_it(
    committed: Path, lab: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", committed / "results")
    folder = RunFolder(committed / "results" / in_git.newest(lab))
    told = report.document(report.Facts.of(folder), report.draw(folder, save=False))
    assert markdown.document(told) == (folder.path / "report.md").read_text()
    before, _, folded = told.partition("<details>")
    shown = re.sub(r"!\[.*?\]\(.*?\)", "", before)  # a picture is seen
    assert len(shown.split()) <= 400
    assert "## Validity" in shown
    assert folded


def test_the_readmes_picture_shows_its_report_as_it_is(
    committed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", committed / "results")
    run, shows = annotated_report.drawn()
    assert shows == annotated_report.digest(pages.page(RunFolder(committed / run)))
