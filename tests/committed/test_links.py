"""Every link of README and docs/ leads somewhere, those into the published results too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serving.models.catalog import ROOT
from tests.makefile import NOTEBOOK, PAGES
from tests.unit.test_docs import links


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOK], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_link_leads_to_what_is_there(page: Path, committed: Path) -> None:
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if path.is_relative_to(ROOT / "results"):
            path = committed / path.relative_to(ROOT)
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
