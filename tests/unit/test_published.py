"""What others published stands in the report beside ours, under the parts of labs it is about."""

from __future__ import annotations

from pathlib import Path

import pytest

from labs import LABS
from labs.harness.derived import lab_modules
from labs.harness.derived.lab_modules import ReportParts, parts_of
from labs.harness.derived.published import Published
from labs.harness.reports import report
from labs.harness.storage.writing import write_json
from tests.unit.builders import write_run
from tests.unit.judged import page_says

THEIRS = Published(figure="9x", setting="an abacus of oak", source="Al-Khwarizmi, 820")


@pytest.mark.parametrize("lab", LABS)
def test_each_entry_is_about_a_part_of_a_lab(lab: str) -> None:
    asked = LABS[lab].at("gpu-80", quick=False)
    for part, entries in parts_of(lab).published.items():
        known = [p if isinstance(p, str) else p.name for p in getattr(asked, part)]
        assert set(entries) <= set(known)


@pytest.mark.parametrize("lab", LABS)
def test_a_headline_is_about_a_claim_of_its_lab(lab: str) -> None:
    headline = parts_of(lab).headline
    assert headline is None or headline.claim in {claim.name for claim in LABS[lab].claims}


def test_a_report_shows_theirs_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path)
    theirs = ReportParts(
        published={"claims": {"faster": [THEIRS]}, "findings": {"quality": [THEIRS]}}
    )
    monkeypatch.setattr(lab_modules, "parts_of", lambda lab: theirs)
    page_says(monkeypatch, "## Findings\n\n### quality: Quality\n\nIt is good.\n")
    run = folder.run()
    write_json(
        folder.path / "run.json",
        run.model_copy(update={"lab": {**run.lab, "findings": ["quality"]}}),
    )
    text = report.write(folder).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| On is faster (")]
    assert len(rows) == 2
    assert text.count(f"9x, {THEIRS.setting} ({THEIRS.source})") == 2  # of the claim, the finding
